"""Arguments of every kind for every public verb, over all three backends, beside a writer who does nothing wrong."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fuzzing import bounded
from hypothesis import given
from hypothesis import strategies as st

import raymem
from raymem import AttendedRows, Bank, Settings, Store
from raymem.config import ColdSettings
from raymem.errors import BackendUnavailable, BankNotFound, Corrupt, InvalidName, RaymemError, StorageError
from raymem.types import Fingerprint

# of one run
ROWS = 4000
SETTINGS = Settings(cold=ColdSettings(sync="none"))
# a mistake in an argument is none of these, and has a class that says what it is
DAMAGE = (Corrupt, StorageError, BackendUnavailable)


class Named(str):
    """Text that is more than text."""

    __slots__ = ()


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**70, 10**400, 10**5000]),
    st.sampled_from([float("nan"), float("inf"), -1e300, -0.0, 0.5, 1.0, 1e-320, 5j, True, False]),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(["", "a", "lab/x", "lab/y", "\ud800", "a\0b", "a\nb", "e\u0301", "é", "x" * 300, "x" * 100_000]),
    st.sampled_from(
        ["1e400", "nan", "-5", "2026-01-31", "9999-12-31T23:59:59-23:59", "🏴‍☠️", "می‌خواهم", "a\u202eb", "'; --"]
    ),
    st.text(max_size=8),
    # lone surrogates too
    st.text(st.characters(), max_size=4),
)
OTHERS: list[Any] = [
    *(
        None,
        b"a",
        bytearray(b"\xff"),
        [],
        ["a"],
        ("lab/x",),
        ["lab/x", "lab/x"],
        {},
        {"a": 1},
        set(),
        object(),
        ...,
        int,
    ),
    *(range(3), Path("/no/such/folder/file"), Named("a"), np.int64(5), np.float32(1.5), np.True_, np.array(["a"])),
    *(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1), datetime.min, datetime.max.replace(tzinfo=UTC)),
]
ARRAYS: list[Any] = [
    *(
        torch.tensor(5),
        torch.tensor(True),
        torch.ones(3, 2, 24),
        torch.ones(3, 2, 24).bfloat16(),
        torch.zeros(0, 2, 24),
    ),
    *(
        torch.ones(1, 1, 1).bfloat16().expand(2**40, 2, 24),
        torch.ones(3, 2, 24, device="meta"),
        torch.ones(3).to_sparse(),
    ),
    *(torch.ones(3, 2, 24, dtype=torch.complex64), torch.full((3, 2, 24), float("nan")).bfloat16(), torch.arange(3)),
    *(
        np.ones((3, 2, 24)),
        np.full((3, 2, 24), 1e300),
        np.broadcast_to(np.float32(1), (2**35, 2, 24)),
        np.zeros((0, 2, 24)),
    ),
    *(
        [[[0.5] * 24] * 2] * 3,
        [[[0.5], [1, 2]]],
        [1, 2, 3],
        [True, 2, 3],
        [2**70, 1, 1],
        np.array([2**64 - 1, 1, 1], np.uint64),
    ),
]
VALUES = st.one_of(NUMBERS, TEXTS, st.sampled_from(OTHERS), st.sampled_from(ARRAYS))
VERBS = [
    (cls, name)
    for cls in (Store, Bank)
    for name, verb in vars(cls).items()
    if inspect.isfunction(verb) and not name.startswith("_") and name != "close"
]
# what would take an innocent writer's rows away, asked for as it should be, has a bank of its own
APART = {
    "attach",
    "detach",
    "restore",
    "migrate",
    "materialise",
    "grow",
    "rebalance",
    "pin",
    "unpin",
    "set_ttl",
    "export",
}


class Beside(NamedTuple):
    """A store, the bank that all use, a good value of every argument, and the innocent writer."""

    store: Store
    tiny: Any
    good: dict[str, Any]
    writer: ThreadPoolExecutor
    written: Iterator[int]
    runs: Iterator[int]

    def write(self) -> None:
        start = next(self.written)
        run, seq = divmod(start, ROWS)
        ack = self.store.bank("lab/x").write(self.tiny.trace(1, stream="innocent", run=str(run), seq=seq))
        assert (ack.rows, ack.gaps, ack.durable) == (1, 0, True)

    def bank(self, verb: str) -> Bank:
        if verb not in APART:
            return self.store.bank("lab/x")
        try:
            self.store.bank("lab/y").attach()
        except BankNotFound:
            self.store.create("lab/y", self.tiny.spec()).write(self.tiny.trace(9))
        return self.store.bank("lab/y")


@pytest.fixture(scope="module")
def beside(
    request: pytest.FixtureRequest, run_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, tiny: Any
) -> Iterator[Beside]:
    folder = tmp_path_factory.mktemp(request.param)
    address, cold = str(folder / "store"), None
    # a relative path is one of an export's
    with ExitStack() as stack, chdir(folder):
        if request.param == "ray":
            request.getfixturevalue("nodes")
            address, cold = "ray", str(folder / "store")
        elif request.param == "http":
            address = stack.enter_context(run_gateway(folder / "store", SETTINGS))
        store = stack.enter_context(raymem.connect(address, cold=cold, settings=SETTINGS))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/x", tiny.spec())
        bank.write(tiny.trace(9))
        bank.tag("t")
        good = {
            **{"name": "lab/new", "source": "lab/x", "target": "lab/new", "sources": ["lab/x"], "spec": tiny.spec()},
            **{
                "stream": "gone",
                "run": "gone",
                "seq_from": 0,
                "seq_to": 5,
                "tag": "u",
                "at": "t",
                "k": 3,
                "node": "nowhere",
            },
            **{
                "to": "nowhere",
                "path": folder / "export.raymem",
                "partitions": 2,
                "content": "content",
                "layers": (3, 5),
            },
            **{"params": "sha256:0", "ttl_s": None, "calibration": tiny.calibration, "learned": None},
        }
        written, epoch = itertools.count(), bank.info().epoch
        yield Beside(store, tiny, good, writer, written, itertools.count())
        # nothing is lost, and the bank was never opened again
        assert bank.info().epoch == epoch
        runs, rest = divmod(next(written), ROWS)
        for run, rows in enumerate([ROWS] * runs + [rest]):
            assert bank.tokens("innocent", str(run), 0, ROWS).tolist() == tiny.trace(rows).tokens.tolist()


def refused(call: Callable[[], object]) -> None:
    """Call; what comes back, or why not, is raymem's own and can be printed."""
    try:
        call()
    except RaymemError as error:
        own(error)


def own(error: RaymemError) -> None:
    assert len(str(error).encode()) < 4000
    assert type(error) is not RaymemError, error
    assert not isinstance(error, DAMAGE), error


def arguments(
    beside: Beside, verb: Callable[..., object], which: int, value: object
) -> tuple[list[Any], dict[str, Any]]:
    """Good values for all arguments of a verb but one."""
    wanted = [each for each in inspect.signature(verb).parameters.values() if each.name != "self"]
    args, kwargs = list[Any](), dict[str, Any]()
    for place, each in enumerate(wanted):
        given = beside.good.get(each.name) if each.default is each.empty else each.default
        if each.name in ("trace", "queries"):
            trace = beside.tiny.trace(2, stream="other", run=str(next(beside.runs)))
            given = trace if each.name == "trace" else trace.hidden
        given = value if wanted and place == which % len(wanted) else given
        if each.kind is each.KEYWORD_ONLY:
            kwargs[each.name] = given
        else:
            args.append(given)
    return args, kwargs


def try_verb(beside: Beside, what: tuple[type, str], which: int, value: object) -> None:
    cls, name = what
    verb = getattr(cls, name)
    args, kwargs = arguments(beside, verb, which, value)
    if name == "erase":
        # whatever else is asked for, of rows that are not there
        kwargs = {"stream": "gone"} | {key: given for key, given in kwargs.items() if given is not None}
    on = beside.store if cls is Store else beside.bank(name)
    innocent = beside.writer.submit(beside.write)
    refused(lambda: getattr(on, name)(*args, **kwargs))
    innocent.result()


def try_trace(beside: Beside, field: str, value: object, durable: bool) -> None:
    trace = dataclasses.replace(beside.tiny.trace(3), run=f"r{next(beside.runs)}")
    innocent = beside.writer.submit(beside.write)
    refused(lambda: beside.store.bank("lab/x").write(dataclasses.replace(trace, **{field: value}), durable=durable))
    innocent.result()


def try_rows(beside: Beside, field: str, value: object, int8: bool) -> None:
    keys, values = torch.ones(2, 3, 5, 2, 4)
    rows = dataclasses.replace(AttendedRows("s", "r", 0, keys, values, rope="theta"), **{field: value})
    innocent = beside.writer.submit(beside.write)
    refused(lambda: beside.store.bank("lab/x").put_rows(rows, int8=int8))
    innocent.result()


def try_spec(beside: Beside, field: str, value: object) -> None:
    spec = beside.tiny.spec()
    refused(lambda: beside.store.create("lab/odd", spec.model_copy(update={field: value})))
    refused(lambda: type(spec)(**(dict(spec) | {field: value})))
    refused(lambda: Fingerprint(**(dict(spec.fingerprint) | {"model": value})))


FIELDS = ("hidden", "tokens", "stream", "run", "seq", "values", "time", "fingerprint")
SPEC = ("kind", "fingerprint", "key", "options", "budget_bytes", "params")
ROWS_FIELDS = tuple(field.name for field in dataclasses.fields(AttendedRows))
BACKENDS = [
    pytest.param("local", id="local"),
    pytest.param("http", id="http"),
    pytest.param("ray", id="ray", marks=[pytest.mark.ray, pytest.mark.timeout(300)]),
]


def each_argument() -> list[tuple[tuple[type, str], int]]:
    """Every verb's every argument, once."""
    counts = {what: len(inspect.signature(getattr(*what)).parameters) - 1 for what in VERBS}
    return [(what, which) for what, count in counts.items() for which in range(count)]


@pytest.mark.parametrize("beside", BACKENDS, indirect=True)
def test_any_value_of_any_argument_is_taken_or_refused(beside: Beside):
    @bounded(120)
    @given(st.sampled_from(each_argument()), VALUES)
    def holds(argument: tuple[tuple[type, str], int], value: object) -> None:
        what, which = argument
        if not (
            what[1] in ("delete", "create", "import_", "fork", "merge") and isinstance(value, str) and value == "lab/x"
        ):
            try_verb(beside, what, which, value)

    holds()


@pytest.mark.parametrize("beside", BACKENDS, indirect=True)
def test_any_value_in_a_trace_or_a_spec_is_taken_or_refused(beside: Beside):
    @bounded(80)
    @given(*map(st.sampled_from, (FIELDS, SPEC, ROWS_FIELDS)), VALUES, st.booleans())
    def holds(field: str, of_spec: str, of_rows: str, value: object, durable: bool) -> None:
        try_trace(beside, field, value, durable)
        try_rows(beside, of_rows, value, durable)
        try_spec(beside, of_spec, value)

    holds()


def test_the_fuzzer_sees_a_foreign_error():
    def foreign() -> None:
        raise OverflowError

    def damage() -> None:
        raise Corrupt("torn")

    with pytest.raises(OverflowError):
        refused(foreign)
    with pytest.raises(AssertionError, match="torn"):
        refused(damage)
    refused(lambda: raymem.types.check_label("stream", "\ud800"))
    with pytest.raises(InvalidName):
        raymem.types.check_label("stream", "\ud800")
