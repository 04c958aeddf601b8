"""What comes in at the door: each argument has a domain, and what is outside it hurts its sender alone."""

import asyncio
import dataclasses
import enum
import inspect
import threading
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import raymem
from raymem import Bank, BankSpec, Fingerprint, KeySpec, Settings, Store, Trace
from raymem.client.bank import domains
from raymem.client.store import AsyncBank, AsyncStore
from raymem.config import ColdSettings
from raymem.errors import ConfigError, InvalidInput, InvalidName, InvalidSpec, InvalidTrace, NonFinite, TooLarge
from raymem.inputs import COUNT_END, TIME_END, label, moment, shown, whole

SETTINGS = Settings(cold=ColdSettings(sync="none"))


@pytest.fixture
def bank(store: Store, tiny: Any) -> Bank:
    made = store.create("lab/a", tiny.spec())
    made.write(tiny.trace(20))
    return made


class Name(enum.StrEnum):
    ALICE = "alice"


class Unmade:
    """What says that it is an array, and can't be made one."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("gone")


@pytest.mark.parametrize("cls", [AsyncStore, AsyncBank])
def test_every_argument_of_every_verb_has_a_domain(cls: type):
    verbs = {name: verb for name, verb in vars(cls).items() if inspect.isfunction(verb) and not name.startswith("_")}
    bare = {(verb, name) for verb in verbs for name, check in domains(verbs[verb]).items() if check is None}
    # what these hold is checked with the bank's dtype at hand; a scope has two values, a method five
    attended = {("attend", "queries"), ("attend", "tokens"), ("attend", "method"), ("put_rows", "rows")}
    assert bare <= {("write", "trace"), ("read", "queries"), ("erase", "scope")} | attended


@pytest.mark.parametrize(("cls", "blocking"), [(AsyncStore, Store), (AsyncBank, Bank)])
def test_every_verb_blocks_and_teaches_as_the_async_one(cls: type, blocking: type):
    verbs = {name for name, verb in vars(cls).items() if inspect.isfunction(verb) and not name.startswith("_")}
    for name in verbs - {"close"}:
        verb, made = getattr(cls, name), getattr(blocking, name)
        assert not inspect.iscoroutinefunction(made)
        assert list(inspect.signature(made).parameters) == list(inspect.signature(verb).parameters)
        assert made.__qualname__ == f"{blocking.__name__}.{name}"
        assert made.__doc__ == verb.__doc__ or name == "bank"


@pytest.mark.parametrize("good", [0, 5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), True + 4])
def test_whole_numbers_of_every_kind_count(good: object):
    found = whole(good, 0, 9)
    assert type(found) is int
    assert found == int(good)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "bad", [True, np.True_, torch.tensor(True), 5.0, np.float32(5), "5", None, b"5", [5], 10, -1, 2**63, 10**400, 5j]
)
def test_what_is_no_whole_number_is_refused(bad: object):
    with pytest.raises(InvalidInput, match="whole number from 0 to 9"):
        whole(bad, 0, 9)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0.0),
        (np.float32(1.5), 1.5),
        (datetime(2026, 1, 31, tzinfo=UTC), 1769817600.0),
        (TIME_END - 1, TIME_END - 1),
    ],
)
def test_times_are_seconds(given: object, seconds: float):
    assert moment(given) == seconds


@pytest.mark.parametrize(
    "bad",
    [
        *(float("nan"), float("inf"), -1e300, -1, TIME_END, 1e400, 10**400, True, np.True_, "5", None, 1j),
        *(datetime(2026, 1, 31), datetime(1969, 1, 1, tzinfo=UTC), 1_769_817_600_000),
    ],
)
def test_what_is_no_time_is_refused(bad: object):
    with pytest.raises(InvalidInput, match="seconds"):
        moment(bad)


@pytest.mark.parametrize(
    "good",
    [
        "a",
        "x" * 256,
        "🏴‍☠️ crew",
        "می‌خواهم",
        "क्‍ष",
        "a b",
        "全角　空白",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    ],
)
def test_labels_of_every_script_are_taken_as_they_are(good: str):
    assert label(good) == unicodedata.normalize("NFC", good)


@pytest.mark.parametrize(
    "bad", ["", "x" * 257, "a\nb", "\0", "\x7f", "\x85", "\ud800", "a\udfff", "a\u202eb", "\u2066a", "\u2028", "\u2029"]
)
def test_labels_with_controls_are_refused(bad: str):
    with pytest.raises(InvalidName, match="1 to 256 characters"):
        label(bad)


def test_labels_are_composed_and_counted_so():
    assert label("e\u0301" * 256) == "é" * 256
    assert label("\u212b") == "\u00c5"
    assert label(Name.ALICE) == "alice"
    assert type(label(Name.ALICE)) is str
    with pytest.raises(InvalidName):
        label("\u0344" * 200)


def test_any_value_is_shown_short_and_printable():
    class Rude:
        def __repr__(self) -> str:
            raise ValueError

    for value in ("\ud800" * 1000, 10**5000, Rude(), np.zeros(10**6), float("nan"), b"\xff", [Rude()]):
        assert len(shown(value).encode()) < 600
    assert (shown(object()), shown([]), shown(1.5)) == ("an object", "a list", "1.5 (a float)")


@pytest.mark.parametrize(
    ("verb", "named"),
    [
        (lambda bank: bank.restore(True), "at is True"),
        (lambda bank: bank.restore(1.0), "at is 1.0"),
        (lambda bank: bank.erase(stream="s", run="r", seq_to=2**70), "seq_to is 1180591620717411303424"),
        (lambda bank: bank.erase(stream="s", before=True), "before is True"),
        (lambda bank: bank.erase(stream=5), "stream is 5"),
        (lambda bank: bank.read(torch.zeros(1, 2, 24).bfloat16(), as_of="1e400"), "as_of is inf"),
        (lambda bank: bank.read(torch.zeros(1, 2, 24).bfloat16(), as_of="-5"), "as_of is -5"),
        (lambda bank: bank.read(torch.zeros(1, 2, 24).bfloat16(), True), "k is True"),
        (lambda bank: bank.read(torch.zeros(1, 2, 24).bfloat16(), 1.0), "k is 1.0"),
        (lambda bank: bank.read(torch.zeros(1, 2, 24).bfloat16(), "5"), "k is '5'"),
        (lambda bank: bank.read(torch.zeros(1, 2, 24).bfloat16(), start=2**63), "start is 9223372036854775808"),
        (lambda bank: bank.set_ttl(float("nan")), "ttl_s is nan"),
        (lambda bank: bank.set_ttl(True), "ttl_s is True"),
        (lambda bank: bank.migrate(5), "to is 5"),
        (lambda bank: bank.grow(True), "partitions is True"),
        (lambda bank: bank.tokens("s", "r", 0, 2**63), "seq_to is 9223372036854775808"),
        (lambda bank: bank.tag("a\ud800"), r"tag is 'a\\ud800'"),
        (lambda bank: bank.export(5), "path is 5"),
        (lambda bank: bank.export("a\0b"), "path is"),
        (lambda bank: bank.write("rows"), "trace is 'rows'"),
    ],
)
def test_mistakes_are_told_with_the_argument_and_the_value(bank: Bank, verb: Callable[[Bank], object], named: str):
    with pytest.raises(InvalidInput, match=named):
        verb(bank)


@pytest.mark.parametrize(
    ("verb", "named"),
    [
        (lambda store: store.fork("lab/a", "lab/b", -1), "at is -1"),
        (lambda store: store.merge("lab/b", "lab/a"), "sources is 'lab/a'"),
        (lambda store: store.merge("lab/b", []), "sources is a list of 0"),
        (lambda store: store.merge("lab/b", ["lab/a", "lab/a"]), "'lab/a' twice"),
        (lambda store: store.banks(5), "prefix is 5"),
        (lambda store: store.banks("\ud800"), "prefix is"),
        (lambda store: store.create("lab/b", {"kind": "spalm"}), "spec is a dict"),
        (lambda store: store.import_(5, "lab/b"), "path is 5"),
        (lambda store: store.put_calibration(b"calibration"), "calibration is a bytes"),
        (lambda store: store.put_params(None), "learned is None"),
        (lambda store: store.delete("lab/a", materialise=1), "materialise is 1"),
        (lambda store: store.drain(None), "node is None"),
    ],
)
def test_mistakes_of_a_store_are_told_too(store: Store, verb: Callable[[Store], object], named: str):
    with pytest.raises(InvalidInput, match=named):
        verb(store)


def test_a_spec_is_checked_whole_however_it_was_made(store: Store, tiny: Any):
    spec = tiny.spec()
    for change in ({"budget_bytes": 2**70}, {"budget_bytes": True}, {"kind": 5}, {"options": {"a": float("nan")}}):
        with pytest.raises(InvalidSpec):
            store.create("lab/b", spec.model_copy(update=change))
        with pytest.raises(InvalidSpec):
            BankSpec(**(dict(spec) | change))
    for options in ({"a": 2**70}, {1: 2}, {"a": object()}, {"a": b"x"}, {"\ud800": 1}, {"a": "\ud800"}, [], None):
        with pytest.raises(InvalidSpec, match="options"):
            BankSpec(**(dict(spec) | {"options": options}))
    with pytest.raises(InvalidSpec, match="window"):
        KeySpec(window=True)
    with pytest.raises(InvalidSpec, match="surrogates"):
        Fingerprint(model="\ud800", content="c", layers=(1,), width=2, tokenizer="t")


@pytest.mark.parametrize("address", [5, None, "", "a\0b", "\ud800", b"folder"])
def test_an_address_is_text(address: Any):
    with pytest.raises(ConfigError, match="uri is"):
        raymem.connect(address)


def _taken(bank: Bank, trace: Trace) -> torch.Tensor:
    assert bank.write(trace).rows == len(trace.tokens)
    return bank.tokens(trace.stream, trace.run, 0, 100)


def test_arrays_and_lists_are_taken_as_tensors(bank: Bank, tiny: Any):
    hidden = tiny.trace(3).hidden.float()
    forms = {
        "numpy": (hidden.numpy(), np.array([1, 2, 3], dtype=np.int32)),
        "other byte order": (hidden.numpy().astype(">f8"), np.array([1, 2, 3], dtype=">u2")),
        "read only": (np.broadcast_to(np.float32(1), (3, 2, 24)), (1, 2, 3)),
        "lists": (hidden.tolist(), [1, 2, 3]),
    }
    for run, (states, tokens) in forms.items():
        trace = Trace(states, tokens, "s", run, np.int64(0), time=np.float32(1))  # type: ignore[arg-type]
        assert _taken(bank, trace).tolist() == [1, 2, 3]
        assert bank.read(states, 1).relevance_Q.shape == (3,)  # type: ignore[arg-type]


def test_tensors_of_every_make_are_taken_or_refused(bank: Bank, tiny: Any):
    good, tokens = tiny.trace(3).hidden, torch.tensor([1, 2, 3])
    taken = {
        "gradient": (good.clone().requires_grad_(), tokens),
        "parameter": (torch.nn.Parameter(good.clone()), tokens),
        "strided": (good.permute(2, 1, 0).contiguous().permute(2, 1, 0), tokens),
        "expanded": (good[:1].expand(3, 2, 24), tokens),
        "int32 tokens": (good, tokens.int()),
    }
    for run, (hidden, ids) in taken.items():
        assert _taken(bank, Trace(hidden, ids, "s", run)).tolist() == [1, 2, 3]
    refused: list[tuple[Any, Any, type[InvalidInput]]] = [
        (good.float().to_sparse(), tokens, InvalidTrace),
        (good.to("meta"), tokens, InvalidTrace),
        (good.to(torch.complex64), tokens, InvalidTrace),
        (good.float(), tokens, InvalidTrace),
        (torch.zeros(()), tokens, InvalidTrace),
        (good[:1].expand(2**40, 2, 24), tokens, TooLarge),
        (np.broadcast_to(np.float32(1), (2**40, 2, 24)), tokens, TooLarge),
        (range(2**40), tokens, TooLarge),
        (good, range(2**40), TooLarge),
        (Unmade(), tokens, InvalidTrace),
        (good, torch.tensor([True, False, True]), InvalidTrace),
        (good, [True, 2, 3], InvalidTrace),
        (good, [1.0, 2.0, 3.0], InvalidTrace),
        (good, np.array([2**64 - 1, 2, 3], dtype=np.uint64), InvalidTrace),
        (good, "abc", InvalidTrace),
        (None, tokens, InvalidTrace),
        ([[[1.0], [2.0, 3.0]]], tokens, InvalidTrace),
        (np.full((3, 2, 24), 1e300), tokens, NonFinite),
    ]
    for hidden, ids, error in refused:
        with pytest.raises(error):
            bank.write(Trace(hidden, ids, "s", "bad"))
    assert bank.tokens("s", "bad", 0, 9).tolist() == []


def test_vectors_that_no_float32_holds_are_refused(store: Store, tiny: Any):
    fingerprint = tiny.spec().fingerprint.model_copy(update={"values": "head"})
    bank = store.create("lab/v", tiny.spec().model_copy(update={"fingerprint": fingerprint}))
    trace = dataclasses.replace(tiny.trace(3), values=torch.full((3, 24), 1e300, dtype=torch.float64))
    with pytest.raises(NonFinite):
        bank.write(trace)


def test_a_trace_may_be_changed_once_its_write_has_returned(bank: Bank, tiny: Any):
    trace = tiny.trace(30, run="later")
    expected = trace.tokens.tolist()
    bank.write(trace, durable=False)
    trace.tokens.zero_()
    trace.hidden.fill_(float("nan"))
    bank.digest()
    assert bank.tokens("s", "later", 0, 99).tolist() == expected


def test_a_run_ends_before_its_last_number(bank: Bank, tiny: Any):
    trace = dataclasses.replace(tiny.trace(3), run="end")
    assert bank.write(dataclasses.replace(trace, seq=COUNT_END - 3)).rows == 3
    for seq in (COUNT_END - 2, 2**63 - 1, 2**63, -1, 1.5, True):
        with pytest.raises(InvalidTrace, match="seq is"):
            bank.write(dataclasses.replace(trace, run="past", seq=seq))


def test_one_bad_trace_of_a_group_fails_alone(bank: Bank, tiny: Any, monkeypatch: pytest.MonkeyPatch):
    # whatever slips through every check: the group, its other traces and the bank go on
    real = raymem.bank.primary.JournalRows.of

    def of(trace: Trace, pos: int, epoch: int) -> Any:
        if trace.run == "bad":
            raise OverflowError("unforeseen")
        return real(trace, pos, epoch)

    monkeypatch.setattr("raymem.bank.primary.JournalRows.of", of)
    epoch, acks = bank.info().epoch, []

    async def all_at_once() -> list[Any]:
        inner = bank._async
        writes = [inner.write(tiny.trace(3, run=run)) for run in ("a", "bad", "b", "bad", "c")]
        return await asyncio.gather(*writes, return_exceptions=True)

    acks = bank._loop.run(all_at_once())
    assert [getattr(ack, "rows", str(ack)[:42]) for ack in acks] == [
        *(3, "a trace for bank lab/a could not be taken:", 3, "a trace for bank lab/a could not be taken:", 3)
    ]
    assert bank.info().epoch == epoch


def test_innocent_writers_lose_nothing_beside_bad_ones(run_gateway: Callable[..., Any], tmp_path: Path, tiny: Any):
    with run_gateway(tmp_path / "memory", SETTINGS) as address, raymem.connect(address, settings=SETTINGS) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec())
        epoch = bank.info().epoch
        rows = {"tokens": [1, 2], "hidden": [[[0.5] * 24] * 2] * 2, "stream": "s", "run": "bad"}
        bad = [
            *({"seq": value} for value in (2**63 - 1, 2**63, -1, 1.5, True, "5")),
            *({"time": value} for value in (-1, 1e300, "5", True)),
            *({"stream": value} for value in (42, "", "a\nb", "\u202e", None)),
            *({"tokens": value} for value in ([True, 1], [1.5, 1], [-1, 2**40], [2**63, 1])),
        ]
        done: list[int] = []

        def innocent(name: str) -> None:
            done.extend(bank.write(tiny.trace(2, run=name, seq=2 * step)).rows for step in range(25))

        threads = [threading.Thread(target=innocent, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for change in bad:
            answer = httpx.post(f"{address}/v1/banks/lab/a/write", json=rows | change)
            assert answer.status_code == 422, (change, answer.text)
        # what no client of json writes, and servers read
        text = '{"tokens": [1], "hidden": [[[0.5]]], "stream": "s", "run": "r", "time": NaN}'
        headers = {"Content-Type": "application/json"}
        assert httpx.post(f"{address}/v1/banks/lab/a/write", content=text, headers=headers).status_code == 422
        for thread in threads:
            thread.join()
        assert done == [2] * 75
        assert bank.info().epoch == epoch
        assert bank.info().rows == 150
