"""Keys and values rebuilt from a real bank's tokens, against one pass over the run."""

from dataclasses import replace

import pytest
import torch
from modelzoo import save_tiny

from raymem.errors import Conflict, InvalidInput
from raymem.lm.attending import rebuild
from raymem.lm.models import LanguageModel
from raymem.lm.rebuilding import Rebuilder, rope_name, rows_of
from raymem.rows import quantize_rows

RUN_ROWS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LanguageModel.load(save_tiny(tmp_path_factory.mktemp("rebuilt") / "tiny"), torch.float32)


@pytest.fixture
def bank(file_store, tiny, request):
    made = file_store.create(f"rebuilt/b{abs(hash(request.node.nodeid))}", tiny.spec("spalm"))
    for stream in ("a", "b"):
        made.write(tiny.talk(stream, RUN_ROWS))
    return made


def chosen(bank, tiny, stream="b", rows=20):
    asked = tiny.talk(stream, 8, seq=33)
    return bank.attend(asked.hidden, asked.tokens, rows)


def whole(model, tiny, stream):
    return rebuild(model, tiny.talk(stream, RUN_ROWS).tokens)


def test_rows_are_those_of_one_pass_over_their_run(model, bank, tiny):
    memory = chosen(bank, tiny)
    assert memory.keys_LNHd is None
    filled = Rebuilder(model).fill(memory, bank)
    expected = {stream: whole(model, tiny, stream) for stream in ("a", "b")}
    assert {row.stream for row in filled.rows()} == {"a", "b"}
    for slot, row in enumerate(filled.rows()):
        keys, values = expected[row.stream]
        # a pass over more tokens adds up in another order
        torch.testing.assert_close(filled.keys_LNHd[:, slot], keys[:, row.seq], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(filled.values_LNHd[:, slot], values[:, row.seq], rtol=1e-4, atol=1e-5)


def test_rows_after_erased_ones_are_found(model, bank, tiny):
    bank.erase(stream="b", run="r1", seq_from=10, seq_to=12)
    memory = chosen(bank, tiny)
    filled = Rebuilder(model).fill(memory, bank)
    tokens = tiny.talk("b", RUN_ROWS).tokens
    keys, _ = rebuild(model, torch.cat([tokens[:10], tokens[12:]]))
    for slot, row in enumerate(filled.rows()):
        if row.stream == "b":
            place = row.seq - 2 * (row.seq >= 12)
            torch.testing.assert_close(filled.keys_LNHd[:, slot], keys[:, place], rtol=1e-4, atol=1e-5)


def test_rows_that_were_erased_since_are_refused(model, bank, tiny):
    memory = chosen(bank, tiny)
    bank.erase(stream="b")
    with pytest.raises(Conflict, match="erased since they were chosen"):
        Rebuilder(model).fill(memory, bank)


def test_what_was_rebuilt_is_kept_within_its_bytes(model, bank, tiny, monkeypatch):
    passes = []
    monkeypatch.setattr("raymem.lm.rebuilding.rebuild", lambda *args: passes.append(1) or rebuild(*args))
    large, small = Rebuilder(model), Rebuilder(model, 0)
    for rebuilder in (large, small):
        first = rebuilder.fill(chosen(bank, tiny), bank)
        second = rebuilder.fill(chosen(bank, tiny), bank)
        assert torch.equal(first.keys_LNHd, second.keys_LNHd)
    assert len(passes) == 2 + 4
    assert small.nbytes == 0
    one = Rebuilder(model, large.nbytes * 2 // 3)
    one.fill(chosen(bank, tiny), bank)
    assert 0 < one.nbytes <= large.nbytes * 2 // 3
    with pytest.raises(InvalidInput, match="limit_bytes is -1"):
        Rebuilder(model, -1)


def test_a_run_that_grew_is_rebuilt_to_its_end(model, bank, tiny):
    rebuilder = Rebuilder(model)
    rebuilder.fill(chosen(bank, tiny), bank)
    bank.write(tiny.talk("b", 16, seq=RUN_ROWS))
    memory = bank.attend(None, tiny.talk("b", 8, seq=RUN_ROWS).tokens, 100)
    assert int(memory.seq_N.max()) == RUN_ROWS + 15
    assert rebuilder.fill(memory, bank).keys_LNHd.shape[1] == len(memory)


def test_what_was_rebuilt_can_be_kept_in_the_bank(model, bank, tiny):
    for stream in ("a", "b"):
        bank.put_rows(rows_of(model, bank, stream, "r1", RUN_ROWS))
    memory = chosen(bank, tiny)
    assert memory.keys_LNHd.dtype == torch.int8
    keys, _ = whole(model, tiny, "b")
    expected, _ = quantize_rows(keys)
    for slot, row in enumerate(memory.rows()):
        if row.stream == "b":
            assert torch.equal(memory.keys_LNHd[:, slot], expected[:, row.seq])
    assert Rebuilder(model).fill(memory, bank) is memory
    with pytest.raises(InvalidInput, match="has 48 of the rows before 50"):
        rows_of(model, bank, "a", "r1", 50)


def test_models_that_turn_keys_alike_have_one_rope(model):
    other = replace(model.rope, frequencies_LF=model.rope.frequencies_LF * 2)
    assert rope_name(model.rope) == rope_name(replace(model.rope))
    assert rope_name(other) != rope_name(model.rope)
    assert rope_name(replace(model.rope, interleaved=True)) != rope_name(model.rope)


def test_nothing_chosen_is_nothing_to_rebuild(model, bank, tiny, file_store):
    empty = file_store.create("rebuilt/empty", tiny.spec("spalm"))
    memory = chosen(empty, tiny)
    assert Rebuilder(model).fill(memory, empty) is memory
