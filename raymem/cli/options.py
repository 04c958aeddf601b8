"""Options that many commands share, and how they open a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from raymem.cli import output
from raymem.errors import InvalidSpec, NotFound

if TYPE_CHECKING:
    from pydantic import BaseModel

    from raymem.client.store import Store

M = TypeVar("M", bound="BaseModel")
DEFAULT_STORE = "./memory"
DEFAULT_MODEL = "smollm2-135m"

StoreOption = Annotated[
    str,
    typer.Option(
        "--store", envvar="RAYMEM_STORE", help='Folder, object-store address, "ray" or http://… of a gateway.'
    ),
]
ColdOption = Annotated[
    str | None, typer.Option("--cold", help="With --store ray: the cold store that all nodes share.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", callback=output.set_json, help="One JSON document on stdout, nothing else.")
]
FileOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here; - for stdout alone.")
]
ModelOption = Annotated[str, typer.Option("--model", help=f"{DEFAULT_MODEL}, or a folder that transformers can load.")]
LayersOption = Annotated[
    str, typer.Option("--layers", help="Layers whose outputs are kept, from 1; for example 15,26.")
]


@contextmanager
def opened(uri: str, cold: str | None = None, *, make: bool = False) -> Iterator[Store]:
    """Open a store for one command.

    Args:
        uri: see `raymem.connect`.
        cold: with Ray.
        make: whether a folder that is not there yet may be made.
    """
    if not make:
        require_store(uri)
    from raymem.client.store import connect

    with connect(uri, cold=cold, api_key=api_key(uri)) as store:
        yield store


def require_store(uri: str) -> None:
    """Refuse a folder that is not there: a typo is likelier than a wish for an empty store.

    Raises:
        NotFound: naming the commands that make one.
    """
    if is_folder(uri) and not Path(uri).exists():
        raise NotFound(
            f"no store at {uri}; `raymem calibrate` or `raymem bank create` makes one, "
            "--store or RAYMEM_STORE names another"
        )


def api_key(uri: str) -> str | None:
    """The key for a gateway, from the variable RAYMEM_API_KEY: other users could see it on a command line."""
    return os.environ.get("RAYMEM_API_KEY") if is_http(uri) else None


def is_http(uri: str) -> bool:
    """Whether a store is behind a gateway."""
    return uri.startswith(("http://", "https://"))


def is_folder(uri: str) -> bool:
    """Whether a store is a folder of this machine."""
    return uri != "ray" and "://" not in uri


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers from `15,26`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of layer numbers such as 15,26") from error


def checked(cls: type[M], fields: dict[str, Any]) -> M:
    """A model of what was given on the command line.

    Raises:
        InvalidSpec: naming the first field that doesn't fit, and its value.
    """
    from pydantic import ValidationError

    try:
        return cls(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidSpec(f"{where}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}") from error
