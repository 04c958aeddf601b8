"""The catalog says the same to everyone, and lets one of several contenders win."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.errors import BankExists, BankNotFound, ConfigError, InvalidName, NotOwner, TagNotFound
from raymem.storage.history import untag
from raymem.storage.store import ColdStore
from raymem.storage.tables.tables import Tables
from raymem.types import BankSpec


def test_a_created_bank_is_found_by_another_handle(store: ColdStore, spec: BankSpec):
    spec = spec.model_copy(update={"options": {"quote": "it's", "n": [1, 2.5, None]}})
    entry = store.catalog.create("lab/a", spec)
    assert (entry.state, entry.epoch, entry.owner, entry.tags) == ("cold", 0, None, {})
    assert ColdStore.open(store.uri).catalog.get("lab/a") == entry


def test_a_name_is_taken_once(store: ColdStore, spec: BankSpec):
    first = store.catalog.create("lab/a", spec)
    with pytest.raises(BankExists, match="lab/a exists"):
        store.catalog.create("lab/a", spec)
    assert store.catalog.list() == [first]


def test_an_unknown_bank_is_answered_with_the_nearest_names(store: ColdStore, spec: BankSpec):
    with pytest.raises(BankNotFound, match="holds no banks"):
        store.catalog.get("lab/alice")
    for name in ("lab/alice", "lab/zebra"):
        store.catalog.create(name, spec)
    with pytest.raises(BankNotFound, match=r"nearest: lab/alice$"):
        store.catalog.get("lab/alcie")
    with pytest.raises(BankNotFound, match="10000 characters"):
        store.catalog.get("x" * 10_000)
    # the row that holds the store's nonce is no bank
    with pytest.raises(BankNotFound):
        store.catalog.get("")


@pytest.mark.parametrize("name", ["", "a", "a/b/c", "../b", "a/b'", "a/" + "b" * 10_000])
def test_an_impossible_name_creates_nothing(store: ColdStore, spec: BankSpec, name: str):
    with pytest.raises(InvalidName):
        store.catalog.create(name, spec)
    assert store.catalog.list() == []


def test_list_gives_every_bank_under_a_prefix_in_order(store: ColdStore, spec: BankSpec):
    # more than the ten that LanceDB gives by itself
    names = [f"lab/b{number:02}" for number in range(13)]
    for name in reversed(names):
        store.catalog.create(name, spec)
    store.catalog.create("labor/x", spec)
    assert [entry.name for entry in store.catalog.list("lab/")] == names
    assert store.catalog.list("lab/%") == []
    assert store.catalog.list("' OR true --") == []


def test_a_claim_moves_the_epoch_and_shuts_out_the_earlier_owner(store: ColdStore, spec: BankSpec):
    store.catalog.create("lab/a", spec)
    first = store.catalog.claim("lab/a", "o'brien", 0)
    assert (first.epoch, first.owner, first.state) == (1, "o'brien", "hot")
    with pytest.raises(NotOwner, match="at epoch 1, owned by o'brien, not at epoch 0"):
        store.catalog.claim("lab/a", "late", 0)
    store.catalog.claim("lab/a", "next", 1)
    with pytest.raises(NotOwner):
        store.catalog.release("lab/a", 1)
    store.catalog.release("lab/a", 2)
    entry = store.catalog.get("lab/a")
    assert (entry.epoch, entry.owner, entry.state) == (2, None, "cold")
    with pytest.raises(BankNotFound):
        store.catalog.claim("lab/b", "o", 0)


def test_tags_are_set_moved_and_forgotten(store: ColdStore, spec: BankSpec):
    store.catalog.create("lab/a", spec)
    store.catalog.tag("lab/a", "before", 5)
    store.catalog.tag("lab/a", "it's", 7)
    store.catalog.tag("lab/a", "before", 6)
    assert store.catalog.tags("lab/a") == {"before": 6, "it's": 7}
    assert untag(store, "lab/a", "before") == {"it's": 7}
    assert store.catalog.tags("lab/a") == {"it's": 7}
    with pytest.raises(TagNotFound, match=r"no tag 'gone'; it has \[\"it's\"\]"):
        untag(store, "lab/a", "gone")
    with pytest.raises(InvalidName):
        store.catalog.tag("lab/a", "a\nb", 1)


def test_a_removed_bank_leaves_nothing_and_its_name_is_free(store: ColdStore, spec: BankSpec):
    first = store.catalog.create("lab/a", spec)
    store.remove("lab/a")
    with pytest.raises(BankNotFound):
        store.remove("lab/a")
    assert not [name for name in os.listdir(store.uri) if first.id in name]
    assert store.catalog.create("lab/a", spec).id != first.id


def test_many_changes_are_compacted_and_all_there(store: ColdStore, spec: BankSpec):
    # a bank's line comes in a fragment of its own; a changed one takes the place of its fragment
    for number in range(40):
        store.catalog.create(f"lab/b{number:02}", spec)
    for epoch in range(20):
        store.catalog.claim("lab/b07", f"o{epoch}", epoch)
    assert store.catalog.get("lab/b07").owner == "o19"
    assert [entry.name for entry in store.catalog.list()] == [f"lab/b{number:02}" for number in range(40)]
    assert store.tables.open("catalog").stats()["fragment_stats"]["num_fragments"] < 30


def test_a_folder_that_lancedb_can_not_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="question mark"):
        ColdStore.open(str(tmp_path / "what?"))
    assert not list(tmp_path.iterdir())


def test_a_store_of_an_earlier_raymem_is_refused_with_the_way_out(store: ColdStore):
    older = store.tables.open("catalog").to_arrow().drop_columns(["log", "base"])
    # past the open store, which would refuse a catalog that isn't its own any more
    tables = Tables(store.uri, None)
    tables.drop("catalog")
    tables.create("catalog", older)
    with pytest.raises(ConfigError, match="no base, log; export its banks with that version"):
        ColdStore.open(store.uri)
    assert tables.open("catalog").to_arrow() == older


def test_sync_is_for_local_paths(store: ColdStore):
    assert store.sync == "disk"
    with pytest.raises(ConfigError, match="s3://bucket/x"):
        ColdStore.open("s3://bucket/x", sync="disk")


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_text_breaks_out_of_a_filter(shared_store: ColdStore, text: str):
    with pytest.raises(BankNotFound):
        shared_store.catalog.get(text + "'")
    assert shared_store.catalog.list(text + "'") == []
    assert shared_store.calibrations.find(text + "'", (1,)) is None


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> ColdStore:
    store = ColdStore.open(str(tmp_path_factory.mktemp("shared")), sync="none")
    store.calibrations.put("h", "c", (1,), b"x")
    return store


def test_of_processes_that_make_a_table_at_once_none_overwrites_what_another_added(tmp_path, worker):
    rounds, uri = 40, tmp_path / "store"
    racers = [worker("share", uri, f"p{number}", rounds) for number in range(3)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
    for _ in range(rounds):
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        assert [racer.stdout.readline() for racer in racers] == ["added\n"] * 3
    tables = Tables(str(uri), "none")
    rows = [sorted(tables.open(f"t{number}").to_arrow()["who"].to_pylist()) for number in range(rounds)]
    assert rows == [["maker", "p0", "p1", "p2"]] * rounds


def test_processes_that_race_agree(tmp_path, worker):
    rounds = 8
    racers = [worker("race", tmp_path / "new" / "store", f"p{number}", rounds) for number in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [json.loads(racer.communicate(timeout=120)[0]) for racer in racers]
    # one store, whoever made it; each bank made once; each epoch won once; no tag lost
    assert len({result["nonce"] for result in results}) == 1
    assert sorted(number for result in results for number in result["created"]) == list(range(rounds))
    assert sorted(number for result in results for number in result["claimed"]) == list(range(rounds))
    entries = ColdStore.open(str(tmp_path / "new" / "store")).catalog.list()
    assert len(entries) == len({entry.id for entry in entries}) == rounds
    assert (entries[0].epoch, len(entries[0].tags)) == (rounds, 3 * rounds)
