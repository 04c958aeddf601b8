"""A store's folder that is renamed, removed, replaced or unmounted while it is open: nothing is acknowledged, nothing
is made anew under the old name, and what comes back goes on."""

import gc
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem import Bank, Settings, Store
from raymem.errors import StorageError

Open = Callable[[Path], tuple[Store, Bank]]
SETTINGS = Settings()


def _open(path: Path, tiny: Any) -> tuple[Store, Bank]:
    store = raymem.connect(path, settings=SETTINGS)
    store.put_calibration(tiny.calibration)
    bank = store.create("lab/a", tiny.spec())
    bank.write(tiny.trace(5))
    return store, bank


def _rename(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def _replace(path: Path) -> None:
    _rename(path)
    with raymem.connect(path, settings=SETTINGS):
        pass


def _empty(path: Path) -> None:
    for child in path.iterdir():
        shutil.rmtree(child)


def _refill(path: Path) -> None:
    _empty(path)
    with raymem.connect(path, settings=SETTINGS):
        pass


def _repoint(path: Path) -> None:
    there = path.resolve()
    other = there.with_name("other")
    with raymem.connect(other, settings=SETTINGS):
        pass
    path.unlink()
    path.symlink_to(other)


def _named(verb: str, call: Callable[[], Any]) -> None:
    call()
    pytest.fail(f"{verb} was acknowledged")


def _listing(path: Path) -> list[str] | None:
    return sorted(os.listdir(path)) if path.exists() else None


@pytest.mark.parametrize("happen", [_rename, shutil.rmtree, _replace, _empty, _refill, _repoint])
def test_every_verb_that_writes_is_refused_once_the_folder_is_another(tmp_path: Path, tiny: Any, happen: Any):
    path = tmp_path / "memory"
    if happen is _repoint:
        (tmp_path / "real").mkdir()
        path.symlink_to(tmp_path / "real")
    store, bank = _open(path, tiny)
    happen(path)
    before = _listing(path)
    verbs: dict[str, Callable[[], Any]] = {
        "write": lambda: bank.write(tiny.trace(3, seq=5)),
        "large write": lambda: bank.write(tiny.trace(3000, seq=5)),
        "tag": lambda: bank.tag("now"),
        "create": lambda: store.create("lab/b", tiny.spec()),
        "fork": lambda: store.fork("lab/a", "lab/c"),
        "merge": lambda: store.merge("lab/d", ["lab/a"]),
        "restore": lambda: bank.restore(0),
        "erase": lambda: bank.erase(stream="s"),
        "detach": bank.detach,
        "pin": bank.pin,
        "set_ttl": lambda: bank.set_ttl(9.0),
        "delete": lambda: store.delete("lab/a"),
        "put_calibration": lambda: store.put_calibration(tiny.calibration),
        "sweep": store.sweep,
        "write again": lambda: bank.write(tiny.trace(3, seq=5)),
    }
    for verb, call in verbs.items():
        with pytest.raises(StorageError, match="not the one that was opened"):
            _named(verb, call)
    store.close()
    assert _listing(path) == before


def test_what_comes_back_goes_on(tmp_path: Path, tiny: Any):
    path, away = tmp_path / "memory", tmp_path / "away"
    store, bank = _open(path, tiny)
    for there, back in ((path, away), (away, path)):
        there.rename(back)
        if back == away:
            with pytest.raises(StorageError):
                bank.write(tiny.trace(3, seq=5))
    assert bank.write(tiny.trace(3, seq=5)).end == 8
    store.close()
    with raymem.connect(path, settings=SETTINGS) as again:
        assert again.bank("lab/a").info().rows == 8


def test_a_writer_under_way_leaves_no_folder_behind_and_is_told(tmp_path: Path, tiny: Any):
    """Renamed between two writes or within one: what was acknowledged is in the folder that was opened."""
    path = tmp_path / "memory"
    store, bank = _open(path, tiny)
    acknowledged, refused = [5], []

    def write() -> None:
        seq = 5
        while not refused and seq < 2000:
            try:
                bank.write(tiny.trace(1, seq=seq))
            except StorageError as error:
                refused.append(error)
            else:
                seq += 1
                acknowledged.append(seq)

    writer = threading.Thread(target=write)
    writer.start()
    while len(acknowledged) < 20:
        assert writer.is_alive()
    _rename(path)
    writer.join(timeout=20)
    assert not writer.is_alive()
    assert "not the one that was opened" in str(refused[0])
    store.close()
    assert not path.exists()
    with raymem.connect(tmp_path / "elsewhere", settings=SETTINGS) as moved:
        assert moved.bank("lab/a").info().rows >= acknowledged[-1]


def test_an_unmounted_store_is_refused(tmp_path: Path, tiny: Any):
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    store, bank = _open(path, tiny)
    subprocess.run(["umount", "--lazy", str(path)], check=True)
    for _ in range(2):
        with pytest.raises(StorageError, match="not the one that was opened"):
            bank.write(tiny.trace(3, seq=5))
    store.close()
    assert not list(path.iterdir())


def test_a_closed_store_keeps_no_folder_open(tmp_path: Path, tiny: Any):
    def handles() -> int:
        return sum(str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}") for fd in _handles())

    for index in range(3):
        store, _ = _open(tmp_path / f"memory{index}", tiny)
        assert handles()
        store.close()
        del store, _
    gc.collect()
    assert handles() == 0


def _handles() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
