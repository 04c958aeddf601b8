from typing import Any

import pytest
import torch

from raymem.errors import FingerprintMismatch, InvalidName, InvalidSpec, InvalidTrace, NonFinite
from raymem.rows import Trace
from raymem.types import BankSpec, Fingerprint, Readout, RowRef, check_bank_name

FINGERPRINT = Fingerprint(model="tiny", content="c", layers=(3, 5), width=7, dtype="float32", tokenizer="t")


def trace(**changes: Any) -> Trace:
    given: dict[str, Any] = {"hidden": torch.ones(4, 2, 7), "tokens": torch.arange(4), "stream": "s", "run": "r"}
    return Trace(**(given | changes))


@pytest.mark.parametrize("name", ["a/b", "research/alice-2", "A_1/0"])
def test_good_names_pass(name: str):
    assert check_bank_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a", "a/", "/b", "a/b/c", "a/../b", "./b", "a/b.c", "a b/c", "a/é", "-a/b", "a/b\n"]
)
def test_bad_names_are_refused_with_the_rule(name: str):
    with pytest.raises(InvalidName, match="namespace/name"):
        check_bank_name(name)


def test_a_very_long_name_is_refused_and_not_repeated_whole():
    with pytest.raises(InvalidName) as caught:
        check_bank_name("a/" + "b" * 10_000)
    assert len(str(caught.value)) < 400


def test_a_good_trace_passes():
    trace().validate(FINGERPRINT)
    trace(hidden=torch.ones(0, 2, 7), tokens=torch.arange(0)).validate(FINGERPRINT)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": torch.ones(4, 2, 8)}, r"\[4, 2, 8\].*width 7"),
        ({"hidden": torch.ones(4, 1, 7)}, "2 layers"),
        ({"hidden": torch.ones(4, 7)}, r"\[4, 7\]"),
        ({"hidden": torch.ones(4, 2, 7).bfloat16()}, "torch.bfloat16.*float32"),
        ({"tokens": torch.arange(3)}, r"\[3\].*\[4\]"),
        ({"tokens": torch.arange(4).int()}, "torch.int32"),
        ({"tokens": torch.tensor([0, 1, -7, 3])}, "token id -7 is not in 0"),
        ({"tokens": torch.tensor([0, 1, 2**31, 3])}, "token id 2147483648 is not in 0"),
        ({"seq": -1}, "seq is -1"),
        ({"values": torch.ones(4, 7)}, "no value space"),
    ],
)
def test_a_trace_of_another_shape_is_refused(changes: dict[str, Any], named: str):
    with pytest.raises(InvalidTrace, match=named):
        trace(**changes).validate(FINGERPRINT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_named(bad: float):
    hidden = torch.ones(4, 2, 7)
    hidden[2, 1, 3] = bad
    with pytest.raises(NonFinite, match="row 2"):
        trace(hidden=hidden).validate(FINGERPRINT)


def test_values_must_fit_the_value_space():
    with_values = FINGERPRINT.model_copy(update={"values": "e"})
    trace(values=torch.ones(4, 7)).validate(with_values)
    with pytest.raises(InvalidTrace, match="send values"):
        trace().validate(with_values)
    with pytest.raises(InvalidTrace, match=r"expected floats \[4, 7\]"):
        trace(values=torch.ones(4, 6)).validate(with_values)
    with pytest.raises(NonFinite):
        trace(values=torch.full((4, 7), float("nan"))).validate(with_values)


@pytest.mark.parametrize("label", ["", "x" * 257, "a\nb", "\0"])
def test_streams_and_runs_are_printable_and_short(label: str):
    for field in ("stream", "run"):
        with pytest.raises(InvalidName, match=field):
            trace(**{field: label}).validate(FINGERPRINT)


def test_a_fingerprint_names_what_differs():
    other = FINGERPRINT.model_copy(update={"model": "huge", "content": "d", "layers": (1,)})
    with pytest.raises(FingerprintMismatch, match=r"model: bank has 'tiny', got 'huge'; content: .*; layers"):
        FINGERPRINT.require(other)
    FINGERPRINT.require(FINGERPRINT)
    # a folder's name says nothing about what is in it
    FINGERPRINT.require(FINGERPRINT.model_copy(update={"model": "tiny-copy"}))


NEW = FINGERPRINT.model_copy(update={"content": "2:c", "tokenizer": "2:t", "legacy": ("c", "t")})


def test_banks_of_an_earlier_release_are_recognised_by_its_hashes():
    for old, new in ((FINGERPRINT, NEW), (NEW, FINGERPRINT)):
        old.require(new)
        old.accept(new)
    other = NEW.model_copy(update={"legacy": ("d", "t")})
    with pytest.raises(FingerprintMismatch, match="content"):
        FINGERPRINT.require(other)


def test_one_old_hash_does_not_make_one_model_of_two():
    # the same weights with another config: hashes of earlier releases could not tell them apart
    with pytest.raises(FingerprintMismatch, match=r"'2:c', got '2:d'"):
        NEW.require(NEW.model_copy(update={"content": "2:d"}))


@pytest.mark.parametrize(
    "other",
    [
        {"layers": (5, 3)},
        {"layers": (3,)},
        {"layers": (1, 5)},
        {"content": "another"},
        {"tokenizer": "another"},
        {"dtype": "bfloat16"},
        {"width": 8},
        {"values": "another"},
    ],
    ids=str,
)
def test_rows_say_what_made_them_and_a_bank_of_something_else_refuses_them(other):
    rows = trace(fingerprint=FINGERPRINT.model_copy(update=other))
    with pytest.raises(FingerprintMismatch, match=next(iter(other))):
        rows.validate(FINGERPRINT)


def test_rows_depend_on_no_calibration_and_no_label():
    bank = FINGERPRINT.model_copy(update={"calibration": "mine"})
    for other in ({}, {"calibration": "yours"}, {"model": "renamed"}):
        trace(fingerprint=FINGERPRINT.model_copy(update=other)).validate(bank)


def test_provenance_leaves_out_absent_neighbours():
    readout = Readout(
        values_QV=torch.zeros(1, 0),
        relevance_Q=torch.ones(1),
        pos_Qk=torch.tensor([[5, -1]]),
        seq_Qk=torch.tensor([[2, -1]]),
        source_Qk=torch.tensor([[0, -1]]),
        sources=(("s", "r"),),
    )
    assert readout.rows(0) == [RowRef("s", "r", 2, 5)]
    assert Readout(torch.zeros(1, 0), torch.ones(1)).rows(0) == []


def test_no_name_or_option_of_a_spec_is_long(tiny: Any) -> None:
    spec = tiny.spec()
    told = spec.fingerprint.model_dump()
    assert Fingerprint(**told | {"model": "m" * 4096}).model == "m" * 4096
    for field in ("model", "content", "tokenizer", "calibration", "values"):
        with pytest.raises(InvalidSpec, match="at most 4096"):
            Fingerprint(**told | {field: "m" * 8_000_000})
    for odd in ({"legacy": ("a", "b" * 5000)}, {"layers": tuple(range(1, 1100))}):
        with pytest.raises(InvalidSpec):
            Fingerprint(**told | odd)
    with pytest.raises(InvalidSpec, match="65536 bytes"):
        BankSpec(**dict(spec) | {"options": {"a": "b" * 70_000}})
