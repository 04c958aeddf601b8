import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.encode import Calibration, Encoder
from raymem.encode.keys import ContextRows
from raymem.errors import Corrupt, FingerprintMismatch, InvalidSpec, InvalidTrace
from raymem.memory.base import EncodedRows
from raymem.rows import JournalRows
from raymem.tensors import to_bits
from raymem.types import KeySpec

KEYS = [
    KeySpec(),
    KeySpec(layers=(7,)),
    KeySpec(function="window", layers=(3,)),
    KeySpec(function="window", window=5),
    KeySpec(function="span", window=3),
]
Make = Callable[..., Encoder]
Kit = SimpleNamespace


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[str, int]], list[int]]:
    """Rows of a few runs in any interleaving, with gaps, and places to cut them."""
    steps = draw(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0, 0, 0, 0, 0, 0, 2])), max_size=60))
    following = {"a": 0, "b": 1, "c": 5}
    where = []
    for run, gap in steps:
        where.append((run, following[run] + gap))
        following[run] += gap + 1
    return where, sorted(draw(st.lists(st.integers(0, len(where)), max_size=8)))


def pieces(kit: Kit, rows: JournalRows, cuts: list[int]) -> list[JournalRows]:
    ends = [0, *cuts, len(rows)]
    return [kit.cut(rows, start, stop) for start, stop in itertools.pairwise(ends)]


def joined(found: list[EncodedRows]) -> dict[str, torch.Tensor]:
    names = ("keys_NK", "tokens_N", "values_NV", "pos_N", "seq_N", "source_N")
    return {name: torch.cat([getattr(rows, name) for rows in found]) for name in names}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        assert to_bits(tensor).tobytes() == to_bits(other[name]).tobytes(), name
        assert tensor.shape == other[name].shape


def expected(calibration: Calibration, key: KeySpec, rows: JournalRows) -> list[tuple[int, int, torch.Tensor]]:
    """Position, next token and key of every completed row, one at a time, in float64."""
    places = [calibration.layers.index(layer) for layer in key.layers or calibration.layers]
    window = 1 if key.function == "single" else key.window
    kept: dict[str, list[int]] = {}
    found = []
    for row, run in enumerate(rows.runs):
        before = kept.setdefault(run, [])
        seq = int(rows.seq_T[row])
        if before and int(rows.seq_T[before[-1]]) + 1 != seq:
            before.clear()
        ends_span = key.function != "span" or seq % window == 0
        if before and ends_span:
            found.append((before[-1], int(rows.token_T[row]), key_of(calibration, places, rows, before[-window:])))
        if seq > 0:
            before.append(row)
    return found


def key_of(calibration: Calibration, places: list[int], rows: JournalRows, window: list[int]) -> torch.Tensor:
    states_LD = (rows.hidden_TLD[window][:, places].double() - calibration.mean_LD[places].double()).mean(0)
    if calibration.whiten_LDD is not None:
        states_LD = torch.einsum("ld,lde->le", states_LD, calibration.whiten_LDD[places].double())
    return torch.nn.functional.normalize(torch.nn.functional.normalize(states_LD, dim=-1).flatten(), dim=0)


@pytest.mark.parametrize("key", KEYS, ids=str)
@given(history=histories())
@settings(max_examples=40, deadline=None)
def test_rows_and_their_bits_do_not_depend_on_how_the_journal_was_cut(
    key: KeySpec, history: tuple[list[tuple[str, int]], list[int]], encoder: Make, kit: Kit
) -> None:
    rows = kit.journal(history[0])
    whole, cut = encoder(key), encoder(key)
    once = joined([whole.push(rows)])
    assert_same_bits(once, joined([cut.push(piece) for piece in pieces(kit, rows, history[1])]))
    assert (whole.sources, whole.dump()[1]) == (cut.sources, cut.dump()[1])
    assert_same_bits(whole.dump()[0], cut.dump()[0])


@pytest.mark.parametrize("key", KEYS, ids=str)
@given(history=histories())
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_a_plain_loop(
    key: KeySpec, history: tuple[list[tuple[str, int]], list[int]], encoder: Make, kit: Kit, calibration: Calibration
) -> None:
    rows = kit.journal(history[0])
    found, wanted = encoder(key).push(rows), expected(calibration, key, rows)
    assert found.pos_N.tolist() == [pos for pos, _, _ in wanted]
    assert found.tokens_N.tolist() == [token for _, token, _ in wanted]
    assert found.seq_N.tolist() == [int(rows.seq_T[pos]) for pos, _, _ in wanted]
    assert torch.equal(found.values_NV, rows.value_TV[found.pos_N])
    for key_K, (_, _, wanted_K) in zip(found.keys_NK, wanted, strict=True):
        # float32 means of bfloat16 states, and 20 bits a state under whitening
        torch.testing.assert_close(key_K.double(), wanted_K, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_an_interleaved_run_has_the_keys_it_has_alone(key: KeySpec, encoder: Make, kit: Kit) -> None:
    where = [(run, seq) for seq in range(23) for run in ("a", "b", "c")]
    together = encoder(key).push(kit.journal(where))
    for source, run in enumerate("abc"):
        alone = encoder(key).push(kit.journal([pair for pair in where if pair[0] == run]))
        mine = together.source_N == source
        assert together.keys_NK[mine].numpy().tobytes() == alone.keys_NK.numpy().tobytes()
        assert torch.equal(together.tokens_N[mine], alone.tokens_N)


def test_a_gap_breaks_pairing_and_the_row_before_it_never_gets_a_token(encoder: Make, kit: Kit) -> None:
    found = encoder().push(kit.journal([("a", seq) for seq in (1, 2, 5, 6)]))
    assert found.seq_N.tolist() == [1, 5]


def test_the_row_at_position_0_has_no_key_and_enters_no_window(encoder: Make, kit: Kit) -> None:
    key = KeySpec(function="window", window=4)
    with_sink = encoder(key).push(kit.journal([("a", seq) for seq in range(6)]))
    without = encoder(key).push(kit.journal([("a", seq) for seq in range(1, 6)]))
    assert with_sink.seq_N.tolist() == [1, 2, 3, 4]
    assert torch.equal(with_sink.keys_NK, without.keys_NK)


def test_a_span_gives_one_key_where_it_ends(encoder: Make, kit: Kit) -> None:
    found = encoder(KeySpec(function="span", window=4)).push(kit.journal([("a", seq) for seq in range(13)]))
    assert found.seq_N.tolist() == [3, 7, 11]


@pytest.mark.parametrize("key", KEYS[:4], ids=str)
def test_a_query_has_the_bits_of_the_row_with_the_same_state(key: KeySpec, encoder: Make, kit: Kit) -> None:
    rows = kit.journal([("a", seq) for seq in range(1, 30)])
    maker = encoder(key)
    assert torch.equal(maker.keys([ContextRows(rows.hidden_TLD)])[:-1], maker.push(rows).keys_NK)


def test_a_query_at_position_0_is_zeros_and_enters_no_window(encoder: Make, kit: Kit) -> None:
    maker = encoder(KeySpec(function="window"))
    hidden = kit.hidden_of(9, 4)
    keys_QK = maker.keys([ContextRows(hidden, start=0)])
    assert keys_QK.shape == (9, maker.key_width)
    assert not keys_QK[0].any()
    assert torch.equal(keys_QK[1:], maker.keys([ContextRows(hidden[1:])]))


def test_keys_are_of_unit_length_and_layers_weigh_the_same(encoder: Make, kit: Kit) -> None:
    keys_QK = encoder().keys([ContextRows(kit.hidden_of(31, 1))])
    halves_QL = keys_QK.unflatten(1, (2, kit.WIDTH)).norm(dim=-1)
    torch.testing.assert_close(halves_QL, torch.full((31, 2), 0.5**0.5))


def test_the_largest_states_give_finite_keys(encoder: Make, kit: Kit) -> None:
    hidden = kit.hidden_of(20, 1)
    hidden[5:9] = torch.finfo(torch.bfloat16).max
    hidden[12] = torch.finfo(torch.bfloat16).smallest_normal
    assert encoder(KeySpec(function="window", window=7)).keys([ContextRows(hidden)]).isfinite().all()


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_dump_in_the_middle_of_runs_goes_on_bit_by_bit(key: KeySpec, encoder: Make, kit: Kit) -> None:
    rows = kit.journal([(run, seq) for seq in range(17) for run in ("a", "b")] + [("c", 0)])
    first, second = encoder(key), encoder(key)
    first.push(kit.cut(rows, 0, 21))
    tensors, meta = first.dump()
    second.load({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(meta)))
    assert second.next_seq("stream", "a") == first.next_seq("stream", "a") == 11
    assert second.sources == first.sources
    rest = kit.cut(rows, 21, 35)
    assert_same_bits(joined([first.push(rest)]), joined([second.push(rest)]))
    assert_same_bits(first.dump()[0], second.dump()[0])


def test_an_empty_encoder_dumps_and_loads(encoder: Make) -> None:
    other = encoder()
    other.load(*encoder().dump())
    assert other.sources == []


@given(history=histories())
@settings(max_examples=60, deadline=None)
def test_the_run_touched_longest_ago_is_closed_wherever_calls_are_cut(
    history: tuple[list[tuple[str, int]], list[int]], encoder: Make, kit: Kit
) -> None:
    rows, key = kit.journal(history[0]), KeySpec(function="window", window=3)
    whole, cut = encoder(key, max_open_runs=2), encoder(key, max_open_runs=2)
    once = joined([whole.push(rows)])
    assert_same_bits(once, joined([cut.push(piece) for piece in pieces(kit, rows, history[1])]))
    assert_same_bits(whole.dump()[0], cut.dump()[0])
    assert len(whole.dump()[0]["tail_runs"]) <= 2


def test_a_closed_run_loses_its_pair_but_not_its_place(encoder: Make, kit: Kit) -> None:
    maker = encoder(max_open_runs=2)
    where = [("a", 1), ("a", 2), ("b", 1), ("c", 1), ("a", 3), ("a", 4)]
    found = maker.push(kit.journal(where))
    assert found.seq_N.tolist() == [1, 3]
    assert [maker.next_seq("stream", run) for run in "abcd"] == [5, 2, 2, 0]
    assert maker.sources == [("stream", "a"), ("stream", "b"), ("stream", "c")]


def test_touching_a_run_keeps_it_open(encoder: Make, kit: Kit) -> None:
    where = [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("a", 3), ("b", 2)]
    assert encoder(max_open_runs=2).push(kit.journal(where)).seq_N.tolist() == [1, 2]


def test_the_states_kept_do_not_grow_with_runs(encoder: Make, kit: Kit) -> None:
    maker = encoder(max_open_runs=5)
    maker.push(kit.journal([(chr(97 + run), seq) for run in range(5) for seq in range(3)]))
    full = maker.nbytes
    maker.push(kit.journal([(chr(110 + run), seq) for run in range(9) for seq in range(3)]))
    assert 0 < maker.nbytes == full


def test_rows_without_values_give_zeros_and_a_bank_without_values_ignores_them(encoder: Make, kit: Kit) -> None:
    where = [("a", seq) for seq in range(1, 5)]
    assert not encoder().push(kit.journal(where, values=False)).values_NV.any()
    assert encoder(values="").push(kit.journal(where)).values_NV is None


def test_values_of_another_width_are_refused_and_change_nothing(encoder: Make, kit: Kit) -> None:
    maker = encoder()
    rows = kit.journal([("a", 1), ("a", 2)])
    wide = JournalRows(**{**vars(rows), "value_TV": torch.zeros(2, 99)})
    with pytest.raises(InvalidTrace, match=r"99 wide; .* 13 wide"):
        maker.push(wide)
    assert maker.sources == []


def test_pushing_nothing_gives_nothing(encoder: Make, kit: Kit) -> None:
    maker = encoder(KeySpec(function="window"))
    assert maker.push(kit.journal([])).keys_NK.shape == (0, maker.key_width)


def test_another_calibration_is_refused_by_name(calibration: Calibration, kit: Kit) -> None:
    spec = kit.spec_for(calibration, KeySpec())
    for field, value in (("calibration", "f" * 64), ("content", "f" * 64), ("width", 99)):
        changed = spec.fingerprint.model_copy(update={field: value})
        with pytest.raises(FingerprintMismatch, match=str(value)):
            Encoder(spec.model_copy(update={"fingerprint": changed}), calibration)


def test_a_key_of_a_layer_that_rows_lack_is_refused(calibration: Calibration, kit: Kit) -> None:
    with pytest.raises(InvalidSpec, match=r"\[4\]; the rows carry \[3, 7\]"):
        Encoder(kit.spec_for(calibration, KeySpec(layers=(4,))), calibration)


def test_a_bank_of_fewer_layers_uses_their_part_of_the_calibration(calibration: Calibration, kit: Kit) -> None:
    spec = kit.spec_for(calibration, KeySpec())
    alone = spec.model_copy(update={"fingerprint": spec.fingerprint.model_copy(update={"layers": (7,)})})
    hidden = kit.hidden_of(9, 2)
    both = Encoder(spec.model_copy(update={"key": KeySpec(layers=(7,))}), calibration)
    assert torch.equal(Encoder(alone, calibration).keys([ContextRows(hidden[:, 1:])]), both.keys([ContextRows(hidden)]))


@pytest.mark.parametrize("damage", ["missing", "dtype", "rows", "source", "names", "twice"])
def test_a_damaged_dump_is_refused_and_changes_nothing(damage: str, encoder: Make, kit: Kit) -> None:
    maker = encoder(KeySpec(function="window"))
    maker.push(kit.journal([("a", 1), ("b", 1)]))
    tensors, meta = maker.dump()
    if damage == "missing":
        del tensors["tail_values"]
    elif damage == "dtype":
        tensors["tail_hidden"] = tensors["tail_hidden"].float()
    elif damage == "rows":
        tensors["tail_runs"][0, 1] = 2
    elif damage == "source":
        tensors["tail_runs"][0, 0] = 2
    elif damage == "names":
        meta["sources"][1] = ["stream"]
    else:
        meta["sources"][1] = meta["sources"][0]
    fresh = encoder(KeySpec(function="window"))
    with pytest.raises(Corrupt):
        fresh.load(tensors, meta)
    assert fresh.sources == []
    assert fresh.nbytes == 0
