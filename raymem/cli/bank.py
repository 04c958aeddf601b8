"""`raymem bank`: the life of a bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymem.cli import output
from raymem.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    ColdOption,
    JsonOption,
    LayersOption,
    ModelOption,
    StoreOption,
    checked,
    opened,
    parse_layers,
)

if TYPE_CHECKING:
    from rich.table import Table

    from raymem.types import BankInfo

app = typer.Typer(no_args_is_help=True, help="Create, list, move, tag, carry away and remove banks.")
Name = Annotated[str, typer.Argument(help="namespace/name, for example research/alice")]


@app.command("ls")
def ls(
    prefix: Annotated[str, typer.Argument(help="Only names that begin so, for example research/")] = "",
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """List banks.

    For example:

        raymem bank ls

        raymem bank ls research/ --store http://127.0.0.1:8765 --json
    """
    with opened(store, cold) as memory:
        found = memory.banks(prefix)
    output.show(found, _table)


@app.command("create")
def create(
    name: Name,
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="The memory algorithm: spalm, titans, larimar, dnc, ntm, compressive, dct or lemn."
        ),
    ] = "spalm",
    model: ModelOption = DEFAULT_MODEL,
    layers: LayersOption = "26",
    key: Annotated[str, typer.Option("--key", help="single, window:N or span:N.")] = "single",
    key_layers: Annotated[str | None, typer.Option("--key-layers", help="The layers keys are made of; all.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="name=value of the kind; repeatable.")] = None,
    budget_mb: Annotated[float, typer.Option("--budget-mb", help="What the bank may hold in memory.")] = 256.0,
    params: Annotated[str, typer.Option("--params", help="Weights that `raymem train` made: sha256:…")] = "",
    partitions: Annotated[
        int, typer.Option("--partitions", help="Over so many shards its rows are spread; each has the budget.")
    ] = 1,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Create a bank for the states of a model.

    The store needs a calibration for the model and these layers: `raymem calibrate`.

    For example:

        raymem bank create research/alice --kind spalm --layers 26

        raymem bank create research/facts --layers 1 --key window:8

        raymem bank create research/alice --kind titans --option chunk=64 --budget-mb 16

        raymem bank create team/all --partitions 4 --store ray
    """
    from raymem.lm.fingerprint import fingerprint_of
    from raymem.types import BankSpec

    fields: dict[str, Any] = {
        "kind": kind,
        "key": parse_key(key, key_layers),
        "options": dict(parse_option(text) for text in option or []),
        "budget_bytes": int(budget_mb * 2**20),
        "params": params,
        # last: of a new model it reads every byte
        "fingerprint": fingerprint_of(model, parse_layers(layers)),
    }
    with opened(store, cold, make=True) as memory:
        info = memory.create(name, checked(BankSpec, fields), partitions=partitions).info()
    output.show(
        info, lambda made: f"created {made.name}: {made.spec.kind}, {made.spec.fingerprint.model} layers {layers}"
    )


@app.command("show")
def show(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """Show one bank: what it is, where it is, how much it holds.

    For example:

        raymem bank show research/alice
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).info()
    output.show(info, _card)


@app.command("attach")
def attach(
    name: Name,
    node: Annotated[str | None, typer.Option("--node", help="Where to; wherever there is room.")] = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Load a bank from the cold store, so that it can be written and read.

    For example:

        raymem bank attach research/alice
    """
    with opened(store, cold) as memory, output.waiting(f"loading {name} …"):
        info = memory.bank(name).attach(node)
    output.show(info, lambda made: f"{made.name} is attached on {made.node}, {made.rows:,} rows")


@app.command("detach")
def detach(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """Settle a bank, write its state down and free its memory; nothing is lost.

    For example:

        raymem bank detach research/alice
    """
    with opened(store, cold) as memory, output.waiting(f"settling {name} …"):
        info = memory.bank(name).detach()
    output.show(info, lambda made: f"{made.name} is detached, {made.rows:,} rows in the cold store")


@app.command("migrate")
def migrate(
    name: Name,
    to: Annotated[str, typer.Option("--to", help="The node; `raymem status` lists them.")],
    partition: Annotated[
        int | None, typer.Option("--partition", min=0, help="Only this one of its partitions.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Move a bank to another node while it is read.

    For example:

        raymem bank migrate research/alice --to NODE --store ray --cold /shared/memory

        raymem bank migrate team/all --partition 2 --to NODE --store ray
    """
    with opened(store, cold) as memory, output.waiting(f"moving {name} …"):
        report = memory.bank(name).migrate(to, partition=partition)
    output.show(
        report,
        lambda did: f"{did.bank}: {did.source} → {did.target}, {did.rows:,} rows, writes paused {did.pause_ms:.0f} ms",
    )


@app.command("pin")
def pin(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """Keep a bank in memory when room is needed for others.

    For example:

        raymem bank pin research/alice
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).pin()
    output.show(info, lambda made: f"{made.name} is pinned")


@app.command("unpin")
def unpin(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """Let a bank leave memory when room is needed; it comes back at its next use.

    For example:

        raymem bank unpin research/alice
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).unpin()
    output.show(info, lambda made: f"{made.name} is not pinned")


@app.command("tag")
def tag(
    name: Name,
    label: Annotated[str, typer.Argument(help="A name for the present position, for example before-merge.")],
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Name a bank's present position.

    For example:

        raymem bank tag research/alice before-merge
    """
    with opened(store, cold) as memory:
        tags = memory.bank(name).tag(label)
    output.show(
        {"bank": name, "tags": tags}, lambda did: output.table(name, ["tag", "rows"], list(did["tags"].items()))
    )


@app.command("export")
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Where to, for example alice.raymem.")],
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a bank to one file.

    For example:

        raymem bank export research/alice alice.raymem
    """
    with opened(store, cold) as memory, output.waiting(f"exporting {name} …"):
        written = memory.bank(name).export(file)
    output.show(
        {"bank": name, "file": str(file), "bytes": written},
        lambda did: f"{did['bank']} → {did['file']}, {output.size(did['bytes'])}",
    )


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `raymem bank export` wrote.", exists=True, dir_okay=False)],
    name: Name,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Create a bank from an exported file; it starts detached.

    For example:

        raymem bank import alice.raymem lab/alice
    """
    with opened(store, cold, make=True) as memory, output.waiting(f"importing {name} …"):
        info = memory.import_(file, name).info()
    output.show(
        info, lambda made: f"imported {made.name}, {made.rows:,} rows; `raymem bank attach {made.name}` loads it"
    )


@app.command("rm")
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    materialise: Annotated[
        bool, typer.Option("--materialise", help="First copy to its forks the rows that they read.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Remove a bank with all its rows, snapshots and tags.

    For example:

        raymem bank rm research/alice --yes
    """
    if not yes:
        typer.confirm(f"Remove {name} and everything in it?", abort=True, err=True)
    with opened(store, cold) as memory:
        memory.delete(name, materialise=materialise)
    output.show({"removed": name}, lambda did: f"removed {did['removed']}")


def parse_key(text: str, layers: str | None) -> dict[str, Any]:
    """A key function from `single`, `window:8` or `span:16`."""
    function, _, window = text.partition(":")
    if window and not window.isdigit():
        raise typer.BadParameter(f"{text!r} is no key function; write single, window:8 or span:16")
    given: dict[str, Any] = {"function": function, "layers": parse_layers(layers) if layers else ()}
    return given | ({"window": int(window)} if window else {})


def parse_option(text: str) -> tuple[str, Any]:
    """Name and value of `name=value`; the value is JSON where it can be, else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is no option; write name=value, for example chunk=64")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _table(found: list[BankInfo]) -> Table:
    rows = [
        [
            info.name,
            info.spec.kind,
            info.state,
            info.node or "",
            info.rows,
            output.size(info.bytes),
            info.spec.fingerprint.model,
        ]
        for info in found
    ]
    return output.table("", ["bank", "kind", "state", "node", "rows", "memory", "model"], rows)


def _card(info: BankInfo) -> Table:
    spec, mark = info.spec, info.spec.fingerprint
    tags = ", ".join(f"{name} at {pos:,}" for name, pos in info.tags.items()) or "none"
    rows = [
        ["kind", spec.kind],
        ["options", json.dumps(spec.options)],
        ["state", f"{info.state}, on {info.node}" if info.node else info.state],
        ["rows", f"{info.rows:,}"],
        ["memory", f"{output.size(info.bytes)} of {output.size(spec.budget_bytes)}"],
        ["model", f"{mark.model} ({mark.content[:12]})"],
        ["layers", ", ".join(map(str, mark.layers))],
        ["states", f"{mark.width} × {mark.dtype}"],
        ["key", spec.key.function if spec.key.function == "single" else f"{spec.key.function} of {spec.key.window}"],
        ["calibration", mark.calibration[:12]],
        ["tags", tags],
    ]
    parts = [[f"partition {index}", _where(part)] for index, part in enumerate(info.partitions)]
    return output.table(info.name, ["", ""], rows + parts)


def _where(info: BankInfo) -> str:
    return f"{info.rows:,} rows, {info.state}{f' on {info.node}' if info.node else ''}, {output.size(info.bytes)}"
