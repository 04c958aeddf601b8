"""Compressive Transformer memory: the newest rows as they came, older ones compressed, the oldest forgotten.

Rae et al. 2019, "Compressive Transformers for Long-Range Sequence Modelling" (arXiv 1911.05507). The compression
functions and their losses are in compressors.py.

Shape legend: `B` banks, `T` rows, `G` blocks, `S` rows of a block, `M` rows that it becomes, `R` fine slots, `C` coarse
slots, `m` tokens of a compressed row, `Q` queries, `K` key width, `V` value width, `k` candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from raymem.errors import InvalidSpec
from raymem.kernels.content_address import cosines
from raymem.memory.base import (
    ROWS_END,
    Dims,
    MergeRule,
    Options,
    Projection,
    Shown,
    State,
    StateSpec,
    TensorSpec,
    positions_of,
)
from raymem.memory.compressors import CompressorName, compressor
from raymem.memory.eviction import EvictionOptions
from raymem.memory.key_reservoir import joined_scopes
from raymem.memory.merging import bank_by_bank, interleaved
from raymem.memory.policies import Policy
from raymem.memory.slots import SlotOptions, narrowed, row_spec, rows_of, widened
from raymem.memory.state import Batch, StateMemory, put

_LEAST_ROWS = 16


class CompressiveOptions(SlotOptions):
    """How many rows are kept fine and coarse, and how fine rows become coarse ones.

    At most `fine` rows as they came and `coarse` compressed ones, both fewer in proportion where the budget is small.
    `ratio` rows become one; `block` of them are compressed at a time (None: `ratio`), which matters to `most_used` and
    `dilated_conv`. `log_count` adds log c to a compressed row's logit: it stands for c rows.

    Defaults are measured on a frozen model's states of five texts of 3,072 tokens, 0.15 MB a bank: the next token is
    among the best 8 candidates in 0.359 of cases with `subsample`, 0.329 with `mean`, 0.332 with `max`, 0.351 with as
    many bytes of fine rows alone; `log_count` made it 0.358, 0.313 and 0.333.
    """

    fine: int = Field(default=2048, ge=1)
    coarse: int = Field(default=2048, ge=0)
    ratio: int = Field(default=4, ge=1)
    block: int | None = Field(default=None, ge=1)
    compressor: CompressorName = "subsample"
    log_count: bool = False

    @model_validator(mode="after")
    def _whole_blocks(self) -> CompressiveOptions:
        if self.block is not None and self.block % self.ratio:
            raise ValueError(f"block={self.block} is no multiple of ratio={self.ratio}")
        return self


class Blocks(NamedTuple):
    """Blocks of rows that leave the fine memory together, `[B, G, S, ...]`; `real_BG` says which are there.

    `use_BGS` is the average attention that each row received, where that is counted.
    """

    rows: State
    real_BG: Tensor
    use_BGS: Tensor | None


class Compressive(StateMemory):
    """Two FIFOs: fine rows, and rows compressed c to 1.

    A stream's row carries its next token, so a pooled row stands for c tokens of weight 1/c each and a selected row for
    its own. Rows that have left the fine FIFO wait until their block is full, and are read as they are until then. A
    read weighs rows by `softmax(beta cos)`; candidates are tokens of the rows with most weight, scores the logarithm of
    the weight. Merging is approximate: what was compressed stays so, however the other bank's rows would have cut it.
    """

    kind: ClassVar[str] = "compressive"
    merge_rule: ClassVar[MergeRule] = "approximate"
    options_type: ClassVar[type[Options]] = CompressiveOptions
    learns: ClassVar[tuple[str, ...]] = ("compress", "rule")
    piece: ClassVar[int] = 0

    def __init__(self, dims: Dims, options: CompressiveOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes, Projection(dims.key, options.key_dims, options.projection_seed))
        self.how = options
        self.block = options.block or options.ratio
        self.compress = compressor(options.compressor, options.ratio, self.key_dims)
        if isinstance(options, EvictionOptions) and options.eviction != "fifo":
            self.rule: Policy | None = options.rule(self.key_dims, options.strength)
        else:
            self.rule = None
        self.fine, self.coarse = self._affordable()
        self.check_budget()

    @property
    def slots(self) -> int:
        """Slots of fine rows: those in the FIFO, and those that wait for their block."""
        return self.fine + self.block

    def fine_spec(self) -> StateSpec:
        """One fine slot; `use` is the attention received, where the compressor asks for it."""
        use = {"use": TensorSpec((), low=0)} if self.compress.wants_use else {}
        return row_spec(self.dims, self.key_dims, self.how.key_dtype) | use

    def coarse_spec(self) -> StateSpec:
        """One compressed slot."""
        tokens = 1 if self.compress.selects else self.how.ratio
        return row_spec(self.dims, self.key_dims, self.how.key_dtype, tokens)

    def fixed_spec(self) -> StateSpec:
        """The counter `kept`: blocks that went to the coarse memory since the start."""
        return {"kept": TensorSpec((), torch.int64, low=0, high=ROWS_END)}

    def own_spec(self) -> StateSpec:
        """All slots; see slots, fine_spec, coarse_spec."""
        fine = {f"mem_{n}": s._replace(shape=(self.slots, *s.shape)) for n, s in self.fine_spec().items()}
        coarse = {f"cmem_{n}": s._replace(shape=(self.coarse, *s.shape)) for n, s in self.coarse_spec().items()}
        return fine | coarse | self.fixed_spec()

    def start(self, banks: int) -> State:
        """Empty FIFOs."""
        own = {name: torch.zeros(banks, *spec.shape, dtype=spec.dtype) for name, spec in self.own_spec().items()}
        return own | {"mem_token": own["mem_token"] - 1, "cmem_token": own["cmem_token"] - 1}

    def write_batch(self, state: State, batch: Batch) -> State:
        """Evict and compress the blocks that are full, then take the new rows in."""
        for piece in _single_rows(batch) if self.compress.wants_use else [batch]:
            rows = rows_of(piece, self.dims)
            rows["key"] = narrowed(rows["key"], state["mem_key"].dtype)
            if self.compress.wants_use:
                state = self._attended(state, piece)
                rows["use"] = torch.zeros_like(piece.keys_BTK[..., 0])
            blocks = self._leaving(state, rows, piece)
            state = state | (self.admit(state, blocks) if blocks.real_BG.shape[1] else {})
            state = state | self._filled(state, rows, piece.length_B)
            state = state | {"count": state["count"] + piece.length_B}
        return {name: state[name] for name in self.own_spec()}

    def admit(self, state: State, blocks: Blocks) -> State:
        """The coarse memory after blocks came in, oldest out: `cmem = last n_cm of [cmem, f_c(old)]`.

        Reference:
            1911.05507 algorithm 1.
        """
        return self.stored(state, self.compressed(blocks), blocks.real_BG)

    def compressed(self, blocks: Blocks) -> State:
        """What blocks become, `[B, G, M, ...]`, as it is kept."""
        banks = blocks.real_BG.shape[0]
        use_GS = None if blocks.use_BGS is None else blocks.use_BGS.flatten(0, 1)
        rows = {name: column.flatten(0, 1) for name, column in blocks.rows.items()}
        keys = self.compress(widened(rows["key"], self._dtype(rows["key"])), use_GS)
        new = {"key": narrowed(keys, rows["key"].dtype), "token": self.compress.tokens(rows["token"], use_GS)}
        if self.dims.value:
            new["value"] = self.compress.vectors(rows["value"], use_GS)
        return {name: column.reshape(banks, -1, *column.shape[1:]) for name, column in new.items()}

    def stored(self, state: State, new: State, chosen_BG: Tensor) -> State:
        """The coarse memory after the chosen ones of compressed blocks."""
        made = self.block // self.how.ratio
        rank_BG = state["kept"][:, None] + chosen_BG.cumsum(1) - 1
        kept = state["kept"] + chosen_BG.sum(1)
        row_BGM = rank_BG[..., None] * made + torch.arange(made, device=rank_BG.device)
        stays = chosen_BG[..., None] & (row_BGM >= kept[:, None, None] * made - self.coarse)
        bank, block, row = torch.nonzero(stays, as_tuple=True)
        if not len(bank):
            return {"kept": kept}
        where = (bank, row_BGM[bank, block, row] % self.coarse)
        after = {f"cmem_{n}": put(state[f"cmem_{n}"], where, column[bank, block, row]) for n, column in new.items()}
        return after | {"kept": kept}

    def answer(self, state: State, queries_BQK: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows weighed by content; see the class."""
        log_BQN = self.log_weights(state, queries_BQK)
        values = log_BQN[..., :0]
        if self.dims.value:
            values = log_BQN.exp() @ torch.cat([state["cmem_value"], state["mem_value"]], 1)
        return values, *self._candidates(state, log_BQN, k)

    def log_weights(self, state: State, queries_BQK: Tensor) -> Tensor:
        """Logarithm `[B, Q, C + R]` of the read weighting over coarse and then fine slots, -inf where nothing is held.

        Reference:
            1911.05507 section 3.1, attention over `[cmem, mem]`; log c makes a block of equal rows weigh what the
            rows themselves would.
        """
        logits = [
            self.how.strength * cosines(state[name].to(queries_BQK.dtype), queries_BQK)
            for name in ("cmem_key", "mem_key")
        ]
        if self.how.log_count:
            logits[0] = logits[0] + math.log(self.how.ratio)
        free_B1N = ~torch.cat([self._coarse_held(state), self._fine_number(state) >= 0], 1)[:, None]
        # finite where nothing is held, so that nothing turns into NaN
        masked = torch.cat(logits, -1).masked_fill(free_B1N, torch.finfo(queries_BQK.dtype).min)
        return torch.log_softmax(masked, -1).masked_fill(free_B1N, float("-inf"))

    def in_order(self, state: State, bank: int = 0) -> tuple[State, State]:
        """One bank's fine rows (those that wait for their block among them) and compressed rows, oldest first."""
        number_R = self._fine_number(state)[bank]
        fine = number_R.argsort(stable=True)[int((number_R < 0).sum()) :]
        return _level(state, "mem_", bank, fine), _level(state, "cmem_", bank, self.coarse_order(state, bank))

    def coarse_order(self, state: State, bank: int) -> Tensor:
        """One bank's coarse slots in use, oldest first."""
        total = int(state["kept"][bank]) * (self.block // self.how.ratio)
        return torch.arange(max(0, total - self.coarse), total) % max(1, self.coarse)

    def shown(self, state: State, pos_N: Tensor) -> Shown:
        """Fine rows, and all rows of the blocks that are still in the coarse memory; see Memory.shown."""
        count, number_R = int(state["count"]), self._fine_number(state)[0]
        fine_N = positions_of(number_R[number_R >= 0].sort().values, count, pos_N)
        step_S = torch.arange(self.block, device=number_R.device)
        old_M = (self.coarse_blocks(state)[:, None] * self.block + step_S).flatten()
        return Shown(fine_N, positions_of(old_M, count, pos_N), self.how.ratio)

    def coarse_blocks(self, state: State, bank: int = 0) -> Tensor:
        """Numbers, ascending, of one bank's blocks that the coarse memory has rows of; its rows came block by block."""
        made, kept = self.block // self.how.ratio, int(state["kept"][bank])
        first = max(0, kept * made - self.coarse) // made if self.coarse else kept
        return torch.arange(first, kept, device=state["kept"].device)

    def merge(self, states: Sequence[State]) -> State:
        """Rows of all, interleaved by age, then evicted and compressed again where that is too much; see merging.py."""
        return bank_by_bank(self._merged, states)

    def readmitted(self, state: State, new: State, states: Sequence[State]) -> State:
        """The coarse memory after compressed blocks `[B, G, M, ...]` of other banks came in."""
        return self.stored(state, new, torch.ones_like(new["token"][..., 0, 0], dtype=torch.bool))

    def _merged(self, states: list[State]) -> State:
        start = {name: tensor.to(states[0][name].dtype) for name, tensor in self.init_state(1).items()}
        state = start | joined_scopes(states)
        coarse = self._joined_coarse(states)
        if coarse["token"].shape[1]:
            state |= self.readmitted(state, coarse, states)
        rows, total = self._joined_fine(states), sum(int(s["count"]) for s in states)
        held = rows["token"].shape[1]
        out = max(0, held - self.fine) // self.block * self.block
        if out:
            leaving = {n: c[:, :out].reshape(1, -1, self.block, *c.shape[2:]) for n, c in rows.items()}
            use = leaving.pop("use") / self._age() if self.compress.wants_use else None
            real = torch.ones_like(leaving["token"][..., 0], dtype=torch.bool)
            state |= self.admit(state, Blocks(leaving, real, use))
        # the count says which rows the slots hold; after blocks have left it may be lower by part of a block
        held -= out
        count = held if held < self.fine else total - (total - held) % self.block
        where = (torch.zeros(held, dtype=torch.int64), torch.arange(count - held, count) % self.slots)
        filled = {f"mem_{name}": put(state[f"mem_{name}"], where, column[0, out:]) for name, column in rows.items()}
        return state | filled | {"count": torch.full_like(state["count"], count)}

    def _joined_fine(self, states: list[State]) -> State:
        """Fine rows of all banks `[1, N, ...]`, in the order of one journal."""
        counts = [int(state["count"]) for state in states]
        parts, numbers = [], []
        for which, state in enumerate(states):
            number_R = self._fine_number(state)[0]
            numbers.append(interleaved(number_R[number_R >= 0].sort().values, which, counts))
            parts.append(self.in_order(state)[0])
        order = torch.cat(numbers).argsort()
        return {name: torch.cat([part[name] for part in parts])[order][None] for name in parts[0]}

    def _joined_coarse(self, states: list[State]) -> State:
        """Whole compressed blocks of all banks `[1, G, M, ...]`, by their rank from the newest."""
        made, kept = self.block // self.how.ratio, [int(state["kept"]) for state in states]
        parts, numbers = [], []
        for which, state in enumerate(states):
            rows = self.in_order(state)[1]
            whole = len(rows["token"]) // made
            first = len(rows["token"]) - whole * made
            parts.append({n: column[first:].reshape(whole, made, *column.shape[1:]) for n, column in rows.items()})
            numbers.append(interleaved(torch.arange(kept[which] - whole, kept[which]), which, kept))
        order = torch.cat(numbers).argsort()
        return {name: torch.cat([part[name] for part in parts])[order][None] for name in parts[0]}

    def _age(self) -> Tensor:
        """How many later rows each row of a block has been there for when it leaves `[S]`."""
        return self.block + self.fine - 1 - torch.arange(self.block)

    def _leaving(self, state: State, rows: State, batch: Batch) -> Blocks:
        """Everything but the last n_m of `[mem, h]`, in whole blocks (algorithm 1)."""
        count = state["count"]
        first, after = self._blocks_out(count), self._blocks_out(count + batch.length_B)
        block_BG = first[:, None] + torch.arange(int((after - first).max()), device=count.device)
        step_S = torch.arange(self.block, device=count.device)
        row_BGS = block_BG[..., None] * self.block + step_S
        bank_B11 = torch.arange(len(count), device=count.device)[:, None, None]
        fresh_BGS = (row_BGS - count[:, None, None]).clamp(0, batch.keys_BTK.shape[1] - 1)
        old_BGS = row_BGS < count[:, None, None]

        def taken(name: str, column: Tensor) -> Tensor:
            held = state[f"mem_{name}"][bank_B11, row_BGS % self.slots]
            new = column.to(held.dtype)[bank_B11, fresh_BGS]
            return torch.where(old_BGS.reshape(*old_BGS.shape, *[1] * (held.dim() - 3)), held, new)

        taken_rows = {name: taken(name, column) for name, column in rows.items()}
        use = taken_rows.pop("use") / self._age().to(count.device) if self.compress.wants_use else None
        return Blocks(taken_rows, block_BG < after[:, None], use)

    def _filled(self, state: State, rows: State, length_B: Tensor) -> State:
        """Fine slots after the rows: number n takes slot n mod R."""
        step_T = torch.arange(rows["token"].shape[1], device=length_B.device)
        length_B1 = length_B[:, None]
        bank, row = torch.nonzero((step_T < length_B1) & (step_T >= length_B1 - self.slots), as_tuple=True)
        where = (bank, (state["count"][bank] + row) % self.slots)
        return {f"mem_{name}": put(state[f"mem_{name}"], where, column[bank, row]) for name, column in rows.items()}

    def _attended(self, state: State, batch: Batch) -> State:
        """Attention that each fine row gets from one new row a bank, added to what it got before."""
        keys = batch.keys_BTK
        held_BN = self._fine_number(state) >= 0
        scores_BN = self.how.strength * cosines(state["mem_key"].to(keys.dtype), keys)[:, 0]
        weights_BN = torch.softmax(scores_BN.masked_fill(~held_BN, torch.finfo(keys.dtype).min), -1)
        counts_BN = held_BN & (batch.length_B > 0)[:, None]
        return state | {"mem_use": state["mem_use"] + weights_BN.masked_fill(~counts_BN, 0.0)}

    def _candidates(self, state: State, log_BQN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, row = log_BQN.topk(min(k, log_BQN.shape[-1]), dim=-1)
        width = state["cmem_token"].shape[-1]
        fine_BRm = pad(state["mem_token"][..., None], (0, width - 1), value=-1)
        tokens_BNm = torch.cat([state["cmem_token"], fine_BRm], 1).long()
        tokens = tokens_BNm.gather(1, row.flatten(1)[..., None].expand(-1, -1, width)).reshape(*row.shape, width)
        held = (tokens >= 0) & (best > float("-inf"))[..., None]
        scores = (best - held.sum(-1).clamp_min(1).log())[..., None].masked_fill(~held, float("-inf")).flatten(2)
        top, which = scores.topk(min(k, scores.shape[-1]), dim=-1)
        found = tokens.flatten(2).gather(-1, which).masked_fill(top == float("-inf"), -1)
        spare = (0, k - top.shape[-1])
        return pad(found, spare, value=-1), pad(top, spare, value=float("-inf"))

    def _blocks_out(self, count_B: Tensor) -> Tensor:
        return (count_B - self.fine).clamp_min(0) // self.block

    def _fine_number(self, state: State) -> Tensor:
        """Number `[B, R]` of the row in each fine slot, negative where there is none."""
        count_B1 = state["count"][:, None]
        slot_R = torch.arange(self.slots, device=count_B1.device)
        number_BR = count_B1 - 1 - (count_B1 - 1 - slot_R) % self.slots
        gone_B1 = self._blocks_out(state["count"])[:, None] * self.block
        return number_BR.masked_fill(number_BR < gone_B1, -1)

    def _coarse_held(self, state: State) -> Tensor:
        filled_B1 = state["kept"][:, None] * (self.block // self.how.ratio)
        return torch.arange(self.coarse, device=filled_B1.device) < filled_B1

    @staticmethod
    def _dtype(keys: Tensor) -> torch.dtype:
        return torch.float64 if keys.dtype == torch.float64 else torch.float32

    def _affordable(self) -> tuple[int, int]:
        fixed = sum(spec.nbytes for spec in (self.base_spec() | self.fixed_spec()).values())
        each, less = (sum(s.nbytes for s in spec.values()) for spec in (self.fine_spec(), self.coarse_spec()))
        left = self.budget_bytes - fixed - self.block * each
        wanted = self.how.fine * each + self.how.coarse * less
        if left >= wanted:
            return self.how.fine, self.how.coarse
        fine, least = max(0, left * self.how.fine // wanted), min(_LEAST_ROWS, self.how.fine)
        if fine < least:
            needed = fixed + self.block * each + math.ceil(least * wanted / self.how.fine)
            raise InvalidSpec(
                f"budget_bytes={self.budget_bytes} leaves a {self.kind} bank {fine} fine rows of {each} bytes; it "
                f"needs {least}, so {needed} bytes, or a lower key_dims or block"
            )
        return fine, max(0, (left - fine * each) // less) if self.how.coarse else 0


def _level(state: State, prefix: str, bank: int, where: Tensor) -> State:
    return {n.removeprefix(prefix): column[bank, where] for n, column in state.items() if n.startswith(prefix)}


def _single_rows(batch: Batch) -> list[Batch]:
    """A batch as batches of one row a bank, for what depends on the rows before."""
    return [
        Batch(
            batch.keys_BTK[:, t : t + 1],
            None if batch.values_BTV is None else batch.values_BTV[:, t : t + 1],
            batch.tokens_BT[:, t : t + 1],
            (batch.length_B > t).long(),
        )
        for t in range(batch.keys_BTK.shape[1])
    ]
