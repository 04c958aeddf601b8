"""What every kind promises, whatever it is: written once, run for each (mechanisms.md section 9)."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raymem.encode import Encoder
from raymem.encode.fit import Sample, fit
from raymem.errors import Corrupt, InvalidSpec
from raymem.memory.base import EncodedRows, Found
from raymem.memory.state import StateMemory
from raymem.types import BankSpec, Fingerprint, KeySpec

RELATIVE = 1e-6
SECOND_PROCESS = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from raymem.memory import build
from raymem.memory.base import Dims, EncodedRows
import json
folder = Path(sys.argv[1])
for case in json.loads((folder / "cases.json").read_text()):
    memory = build(case["kind"], Dims(*case["dims"]), case["options"], case["budget"]).requires_grad_(False)
    state = memory.load(load_file(folder / f"{case['name']}.before"))
    again = memory.dump(state)
    rows = load_file(folder / f"{case['name']}.rows")
    parts = rows["keys"], rows["tokens"], rows.get("values"), *rows["origin"].unbind()
    state = memory.absorb(state, EncodedRows(*parts))
    found = memory.lookup(state, rows["queries"], 7)
    answers = {k: v.contiguous() for k, v in vars(found).items() if v is not None}
    save_file(again, folder / f"{case['name']}.again")
    save_file(memory.dump(state), folder / f"{case['name']}.after")
    save_file(answers, folder / f"{case['name']}.found")
"""


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and raw(a[n]) == raw(b[n]) for n in a
    )


def tensors_of(found: Found) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in vars(found).items() if tensor is not None}


def close(a: Found, b: Found) -> None:
    for name, tensor in tensors_of(a).items():
        other = tensors_of(b)[name]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, other, rtol=RELATIVE * 10, atol=RELATIVE * 10)
        else:
            assert torch.equal(tensor, other), name


@pytest.fixture(scope="module")
def second_process(tmp_path_factory, cases) -> Path:
    """Every kind dumped here, then loaded, written to and read in another process; the folder has both sides."""
    import json

    folder = tmp_path_factory.mktemp("states")
    described = []
    for case in cases:
        memory = case.build()
        state = memory.absorb(memory.empty(), case.rows(301))
        save_file(memory.dump(state), folder / f"{case.name}.before")
        rows = case.rows(23, 301)
        origin = torch.stack([rows.pos_N, rows.seq_N, rows.source_N])
        tensors = {
            "keys": rows.keys_NK,
            "tokens": rows.tokens_N,
            "origin": origin,
            "queries": case.rows(9, 295).keys_NK,
        }
        save_file(tensors | ({"values": rows.values_NV} if case.value else {}), folder / f"{case.name}.rows")
        described.append(
            {"name": case.name, "kind": case.kind, "options": case.options, "budget": case.budget, "dims": memory.dims}
        )
    (folder / "cases.json").write_text(json.dumps(described))
    subprocess.run([sys.executable, "-c", SECOND_PROCESS, str(folder)], check=True, timeout=120)
    return folder


def test_u1_a_state_moves_to_another_process_bitwise_and_works_on_there(case, second_process):
    memory = case.build()
    before = load_file(second_process / f"{case.name}.before")
    assert same_bits(load_file(second_process / f"{case.name}.again"), before)
    state = memory.absorb(memory.absorb(memory.empty(), case.rows(301)), case.rows(23, 301))
    assert same_bits(load_file(second_process / f"{case.name}.after"), memory.dump(state))
    found = memory.lookup(state, case.rows(9, 295).keys_NK, 7)
    assert same_bits(load_file(second_process / f"{case.name}.found"), tensors_of(found))


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=5))
def test_u2_cutting_the_stream_elsewhere_gives_the_same_bits(cuts, cases):
    borders = [0, *sorted(cuts), 90]
    for case in cases:
        memory = case.build()
        whole = memory.absorb(memory.empty(), case.rows(90))
        state = memory.empty()
        for start, end in pairwise(borders):
            state = memory.absorb(state, case.rows(end - start, start))
        assert same_bits(memory.dump(whole), memory.dump(state)), case.name


def test_u3_an_empty_bank_answers_nothing_and_an_empty_write_is_none(case):
    memory = case.build()
    empty = memory.empty()
    found = memory.lookup(empty, case.rows(3).keys_NK, 4)
    assert found.values_QV.shape == (3, case.value)
    assert not found.values_QV.any()
    assert found.similarity_Q.tolist() == [-1.0] * 3
    assert found.tokens_Qk.tolist() == [[-1] * 4] * 3
    assert found.scores_Qk.tolist() == [[float("-inf")] * 4] * 3
    before = memory.dump(memory.absorb(memory.empty(), case.rows(17)))
    state = memory.absorb(memory.absorb(memory.empty(), case.rows(17)), case.rows(0))
    assert same_bits(before, memory.dump(state))


def test_u5_a_sink_row_changes_nothing(case):
    # through the real encoder, which is what stands between a model's first state and a bank
    torch.manual_seed(5)
    drawn = [torch.randn(60, 1, 24).bfloat16() for _ in range(3)]
    calibration = fit("0" * 64, (2,), Sample(drawn[:1], drawn[1:2], drawn[2:]))
    fingerprint = Fingerprint(
        model="m",
        content="0" * 64,
        layers=(2,),
        width=24,
        tokenizer="t",
        calibration=calibration.hash,
        values="e" * 64 if case.value else "",
    )
    spec = BankSpec(kind=case.kind, fingerprint=fingerprint, key=KeySpec())
    hidden = torch.randn(20, 1, 24).bfloat16()
    dumps = []
    for norm in (1.0, 1e5):
        memory, encoder = case.build(), Encoder(spec, calibration)
        first = torch.full((1, 1, 24), norm).bfloat16()
        rows = encoder.push(journaled(torch.cat([first, hidden]), case.value))
        dumps.append(memory.dump(memory.absorb(memory.empty(), rows)))
    assert same_bits(*dumps)


def journaled(hidden: torch.Tensor, value: int):
    from raymem.rows import JournalRows, Trace

    values = torch.ones(len(hidden), value) if value else None
    trace = Trace(hidden, torch.arange(len(hidden)), "s", "r", values=values, time=0.0)
    return JournalRows.of(trace, 0, 1)


def test_u7_two_runs_give_the_same_bytes(case):
    dumps = []
    for _ in range(2):
        torch.manual_seed(len(dumps))
        memory = case.build()
        dumps.append(memory.dump(memory.absorb(memory.empty(), case.rows(40))))
    assert same_bits(*dumps)


def test_u8_ten_times_its_capacity_leaves_a_bank_as_large_as_it_was_and_the_newest_rows_in_it(case):
    memory = case.build()
    state = memory.empty()
    # a row takes at least 43 bytes: this many fill any of them
    full = case.budget // 43
    state = memory.absorb(state, case.rows(full, vocabulary=5000))
    size = memory.nbytes(state)
    for start in range(full, 10 * full, full):
        state = memory.absorb(state, case.rows(full, start, vocabulary=5000))
        assert memory.nbytes(state) == size <= case.budget
    if case.name == "larimar-vectors":
        # least squares weighs all rows alike: past its capacity it knows the newest no better than the others
        return
    last = 10 * full
    newest = case.rows(20, last - 20, vocabulary=5000)
    found = memory.lookup(state, newest.keys_NK, 8)
    if case.value and found.pos_Qk is None:
        # a vector comes back nearer to its own than to the others' on average
        own = (found.values_QV * newest.values_NV).sum(1).mean()
        assert own > (found.values_QV * newest.values_NV.roll(1, 0)).sum(1).mean() + 1
    else:
        hits = (found.tokens_Qk == newest.tokens_N[:, None]).any(1)
        assert hits.float().mean() >= 0.75


def test_a_dump_is_a_value_that_later_writes_leave_alone(case):
    memory = case.build()
    state = memory.absorb(memory.empty(), case.rows(33))
    dump = memory.dump(state)
    copy = {name: tensor.clone() for name, tensor in dump.items()}
    loaded = memory.load(dump)
    memory.absorb(state, case.rows(33, 33))
    memory.absorb(loaded, case.rows(9, 33))
    assert same_bits(dump, copy)


def test_more_candidates_than_there_are_tokens_or_rows_are_marked_absent(case):
    memory = case.build()
    state = memory.absorb(memory.empty(), case.rows(5))
    found = memory.lookup(state, case.rows(2).keys_NK, 600)
    assert found.tokens_Qk.shape == found.scores_Qk.shape == (2, 600)
    absent = found.tokens_Qk < 0
    assert bool(absent[:, 5:].all())
    assert bool((found.scores_Qk[absent] == float("-inf")).all())
    assert bool(torch.isfinite(found.scores_Qk[~absent]).all())


def test_no_query_and_no_candidate_asked_for_give_answers_of_that_shape(case):
    memory = case.build()
    for state in (memory.empty(), memory.absorb(memory.empty(), case.rows(20))):
        none = memory.lookup(state, case.rows(0).keys_NK, 4)
        assert none.values_QV.shape == (0, case.value)
        assert none.tokens_Qk.shape == none.scores_Qk.shape == (0, 4)
        found = memory.lookup(state, case.rows(3).keys_NK, 0)
        assert found.tokens_Qk.shape == found.scores_Qk.shape == (3, 0)
        assert found.similarity_Q.shape == (3,)


def test_candidates_come_best_first(case):
    memory = case.build()
    found = memory.lookup(memory.absorb(memory.empty(), case.rows(70)), case.rows(6).keys_NK, 20)
    assert bool((found.scores_Qk[:, :-1] >= found.scores_Qk[:, 1:]).all())


def test_similarity_tells_what_was_seen_from_what_was_not(case):
    memory = case.build()
    state = memory.absorb(memory.empty(), case.rows(60))
    seen = memory.lookup(state, case.rows(20, 40).keys_NK, 1).similarity_Q
    unseen = memory.lookup(state, case.rows(20, 900).keys_NK, 1).similarity_Q
    # keys are kept in 8 bits at the least
    assert bool((seen > 0.99).all())
    assert unseen.mean() < 0.8
    assert bool((seen <= 1).all())


def test_bfloat16_keys_are_taken(case):
    memory = case.build()
    rows = case.rows(30)
    short = EncodedRows(
        rows.keys_NK.bfloat16(), *(getattr(rows, n) for n in ("tokens_N", "values_NV", "pos_N", "seq_N", "source_N"))
    )
    found = memory.lookup(memory.absorb(memory.empty(), short), rows.keys_NK.bfloat16(), 3)
    assert found.scores_Qk.dtype == found.similarity_Q.dtype == torch.float32


def test_a_dump_of_another_shape_or_without_a_part_is_refused(case):
    memory = case.build()
    dump = memory.dump(memory.absorb(memory.empty(), case.rows(20)))
    name = max(dump, key=lambda n: dump[n].dim())
    with pytest.raises(Corrupt, match=name):
        memory.load({n: t for n, t in dump.items() if n != name})
    with pytest.raises(Corrupt, match=name):
        memory.load(dump | {name: dump[name][..., :-1]})
    with pytest.raises(Corrupt, match=name):
        memory.load(dump | {name: dump[name].to(torch.complex64)})


def test_a_budget_too_small_is_refused_naming_the_number():
    from raymem.memory import build
    from raymem.memory.base import Dims

    with pytest.raises(InvalidSpec, match="budget_bytes is 1024"):
        build("spalm", Dims(4096, 0), {}, 1024)
    with pytest.raises(InvalidSpec, match=r"budget_bytes=1024 and slots=1024 leave .* it needs 16, so \d+ bytes"):
        build("titans", Dims(64, 0), {}, 1024)
    with pytest.raises(InvalidSpec, match="its budget_bytes is 1024"):
        build("titans", Dims(64, 64), {}, 1024)


def test_banks_in_one_arena_don_t_see_each_other(case):
    memory = case.build()
    if not isinstance(memory, StateMemory):
        pytest.skip("row kinds keep one bank a state")
    lengths = [40, 0, 23]
    rows = [case.rows(40, 1000 * bank) for bank in range(3)]
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    # real rows need not come first
    mask = mask.flip(1)
    keys = torch.stack([r.keys_NK.roll(40 - n, 0) for r, n in zip(rows, lengths, strict=True)])
    tokens = torch.stack([r.tokens_N.roll(40 - n, 0) for r, n in zip(rows, lengths, strict=True)])
    values = None
    if case.value:
        values = torch.stack([r.values_NV.roll(40 - n, 0) for r, n in zip(rows, lengths, strict=True)])
    state = memory.write(memory.init_state(3), keys, values, tokens, mask)
    queries = torch.stack([r.keys_NK[:5] for r in rows])
    together = memory.read(state, queries, 6)
    for bank, length in enumerate(lengths):
        alone = memory.absorb(memory.empty(), case.rows(length, 1000 * bank))
        found = memory.lookup(alone, queries[bank], 6)
        close(found, Found(*(part[bank] for part in together)))
