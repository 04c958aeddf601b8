"""Forks, event loops and the end of a process: what can't go on says so at once, and nothing accepted is lost."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from faultkit import preloaded

import raymem
from raymem import AsyncStore, Settings
from raymem.errors import ConfigError, RaymemError, StoreClosed

SETTINGS = Settings()
HEAD = """
import asyncio, os, sys, threading
import conftest, raymem
from raymem import AsyncStore, Settings, Trace
tiny = conftest.Tiny()
path = sys.argv[1]
def opened():
    store = raymem.connect(path, settings=Settings())
    store.put_calibration(tiny.calibration)
    return store, store.create("lab/a", tiny.spec())
rows = tiny.trace(2000)
def row(seq):
    return Trace(rows.hidden[seq:seq+1], rows.tokens[seq:seq+1], "s", "r", seq, time=1.0)
"""


def _run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return preloaded.run(HEAD + textwrap.dedent(script), str(path))


def _rows(path: Path, name: str = "lab/a") -> int:
    with raymem.connect(path, settings=SETTINGS) as store:
        bank = store.bank(name)
        bank.attach()
        return bank.info().rows


def _in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child, or the error's class and text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said: Any = work()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = [type(error).__name__, str(error)]
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = json.loads(answer.read())
    assert os.waitpid(child, 0)[1] == 0
    return said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(60)
def test_a_forked_child_is_told_and_harms_nothing(tmp_path: Path, tiny: Any, request: pytest.FixtureRequest):
    with raymem.connect(tmp_path / "m", settings=SETTINGS) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec())
        bank.write(tiny.trace(5))
        bank.write(tiny.trace(5, seq=5), durable=False)

        def close() -> str:
            store.close()
            store.__exit__(None, None, None)
            return "closed"

        for work in (lambda: bank.write(tiny.trace(5, seq=10)), lambda: store.banks(), bank.info, store.stats):
            kind, text = _in_fork(work)
            assert kind == "StoreClosed"
            assert f"opened in process {os.getpid()}" in text
            assert "connect again here" in text
        assert _in_fork(close) == "closed"
        # a store of its own is another owner
        assert _in_fork(lambda: _connects(tmp_path / "m")) == ["lab/a"]
        assert bank.write(tiny.trace(5, seq=10)).end == 15
    assert _rows(tmp_path / "m") == 15


def _connects(path: Path) -> list[str]:
    with raymem.connect(path, settings=SETTINGS) as store:
        return [info.name for info in store.banks()]


@pytest.mark.filterwarnings("ignore")
def test_an_async_handle_is_told_as_well(tmp_path: Path, tiny: Any):
    async def parent() -> None:
        store = await AsyncStore.connect(tmp_path / "m", settings=SETTINGS)
        await store.put_calibration(tiny.calibration)
        bank = await store.create("lab/a", tiny.spec())
        for work in (bank.info, store.banks):
            # on the child's own loop, and on the one it inherited
            for run in (_step, lambda coroutine: asyncio.new_event_loop().run_until_complete(coroutine)):
                kind, text = _in_fork(lambda run=run, work=work: run(work()))
                assert kind == "StoreClosed", text
        await bank.write(tiny.trace(3))
        await store.close()

    asyncio.run(parent())
    assert _rows(tmp_path / "m") == 3


def _step(coroutine: Coroutine[Any, Any, Any]) -> None:
    coroutine.send(None)


def test_a_process_of_multiprocessing_flushes_what_it_accepted(tmp_path: Path):
    ran = _run(
        """
        import multiprocessing
        def work():
            store, bank = opened()
            for seq in range(40):
                bank.write(row(seq), durable=False)
        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            child = context.Process(target=work)
            child.start(); child.join()
            sys.exit(child.exitcode)
        """,
        tmp_path / "m",
    )
    assert ran.returncode == 0, ran.stderr
    assert _rows(tmp_path / "m") == 40


ENDS = {
    "end of main": "",
    "sys.exit": "sys.exit(0)",
    "unhandled": "raise SystemError('on purpose')",
}
WRITERS = {
    "daemon": "threading.Thread(target=work, daemon=True)",
    "thread": "threading.Thread(target=work, args=(160,))",
}


@pytest.mark.parametrize(
    ("end", "writer"), [("end of main", "daemon"), ("unhandled", "daemon"), ("sys.exit", "thread")]
)
def test_a_clean_exit_flushes_beside_a_writing_thread(tmp_path: Path, end: str, writer: str):
    ran = _run(
        f"""
        store, bank = opened()
        begun = threading.Event()
        accepted = open(path + ".accepted", "w")
        def work(most=2000):
            for seq in range(most):
                bank.write(row(seq), durable=False)
                accepted.write("x"); accepted.flush()
                if seq == 100:
                    begun.set()
        {WRITERS[writer]}.start()
        begun.wait()
        {ENDS[end]}
        """,
        tmp_path / "m",
    )
    assert ran.returncode == (1 if end == "unhandled" else 0), ran.stderr
    # a daemon thread may be refused at the very end
    assert "cannot schedule" not in ran.stderr
    assert "Event loop" not in ran.stderr
    accepted = (tmp_path / "m.accepted").stat().st_size
    assert accepted >= (160 if writer == "thread" else 100)
    assert _rows(tmp_path / "m") >= accepted


ASYNC = {
    "a loop that ran": "asyncio.run(main())",
    "a loop on a daemon thread": """
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
asyncio.run_coroutine_threadsafe(main(), loop).result()
""",
}


def test_a_thread_that_outlives_the_main_one_is_told_when_it_first_connects(tmp_path: Path):
    # in a process of its own: raymem is imported by then, what opens a store is not
    script = """
import sys, threading, raymem, concurrent.futures.thread
from raymem.errors import StoreClosed
def late():
    threading.main_thread().join()
    try:
        raymem.connect(sys.argv[1])
    except StoreClosed as error:
        print(error)
threading.Thread(target=late).start()
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "m")], capture_output=True, text=True, timeout=60
    )
    assert "is ending" in ran.stdout, ran.stderr


@pytest.mark.parametrize("how", ASYNC)
def test_a_clean_exit_flushes_an_async_store(tmp_path: Path, how: str):
    script = """
async def main():
    store = await AsyncStore.connect(path, settings=Settings())
    await store.put_calibration(tiny.calibration)
    bank = await store.create("lab/a", tiny.spec())
    for seq in range(160):
        await bank.write(row(seq), durable=False)
    # takes longer than the rest of the script
    await bank.write(tiny.trace(1840, seq=160), durable=False)
"""
    ran = _run(script + ASYNC[how], tmp_path / "m")
    assert ran.returncode == 0, ran.stderr
    assert _rows(tmp_path / "m") == 2000


def test_a_store_belongs_to_its_loop_and_says_so(tmp_path: Path, tiny: Any):
    async def first() -> tuple[AsyncStore, raymem.client.store.AsyncBank]:
        store = await AsyncStore.connect(tmp_path / "m", settings=SETTINGS)
        await store.put_calibration(tiny.calibration)
        bank = await store.create("lab/a", tiny.spec())
        await bank.write(tiny.trace(5), durable=False)
        return store, bank

    async def second() -> None:
        with pytest.raises(StoreClosed, match="event loop that is closed"):
            await bank.write(tiny.trace(5, seq=5))
        with pytest.raises(StoreClosed, match="connect"):
            await store.banks()
        # it can be closed from anywhere: what was accepted is written, and the bank is let go
        await store.close()
        await store.close()
        with pytest.raises(ConfigError, match="closed"):
            await store.banks()

    store, bank = asyncio.run(first())
    asyncio.run(second())
    assert _rows(tmp_path / "m") == 5


def test_a_call_under_way_when_the_store_is_closed_ends_with_an_error_of_raymem(tmp_path: Path, tiny: Any):
    from concurrent.futures import ThreadPoolExecutor

    store = raymem.connect(tmp_path / "m", settings=SETTINGS)
    store.put_calibration(tiny.calibration)
    bank = store.create("lab/a", tiny.spec())

    def work(index: int) -> Any:
        seq = 0
        while True:
            try:
                bank.write(tiny.trace(2, run=f"r{index}", seq=seq))
                bank.read(tiny.trace(3).hidden)
            except RaymemError as error:
                return error
            seq += 2

    with ThreadPoolExecutor(8) as pool:
        outcomes = [pool.submit(work, index) for index in range(8)]
        while bank.info().rows < 40:
            pass
        store.close()
        errors = [outcome.result(timeout=30) for outcome in outcomes]
    assert all(isinstance(error, RaymemError) for error in errors)
    assert any(isinstance(error, StoreClosed) for error in errors)


def test_the_blocking_face_works_inside_a_running_loop(tmp_path: Path, tiny: Any):
    async def main() -> int:
        with raymem.connect(tmp_path / "m", settings=SETTINGS) as store:
            store.put_calibration(tiny.calibration)
            bank = store.create("lab/a", tiny.spec())
            return bank.write(tiny.trace(5)).end + (await asyncio.to_thread(bank.info)).rows

    assert asyncio.run(main()) == 10
    assert multiprocessing.current_process().name == "MainProcess"
