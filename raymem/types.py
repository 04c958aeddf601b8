"""The value types that rooms pass to one another.

Shape legend: `T` rows of a trace, `Q` queries, `L` layers, `D` hidden width, `K` key width, `V` value width,
`k` neighbours, `B` banks; of attended rows `L` attention layers, `N` rows, `H` key and value heads, `d` head width. A
tensor's name ends in its shape: `keys_TK`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from raymem.errors import FingerprintMismatch, InvalidInput, InvalidSpec, InvalidTrace, TooLarge
from raymem.inputs import (
    COUNT_END,
    MOST_ASKED,
    MOST_ATTENDED,
    Check,
    Label,
    bank_name,
    count,
    json_value,
    label,
    moment,
    named,
    numbers,
    shown,
    text,
    whole,
)
from raymem.inputs import shorten as shorten
from raymem.reports import AttendedExtent as AttendedExtent
from raymem.reports import DrainReport as DrainReport
from raymem.reports import FileCheck as FileCheck
from raymem.reports import MergeReport as MergeReport
from raymem.reports import MigrationReport as MigrationReport
from raymem.reports import RebalanceReport as RebalanceReport
from raymem.reports import RestoreReport as RestoreReport
from raymem.reports import ShardInfo as ShardInfo

# a bank's line is read whenever banks are listed: no name and no hash in it is longer, and no set of options
_MOST_OPTIONS, _LONGEST, _MOST_LAYERS = 100, 4096, 1024
_OPTIONS_BYTES = 2**16
_Sized = Annotated[int, BeforeValidator(lambda value: whole(value, 0, COUNT_END, InvalidSpec))]
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# banks keep token ids in four bytes


def _short(value: str) -> str:
    if len(value) > _LONGEST:
        raise InvalidSpec(f"{shown(value)}; give at most {_LONGEST} characters")
    return value


_Hash = Annotated[str, AfterValidator(_short)]


class _Frozen(BaseModel):
    # `model_copy` checks nothing: what it made is checked where it is used
    model_config = ConfigDict(frozen=True, extra="forbid", revalidate_instances="always")

    def __init__(self, /, **fields: Any) -> None:
        try:
            for value in fields.values():
                if isinstance(value, str):
                    _short(text(value[: _LONGEST + 1]))
            super().__init__(**fields)
        except ValidationError as error:
            raise _invalid_spec(type(self).__name__, error) from error
        except InvalidInput as error:
            raise InvalidSpec(f"{type(self).__name__}: {error.message}") from None
        except TypeError as error:
            # a map in place of a spec, whose keys are no text
            raise InvalidSpec(f"{type(self).__name__}: {error}") from error


class Fingerprint(_Frozen):
    """What made a bank's rows: a bank refuses rows and queries of another.

    `layers` are 1-based decoder outputs; layer n = number of layers is the state before the final norm. `content`,
    `tokenizer` and `calibration` are content hashes; `values` is the hash of the output embedding that vector values
    live in ("" when the rows carry no vectors). `model` is a label. `legacy` are the content and tokenizer hashes under
    which raymem 0.3 and earlier knew the same files: banks of theirs are recognised by them.
    """

    model: str
    content: str
    layers: tuple[int, ...] = Field(min_length=1, max_length=_MOST_LAYERS)
    width: int = Field(gt=0)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tokenizer: str
    calibration: str = ""
    values: str = ""
    legacy: tuple[_Hash, _Hash] | None = None

    def require(self, other: Fingerprint) -> None:
        """Raise FingerprintMismatch naming every field in which `other` differs; labels may."""
        self._refuse(self.differences(other))

    def accept(self, made: Fingerprint) -> None:
        """Raise FingerprintMismatch if rows or queries that `made` describes can't be this bank's.

        They depend on no calibration, and name a value space only where they carry vectors.
        """
        wrong = self.differences(made)
        wrong.pop("calibration", None)
        if not made.values:
            wrong.pop("values", None)
        self._refuse(wrong)

    def differences(self, other: Fingerprint) -> dict[str, str]:
        """What `other` has another of, and how, by field."""
        mine, theirs = self.model_dump(), other.model_dump()
        names = [name for name in mine if name not in {"model", "content", "tokenizer", "legacy"}]
        if not self._same_files(other):
            names = ["model", "content", "tokenizer", *names]
        return {
            name: f"{name}: bank has {mine[name]!r}, got {theirs[name]!r}"
            for name in names
            if mine[name] != theirs[name]
        }

    def content_hashes(self) -> tuple[str, ...]:
        """All hashes that the model's content goes by."""
        return (self.content,) if self.legacy is None else (self.content, self.legacy[0])

    def _same_files(self, other: Fingerprint) -> bool:
        mine, theirs = (self.content, self.tokenizer), (other.content, other.tokenizer)
        # one that knows its old hashes beside one that has no others
        if self.legacy is None and other.legacy is not None:
            return mine in (theirs, other.legacy)
        if other.legacy is None and self.legacy is not None:
            return theirs in (mine, self.legacy)
        return mine == theirs

    def _refuse(self, wrong: dict[str, str]) -> None:
        if wrong:
            raise FingerprintMismatch(
                f"made by another model ({'; '.join(wrong.values())}); write to a bank created with this fingerprint",
                fields=list(wrong),
            )


class KeySpec(_Frozen):
    """How rows become keys: which layers, and one state, a trailing-window mean, or one pooled key a span.

    `layers` is a subset of the fingerprint's (all when empty); several layers are concatenated. `window` is in rows.
    """

    function: Literal["single", "window", "span"] = "single"
    layers: tuple[_Sized, ...] = ()
    window: _Sized = Field(default=8, ge=1, le=4096)


class BankSpec(_Frozen):
    """Everything that fixes what a bank is: its kind, whose states it holds, its keys and its byte budget.

    `params` names the weights that its mechanism uses, `sha256:…` as `raymem train` printed it; "" is untrained.
    """

    kind: Label
    fingerprint: Fingerprint
    key: KeySpec = KeySpec()
    options: dict[str, Any] = Field(default_factory=dict)
    budget_bytes: _Sized = Field(default=256 * 2**20, ge=1024)
    params: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$")

    @field_validator("options", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) > _MOST_OPTIONS:
            raise InvalidSpec(f"options are {shown(value)}; give a map of at most {_MOST_OPTIONS} options")
        plain = dict(sorted(json_value(value).items()))
        if len(json.dumps(plain)) > _OPTIONS_BYTES:
            raise InvalidSpec(f"options are over {_OPTIONS_BYTES} bytes as JSON; give less")
        return plain


class RowRef(NamedTuple):
    """Where a row came from: its identity (stream, run, seq) and its position in the bank's journal.

    Each partition of a partitioned bank has a journal of its own: then `partition` says which.
    """

    stream: str
    run: str
    seq: int
    pos: int
    partition: int | None = None


@dataclass(frozen=True)
class Ack:
    """What a write did: rows accepted and already there, the journal position after it, and whether it is durable."""

    rows: int
    duplicates: int
    end: int
    gaps: int
    durable: bool


@dataclass(frozen=True)
class Readout:
    """What a bank answers to Q queries.

    `values_QV` blended vector (V may be 0), `relevance_Q` in [0, 1]. `tokens_Qk` are candidate next tokens (-1 where
    fewer than k) with `scores_Qk` (cosine for row kinds, the memory's own score for state kinds; -inf where absent).
    Where rows are held, `pos_Qk` and `seq_Qk` (int64), and `source_Qk` indexing `sources` say who wrote them. `kind` is
    the bank's: what its scores are worth to a model depends on it.

    Of a partitioned bank `partition_Qk` says whose journal `pos_Qk` counts in, and `missing` which partitions did not
    answer, if the caller allowed that. What one partition answers also has its neighbours' `vectors_QkV`.
    """

    values_QV: Tensor
    relevance_Q: Tensor
    tokens_Qk: Tensor | None = None
    scores_Qk: Tensor | None = None
    pos_Qk: Tensor | None = None
    seq_Qk: Tensor | None = None
    source_Qk: Tensor | None = None
    sources: tuple[tuple[str, str], ...] = ()
    kind: str = ""
    partition_Qk: Tensor | None = None
    missing: tuple[int, ...] = ()
    vectors_QkV: Tensor | None = None

    @property
    def partial(self) -> bool:
        """Whether some partitions did not answer."""
        return bool(self.missing)

    def rows(self, query: int) -> list[RowRef]:
        """Provenance of one query's neighbours, best first; empty for kinds that hold no rows."""
        if self.pos_Qk is None or self.seq_Qk is None or self.source_Qk is None:
            return []
        columns = [column[query].tolist() for column in (self.source_Qk, self.seq_Qk, self.pos_Qk)]
        parts = [None] * len(columns[0]) if self.partition_Qk is None else self.partition_Qk[query].tolist()
        found = zip(*columns, parts, strict=True)
        return [RowRef(*self.sources[int(source)], seq, pos, part) for source, seq, pos, part in found if pos >= 0]


ChoiceMethod = Literal["fused", "states", "bm25", "even", "recent"]


@dataclass(frozen=True)
class AttendQuery:
    """What rows of a bank are chosen by, and how many.

    `hidden_QLD` are states of the text before the tokens that are predicted, in the bank's layers and dtype, `tokens_Q`
    its token ids (int64); "states" needs the first, "bm25" the second, "fused" takes what is there. `layer` is the one
    whose states are compared, the bank's middle one by default. Without `fetch` no keys and values are fetched.
    """

    hidden_QLD: Tensor | None
    tokens_Q: Tensor | None = None
    rows: int = 512
    layer: int | None = None
    method: ChoiceMethod = "fused"
    fetch: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors carried."""
        return sum(0 if tensor is None else tensor.nbytes for tensor in (self.hidden_QLD, self.tokens_Q))

    def checked(self, dtype: torch.dtype) -> AttendQuery:
        """The same as banks take it; see `Trace.checked`. Whether the states fit a bank is for its owner.

        Raises:
            InvalidInput, InvalidTrace, TooLarge: naming the field and the value.
        """
        methods = get_args(ChoiceMethod)
        if not isinstance(self.method, str) or self.method not in methods:
            raise InvalidInput(f"method is {shown(self.method)}; it is one of {', '.join(methods)}")
        tokens_Q = None if self.tokens_Q is None else numbers("tokens", self.tokens_Q, torch.int64)
        if tokens_Q is not None and tokens_Q.dim() != 1:
            raise InvalidTrace(f"tokens are {list(tokens_Q.shape)}; give one id a query: [Q]")
        hidden_QLD = None if self.hidden_QLD is None else numbers("queries", self.hidden_QLD, dtype)
        rows = named("rows", whole, self.rows, 1, MOST_ATTENDED)
        layer = None if self.layer is None else named("layer", count, self.layer)
        made = replace(self, hidden_QLD=hidden_QLD, tokens_Q=tokens_Q, rows=rows, layer=layer)
        made.require_bounded()
        return made

    def require_bounded(self) -> None:
        """Raise TooLarge where there are more states or tokens than a bank compares at once."""
        for what, tensor in (("hidden states", self.hidden_QLD), ("tokens", self.tokens_Q)):
            if tensor is not None and tensor.dim() and len(tensor) > MOST_ASKED:
                raise TooLarge(f"{len(tensor)} {what} to choose by; give at most {MOST_ASKED}, such as the last ones")


@dataclass(frozen=True)
class MemoryTokens:
    """What a model attends to: N rows of a bank, in the order of their slots 0 to N - 1.

    `pos_N` journal positions (int64, -1: a mechanism made the row of several) and `tokens_N` token ids (int64);
    `seq_N` and `source_N`, indexing `sources`, say who wrote them. `relevance` in [0, 1] is that of the best match:
    below the floor nothing is chosen, and N is 0. `kind` is the bank's.

    `keys_LNHd` and `values_LNHd` are of all attention layers; keys are position-free: turned back to position 0. They
    are None where the bank keeps none: then they are rebuilt from the journal's tokens. int8 rows have
    `key_scales_LNH` and `value_scales_LNH` (float32). `partition_N` says whose journal `pos_N` counts in. What one
    partition answers also has the states `states_ND` that its rows were chosen by.
    """

    pos_N: Tensor
    tokens_N: Tensor
    seq_N: Tensor
    source_N: Tensor
    sources: tuple[tuple[str, str], ...]
    relevance: float
    kind: str = ""
    keys_LNHd: Tensor | None = None
    values_LNHd: Tensor | None = None
    key_scales_LNH: Tensor | None = None
    value_scales_LNH: Tensor | None = None
    partition_N: Tensor | None = None
    states_ND: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pos_N)

    @property
    def bytes(self) -> int:
        """What its tensors hold."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def rows(self) -> list[RowRef]:
        """Provenance of the rows that one journal row each became, in the order of their slots."""
        parts = [None] * len(self) if self.partition_N is None else self.partition_N.tolist()
        found = zip(self.source_N.tolist(), self.seq_N.tolist(), self.pos_N.tolist(), parts, strict=True)
        return [RowRef(*self.sources[int(source)], seq, pos, part) for source, seq, pos, part in found if pos >= 0]


@dataclass(frozen=True)
class BankInfo:
    """One line of the catalog, with what its owner says of it when it is hot.

    A partitioned bank has a line for each of its `partitions` and is hot when all of them are; its rows and bytes are
    their sums, a tag's position is the rows that all had together.

    `attended_rows` have keys and values beside the journal, of `attended_bytes`: counted where the bank is asked for
    its info, and 0 in what other verbs answer.
    """

    name: str
    spec: BankSpec
    state: Literal["hot", "cold"]
    epoch: int
    owner: str | None
    node: str | None
    rows: int
    bytes: int
    tags: dict[str, int]
    created: float
    pinned: bool = False
    ttl_s: float | None = None
    partitions: tuple[BankInfo, ...] = ()
    attended_rows: int = 0
    attended_bytes: int = 0


@dataclass(frozen=True)
class Selection:
    """Which rows an erasure is about: those for which everything that is given holds.

    A stream; one of its runs; the run's rows with seq in [`seq_from`, `seq_to`); rows whose trace is older than
    `before`, in seconds since the epoch. `scope` "run" adds what followed in the same runs, whose states were computed
    with these rows in their context. `starts` is raymem's own: where runs were cut in the bank that a fork began as.
    """

    stream: str | None = None
    run: str | None = None
    seq_from: int | None = None
    seq_to: int | None = None
    before: float | None = None
    scope: Literal["rows", "run"] = "rows"
    starts: tuple[RowRef, ...] = ()

    def check(self) -> Selection:
        """Return this selection, its names in NFC, if it can be meant.

        Raises:
            InvalidInput: it would take the whole bank, or names rows without the run that they are of, or by a name, a
                number or a time that no row can have.
        """
        if self.stream is None and self.before is None:
            raise InvalidInput("erase what? name a stream, or a time before which; store.delete removes a whole bank")
        if self.run is not None and self.stream is None:
            raise InvalidInput(f"run {shown(self.run)} of which stream? run ids may repeat: name the stream too")
        if (self.seq_from, self.seq_to) != (None, None) and self.run is None:
            raise InvalidInput("seq_from and seq_to count the rows of a run: name the stream and the run too")
        if not isinstance(self.scope, str) or self.scope not in ("rows", "run"):
            raise InvalidInput(
                f"scope is {shown(self.scope)}; it is 'rows', those that are named, or 'run', also what followed them "
                "in their runs"
            )
        checks: dict[str, Check] = {"stream": label, "run": label, "seq_from": count, "seq_to": count, "before": moment}
        given: dict[str, Any] = {name: getattr(self, name) for name in checks}
        fit: dict[str, Any] = {
            name: value if value is None else named(name, checks[name], value) for name, value in given.items()
        }
        return replace(self, **fit)

    @property
    def whole(self) -> bool:
        """Whether it is about all rows of a stream or of a run."""
        return self.stream is not None and (self.seq_from, self.seq_to, self.before) == (None, None, None)


@dataclass(frozen=True)
class Exposed:
    """Rows of a run that stay and come after its first erased one, `seq_from`."""

    stream: str
    run: str
    seq_from: int
    rows: int


@dataclass(frozen=True)
class EraseReceipt:
    """What an erasure did, and how that is known.

    `status` is "complete" once no file of the bank holds any of the `rows`, "pending" until then (`reason` says what is
    left; a sweep goes on with it), "undone" when the process died before anything was erased. The check ran `before`
    and had to find the rows then: where it did not, `proves` is False and the check `after` means nothing. `forks` are
    banks that began with these rows, with the receipt of the same erasure there. What no check can reach is named in
    `out_of_reach`.

    Of the `rows`, `followed_rows` were not named themselves: the scope "run" took them along. Rows that stay may have
    traces of what went. `exposed_rows` come later in the same runs, so that their states were computed with the erased
    rows in their context; `exposed` says which they are, up to 64 runs. `later_rows` came later in other runs of the
    same streams: whether those had the erased text in their prompts is not known. `same_rows` are, token and states,
    the same as erased ones, under other names. With `names_forgotten`, salted digests stand for stream and run.
    """

    id: str
    bank: str
    bank_id: str
    what: Selection
    rows: int
    generation: int
    status: Literal["pending", "complete", "undone"]
    started: float
    before: FileCheck
    after: FileCheck | None = None
    proves: bool = False
    finished: float | None = None
    reason: str = ""
    forks: dict[str, str] = field(default_factory=dict)
    out_of_reach: tuple[str, ...] = ()
    followed_rows: int = 0
    exposed_rows: int = 0
    exposed: tuple[Exposed, ...] = ()
    later_rows: int = 0
    same_rows: int = 0
    names_forgotten: bool = False

    def is_about(self, stream: str, run: str | None = None) -> bool:
        """Whether this stream was named, and this run or no run: also where the receipt has only their digests.

        Raises:
            InvalidName: what no stream or run can be called.
        """
        asked = [(self.what.stream, check_label("stream", stream))]
        if run is not None and self.what.run is not None:
            asked.append((self.what.run, check_label("run", run)))
        return all(kept is not None and self._is_name(kept, name) for kept, name in asked)

    def _is_name(self, kept: str, name: str) -> bool:
        if not self.names_forgotten:
            return kept == name
        return hmac.compare_digest(kept, name_digest(name, bytes.fromhex(kept.split(":")[1])))


def name_digest(name: str, salt: bytes) -> str:
    """The salted digest that replaces a forgotten name; a guess at the name costs one slow hash."""
    digest = hashlib.scrypt(name.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)
    return f"scrypt:{salt.hex()}:{digest.hex()}"


@dataclass(frozen=True)
class SweepReport:
    """What a sweep deleted, or would: tables that the catalog doesn't name; `young` ones wait. And what it finished.

    `unfinished` counts snapshots that were cut short and whose parts went.
    """

    deleted: tuple[str, ...]
    young: tuple[str, ...]
    bytes: int
    unfinished: int = 0
    receipts: tuple[EraseReceipt, ...] = ()


check_bank_name = bank_name


def check_label(what: str, value: str) -> str:
    """Return a stream, run or tag name in NFC; see `raymem.inputs.label`.

    Raises:
        InvalidName: naming the value (shortened) and the rule.
    """
    return str(named(what, label, value))


def check_spec(spec: object) -> BankSpec:
    """A spec whose every field was checked: `model_copy` checks none.

    Raises:
        InvalidSpec: naming the field and the value.
    """
    if not isinstance(spec, BankSpec):
        raise InvalidSpec(f"{shown(spec)}; give a raymem.BankSpec")
    return BankSpec(**dict(spec))


def _invalid_spec(name: str, error: ValidationError) -> InvalidSpec:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    where = ".".join(str(part) for part in first["loc"])
    said = cause.message if isinstance(cause, InvalidInput) else f"{shown(first['input'])}: {first['msg']}"
    return InvalidSpec(f"{name}: {where}: {said}" if where else f"{name}: {said}")
