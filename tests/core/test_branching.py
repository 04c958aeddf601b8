"""The past of partitioned banks in one process: tags, forks, going back, merges, and what comes between."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

from raymem.config import ColdSettings, Settings
from raymem.errors import BankExists, Conflict, InvalidInput, Partitioned, RaymemError, StorageError, TagNotFound
from raymem.storage.history import require_no_past
from raymem.storage.partitions import Place
from raymem.storage.store import ColdStore


@pytest.fixture
def settings() -> Settings:
    return Settings(cold=ColdSettings(sync="none"))


@pytest.fixture
def bank(store, tiny):
    """Three partitions with two streams each, of 17 rows and more."""
    made = store.create("lab/many", tiny.spec(), partitions=3)
    for number in range(6):
        made.write(tiny.trace(17 + number, stream=f"s{number}", seed=number))
    return made


def inner(store):
    return store._async.backend


def rows_of(store, name: str) -> Counter:
    """How often each row is in the journals of a bank."""
    cold, found = inner(store).cold, Counter()
    for part in store.bank(name).info().partitions or [store.bank(name).info()]:
        for rows in cold.journal(cold.catalog.get(part.name)).scan():
            found.update(zip(rows.streams, rows.runs, rows.seq_T.tolist(), strict=True))
    return found


def assert_alike(got, expected) -> None:
    assert torch.equal(got.scores_Qk, expected.scores_Qk)
    assert torch.equal(got.tokens_Qk, expected.tokens_Qk)
    rows = [[(row.stream, row.run, row.seq, row.partition) for row in each.rows(2)] for each in (got, expected)]
    assert rows[0] == rows[1]


def test_a_fork_begins_with_the_same_rows_and_goes_its_own_way(store, bank, tiny):
    queries = tiny.trace(5, seed=3).hidden
    before = bank.read(queries, 9)
    bank.tag("then")
    bank.grow(4)
    bank.write(tiny.trace(40, stream="s3", seed=3))
    bank.write(tiny.trace(9, stream="late", seed=9))

    then, now = store.fork("lab/many", "lab/then", "then"), store.fork("lab/many", "lab/now")

    assert_alike(then.read(queries, 9), before)
    assert_alike(now.read(queries, 9), bank.read(queries, 9))
    assert (then.info().rows, now.info().rows, bank.info().rows) == (117, 146, 146)
    assert (then.tags(), [info.name for info in store.banks()]) == ({"then": 117}, ["lab/many", "lab/now", "lab/then"])
    # streams live where they did
    assert then.write(tiny.trace(30, stream="s3", seed=3)).duplicates == 20
    assert then.write(tiny.trace(9, stream="other", seed=8)).rows == 9
    assert (then.info().rows, bank.info().rows) == (136, 146)
    with pytest.raises(Conflict, match="forks lab/now, lab/then,"):
        store.delete("lab/many")
    store.delete("lab/many", materialise=True)
    assert_alike(now.read(queries, 9, as_of="then"), before)
    assert rows_of(store, "lab/then").total() == 136


def test_a_place_that_no_fork_can_begin_at_is_refused(store, bank):
    for refused, why in (
        (lambda: store.fork("lab/many", "lab/fork", 5), InvalidInput),
        (lambda: store.fork("lab/many", "lab/fork", "never"), TagNotFound),
        (lambda: store.fork("lab/many", "lab/many"), BankExists),
        (lambda: bank.restore(5), InvalidInput),
        (lambda: bank.restore("never"), TagNotFound),
    ):
        with pytest.raises(why):
            refused()
    assert bank.info().state == "hot"
    assert len(inner(store).cold.partitions._table.rows()) == 7


def test_a_fork_has_rows_of_its_own_before_its_streams_move(store, bank, tiny):
    fork = store.fork("lab/many", "lab/fork")
    fork.grow(6)
    with pytest.raises(Conflict, match="materialise"):
        fork.rebalance()
    rows = rows_of(store, "lab/fork")

    assert fork.materialise().rows == 117
    assert fork.rebalance().streams == 3

    assert rows_of(store, "lab/fork") == rows == rows_of(store, "lab/many")
    store.delete("lab/many")
    assert fork.info().rows == 117


def test_what_is_erased_in_a_bank_goes_from_its_forks(store, bank):
    store.fork("lab/many", "lab/fork")

    assert bank.erase(stream="s4").rows == 21

    assert not any(stream == "s4" for stream, _, _ in rows_of(store, "lab/fork"))
    assert rows_of(store, "lab/fork") == rows_of(store, "lab/many")


def test_a_bank_goes_back_to_a_tag_and_keeps_what_came_after(store, bank, tiny):
    queries = tiny.trace(5, seed=3).hidden
    before = bank.read(queries, 9)
    bank.tag("then")
    bank.write(tiny.trace(40, stream="s3", seed=3))
    # goes with what came after the first
    bank.tag("later")
    late = bank.read(queries, 9)

    report = bank.restore("then")

    assert (report.pos, report.undone, report.kept_as) == (117, 20, "lab/many-before-restore")
    assert bank.restore("then").kept_as is None
    assert bank.tags() == {"then": 117}
    assert_alike(bank.read(queries, 9), before)
    kept = store.bank(report.kept_as)
    assert (kept.info().state, kept.tags()) == ("cold", {"then": 117, "later": 137})
    kept.attach()
    assert_alike(kept.read(queries, 9), late)
    # streams live where they did, in both
    for each, there in ((bank, 20), (kept, 40)):
        assert each.write(tiny.trace(50, stream="s3", seed=3)).duplicates == there
    with pytest.raises(Conflict, match="forks lab/many,"):
        store.delete(report.kept_as)
    bank.materialise()
    store.delete(report.kept_as)
    assert bank.info().rows == 147


class Stop(Exception):
    """The end of a process: nothing that raymem catches."""


@pytest.mark.parametrize("verb", ["fork", "restore", "merge"])
def test_whatever_is_cut_short_changes_nothing_and_can_be_done_again(store, bank, tiny, monkeypatch, verb):
    bank.tag("then")
    bank.write(tiny.trace(40, stream="s3", seed=3))
    queries = tiny.trace(5, seed=3).hidden
    before, cold = bank.read(queries, 9), inner(store).cold
    steps = ((cold.partitions, "lay_out" if verb == "merge" else "copy"), (cold.catalog, "together"))
    verbs = {
        "fork": lambda: store.fork("lab/many", "lab/new", "then"),
        "restore": lambda: bank.restore("then"),
        "merge": lambda: store.merge("lab/new", ["lab/many"]),
    }
    for (at, name), error in product(steps, (Stop, StorageError)):

        def cut(*args, error=error, **more):
            raise error("no more")

        with monkeypatch.context() as patch:
            patch.setattr(at, name, cut)
            with pytest.raises(error):
                verbs[verb]()

        assert [info.name for info in store.banks()] == ["lab/many"], (name, error)
        assert_alike(bank.read(queries, 9), before)
    verbs[verb]()
    assert len(store.banks()) == 2


def test_a_stream_that_moves_between_two_looks_is_seen_by_whoever_looks_last(store, bank, monkeypatch):
    backend, partitions = inner(store), inner(store).cold.partitions
    home = partitions.find(partitions.get("lab/many").id, "s1").home
    bank.grow(4)
    layout, tried = partitions.get("lab/many"), []
    ask = backend.ask

    async def meanwhile(name, what, *args):
        if what != "pull":
            return await ask(name, what, *args)
        # the stream is on its way: nobody may keep a past of where it was
        for verb in (
            lambda: store._async.backend.fork("lab/many", "lab/fork", None),
            lambda: store._async.backend.tag("lab/many", "now"),
            lambda: store._async.backend.merge("lab/all", ["lab/many"], False, True),
        ):
            try:
                await verb()
            except RaymemError as error:
                tried.append(type(error))
        return await ask(name, what, *args)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "ask", meanwhile)
        assert bank.rebalance().failed == {}
    assert set(tried) == {Conflict}
    assert [info.name for info in store.banks()] == ["lab/many"]
    assert bank.tags() == {}

    # and the other way round: a past that came after the first look
    partitions.change(layout, "s1", place := partitions.find(layout.id, "s1"), Place(place.home, target=home))
    with pytest.raises(Conflict, match="rebalance"):
        store.fork("lab/many", "lab/fork")
    assert bank.rebalance().failed == {}
    store.fork("lab/many", "lab/fork")
    with pytest.raises(Conflict, match="forks lab/fork,"):
        bank.rebalance()


@pytest.mark.parametrize("verb", ["fork", "tag", "merge"])
def test_who_looked_before_a_stream_set_out_looks_again(store, bank, monkeypatch, verb):
    cold, rows, looks = inner(store).cold, rows_of(store, "lab/many"), []
    still = cold.partitions.require_still
    # another process: of one, all take turns at the catalog
    mover = ColdStore.open(cold.uri)

    def set_out(layout):
        still(layout)
        looks.append(layout)
        if len(looks) == 1:
            # all that a mover does before it copies a row
            place = mover.partitions.find(layout.id, "s1")
            mover.partitions.change(layout, "s1", place, Place(place.home, target=(place.home + 1) % 3))
            require_no_past(mover, layout)

    monkeypatch.setattr(cold.partitions, "require_still", set_out)
    verbs = {
        "fork": lambda: store.fork("lab/many", "lab/new"),
        "tag": lambda: bank.tag("now"),
        "merge": lambda: store.merge("lab/new", ["lab/many"]),
    }
    with pytest.raises(Conflict, match="being moved"):
        verbs[verb]()

    assert len(looks) == 1
    assert ([info.name for info in store.banks()], bank.tags()) == (["lab/many"], {})
    assert rows_of(store, "lab/many") == rows


@pytest.mark.slow
def test_forks_and_moves_at_once_lose_and_double_nothing(store, bank, tiny):
    rows, over = rows_of(store, "lab/many"), threading.Event()

    def fork() -> int:
        count = 0
        while not over.is_set():
            try:
                store.fork("lab/many", f"lab/fork{count}")
            except Conflict:
                continue
            assert rows_of(store, f"lab/fork{count}") == rows
            store.delete(f"lab/fork{count}")
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        forking = pool.submit(fork)
        try:
            for count in (4, 5, 6):
                bank.grow(count)
                for _ in range(3):
                    try:
                        bank.rebalance()
                    except Conflict:
                        continue
        finally:
            over.set()
        assert forking.result() > 0

    while (report := bank.rebalance()).failed or report.streams:
        pass
    assert rows_of(store, "lab/many") == rows


def test_a_merge_has_the_rows_of_all_and_a_stream_lives_in_one_place(store, bank, tiny):
    store.create("lab/two", tiny.spec(), partitions=2)
    for number in range(4):
        store.bank("lab/two").write(tiny.trace(11 + number, stream=f"s{number}", seed=20 + number))
    whole = store.create("lab/whole", tiny.spec())
    whole.write(tiny.trace(30, seed=40))
    whole.write(tiny.trace(9, stream="gone", seed=41))
    whole.erase(stream="gone")
    fork = store.fork("lab/many", "lab/fork")
    queries = tiny.trace(5, seed=22).hidden

    report = store.merge("lab/all", ["lab/fork", "lab/two", "lab/whole"])

    assert report.sources == {"lab/fork": 117, "lab/two": 50, "lab/whole": 30}
    assert (report.rows, report.streams["lab/two"], report.rule) == (197, "two/", "exact")
    merged = store.bank("lab/all")
    info = merged.info()
    assert (info.rows, info.state, len(info.partitions)) == (197, "hot", 3)
    assert max(part.rows for part in info.partitions) < 100
    assert info.spec.budget_bytes == 3 * bank.info().spec.budget_bytes
    assert merged.write(tiny.trace(30, stream="two/s2", seed=22)).duplicates == 13
    assert merged.read(queries, 5).rows(2)[0].stream == "two/s2"
    assert merged.tokens("fork/s1", "r", 2, 9).tolist() == fork.tokens("s1", "r", 2, 9).tolist() != []
    # whole journals come together: the same rows as by way of one bank
    names = Counter({(f"many/{stream}", run, seq): n for (stream, run, seq), n in rows_of(store, "lab/many").items()})
    store.merge("lab/one", ["lab/many"])
    assert rows_of(store, "lab/one") == names
    with pytest.raises(Partitioned, match="rename=True"):
        store.merge("lab/none", ["lab/many", "lab/two"], rename=False)
