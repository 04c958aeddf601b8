"""Titans: a small network whose weights are the memory, trained by one gradient step a token while it is used.

Behrouz et al. 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663).

Shape legend: `B` banks, `T` rows, `Q` queries, `K` key width, `V` value width, `S` token slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raymem.errors import InvalidSpec, Unsupported
from raymem.kernels.delta_update import (
    Transition,
    chunk_delta_update,
    prefers_tokens,
    recurrent_delta_update,
    transition,
)
from raymem.memory import nets
from raymem.memory.base import Dims, MergeRule, Options, Projection, Seed, State, StateSpec, TensorSpec
from raymem.memory.codes import OneHotCode, SignCode, SoftmaxCode, TokenCode, ValueCode, VectorCode
from raymem.memory.key_reservoir import joined_scopes
from raymem.memory.merging import bank_by_bank, interleaved
from raymem.memory.state import Batch, StateMemory

_LEAST_SLOTS = 16
Gates = tuple[Tensor, Tensor, Tensor]


class TitansOptions(Options):
    """The network, its learning rule, and its targets.

    `values`: the target of a row. "softmax": its next token, under the cross-entropy over the tokens seen; "onehot":
    the same under the squared loss; "signs": a code of `code_width` signs for the token; "vectors": the vector that
    came with the row. "auto" is vectors where rows carry them, else softmax. At most `slots` tokens can come out.
    `depth` layers, hidden ones `expansion` times the key's width; `residual_norm` puts `LN(.) + k` around them.
    `theta` is the step size, `eta` the momentum (None: 0.9 for softmax, else 0), `alpha` the decay. Under the squared
    loss a linear memory with unit keys stores exactly at theta 0.5 and eta 0, and is stable while theta < 1 + eta.
    `gradient`: at which weights a token's gradient is taken, its own ("token") or those at the start of its chunk
    ("chunk", the paper's parallel form); None is chunk for softmax, else token. `chunk` rows are written at once, and
    its borders lie at multiples of `chunk` in the bank's row count. `clip` bounds the norm of a token's gradient.
    `learned` makes theta, eta and alpha functions of the key, and the first weights parameters.
    """

    values: Literal["auto", "softmax", "onehot", "signs", "vectors"] = "auto"
    slots: int = Field(default=1024, ge=_LEAST_SLOTS)
    code_width: int = Field(default=256, ge=1)
    depth: int = Field(default=1, ge=1, le=8)
    expansion: float = Field(default=4.0, gt=0)
    residual_norm: bool = False
    theta: float = Field(default=0.5, ge=0, le=4)
    eta: float | None = Field(default=None, ge=0, lt=1)
    alpha: float = Field(default=0.0, ge=0, le=1)
    gradient: Literal["token", "chunk"] | None = None
    chunk: int = Field(default=16, ge=1, le=256)
    clip: float | None = Field(default=None, gt=0)
    learned: bool = False
    key_dims: int | None = Field(default=None, ge=1)
    projection_seed: Seed = 0
    seed: Seed = 0

    def resolved(self, value_width: int) -> TitansOptions:
        """The same options with what depends on the kind of value filled in."""
        values = ("vectors" if value_width else "softmax") if self.values == "auto" else self.values
        soft = values == "softmax"
        eta = (0.9 if soft else 0.0) if self.eta is None else self.eta
        gradient = ("chunk" if soft else "token") if self.gradient is None else self.gradient
        return self.model_copy(update={"values": values, "eta": eta, "gradient": gradient})


class Titans(StateMemory):
    """Writes by `S = eta S - theta grad loss`, `M = (1 - alpha) M + S`; reads `M(q)`.

    The squared loss is summed over features: titans-pytorch averages it, so its step sizes are V times larger for the
    same update. Rows of an unfinished chunk wait in the state; a read sees them as if the chunk ended there. A row
    can't be taken out of a bank without its journal.

    Merging is approximate, and refused unless the memory is linear. The sum of updates is exact for gradients taken at
    common weights (rows that still wait), and under the squared loss without momentum and decay where the banks' keys
    are orthogonal; else each bank's later steps were taken without the other's, and what both learned counts twice.
    """

    kind: ClassVar[str] = "titans"
    merge_rule: ClassVar[MergeRule] = "approximate"
    options_type: ClassVar[type[Options]] = TitansOptions
    learns: ClassVar[tuple[str, ...]] = ("gate", "first")

    def __init__(self, dims: Dims, options: TitansOptions, budget_bytes: int) -> None:
        projection = Projection(dims.key, options.key_dims, options.projection_seed)
        super().__init__(dims, options, budget_bytes, projection)
        self.titans = options = options.resolved(dims.value)
        self.eta = options.eta or 0.0
        linear = options.depth == 1 and not options.residual_norm
        # each token's error given those before it solves a linear system; other memories go token by token
        self.solved = linear and options.gradient == "token" and options.clip is None and options.values != "softmax"
        self.chunk = options.chunk if self.solved or options.gradient == "chunk" else 1
        self.has_momentum = self.eta > 0 or options.learned
        self.code = self._make_code()
        if options.residual_norm and self.code.width != self.key_dims:
            raise InvalidSpec(
                f"residual_norm adds the key to the output: key width {self.key_dims}, output width {self.code.width}"
            )
        self.check_budget()
        self._moves: dict[tuple[int, torch.dtype, torch.device], Transition] = {}
        if options.learned:
            self.gate = _gate(self.key_dims, self.eta, options)
            self.first = nn.ParameterList(self._first_weights())

    def own_spec(self) -> StateSpec:
        """Weights, momenta, the code's table, and the rows that wait for their chunk to fill."""
        shapes = itertools.pairwise([*self._hidden_widths(), self.code.width])
        layers = {f"weight_{layer}": TensorSpec(shape) for layer, shape in enumerate(shapes)}
        momenta = {name.replace("weight", "momentum"): spec for name, spec in layers.items()}
        item = self.code.item_spec()
        waiting = {
            "wait_key": TensorSpec((self.chunk - 1, self.key_dims)),
            "wait_item": TensorSpec((self.chunk - 1, *item.shape), item.dtype),
        }
        return layers | (momenta if self.has_momentum else {}) | self.code.spec() | waiting

    def start(self, banks: int) -> State:
        """Zero weights for a linear memory; a deeper one starts with a last layer of zeros, so that it too reads 0."""
        own = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.own_spec().items()}
        for layer, weight in enumerate(self.first if self.titans.learned else self._first_weights()):
            own[f"weight_{layer}"] = weight.to(own["wait_key"].device).expand(banks, -1, -1).clone()
        if "slot_token" in own:
            own["slot_token"] -= 1
        return own

    def write_batch(self, state: State, batch: Batch) -> State:
        """Learn the rows; full chunks change the weights, the rest waits."""
        items = self.code.items(batch)
        if self.chunk == 1:
            return self._own(self._rows(state, batch.keys_BTK, items, batch.length_B))
        keys, items, total_B = self._queue(state, batch.keys_BTK, items, batch.length_B)
        for start in range(0, int(total_B.max()) - self.chunk + 1, self.chunk):
            length_B = torch.where(total_B >= start + self.chunk, self.chunk, 0)
            block = slice(start, start + self.chunk)
            state = self._advance(state, keys[:, block], items[:, block], length_B)
        return self._own(state | self._waiting(keys, items, total_B))

    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """`M(q)`, decoded into candidate tokens where the memory was taught tokens."""
        ahead = self._look_ahead(state)
        return self.code.decode(ahead, self._output(ahead, queries_BQK), k)

    def surprise(self, state: State, keys_BTK: Tensor, values_BTV: Tensor | None, tokens_BT: Tensor) -> Tensor:
        """Loss [B, T] of each row under the memory as it stands, nothing being written.

        That is `-log p(token)` for softmax, `|M(k) - v|^2` for the others. A token not in the table counts as one that
        has just entered it.

        Args:
            state: of B banks.
            keys_BTK: `[B, T, K]` unit keys.
            values_BTV: `[B, T, V]` where the bank learns vectors.
            tokens_BT: int64 `[B, T]` next tokens.

        Reference:
            Titans (2501.00663) equation 12: the gradient of this loss is the momentary surprise.
        """
        keys = self.project(keys_BTK).to(state["scope_scale"].dtype)
        items = self.code.items(Batch(keys, values_BTV, tokens_BT, state["count"]))
        ahead = self._look_ahead(state)
        return self.code.loss(ahead, self._output(ahead, keys), items)

    def merge(self, states: Sequence[State]) -> State:
        """`M = M_0 + sum_s (M_s - M_0)` of a linear memory, its momenta added likewise; see the class.

        Token tables become one, of the tokens written last. Waiting rows of all are put in order and learned when they
        fill chunks.

        Raises:
            Unsupported: the memory is not linear.
        """
        if self.titans.depth > 1 or self.titans.residual_norm:
            raise Unsupported(
                f"titans banks of depth {self.titans.depth} with residual_norm={self.titans.residual_norm} can't be "
                "merged, their weights are not linear in what they learned: write both journals to a new bank"
            )
        return bank_by_bank(self._merged, states)

    def _merged(self, states: list[State]) -> State:
        start = {name: tensor.to(states[0][name].dtype) for name, tensor in self.init_state(1).items()}
        merged, columns = self._merged_tables(start, states)
        for name in ("weight_0", "momentum_0") if self.has_momentum else ("weight_0",):
            merged[name] = start[name].clone()
            for state, column in zip(states, columns, strict=True):
                change = state[name] - start[name]
                here = slice(None) if column is None else column >= 0
                where = slice(None) if column is None else column[column >= 0]
                merged[name][..., where] += change[..., here]
        counts = [int(state["count"]) for state in states]
        learned = sum(count // self.chunk * self.chunk for count in counts)
        merged = start | merged | joined_scopes(states) | {"count": torch.full_like(start["count"], learned)}
        own = self.write_batch(merged, self._all_waiting(states, counts)) if self.chunk > 1 else {}
        return merged | own | {"count": torch.full_like(start["count"], sum(counts))}

    def _merged_tables(self, start: State, states: list[State]) -> tuple[State, list[Tensor | None]]:
        """One table of the tokens written last, and where each state's output columns go (-1: nowhere; None: stay)."""
        if not isinstance(self.code, TokenCode):
            return {}, [None] * len(states)
        newest = max(int(state["slot_used"].max()) for state in states)
        # a token keeps its age; the younger of two counts
        ages = [state["slot_used"][0] + newest - int(state["slot_used"].max()) for state in states]
        known, inverse = torch.unique(torch.cat([state["slot_token"][0] for state in states]), return_inverse=True)
        used = torch.zeros_like(known).scatter_reduce(0, inverse, torch.cat(ages), "amax").masked_fill(known < 0, -1)
        kept = used.argsort(descending=True, stable=True)[: self.code.slots]
        kept = kept[known[kept] >= 0].sort().values
        place = torch.full_like(known, -1).scatter(0, kept, torch.arange(len(kept)))
        table = {"slot_token": start["slot_token"].clone(), "slot_used": start["slot_used"].clone()}
        table["slot_token"][0, : len(kept)], table["slot_used"][0, : len(kept)] = known[kept], used[kept]
        columns = torch.split(place[inverse], [len(age) for age in ages])
        return table, [column if isinstance(self.code, OneHotCode) else None for column in columns]

    def _all_waiting(self, states: list[State], counts: list[int]) -> Batch:
        """Rows of all banks that wait for a chunk to fill, oldest first."""
        waiting = [count % self.chunk for count in counts]
        numbers = [interleaved(torch.arange(w), which, waiting) for which, w in enumerate(waiting)]
        order = torch.cat(numbers).argsort()
        keys, items = (
            torch.cat([state[name][0, :w] for state, w in zip(states, waiting, strict=True)])[order][None]
            for name in ("wait_key", "wait_item")
        )
        return Batch(keys, items, items, torch.tensor([sum(waiting)]))

    def _hidden_widths(self) -> list[int]:
        hidden = max(1, round(self.key_dims * self.titans.expansion))
        return [self.key_dims, *[hidden] * (self.titans.depth - 1)]

    def _make_code(self) -> ValueCode:
        options = self.titans
        if options.values == "vectors":
            if not self.dims.value:
                raise InvalidSpec("values='vectors' needs rows that carry vectors; this bank's fingerprint names none")
            return VectorCode(self.dims.value)
        if options.values == "signs":
            return SignCode(self._affordable_slots(outputs=options.code_width, outputs_a_slot=0), options.code_width)
        code = SoftmaxCode if options.values == "softmax" else OneHotCode
        return code(self._affordable_slots(outputs=0, outputs_a_slot=1))

    def _affordable_slots(self, *, outputs: int, outputs_a_slot: int) -> int:
        copies, hidden = 8 if self.has_momentum else 4, self._hidden_widths()
        weights = copies * sum(a * b for a, b in itertools.pairwise([*hidden, outputs]))
        waiting = (self.chunk - 1) * (4 * self.key_dims + 8)
        fixed = weights + waiting + sum(spec.nbytes for spec in self.base_spec().values())
        each = 16 + copies * hidden[-1] * outputs_a_slot
        slots, least = min(self.titans.slots, (self.budget_bytes - fixed) // each), max(_LEAST_SLOTS, self.chunk)
        if slots < least:
            raise InvalidSpec(
                f"budget_bytes={self.budget_bytes} and slots={self.titans.slots} leave a titans bank {max(0, slots)} "
                f"token slots of {each} bytes; it needs {least}, so {fixed + least * each} bytes, or a lower key_dims"
            )
        return slots

    def _first_weights(self) -> list[Tensor]:
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(self.titans.seed)
            hidden = self._hidden_widths()
            # xavier, but for a last layer of zeros: an untrained memory reads zeros
            made = [
                (torch.rand(a, b, generator=generator) * 2 - 1) * math.sqrt(6 / (a + b))
                for a, b in itertools.pairwise(hidden)
            ]
            return [*made, torch.zeros(hidden[-1], self.code.width)]

    def _layers(self, state: State) -> tuple[list[Tensor], list[Tensor] | None]:
        weights = [state[f"weight_{layer}"] for layer in range(self.titans.depth)]
        if not self.has_momentum:
            return weights, None
        return weights, [state[f"momentum_{layer}"] for layer in range(self.titans.depth)]

    def _with(self, state: State, weights: list[Tensor], momenta: list[Tensor] | None) -> State:
        changed = {f"weight_{layer}": weight for layer, weight in enumerate(weights)}
        return state | changed | {f"momentum_{layer}": momentum for layer, momentum in enumerate(momenta or [])}

    def _own(self, state: State) -> State:
        return {name: state[name] for name in self.own_spec()}

    def _output(self, state: State, keys_BTK: Tensor) -> Tensor:
        return nets.forward(self._layers(state)[0], keys_BTK, residual_norm=self.titans.residual_norm)

    def _gates(self, keys_BTK: Tensor) -> Gates:
        if self.titans.learned:
            theta, eta, alpha = torch.sigmoid(self.gate.to(keys_BTK.dtype)(keys_BTK)).unbind(-1)
            return theta, eta, alpha
        constants = (self.titans.theta, self.eta, self.titans.alpha)
        theta, eta, alpha = (keys_BTK.new_full(keys_BTK.shape[:2], gate) for gate in constants)
        return theta, eta, alpha

    def _advance(
        self, state: State, keys_BTK: Tensor, items_BT: Tensor, length_B: Tensor, *, push: bool = True
    ) -> State:
        """The state after one chunk, of which each bank's first `length_B` rows count; momenta stay without `push`."""
        own, cleared = self.code.enter(state, items_BT, length_B)
        state = state | own
        if cleared is not None:
            state = state | self._cleared(state, cleared)
        active_BT = torch.arange(keys_BTK.shape[1], device=keys_BTK.device) < length_B[:, None]
        active = None if bool(active_BT.all()) else active_BT
        theta, eta, alpha = self._gates(keys_BTK)
        target = self.code.target(state, items_BT, keys_BTK.dtype)
        weights, momenta = self._layers(state)
        if self.solved and prefers_tokens(weights[0]):
            momentum = None if momenta is None else momenta[0]
            gates = (theta, eta, alpha)
            weight, momentum, _ = recurrent_delta_update(weights[0], momentum, keys_BTK, target, gates, active)
            return self._with(state, [weight], None if momentum is None else [momentum])
        moves = self._transition(eta, alpha, active)
        theta = theta if active is None else theta * active
        if self.solved:
            momentum = None if momenta is None else momenta[0]
            weight, momentum, _ = chunk_delta_update(weights[0], momentum, keys_BTK, target, theta, moves)
            return self._with(state, [weight], None if momentum is None else [momentum])
        found = nets.signals(
            weights,
            keys_BTK,
            lambda output: self.code.slope(state, output, target),
            residual_norm=self.titans.residual_norm,
        )
        theta = theta if self.titans.clip is None else nets.clipped(theta, found, self.titans.clip)
        return self._with(state, *nets.chunk_step(weights, momenta, found, theta, moves, push=push))

    def _transition(self, eta: Tensor, alpha: Tensor, active_BT: Tensor | None) -> Transition:
        if self.titans.learned or active_BT is not None:
            return transition(eta, alpha, active_BT)
        name = (eta.shape[1], eta.dtype, eta.device)
        if name not in self._moves:
            self._moves[name] = transition(eta[:1], alpha[:1])
        return self._moves[name]

    def _rows(self, state: State, keys_BTK: Tensor, items_BT: Tensor, length_B: Tensor) -> State:
        """The state after rows written one by one."""
        if self.solved and isinstance(self.code, VectorCode):
            active_BT = torch.arange(keys_BTK.shape[1], device=keys_BTK.device) < length_B[:, None]
            active = None if bool(active_BT.all()) else active_BT
            weights, momenta = self._layers(state)
            momentum = None if momenta is None else momenta[0]
            weight, momentum, _ = recurrent_delta_update(
                weights[0], momentum, keys_BTK, items_BT, self._gates(keys_BTK), active
            )
            return self._with(state, [weight], None if momentum is None else [momentum])
        for t in range(keys_BTK.shape[1]):
            row = slice(t, t + 1)
            state = self._advance(state, keys_BTK[:, row], items_BT[:, row], (length_B > t).long())
        return state

    def _queue(
        self, state: State, keys_BTK: Tensor, items_BT: Tensor, length_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that wait and the new ones behind them, and how many there are of each bank."""
        waiting_B1 = (state["count"] % self.chunk)[:, None]
        place = torch.arange(self.chunk - 1 + keys_BTK.shape[1], device=waiting_B1.device)
        source = torch.where(place < waiting_B1, place, place - waiting_B1 + self.chunk - 1).clamp_max(len(place) - 1)
        keys = torch.cat([state["wait_key"], keys_BTK], 1)
        items = torch.cat([state["wait_item"], items_BT], 1)
        return _take(keys, source), _take(items, source), waiting_B1[:, 0] + length_B

    def _waiting(self, keys: Tensor, items: Tensor, total_B: Tensor) -> State:
        place = (total_B // self.chunk * self.chunk)[:, None] + torch.arange(self.chunk - 1, device=total_B.device)
        here = place < total_B[:, None]
        source = torch.where(here, place, 0)
        return {"wait_key": _only(_take(keys, source), here), "wait_item": _only(_take(items, source), here)}

    def _look_ahead(self, state: State) -> State:
        """The state with the waiting rows learned, for reading only."""
        waiting_B = state["count"] % self.chunk
        rows = int(waiting_B.max())
        if rows == 0:
            return state
        # a copy: the next write starts from the weights as they are
        own = {f"weight_{layer}": weight.clone() for layer, weight in enumerate(self._layers(state)[0])}
        keys, items = state["wait_key"][:, :rows], state["wait_item"][:, :rows]
        return self._advance(state | own, keys, items, waiting_B, push=False)

    def _cleared(self, state: State, cleared_BV: Tensor) -> State:
        """Output columns whose token changed, emptied."""
        last = self.titans.depth - 1
        names = [f"weight_{last}", *([f"momentum_{last}"] if self.has_momentum else [])]
        return {name: state[name].masked_fill(cleared_BV[:, None], 0.0) for name in names}


def _gate(width: int, eta: float, options: TitansOptions) -> nn.Linear:
    gate = nn.Linear(width, 3)
    nn.init.zeros_(gate.weight)
    # a sigmoid never reaches 0 or 1; a decay that starts near 0.5 would forget within a token
    start = torch.tensor([options.theta, eta, options.alpha]).clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        gate.bias.copy_(torch.logit(start))
    return gate


def _take(rows: Tensor, source_BT: Tensor) -> Tensor:
    if rows.dim() == 2:
        return rows.gather(1, source_BT)
    return rows.gather(1, source_BT[..., None].expand(-1, -1, rows.shape[2]))


def _only(rows: Tensor, here_BT: Tensor) -> Tensor:
    return rows.masked_fill(~(here_BT if rows.dim() == 2 else here_BT[..., None]), 0)
