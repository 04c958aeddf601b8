"""An object store as cold store: the same verbs, the same fence, the same faults."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faultkit import made
from faultkit.s3 import s3_server
from faultkit.schedule import PLACES, Schedule

import raymem
from raymem.errors import NotOwner, StorageError
from raymem.rows import JournalRows
from raymem.storage.store import ColdStore

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


def test_a_bank_in_a_bucket_lives_sleeps_travels_and_is_found_by_the_next_process(bucket: str, tmp_path: Path):
    uri = f"{bucket}/life"
    made.open_cold(uri)
    with raymem.connect(uri) as store:
        bank = store.create("lab/a", made.spec())
        for seq in range(0, 50, 10):
            assert bank.write(made.trace("s", "r", seq, 10)).durable
        digest = bank.digest()
        bank.detach()
        bank.attach()
        assert bank.digest() == digest
        bank.export(tmp_path / "a.raymem")
        copy = store.import_(tmp_path / "a.raymem", "lab/b")
        copy.attach()
        assert copy.digest() == digest
        store.delete("lab/b")
    with raymem.connect(uri) as later:
        assert later.bank("lab/a").digest() == digest
        assert later.bank("lab/a").write(made.trace("s", "r", 40, 20)).duplicates == 10
        assert [info.name for info in later.banks()] == ["lab/a"]


def test_owners_of_a_bank_in_a_bucket_are_fenced_and_one_of_several_wins(bucket: str):
    uri = f"{bucket}/fence"
    cold = made.open_cold(uri)
    first = cold.catalog.claim("lab/a", "first", cold.catalog.create("lab/a", made.spec()).epoch)
    old = cold.journal(first)
    old.append(JournalRows.of(made.trace("s", "r", 0, 3), 0, first.epoch))
    second = cold.catalog.claim("lab/a", "second", first.epoch)
    new = cold.journal(second)
    new.fence()
    with pytest.raises(NotOwner):
        old.append(JournalRows.of(made.trace("s", "r", 3, 3), 3, first.epoch))
    new.append(JournalRows.of(made.trace("s", "r", 3, 4), 3, second.epoch))
    assert new.end() == 7

    def claim(owner: str) -> list[int]:
        catalog, won = ColdStore.open(uri).catalog, []
        for epoch in range(second.epoch, second.epoch + 4):
            try:
                catalog.claim("lab/a", owner, epoch)
                won.append(epoch)
            except NotOwner:
                pass
        return won

    with ThreadPoolExecutor(4) as pool:
        won = [epoch for epochs in pool.map(claim, "abcd") for epoch in epochs]
    assert len(won) == len(set(won)) > 0


def test_a_bucket_that_is_not_there_is_said(bucket: str):
    with pytest.raises(StorageError, match="open the cold store"):
        ColdStore.open("s3://no-such-bucket/memory")


def test_no_fault_over_a_bucket_loses_or_doubles_a_row(bucket: str, tmp_path: Path):
    schedule = Schedule(f"{bucket}/faults", tmp_path / "scratch", seed=6)
    # a bucket has no folder to sync
    outcome = asyncio.run(schedule.run(3, places=[place for place in PLACES if place["op"] != "sync"]))
    print(outcome)
    outcome.verdict.require()
    assert outcome.verdict.acknowledged > 50
