"""Orders from the front end to an engine, as requests carry them: compute and keep a bank's rows, or forget them.

They are signed with a secret of the engine, because requests may come from anyone who reaches the server: a bank's rows
are what its journal says, and no one else's text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from raymem.errors import InvalidInput, Unauthorized


class Order(BaseModel):
    """What the engine does with a bank's rows.

    `capture` keeps the rows of some of the request's tokens: `at` lists their indices, `pos` their positions in the
    bank's journal, both as ranges, end exclusive. `load` keeps rows of `tokens` that workers have read from the bank's
    store, and hold under the name `staged`. `replace` keeps rows that were made of all of a bank, in the same way: they
    stand in the place of the bank's own, and `about` are the tokens that the bank is told by. `release` forgets all of
    the bank's. `store`, `id` and `generation` say which bank, and how often its journal was rewritten.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    do: Literal["capture", "load", "replace", "release"]
    bank: str
    store: str = ""
    id: str = ""
    kind: str = ""
    generation: int = 0
    pos: list[tuple[int, int]] = []
    at: list[tuple[int, int]] = []
    tokens: list[int] = []
    staged: str = ""
    about: list[int] = []

    def signed(self, tokens: Sequence[int], secret: str) -> dict[str, Any]:
        """The `kv_transfer_params` of a request with these tokens that carries the order."""
        return {"raymem": {"order": self.model_dump(mode="json"), "signature": _signature(self, tokens, secret)}}


def listed(ranges: Iterable[tuple[int, int]]) -> list[int]:
    """The numbers that ranges stand for."""
    return [number for start, stop in ranges for number in range(start, stop)]


def ranges(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges, end exclusive."""
    found: list[tuple[int, int]] = []
    for at in positions:
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found


def order_of(kv_transfer_params: Any, tokens: Sequence[int] | None, secret: str) -> Order | None:
    """Read a request's order; None where it has none.

    Raises:
        InvalidInput: it can't be read. Unauthorized: this engine's `attach_rows` did not make it.
    """
    asked = kv_transfer_params.get("raymem") if isinstance(kv_transfer_params, Mapping) else None
    if not isinstance(asked, Mapping) or "order" not in asked:
        return None
    try:
        order = Order.model_validate_json(json.dumps(asked["order"]))
    except (ValidationError, TypeError, ValueError) as error:
        raise InvalidInput("an order that can't be read; raymem.serving.vllm.attach_rows makes them") from error
    signature = _signature(order, tokens or (), secret)
    # strings beyond ASCII can't be compared
    if not hmac.compare_digest(signature.encode(), str(asked.get("signature")).encode(errors="replace")):
        raise Unauthorized(
            f"an order for bank {order.bank!r} that this engine did not sign; attach with "
            "raymem.serving.vllm.attach_rows"
        )
    return order


def _signature(order: Order, tokens: Sequence[int], secret: str) -> str:
    signed = f"{order.model_dump_json()} {list(tokens)}".encode()
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
