"""The sink that writes to a store: banks are opened beside each other, each once."""

import asyncio

import pytest

from raymem.client.store import AsyncBank, AsyncStore
from raymem.errors import BankNotFound, FingerprintMismatch
from raymem.serving.vllm import sink as sinks
from raymem.serving.vllm.params import ConnectorConfig
from raymem.serving.vllm.sink import StoreSink


@pytest.fixture
async def opened(tmp_path, tiny):
    """A sink over a store with three banks, and how often each bank was opened."""
    uri = str(tmp_path / "memory")
    store = await AsyncStore.connect(uri)
    await store.put_calibration(tiny.calibration)
    for name in ("lab/a", "lab/b", "lab/slow"):
        await store.create(name, tiny.spec())
    await store.close()
    asked = []
    sink = StoreSink(ConnectorConfig(store=uri), asked.append, lambda: tiny.fingerprint)
    yield sink, asked
    await sink.close()


async def test_a_bank_that_is_slow_to_open_does_not_hold_up_the_others(opened, tiny, monkeypatch):
    sink, asked = opened
    await sink.write("lab/a", tiny.trace(2))
    gate, info = asyncio.Event(), AsyncBank.info

    async def slow(bank):
        if bank.name == "lab/slow":
            await gate.wait()
        return await info(bank)

    monkeypatch.setattr(AsyncBank, "info", slow)
    stuck = [asyncio.create_task(sink.write("lab/slow", tiny.trace(2, run=f"r{i}"))) for i in range(3)]
    await asyncio.wait_for(sink.write("lab/b", tiny.trace(2)), 10)
    assert not any(task.done() for task in stuck)
    gate.set()
    await asyncio.gather(*stuck)
    # three writes waited for one opening
    assert len(asked) == 3


async def test_a_bank_that_could_not_be_opened_is_tried_again(opened, tiny, monkeypatch):
    sink, asked = opened
    for _ in range(2):
        with pytest.raises(BankNotFound):
            await sink.write("lab/none", tiny.trace(2))
    assert not asked

    def refuse(_fingerprint):
        raise FingerprintMismatch("another model")

    monkeypatch.setattr(sink, "_require", refuse)
    with pytest.raises(FingerprintMismatch):
        await sink.write("lab/a", tiny.trace(2))
    assert sink._banks == {}
    monkeypatch.setattr(sink, "_require", asked.append)
    await sink.write("lab/a", tiny.trace(2))
    assert len(asked) == 1


async def test_no_more_banks_are_kept_open_than_a_bound_and_the_latest_used_stay(opened, tiny, monkeypatch):
    sink, asked = opened
    monkeypatch.setattr(sinks, "_MOST_BANKS", 2)
    for seq, name in enumerate(("lab/a", "lab/b", "lab/a", "lab/slow", "lab/a", "lab/b")):
        await sink.write(name, tiny.trace(1, run=f"r{seq}"))
    assert list(sink._banks) == ["lab/a", "lab/b"]
    # b was let go and opened again
    assert len(asked) == 4


async def test_each_write_says_what_made_it(opened, tiny, monkeypatch):
    sink, _ = opened
    await sink.write("lab/a", tiny.trace(2))
    # the bank was deleted and made again for another layer: the handle that is kept doesn't know
    monkeypatch.setattr(sink, "_made_by", lambda: tiny.fingerprint.model_copy(update={"layers": (1, 5)}))
    with pytest.raises(FingerprintMismatch, match=r"layers: bank has \(3, 5\), got \(1, 5\)"):
        await sink.write("lab/a", tiny.trace(2, run="other"))
