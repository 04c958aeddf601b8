import os

import pytest
import torch

from raymem import Trace, connect
from raymem.cli.bank import parse_key, parse_option


def test_a_bank_lives_its_whole_life_on_the_command_line(raymem, alice, tmp_path):
    assert raymem("bank", "show", alice, "--json").json["rows"] == 10
    assert raymem("bank", "tag", alice, "first", "--json").json == {"bank": alice, "tags": {"first": 10}}
    assert raymem("bank", "detach", alice, "--json").json["state"] == "cold"
    assert raymem("bank", "attach", alice, "--json").json["state"] == "hot"
    assert raymem("bank", "pin", alice, "--json").json["pinned"] is True
    assert raymem("bank", "unpin", alice, "--json").json["pinned"] is False
    assert raymem("bank", "migrate", alice, "--to", "local", "--json").json["rows"] == 0

    file = tmp_path / "alice.raymem"
    assert raymem("bank", "export", alice, file, "--json").json["bytes"] == file.stat().st_size
    assert raymem("bank", "import", file, "lab/copy", "--json").json["tags"] == {"first": 10}
    assert [bank["name"] for bank in raymem("bank", "ls", "--json").json] == [alice, "lab/copy"]
    assert raymem("bank", "rm", "lab/copy", "--yes", "--json").json == {"removed": "lab/copy"}
    assert [bank["name"] for bank in raymem("bank", "ls", "lab/", "--json").json] == [alice]


def test_a_banks_past_on_the_command_line(raymem, alice):
    raymem("bank", "tag", alice, "ten")
    assert raymem("bank", "tags", alice, "--json").json == {"bank": alice, "tags": {"ten": 10}}
    assert raymem("bank", "fork", alice, "lab/bob", "--at", "ten", "--json").json["rows"] == 10
    assert raymem("bank", "fork", alice, "lab/carol", "--pos", 4, "--json").json["rows"] == 4
    refused = raymem("bank", "rm", alice, "--yes")
    assert refused.code != 0
    assert "lab/bob, lab/carol" in refused.err
    assert raymem("bank", "materialise", "lab/bob", "--json").json["rows"] == 10
    assert raymem("bank", "restore", "lab/bob", "--pos", 7, "--json").json["undone"] == 3
    assert "already" in raymem("bank", "restore", alice, "ten").out
    assert raymem("bank", "restore", alice).code != 0
    merged = raymem("bank", "merge", "lab/all", alice, "lab/carol", "--json").json
    assert (merged["rows"], merged["streams"]) == (14, {alice: f"{alice.split('/')[1]}/", "lab/carol": "carol/"})
    assert raymem("bank", "untag", alice, "ten", "--json").json == {"bank": alice, "tags": {}}
    assert raymem("bank", "rm", alice, "--yes", "--materialise", "--json").json == {"removed": alice}


def test_a_bank_in_partitions_on_the_command_line(raymem, alice, model, tmp_path):
    made = raymem(
        *("bank", "create", "lab/many", "--model", model, "--layers", "3,5", "--key-layers", "5", "--partitions", 2),
        "--json",
    ).json
    assert [part["rows"] for part in made["partitions"]] == [0, 0]
    with connect(os.environ["RAYMEM_STORE"]) as opened:
        for stream in ("a", "b", "c", "d"):
            opened.bank("lab/many").write(
                Trace((torch.randn(10, 2, 24) + 0.5).bfloat16(), torch.arange(10), stream, "r")
            )

    assert "has 2 partitions" in raymem("bank", "grow", "lab/many", "--partitions", 1).err
    assert len(raymem("bank", "grow", "lab/many", "--partitions", 4, "--json").json["partitions"]) == 4
    moved = raymem("bank", "rebalance", "lab/many", "--json").json
    assert (moved["streams"], moved["rows"], moved["failed"]) == (2, 20, {})
    assert "0 streams moved" in raymem("bank", "rebalance", "lab/many").out
    assert "partition 3" in raymem("bank", "show", "lab/many").out
    assert [part["rows"] for part in raymem("bank", "show", "lab/many", "--json").json["partitions"]] == [10] * 4
    status = raymem("status", "--json").json
    assert [(bank["name"], bank["rows"]) for bank in status["banks"]] == [(alice, 10), ("lab/many", 40)]
    assert raymem("bank", "migrate", "lab/many", "--partition", 3, "--to", "local", "--json").json["rows"] == 0
    # positions: what moved has left its own behind
    assert raymem("bank", "tag", "lab/many", "all", "--json").json["tags"] == {"all": 60}
    assert raymem("bank", "ttl", "lab/many", 3600, "--json").json["ttl_s"] == 3600
    assert raymem("bank", "erase", "lab/many", "--stream", "b", "--yes", "--json").json["rows"] == 10
    # of the streams that moved too
    assert [receipt["rows"] for receipt in raymem("bank", "receipts", "lab/many", "--json").json] == [10] * 3
    assert raymem("bank", "fork", "lab/many", "lab/fork", "--at", "all", "--json").json["rows"] == 30
    assert "name a tag" in raymem("bank", "fork", "lab/many", "lab/none", "--pos", 3).err
    assert raymem("bank", "materialise", "lab/fork", "--json").json["rows"] == 30
    assert "is at position 60 already" in raymem("bank", "restore", "lab/fork", "all").out
    assert raymem("bank", "merge", "lab/all", "lab/fork", alice, "--json").json["rows"] == 40
    file = tmp_path / "many.raymem"
    assert raymem("bank", "export", "lab/many", file, "--json").json["bytes"] == file.stat().st_size
    assert raymem("bank", "import", file, "lab/whole", "--json").json["rows"] == 30
    assert raymem("bank", "rm", "lab/many", "--yes", "--json").json == {"removed": "lab/many"}
    assert len(raymem("bank", "receipts", "lab/many", "--json").json) == 3
    for refused in (["grow", alice, "--partitions", 2], ["rebalance", alice]):
        assert "not partitioned" in raymem("bank", *refused).err


@pytest.mark.parametrize("verb", ["ls", "show", "detach", "attach"])
def test_people_get_tables_and_sentences(raymem, alice, verb):
    said = raymem("bank", verb, *([] if verb == "ls" else [alice]))
    assert said.code == 0
    assert alice in said.out


def test_create_takes_everything_a_spec_has(raymem, store, model):
    made = raymem(
        *("bank", "create", "lab/bob", "--kind", "titans", "--model", model, "--layers", "3,5"),
        *("--key", "window:6", "--key-layers", "3", "--option", "chunk=16", "--budget-mb", "2", "--json"),
    )
    spec = made.json["spec"]
    assert (spec["kind"], spec["options"], spec["budget_bytes"]) == ("titans", {"chunk": 16}, 2 * 2**20)
    assert spec["key"] == {"function": "window", "layers": [3], "window": 6}
    assert (spec["fingerprint"]["model"], spec["fingerprint"]["width"]) == ("tiny", 24)
    assert len(spec["fingerprint"]["calibration"]) == 64


REFUSED = [
    (["--layers", "3"], "raymem calibrate"),
    (["--layers", "9"], "layers 1 to 6"),
    (["--layers", "3,5", "--kind", "spolm"], "spolm"),
    (["--layers", "3,5", "--option", "colour=red"], "colour"),
    (["--layers", "3,5", "--key", "windoww:8"], "windoww"),
    (["--layers", "3,5", "--key-layers", "4"], "[4]"),
    (["--layers", "3,5", "--budget-mb", "0"], "budget_bytes"),
    (["--layers", "3,5", "--model", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(
    ("args", "says"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_bank_that_can_not_be_is_refused_in_one_line(raymem, store, model, args, says):
    said = raymem("bank", "create", "lab/new", "--model", model, *args)
    assert said.code == 1
    assert says in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert raymem("bank", "ls", "--json").json == []


@pytest.mark.parametrize("name", ["alice", "a/b/c", "a/b.c", "x" * 10_000 + "/y", "../up"])
def test_a_name_that_is_none_is_refused(raymem, store, model, name):
    said = raymem("bank", "create", name, "--model", model, "--layers", "3,5", "--json")
    assert (said.code, said.json["error"]["code"]) == (1, "invalid_name")
    assert len(said.err) < 400


USAGE = [
    ("bank", "create"),
    ("bank", "create", "lab/x", "--layers", "three"),
    ("bank", "create", "lab/x", "--key", "window:eight"),
    ("bank", "create", "lab/x", "--option", "chunk"),
    ("bank", "import", "no-such-file", "lab/x"),
    ("bank", "paint", "lab/x"),
    ("bank", "ls", "--colour"),
]


@pytest.mark.parametrize("args", USAGE, ids=" ".join)
def test_a_slip_on_the_command_line_ends_with_code_two(raymem, store, model, args):
    said = raymem(*args)
    assert said.code == 2
    assert "Usage: raymem" in said.err
    assert said.out == ""


def test_rm_asks_first(raymem, alice, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert raymem("bank", "rm", alice).code == 1
    assert raymem("bank", "show", alice, "--json").json["name"] == alice


def test_a_bank_that_is_not_there_is_named(raymem, store):
    said = raymem("bank", "show", "lab/nobody", "--json")
    assert (said.code, said.json["error"]["code"]) == (1, "bank_not_found")
    assert "lab/nobody" in said.err


def test_a_folder_that_is_no_store_is_not_made_by_looking(raymem, tmp_path):
    said = raymem("bank", "ls", "--store", tmp_path / "typo")
    assert said.code == 1
    assert "--store" in said.err
    assert not (tmp_path / "typo").exists()


def test_key_functions_and_options_are_read_as_written():
    assert parse_key("single", None) == {"function": "single", "layers": ()}
    assert parse_key("span:16", "1,2") == {"function": "span", "layers": (1, 2), "window": 16}
    assert parse_option("chunk=16") == ("chunk", 16)
    assert parse_option("eviction=fifo") == ("eviction", "fifo")
    assert parse_option("whiten=true") == ("whiten", True)
    assert parse_option("expression=a=b") == ("expression", "a=b")
