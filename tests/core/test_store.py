import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raymem
from raymem import BankSpec, Calibration, Fingerprint, KeySpec, RowRef, Store
from raymem.errors import (
    BankDetached,
    BankExists,
    BankNotFound,
    CalibrationNotFound,
    ConfigError,
    Conflict,
    Corrupt,
    InvalidInput,
    InvalidName,
    InvalidSpec,
    InvalidTrace,
    NonFinite,
    Overloaded,
    RaymemError,
    SequenceConflict,
    TooLarge,
)

KINDS = ["spalm", "titans"]
# the same for every kind
one_kind = pytest.mark.parametrize("bank", ["spalm"], indirect=True)


@pytest.fixture(params=KINDS)
def bank(request: pytest.FixtureRequest, store: Store, spec: BankSpec) -> raymem.Bank:
    return store.create("lab/alice", spec.model_copy(update={"kind": request.param}))


def test_what_is_written_is_found_with_its_provenance(store: Store, spec: BankSpec, make_trace):
    bank = store.create("lab/alice", spec)
    trace = make_trace(20)
    ack = bank.write(trace)
    assert (ack.rows, ack.duplicates, ack.end, ack.durable) == (20, 0, 20, True)
    readout = bank.read(trace.hidden[5:8], k=3, start=5)
    assert readout.tokens_Qk is not None
    assert readout.tokens_Qk[:, 0].tolist() == trace.tokens[6:9].tolist()
    assert readout.rows(0)[0] == RowRef("s", "r", 5, 5)
    assert bool((readout.relevance_Q == 1).all())


def test_an_empty_bank_reads_zeros_with_relevance_zero(bank, make_trace):
    readout = bank.read(make_trace(3).hidden)
    assert readout.relevance_Q.tolist() == [0.0, 0.0, 0.0]
    assert not readout.values_QV.any()


def test_an_empty_write_changes_nothing(bank, make_trace):
    before = bank.digest()
    assert bank.write(make_trace(0)).rows == 0
    assert bank.digest() == before


def test_a_row_alone_waits_for_the_next(store: Store, spec: BankSpec, make_trace):
    bank = store.create("lab/alice", spec)
    for seq in range(4):
        bank.write(make_trace(1, seq=seq))
    whole = store.create("lab/bob", spec)
    whole.write(make_trace(4))
    assert bank.digest() == whole.digest()


def test_the_same_rows_again_are_acknowledged_and_not_applied(bank, make_trace):
    bank.write(make_trace(10))
    before = bank.digest()
    again = bank.write(make_trace(10))
    assert (again.rows, again.duplicates, again.end) == (0, 10, 10)
    assert bank.digest() == before
    overlapping = bank.write(make_trace(8, seq=6))
    assert (overlapping.rows, overlapping.duplicates, overlapping.end) == (4, 4, 14)


def test_other_content_under_the_same_identity_is_a_conflict(bank, make_trace):
    bank.write(make_trace(10))
    before = bank.digest()
    with pytest.raises(SequenceConflict, match=r"row 4 of stream 's' run 'r'.*other content"):
        bank.write(make_trace(3, seq=4, seed=1))
    assert bank.digest() == before


def test_a_gap_is_accepted_and_counted_and_can_not_be_filled_later(bank, make_trace):
    bank.write(make_trace(4))
    assert bank.write(make_trace(4, seq=8)).gaps == 1
    with pytest.raises(SequenceConflict, match=r"row 5 .* must arrive in order"):
        bank.write(make_trace(2, seq=5))


def test_bad_rows_are_refused_and_change_nothing(bank, make_trace):
    bank.write(make_trace(5))
    before = bank.digest()
    good = make_trace(5, run="other")
    for bad, error in (
        (good.hidden[:, :, :-1], InvalidTrace),
        (good.hidden.float(), InvalidTrace),
        (good.hidden * float("nan"), NonFinite),
        (good.hidden / 0, NonFinite),
    ):
        with pytest.raises(error):
            bank.write(raymem.Trace(bad, good.tokens, good.stream, good.run))
        with pytest.raises(error):
            bank.read(bad)
        assert bank.digest() == before
        assert bank.info().rows == 5


def test_detach_frees_and_attach_brings_back_the_same_bytes(bank, make_trace):
    bank.write(make_trace(33))
    before = bank.digest()
    info = bank.detach()
    assert (info.state, info.owner, info.bytes) == ("cold", None, 0)
    for verb in (lambda: bank.write(make_trace(1, seq=33)), lambda: bank.read(make_trace(2).hidden), bank.digest):
        with pytest.raises(BankDetached, match="raymem bank attach lab/alice"):
            verb()
    assert bank.attach().state == "hot"
    assert bank.digest() == before
    assert bank.write(make_trace(5, seq=33)).end == 38


@pytest.mark.parametrize("durable", [True, False])
def test_who_wrote_a_trace_may_change_its_tensors_afterwards(store: Store, spec: BankSpec, make_trace, durable: bool):
    bank = store.create("lab/mine", spec)
    trace = make_trace(9)
    bank.write(trace, durable=durable)
    trace.hidden.neg_()
    trace.tokens.zero_()
    digest = bank.digest()
    assert bank.read(make_trace(9).hidden[3:4], 1).scores_Qk.item() == pytest.approx(1.0, abs=1e-2)
    bank.detach()
    bank.attach()
    assert bank.digest() == digest
    assert bank.write(make_trace(9)).duplicates == 9


def test_a_new_process_finds_the_same_bytes(tmp_path: Path, store: Store, spec: BankSpec, make_trace):
    before = {}
    for kind in KINDS:
        bank = store.create(f"lab/{kind}", spec.model_copy(update={"kind": kind}))
        bank.write(make_trace(21))
        before[bank.name] = bank.digest()
        bank.detach()
    store.close()
    code = (
        "import json, sys, raymem\n"
        "with raymem.connect(sys.argv[1]) as store:\n"
        "    banks = [store.bank(name) for name in sys.argv[2:]]\n"
        "    [bank.attach() for bank in banks]\n"
        "    print(json.dumps({bank.name: bank.digest() for bank in banks}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "memory"), *before]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(found.stdout) == before


def test_closing_keeps_banks_attached_for_the_next_process(tmp_path: Path, store: Store, bank, make_trace):
    bank.write(make_trace(9))
    before = bank.digest()
    store.close()
    with raymem.connect(tmp_path / "memory") as again:
        assert again.bank("lab/alice").digest() == before


def test_two_stores_do_not_share_a_hot_bank(tmp_path: Path, bank, make_trace):
    bank.write(make_trace(3))
    with raymem.connect(tmp_path / "memory") as other, pytest.raises(Conflict, match="is held by process"):
        other.bank("lab/alice").write(make_trace(3, run="other"))


def test_a_dead_process_loses_its_banks_and_no_rows(tmp_path: Path, store: Store, spec: BankSpec, make_trace):
    code = (
        "import os, sys, torch, raymem\n"
        "store = raymem.connect(sys.argv[1])\n"
        "bank = store.bank('lab/alice'); bank.attach()\n"
        "for seq in range(10):\n"
        "    hidden = torch.full((1, 2, 24), seq + 1.0).bfloat16()\n"
        "    ack = bank.write(raymem.Trace(hidden, torch.tensor([seq]), 's', 'r', seq))\n"
        "    print(ack.end, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    bank = store.create("lab/alice", spec)
    bank.detach()
    died = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "memory")], capture_output=True, text=True, timeout=120, check=False
    )
    assert (died.returncode, died.stdout.split()[-1]) == (-9, "10")
    assert bank.attach().rows == 10


def test_export_and_import_carry_the_state(tmp_path: Path, store: Store, bank, make_trace):
    bank.write(make_trace(30))
    assert bank.export(tmp_path / "a.raymem") == (tmp_path / "a.raymem").stat().st_size
    copy = store.import_(tmp_path / "a.raymem", "lab/copy")
    assert copy.info().state == "cold"
    copy.attach()
    assert copy.digest() == bank.digest()
    with pytest.raises(BankExists, match="lab/copy"):
        store.import_(tmp_path / "a.raymem", "lab/copy")


def test_a_damaged_export_leaves_nothing_behind(tmp_path: Path, store: Store, bank, make_trace):
    bank.write(make_trace(30))
    file = tmp_path / "a.raymem"
    bank.export(file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(Corrupt):
        store.import_(file, "lab/copy")
    assert [info.name for info in store.banks()] == ["lab/alice"]


@one_kind
def test_tags_name_positions(bank, make_trace):
    bank.write(make_trace(4))
    bank.tag("before")
    bank.write(make_trace(4, seq=4))
    assert bank.tag("after") == {"before": 4, "after": 8}
    assert bank.info().tags == {"before": 4, "after": 8}


@one_kind
def test_a_move_to_the_only_node_moves_nothing(store: Store, bank):
    assert store.nodes() == ["local"]
    assert bank.migrate("local").rows == 0
    with pytest.raises(InvalidInput, match="no node 'moon'"):
        bank.migrate("moon")


def test_delete_removes_all_of_it(store: Store, bank, make_trace):
    bank.write(make_trace(4))
    store.delete("lab/alice")
    assert store.banks() == []
    with pytest.raises(BankNotFound):
        bank.info()


def test_unknown_kinds_and_options_are_named(store: Store, spec: BankSpec):
    for change, named in (
        ({"kind": "spam"}, r"unknown kind 'spam'; there is .*spalm"),
        ({"options": {"colour": 3}}, "colour=3"),
        ({"key": KeySpec(layers=(4,))}, r"layers \[4\]"),
    ):
        with pytest.raises(InvalidSpec, match=named):
            store.create("lab/alice", spec.model_copy(update=change))
    assert store.banks() == []


def test_a_bank_needs_a_calibration_and_the_error_names_the_command(tmp_path: Path, spec: BankSpec):
    with (
        raymem.connect(tmp_path / "empty") as store,
        pytest.raises(CalibrationNotFound, match="raymem calibrate --model"),
    ):
        store.create("lab/alice", spec)


def test_the_stores_calibration_is_found_by_model_and_layers(
    store: Store, calibration: Calibration, spec: BankSpec, fingerprint: Fingerprint
):
    assert store.calibration("content", (3, 5)).hash == calibration.hash
    assert store.create("lab/alice", spec).info().spec.fingerprint.calibration == calibration.hash


def test_bad_names_reach_no_backend(store: Store, spec: BankSpec):
    for name in ("alice", "a/b/c", "a/../b", "a/" + "b" * 10_000):
        with pytest.raises(InvalidName):
            store.create(name, spec)
        with pytest.raises(InvalidName):
            store.bank(name)


@one_kind
def test_reads_ask_for_sensible_things(bank, make_trace):
    for change in ({"k": 0}, {"k": 5000}, {"start": -1}):
        with pytest.raises(InvalidInput, match=r"is -?[0-9]+"):
            bank.read(make_trace(2).hidden, **change)


def test_addresses_and_options_that_do_not_go_together(tmp_path: Path):
    with pytest.raises(ConfigError, match="api_key goes with"):
        raymem.connect(tmp_path, api_key="k")
    with pytest.raises(ConfigError, match="goes with 'ray'"):
        raymem.connect(tmp_path, cold="elsewhere")


def test_a_closed_store_says_so(store: Store):
    store.close()
    store.close()
    with pytest.raises(ConfigError, match="closed"):
        store.banks()


def test_a_caller_with_too_much_in_flight_is_told_when_to_come_back(tmp_path: Path, calibration, spec, make_trace):
    settings = raymem.Settings.model_validate({"host": {"caller_bytes": 2000}})
    with raymem.connect(tmp_path / "memory", settings=settings) as store:
        store.put_calibration(calibration)
        bank = store.create("lab/alice", spec)
        with pytest.raises(TooLarge, match="limit of 2000"):
            bank.write(make_trace(200))
        refused = []
        for seq in range(0, 400, 10):
            try:
                bank.write(make_trace(10, seq=seq, run=str(seq)), durable=False)
            except Overloaded as error:
                refused.append(error.retry_after_s)
        assert refused
        assert min(refused) > 0


def test_an_undurable_write_is_there_after_a_close(tmp_path: Path, store: Store, bank, make_trace):
    ack = bank.write(make_trace(6), durable=False)
    assert (ack.durable, ack.rows) == (False, 6)
    store.close()
    with raymem.connect(tmp_path / "memory") as again:
        assert again.bank("lab/alice").info().rows == 6


def test_memory_stays_in_its_budget(store: Store, spec: BankSpec, make_trace):
    budget = 64 * 1024
    bank = store.create("lab/small", spec.model_copy(update={"budget_bytes": budget}))
    for part in range(10):
        bank.write(make_trace(400, run=str(part), seed=part))
    assert 0 < bank.info().bytes <= budget
    newest = make_trace(400, run="9", seed=9)
    assert float(bank.read(newest.hidden[-10:-1], start=390).relevance_Q.min()) > 0.9


def test_stats_count_what_happened(store: Store, bank, make_trace):
    bank.write(make_trace(10))
    bank.write(make_trace(10))
    bank.read(make_trace(3).hidden)
    with pytest.raises(RaymemError):
        bank.write(make_trace(4, seed=7))
    found = store.stats()["shards"][0]["banks"]["lab/alice"]
    counted = {name: found[name] for name in ("rows", "rows_written", "duplicates", "reads", "queries", "refused")}
    assert counted == {"rows": 10, "rows_written": 10, "duplicates": 10, "reads": 1, "queries": 3, "refused": 1}


def test_relevance_tells_stored_from_unrelated(store: Store, spec: BankSpec, make_trace):
    bank = store.create("lab/alice", spec)
    trace = make_trace(40)
    bank.write(trace)
    stored = bank.read(trace.hidden[1:30]).relevance_Q
    unrelated = bank.read(make_trace(30, seed=99).hidden[1:]).relevance_Q
    assert float(stored.min()) > float(unrelated.max())
    assert torch.all(bank.read(trace.hidden[:1], start=0).relevance_Q == 0)
