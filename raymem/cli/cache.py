"""`raymem cache show|clear`: the files that this machine keeps beside the stores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymem.cli import output
from raymem.cli.options import JsonOption
from raymem.errors import StorageError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="What this machine keeps beside the stores: passes of text, models.")
_PARTS = {
    # what each is, and the files that raymem makes: nothing else is deleted
    "passes": ("hidden states of texts that were read; with the model they reveal the text", "*.safetensors"),
    "digests": ("hashes of weight files", "[0-9a-f]*"),
    "models": ("the bundled model, unpacked", "*"),
    "train": ("checkpoints from which `raymem train` resumes an unfinished run", "*"),
}
# files that are being written are deleted too; a model's lock stays
_TEMPORARY, _LOCK = "tmp*", ".lock"


@dataclass(frozen=True)
class CachePart:
    """A part of the cache: what it is, its folder, how many files are in it and their bytes."""

    name: str
    what: str
    folder: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Cache:
    """The folder, its parts, and their bytes together."""

    folder: str
    parts: tuple[CachePart, ...]
    bytes: int


@app.callback()
def _group() -> None:
    """What this machine keeps beside the stores: passes of text, models."""


@app.command("show")
def show(json_: JsonOption = False) -> None:
    """List what is kept, where, and how large it is.

    The folder is ~/.cache/raymem, or the one that the variable RAYMEM_CACHE names. Stores are not in it.

    For example:

        raymem cache show

        RAYMEM_CACHE=/scratch/raymem raymem cache show --json
    """
    output.show(_of(_looked_at(tuple(_PARTS))), _card)


@app.command("clear")
def clear(
    passes: Annotated[bool, typer.Option("--passes", help="Hidden states of texts that were read.")] = False,
    digests: Annotated[bool, typer.Option("--digests", help="Hashes of weight files.")] = False,
    models: Annotated[bool, typer.Option("--models", help="The bundled model; unpacked again in 25 s.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Unfinished trainings: they start again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    json_: JsonOption = False,
) -> None:
    """Delete what is named; without a name, all that can be made again: passes, digests and models.

    An erasure does not reach the passes: after erasing text of a bank, clear them on each machine that read the text
    (`raymem calibrate`, `eval`, `train`). Banks and stores are never touched.

    For example:

        raymem cache clear --passes

        raymem cache clear --json
    """
    asked = {"passes": passes, "digests": digests, "models": models, "train": train}
    names = tuple(name for name, wanted in asked.items() if wanted) or ("passes", "digests", "models")
    if train and not yes:
        typer.confirm("Delete the checkpoints of unfinished trainings?", abort=True, err=True)
    parts = _looked_at(names)
    for part in parts:
        _delete(part)
    output.show(_of(parts), lambda made: f"deleted {', '.join(names)}: {output.size(made.bytes)} in {made.folder}")


def _looked_at(names: tuple[str, ...]) -> tuple[CachePart, ...]:
    from raymem.lm.identity import cache_folder

    found = []
    for name in names:
        what, _ = _PARTS[name]
        folder = cache_folder() / name
        sizes = [size for path in _own(name, folder) for size in _sizes(path)]
        found.append(CachePart(name, what, str(folder), len(sizes), sum(sizes)))
    return tuple(found)


def _of(parts: tuple[CachePart, ...]) -> Cache:
    folder = str(Path(parts[0].folder).parent)
    return Cache(folder, parts, sum(part.bytes for part in parts))


def _own(name: str, folder: Path) -> list[Path]:
    """The files of a part that raymem made."""
    _, pattern = _PARTS[name]
    there = {*folder.glob(pattern), *folder.glob(_TEMPORARY)}
    return sorted(path for path in there if path.suffix != _LOCK)


def _sizes(path: Path) -> Iterator[int]:
    for file in (path, *path.rglob("*")):
        if file.is_symlink() or not file.is_dir():
            yield _size(file)


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        # another process has deleted it meanwhile
        return 0


def _delete(part: CachePart) -> None:
    """Delete the files of a part; its folder stays, as other processes may be writing to it.

    Raises:
        StorageError: something can't be deleted.
    """
    for path in _own(part.name, Path(part.folder)):
        try:
            # a link is deleted, not its target
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"can't delete {path}: {error}; delete it by hand, or check its owner") from error


def _card(made: Cache) -> Table:
    rows = [[part.name, part.files, output.size(part.bytes), part.what] for part in made.parts]
    return output.table(f"{made.folder}, {output.size(made.bytes)}", ["part", "files", "size", "what it is"], rows)
