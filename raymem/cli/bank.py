"""`raymem bank`: create, list, move, tag and remove banks; their history and their partitions."""

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

    from raymem.types import BankInfo, MergeReport, RebalanceReport, RestoreReport

app = typer.Typer(no_args_is_help=True, help="Create, list, move, tag, export, fork, merge and remove banks.")
Name = Annotated[str, typer.Argument(help="namespace/name, for example research/alice")]
Label = Annotated[str, typer.Argument(help="A tag, for example before-merge.")]
Position = Annotated[int | None, typer.Option("--pos", min=0, help="A position, where there is no tag.")]


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
        # last, because it reads every byte of a new model
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
    """Flush a bank, write its state to the cold store and free its memory; nothing is lost.

    For example:

        raymem bank detach research/alice
    """
    with opened(store, cold) as memory, output.waiting(f"flushing {name} …"):
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
    """Keep a bank in memory when others need room.

    For example:

        raymem bank pin research/alice
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).pin()
    output.show(info, lambda made: f"{made.name} is pinned")


@app.command("unpin")
def unpin(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """Let a bank leave memory when others need room; its next use loads it again.

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
    output.show({"bank": name, "tags": tags}, _tags)


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


@app.command("tags")
def tags(name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False) -> None:
    """List a bank's tags and the positions that they name.

    For example:

        raymem bank tags research/alice
    """
    with opened(store, cold) as memory:
        found = memory.bank(name).tags()
    output.show({"bank": name, "tags": found}, _tags)


@app.command("untag")
def untag(
    name: Name, label: Label, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False
) -> None:
    """Forget a tag; the rows stay.

    For example:

        raymem bank untag research/alice before-merge
    """
    with opened(store, cold) as memory:
        left = memory.bank(name).untag(label)
    output.show({"bank": name, "tags": left}, _tags)


@app.command("restore")
def restore(
    name: Name,
    label: Annotated[str | None, typer.Argument(help="The tag to go back to.")] = None,
    pos: Position = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Go back to a tag; what came after it stays in a bank of its own.

    For example:

        raymem bank restore research/alice before-merge
    """
    at = _one_of(label, pos)
    if at is None:
        raise typer.BadParameter("say where to: a tag (`raymem bank tags` lists them) or --pos N")
    with opened(store, cold) as memory, output.waiting(f"going back in {name} …"):
        report = memory.bank(name).restore(at)
    output.show(report, _restored)


@app.command("fork")
def fork(
    name: Name,
    target: Annotated[str, typer.Argument(help="The new bank, for example research/bob.")],
    at: Annotated[str | None, typer.Option("--at", help="A tag; the present position by default.")] = None,
    pos: Position = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Create a bank that begins with another's rows; none is copied.

    For example:

        raymem bank fork research/alice research/bob

        raymem bank fork research/alice research/bob --at before-merge
    """
    with opened(store, cold) as memory:
        info = memory.fork(name, target, _one_of(at, pos)).info()
    output.show(info, lambda made: f"{made.name} begins with {made.rows:,} rows of {name}")


@app.command("materialise")
def materialise(
    name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False
) -> None:
    """Copy to a fork the rows that it reads from its parent, so that the parent can go.

    For example:

        raymem bank materialise research/bob
    """
    with opened(store, cold) as memory, output.waiting(f"copying rows to {name} …"):
        info = memory.bank(name).materialise()
    output.show(info, lambda made: f"{made.name} has all its {made.rows:,} rows itself")


@app.command("merge")
def merge(
    target: Annotated[str, typer.Argument(help="The new bank, for example team/all.")],
    sources: Annotated[list[str], typer.Argument(help="The banks it is made of.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the state of the rows; some kinds need it.")] = False,
    keep_names: Annotated[
        bool, typer.Option("--keep-names", help="Don't put each bank's name before its streams.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Create a bank from the rows of several, in the order of their times.

    For example:

        raymem bank merge team/all research/alice research/bob
    """
    with opened(store, cold) as memory, output.waiting(f"merging into {target} …"):
        report = memory.merge(target, sources, rebuild=rebuild, rename=not keep_names)
    output.show(report, _merged)


@app.command("grow")
def grow(
    name: Name,
    partitions: Annotated[int, typer.Option("--partitions", help="How many there are to be.")],
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Add empty partitions to a partitioned bank; no stream moves, new ones go where there are fewest.

    For example:

        raymem bank grow team/all --partitions 8 --store ray
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).grow(partitions)
    output.show(
        info, lambda made: f"{made.name} has {len(made.partitions)} partitions; `raymem bank rebalance` evens them"
    )


@app.command("rebalance")
def rebalance(
    name: Name, store: StoreOption = DEFAULT_STORE, cold: ColdOption = None, json_: JsonOption = False
) -> None:
    """Move streams between partitions until none has much more than its share of the rows.

    Streams are read and written meanwhile. The next call finishes one that was cut short.

    For example:

        raymem bank rebalance team/all --store ray
    """
    with opened(store, cold) as memory, output.waiting(f"moving streams of {name} …"):
        report = memory.bank(name).rebalance()
    output.show(report, _rebalanced)
    if report.failed:
        raise typer.Exit(1)


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
        ["keys and values", f"of {info.attended_rows:,} rows, {output.size(info.attended_bytes)}"],
        ["model", f"{mark.model} ({mark.content[:12]})"],
        ["layers", ", ".join(map(str, mark.layers))],
        ["states", f"{mark.width} × {mark.dtype}"],
        ["key", spec.key.function if spec.key.function == "single" else f"{spec.key.function} of {spec.key.window}"],
        ["calibration", mark.calibration[:12]],
        ["tags", tags],
    ]
    for index, part in enumerate(info.partitions):
        where = f"{part.state}{f' on {part.node}' if part.node else ''}"
        rows.append([f"partition {index}", f"{part.rows:,} rows, {where}, {output.size(part.bytes)}"])
    return output.table(info.name, ["", ""], rows)


def _one_of(label: str | None, pos: int | None) -> str | int | None:
    if label is not None and pos is not None:
        raise typer.BadParameter(f"{label!r} and --pos {pos} are two places: name one")
    return pos if label is None else label


def _tags(found: dict[str, Any]) -> Table:
    return output.table(found["bank"], ["tag", "rows"], list(found["tags"].items()))


def _restored(report: RestoreReport) -> str:
    if report.kept_as is None:
        return f"{report.bank} is at position {report.pos:,} already"
    return (
        f"{report.bank} is back at position {report.pos:,}; the {report.undone:,} rows after it are in {report.kept_as}"
    )


def _merged(report: MergeReport) -> str:
    how = "rebuilt from its rows" if report.rebuilt else f"merged from states ({report.rule})"
    lines = [f"{report.bank}: {report.rows:,} rows of {len(report.sources)} banks, {how}"]
    lines += [f"{report.duplicates:,} rows were in two of them, kept once"] * (report.duplicates > 0)
    lines += [f"{report.conflicts:,} rows left out, their names had other content:"] * (report.conflicts > 0)
    return "\n".join([*lines, *report.conflict_rows])


def _rebalanced(report: RebalanceReport) -> str:
    moved = f"{report.bank}: {report.streams:,} streams moved, {report.rows:,} rows, in {report.total_ms / 1e3:.1f} s"
    lines = [f"{moved}; writes of one paused {report.pause_ms:.0f} ms at most"]
    return "\n".join([*lines, *(f"not moved: {stream}: {why}" for stream, why in sorted(report.failed.items()))])
