"""What every memory mechanism is: pure tensor code, learned parameters in the module, state outside it.

Shape legend: `B` banks, `T` or `N` rows, `Q` queries, `K` key width, `V` value width, `k` candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

State = dict[str, Tensor]
# what torch's generators take
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MergeRule = Literal["exact", "approximate", "refused"]


class Options(BaseModel):
    """Base of each kind's options: frozen, and an unknown option is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Dims(NamedTuple):
    """Widths of keys and of the vector values that come with the rows (0: none)."""

    key: int
    value: int


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows of one bank, in the order in which the mechanism must see them.

    `keys_NK` float32, unit length; `tokens_N` int64, the token that followed each row; `values_NV` float32 or None;
    `pos_N`, `seq_N`, `source_N` int64: where each row came from.
    """

    keys_NK: Tensor
    tokens_N: Tensor
    values_NV: Tensor | None
    pos_N: Tensor
    seq_N: Tensor
    source_N: Tensor

    def __len__(self) -> int:
        return int(self.keys_NK.shape[0])


@dataclass(frozen=True)
class Found:
    """A mechanism's answer to queries [Q, K], before calibration turns similarity into relevance.

    `values_QV` float32 blended vector; `similarity_Q` the highest cosine with the keys held, or with the seeded
    reservoir of them (-1 when empty); `tokens_Qk` candidate next tokens (-1 where absent), best first, with
    `scores_Qk` (-inf where absent); row kinds also say where each candidate came from (-1 where absent) and give its
    vector.
    """

    values_QV: Tensor
    similarity_Q: Tensor
    tokens_Qk: Tensor
    scores_Qk: Tensor
    pos_Qk: Tensor | None = None
    seq_Qk: Tensor | None = None
    source_Qk: Tensor | None = None
    vectors_QkV: Tensor | None = None


class Memory(nn.Module, ABC):
    """One mechanism; its parameters are the learned ones only, its state is a value handed in and out.

    These verbs are all that the runtime knows: one bank's state, whatever the family. `absorb` may reuse the storage
    of the state it was given when gradients are off; the caller keeps only what it returns.

    `merge_rule` says what `merge` makes of several banks' states: "exact", the state of one bank that has seen all
    their rows; "approximate", one that such a bank could have; or it is "refused". Each class says which and why.
    """

    kind: ClassVar[str]
    merge_rule: ClassVar[MergeRule]
    options_type: ClassVar[type[Options]] = Options
    # whether a row can be taken out exactly; of the others only a replay without it knows what they would be
    forgets: ClassVar[bool] = False
    # what the names of its learned weights begin with
    learns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dims: Dims, options: Options, budget_bytes: int) -> None:
        super().__init__()
        self.dims = dims
        self.options = options
        self.budget_bytes = budget_bytes

    @abstractmethod
    def empty(self) -> Any:
        """The state of a bank that has seen nothing; reads zeros with similarity -1."""

    @abstractmethod
    def absorb(self, state: Any, rows: EncodedRows) -> Any:
        """Write rows in order; cutting them into other calls gives the same state."""

    @abstractmethod
    def lookup(self, state: Any, queries_QK: Tensor, k: int) -> Found:
        """Read without changing the state."""

    @abstractmethod
    def merge(self, states: Sequence[Any]) -> Any:
        """One state of several of this spec, by the class's `merge_rule`; those given are left as they are.

        Raises:
            Unsupported: the rule is "refused", or these states can't be merged.
            InvalidInput: no states, or states of different forms.
        """

    @abstractmethod
    def dump(self, state: Any) -> State:
        """The whole state as named tensors of its own, which later writes don't touch."""

    @abstractmethod
    def load(self, tensors: State) -> Any:
        """The state that `dump` wrote, bitwise.

        Args:
            tensors: now the state's own; where their storage goes on behind them, rows may grow into it.

        Raises:
            Corrupt: a tensor is missing or has another shape or dtype.
        """

    @abstractmethod
    def nbytes(self, state: Any) -> int:
        """Bytes the state holds; never more than the budget."""
