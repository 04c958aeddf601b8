"""Eviction policies: given the entries of a full memory and a newcomer, which of them is evicted.

The learned ones are those of Jung et al. 2018, "Learning What to Remember: Long-term Episodic Memory Networks for
Learning from Streaming Data" (arXiv 1812.04227), with the layers of the authors' EMR. Any memory of slots can use them.

Shape legend: `B` banks, `N` slots, `E = N + 1` entries (the newcomer last), `K` key width, `H` hidden width, `T` steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raymem.memory.base import State, StateSpec, TensorSpec
from raymem.memory.key_reservoir import hash62

PolicyName = Literal["fifo", "lifo", "uniform", "reservoir", "lru", "im", "s", "st"]
# how much of the attention's moving average an old value keeps (D-NTM's least-recently-used rule)
_KEPT = 0.1


class Entries(NamedTuple):
    """A memory and a newcomer: unit `keys_BNK`, `arrival_BN` the number of each slot's row (-1 where free), unit
    `newcomer_BK`, and `number_B`, the newcomer's number.
    """

    keys_BNK: Tensor
    arrival_BN: Tensor
    newcomer_BK: Tensor
    number_B: Tensor


class Policy(nn.Module, ABC):
    """Base of the eviction policies.

    A policy keeps its own tensors, one entry a slot; the newcomer's entry moves to the slot that it takes. `numbers`
    names those that hold numbers of rows. A policy that is not `by_content` never looks at keys, which may then have no
    width.
    """

    numbers: ClassVar[tuple[str, ...]] = ()
    by_content: ClassVar[bool] = True

    def spec(self) -> StateSpec:
        """Shape and dtype of one slot's entry in each of the policy's tensors."""
        return {}

    @abstractmethod
    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """Logits `[B, E]` of being evicted, and the policy's tensors with the newcomer's entry behind, `[B, E, ...]`.

        The entry of the largest logit is evicted; a newcomer that is evicted is not written.
        """


class Fifo(Policy):
    """Evicts the oldest."""

    by_content = False

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy."""
        # differences are small enough for float32, numbers need not be
        return (entries.number_B[:, None] - _arrivals(entries)).float(), {}


class Lifo(Policy):
    """Evicts the newcomer: the memory keeps what it saw first."""

    by_content = False

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy."""
        return _only(entries, torch.full_like(entries.number_B, entries.arrival_BN.shape[1])), {}


class Uniform(Policy):
    """Evicts any entry, drawn by a hash of the newcomer's number: a row outlives k more with chance `(N/(N+1))^k`."""

    by_content = False

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy."""
        return _only(entries, hash62(entries.number_B) % (entries.arrival_BN.shape[1] + 1)), {}


class Reservoir(Policy):
    """Holds every row of the stream with the same chance: rows whose numbers have the largest hashes stay."""

    by_content = False

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy."""
        # as many bits as float32 tells apart
        return -(hash62(_arrivals(entries)) >> 38).float(), {}


class Lru(Policy):
    """Evicts the row not used for longest; a newcomer uses the row that it is nearest to."""

    numbers = ("used",)

    def spec(self) -> StateSpec:
        """`used`: number of the row that used the slot last."""
        return {"used": TensorSpec((), torch.int64)}

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy."""
        nearest_B1 = _cosines(entries).argmax(1, keepdim=True)
        number_B1 = entries.number_B[:, None]
        used_BE = torch.cat([own["used"].scatter(1, nearest_B1, number_B1), number_B1], 1)
        return (number_B1 - used_BE).float(), {"used": used_BE}


class InputMatching(Policy):
    """Evicts by attention (IM): the row most like the newcomer, unless it was attended to lately; the newcomer stays.

    `gamma` fixes how much past attention protects a row; None learns it as `sigmoid(w c)`.

    Reference:
        1812.04227 section 3 (IM-LEMN): `z = softmax(M c)`, logits `z - gamma v`, `v <- 0.1 v + 0.9 z`.
    """

    def __init__(self, key_dims: int, strength: float, gamma: float | None) -> None:
        super().__init__()
        self.strength, self.gamma = strength, gamma
        self.protect = nn.Parameter(torch.zeros(key_dims)) if gamma is None else None

    def spec(self) -> StateSpec:
        """`attended`: the moving average v of the attention received."""
        return {"attended": TensorSpec(())}

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy."""
        z_BN = torch.softmax(self.strength * _cosines(entries), -1)
        v_BN = own["attended"]
        if self.protect is None:
            assert self.gamma is not None, "a fixed gamma has no weights"
            logits_BN = z_BN - self.gamma * v_BN
        else:
            learned_B = torch.sigmoid(entries.newcomer_BK @ self.protect.to(entries.newcomer_BK.dtype))
            logits_BN = z_BN - learned_B[:, None] * v_BN
        newcomer_B1 = torch.full_like(logits_BN[:, :1], float("-inf"))
        after_BN = _KEPT * v_BN + (1 - _KEPT) * z_BN
        return torch.cat([logits_BN, newcomer_B1], 1), {"attended": torch.cat([after_BN, 0 * after_BN[:, :1]], 1)}


class Spatial(Policy):
    """An agent that compares all entries (S): a BiGRU over them in the order of arrival.

    Reference:
        1812.04227 section 3 (S-LEMN): `e = BiGRU([M, c])`, `logit_i = w e_i`.
    """

    def __init__(self, key_dims: int, hidden: int, seed: int = 0) -> None:
        super().__init__()
        self.hidden = hidden
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            self.across = nn.GRU(key_dims, hidden, batch_first=True, bidirectional=True)
            self.over_time = nn.GRUCell(2 * hidden, hidden)
            self.weigh = nn.Linear(2 * hidden, 1)
            self.weigh_history = nn.Linear(hidden, 1)

    def encode(self, entries_BEK: Tensor) -> Tensor:
        """Each entry encoded among the others, `[B, E, 2 H]`; entries come in the order of arrival."""
        encoded: Tensor = self.across(entries_BEK)[0]
        return encoded

    def score(self, encoded_BEH: Tensor, history_BEH: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, E]` of what `encode` made, and no history."""
        return self.weigh(encoded_BEH)[..., 0], None

    def forward(self, own: State, entries: Entries) -> tuple[Tensor, State]:
        """See Policy; free slots count as zeros that came before everything."""
        order_BE = _arrivals(entries).argsort(dim=1, stable=True)
        keys_BEK = torch.cat([entries.keys_BNK, entries.newcomer_BK[:, None]], 1)
        weight = self.weigh.weight
        sorted_BEK = _taken(keys_BEK, order_BE).to(weight.dtype)
        history_BEH = None
        if own:
            history_BEH = nn.functional.pad(own["history"], (0, 0, 0, 1)).to(weight.dtype)
            history_BEH = _taken(history_BEH, order_BE)
        logits_BE, history_BEH = self.score(self.encode(sorted_BEK), history_BEH)
        back_BE = order_BE.argsort(dim=1)
        after = {} if history_BEH is None else {"history": _taken(history_BEH, back_BE).to(own["history"].dtype)}
        return logits_BE.gather(1, back_BE), after


class SpatioTemporal(Spatial):
    """The same agent with a recurrent history of each entry (ST).

    Reference:
        1812.04227 section 3 (ST-LEMN): `h_i <- GRU(e_i, h_i)`, `logit_i = w h_i`; a newcomer's history starts at 0.
    """

    def spec(self) -> StateSpec:
        """`history`: h of each slot."""
        return {"history": TensorSpec((self.hidden,))}

    def score(self, encoded_BEH: Tensor, history_BEH: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, E]`, and the histories after this step `[B, E, H]`."""
        assert history_BEH is not None, "this agent goes by the entries' histories"
        after = self.over_time(encoded_BEH.flatten(0, 1), history_BEH.flatten(0, 1)).reshape(history_BEH.shape)
        return self.weigh_history(after)[..., 0], after


class Critic(nn.Module):
    """The expected return of a memory: `h <- GRU(rho(sum_i e_i), h)`, `V = w h`; the entries' order does not matter."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.inner = nn.Sequential(nn.Linear(width, hidden), nn.ReLU())
        self.cell = nn.GRUCell(hidden, hidden)
        self.value = nn.Linear(hidden, 1)

    def forward(self, encoded_BEH: Tensor, hidden_BH: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values `[B]` and the state after; None starts at 0."""
        after = self.cell(self.inner(encoded_BEH.sum(1)), hidden_BH)
        return self.value(after)[..., 0], after


def advantages(rewards_TB: Tensor, values_TB: Tensor, discount: float = 0.99, tau: float = 1.0) -> Tensor:
    """Generalised advantage estimates `[T, B]` of episodes that end after T; tau = 1 is discounted return minus value.

    Reference:
        Schulman et al. 2016 (1506.02438) equation 16; EMR uses tau = 1.
    """
    following_TB = torch.cat([values_TB[1:], torch.zeros_like(values_TB[:1])])
    errors_TB = rewards_TB + discount * following_TB - values_TB
    total, found = torch.zeros_like(errors_TB[0]), []
    for error_B in errors_TB.flip(0):
        total = error_B + discount * tau * total
        found.append(total)
    return torch.stack(found[::-1])


def policy(name: PolicyName, key_dims: int, *, strength: float, gamma: float | None, hidden: int) -> Policy:
    """The policy `name` for keys of `key_dims`."""
    plain: dict[str, type[Policy]] = {
        "fifo": Fifo,
        "lifo": Lifo,
        "uniform": Uniform,
        "reservoir": Reservoir,
        "lru": Lru,
    }
    if name in plain:
        return plain[name]()
    if name == "im":
        return InputMatching(key_dims, strength, gamma)
    return Spatial(key_dims, hidden) if name == "s" else SpatioTemporal(key_dims, hidden)


def _arrivals(entries: Entries) -> Tensor:
    return torch.cat([entries.arrival_BN, entries.number_B[:, None]], 1)


def _cosines(entries: Entries) -> Tensor:
    """Cosine `[B, N]` of the newcomer with each row, -1 (as far as can be) where a slot is free."""
    cosine_BN = (entries.keys_BNK @ entries.newcomer_BK[..., None])[..., 0]
    return cosine_BN.masked_fill(entries.arrival_BN < 0, -1.0)


def _only(entries: Entries, which_B: Tensor) -> Tensor:
    return nn.functional.one_hot(which_B, entries.arrival_BN.shape[1] + 1).float()


def _taken(rows_BEW: Tensor, order_BE: Tensor) -> Tensor:
    return rows_BEW.gather(1, order_BE[..., None].expand(-1, -1, rows_BEW.shape[2]))
