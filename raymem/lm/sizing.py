"""What options make a bank of each kind as good as its bytes allow."""

from __future__ import annotations

from typing import NamedTuple

from raymem.errors import InvalidSpec
from raymem.memory import build, option_names
from raymem.memory.base import Dims
from raymem.memory.rows import RowMemory
from raymem.memory.state import StateMemory

# a stream of 4,096 tokens of which three quarters are written
ROWS = 3072
# narrower keys lose more than the rows do that no longer fit
_LEAST_KEY_DIMS = 64
# plain text of a few thousand tokens uses about a third as many different ones
_ROWS_A_TOKEN = 3
# other values for a kind that sums rows: it loses less by narrow keys than by tokens without a column
_OTHER = {"larimar": (48, 2)}
# more than any budget pays for: a kind takes as many as fit
_AS_MANY_AS_FIT = 2**20
_CAPACITIES = dict.fromkeys(("slots", "tokens", "fine", "coarse"), _AS_MANY_AS_FIT)
# bytes that buy less than more rows or tokens do: keys beyond 8 bits, sums beyond 32, and a momentum for each weight,
# in whose place steps are longer
_FRUGAL = {"key_dtype": "int8", "cross_dtype": "float32", "eta": 0.0, "theta": 2.0}


class _Needed(NamedTuple):
    """Rows, or different tokens, for which there has to be room."""

    rows: int
    tokens: int


def options_for(kind: str, dims: Dims, budget_bytes: int, rows: int = ROWS) -> dict[str, object]:
    """Options of the `kind` with which a bank fills its budget and serves a stream of `rows` rows best.

    The keys are the widest that leave room for all rows, or where a kind learns a table of tokens for a third as many
    (Larimar: half); but never narrower than 64 (48), where rows or tokens have to make room for each other instead.

    Args:
        kind: one of `raymem.memory.kinds()`.
        dims: widths of the bank's keys and vector values.
        budget_bytes: what a bank may hold.
        rows: how many are expected.

    Raises:
        InvalidSpec: an unknown kind, or a budget that is too small for any such bank.
    """
    names = option_names(kind)
    options: dict[str, object] = {n: value for n, value in (_FRUGAL | _CAPACITIES).items() if n in names}
    least, rows_a_token = _OTHER.get(kind, (_LEAST_KEY_DIMS, _ROWS_A_TOKEN))
    narrow, wide = min(least, dims.key), dims.key
    needed = _Needed(rows, rows // rows_a_token)
    while narrow < wide:
        middle = (narrow + wide + 1) // 2
        roomy = _has_room(kind, dims, options | {"key_dims": middle}, budget_bytes, needed)
        narrow, wide = (middle, wide) if roomy else (narrow, middle - 1)
    build(kind, dims, options | {"key_dims": narrow}, budget_bytes)
    return options | {"key_dims": narrow}


def _has_room(kind: str, dims: Dims, options: dict[str, object], budget_bytes: int, needed: _Needed) -> bool:
    try:
        memory = build(kind, dims, options, budget_bytes)
    except InvalidSpec:
        # keys so wide that the budget does not pay for the least state
        return False
    if isinstance(memory, RowMemory):
        return memory.capacity >= needed.rows
    assert isinstance(memory, StateMemory), "a kind keeps rows or has a bounded state"
    # a table of tokens, or the token of each row
    held = {name: spec.shape[0] for name, spec in memory.state_spec().items() if name.endswith("token")}
    return sum(held.values()) >= (needed.tokens if "slot_token" in held else needed.rows)
