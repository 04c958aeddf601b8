"""The `memory` field of a request to vLLM's OpenAI routes: what a caller may ask for, and what is wrong with it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from raymem.errors import InvalidInput
from raymem.serving.vllm.params import ROWS, banks_to_attend, banks_to_read, raymem_params, write_target

FIELD = "memory"
# of a key that a caller made up, in an error
_LONGEST = 80


class MemoryField(BaseModel):
    """What one request wants of memory.

    Its states go to the bank `write`, under the label `stream` (the bank's name by default). Banks to `read` are mixed
    into its logits. Its attention sees `rows` of the banks to `attend`, chosen anew after every `refresh` generated
    tokens, 0 for never. A request that is `required` to have its memory is refused where a bank can't serve it; another
    one runs without that bank, and its answer says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    write: str | None = None
    stream: str | None = None
    read: list[str] = []
    attend: list[str] = []
    rows: int = ROWS
    refresh: int = 0
    required: bool = True

    @classmethod
    def parse(cls, asked: Any) -> MemoryField:
        """Read the field.

        Raises:
            InvalidInput: it is no object, a key is unknown, or a value is of the wrong type; InvalidName: a name that
                no bank or stream can have.
        """
        if not isinstance(asked, Mapping):
            raise InvalidInput(f'{FIELD} is {reprlib.repr(asked)}; give an object like {{"read": ["team/notes"]}}')
        try:
            field = cls.model_validate(dict(asked))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join((FIELD, *(str(part)[:_LONGEST] for part in first["loc"])))
            raise InvalidInput(
                f"{where} is {reprlib.repr(first['input'])}: {first['msg']}; {FIELD} has the keys "
                f"{', '.join(cls.model_fields)}"
            ) from error
        for name, needs in (("stream", "write"), ("rows", "attend"), ("refresh", "attend")):
            if name in field.model_fields_set and not getattr(field, needs):
                raise InvalidInput(
                    f"{FIELD}.{name} is {getattr(field, name)!r} without {FIELD}.{needs}; name a bank there"
                )
        # names are checked here, before anything is looked up
        field.params()
        return field

    @classmethod
    def of_params(cls, kv_transfer_params: Any) -> MemoryField | None:
        """Read `kv_transfer_params["raymem"]`, as `raymem_params` writes it; None for requests of others.

        Raises:
            InvalidInput, InvalidName: as `write_target`, `banks_to_read` and `banks_to_attend`; or it has a key that is
                the engine's own.
        """
        target, attending = write_target(kv_transfer_params), banks_to_attend(kv_transfer_params)
        read = banks_to_read({"kv_transfer_params": kv_transfer_params})
        asked = kv_transfer_params.get("raymem") if isinstance(kv_transfer_params, Mapping) else None
        if asked is None:
            return None
        if others := sorted(set(asked) - {"bank", "stream", "read", "attend"}):
            raise InvalidInput(f'kv_transfer_params["raymem"] has {others[0]!r}; over HTTP, ask with {FIELD}')
        write, stream = (None, None) if target is None else target
        attend = {} if attending is None else {**attending._asdict(), "attend": list(attending.banks)}
        attend.pop("banks", None)
        return cls(write=write, stream=stream, read=list(read), **attend)

    def params(self) -> dict[str, Any]:
        """The `kv_transfer_params` that the engine reads, see `raymem_params`."""
        how: dict[str, Any] = {"rows": self.rows, "refresh": self.refresh, "required": self.required}
        made = raymem_params(self.write, self.stream, self.read, attend=self.attend, **how)
        return dict(made.get("kv_transfer_params", {}))
