"""`raymem train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymem.cli import output
from raymem.cli.options import (
    DEFAULT_STORE,
    ColdOption,
    JsonOption,
    StoreOption,
    checked,
    is_http,
    opened,
    require_store,
)
from raymem.errors import InvalidInput

if TYPE_CHECKING:
    from raymem.train import TrainReport


def train(
    kind: Annotated[str, typer.Argument(help="compressive, dct, lemn or spalm.")],
    bank: Annotated[str, typer.Option("--bank", help="Whose rows to learn from: namespace/name.")],
    into: Annotated[
        str | None, typer.Option("--into", help="Also create this bank, which uses what was learned.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Of the optimiser; what suits the kind.")] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Learning rate at first; what suits the kind.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed and rows give the same file.")] = 0,
    max_rows: Annotated[int, typer.Option("--max-rows", help="The newest rows of the bank.")] = 20_000,
    goal: Annotated[str, typer.Option("--goal", help="compressive: attention or auto_encoding.")] = "attention",
    keep_rate: Annotated[float, typer.Option("--keep-rate", help="dct: the share of blocks to aim at.")] = 0.5,
    model: Annotated[str | None, typer.Option("--model", help="spalm: the folder of the model that wrote.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Don't go on from an unfinished run.")] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Fit what a kind of memory can learn to a bank's own rows, and keep the weights in the store by their hash.

    compressive learns a convolution in place of pooling, dct which blocks to keep, lemn which row to evict, spalm how
    far to trust it beside its model. Four fifths of the rows are learned from; the figures are of the rest, beside
    what needs no training. The bank is only read: a bank uses the weights if it is created with them. A run that was
    cut short resumes where it was.

    For example:

        raymem train compressive --bank lab/alice

        raymem train dct --bank lab/chats --keep-rate 0.4 --into lab/chats-trained

        raymem bank create lab/new --kind compressive --option compressor=conv --params sha256:…
    """
    if is_http(store):
        raise InvalidInput(
            f"training reads the journal itself, and {store} is a gateway: run it where the cold store is, with "
            "--store naming its folder or address"
        )
    if store.startswith("ray") and cold is None:
        raise InvalidInput(f"--store {store} needs --cold: training reads the cold store that the nodes share")
    require_store(store)
    from raymem.lm.identity import cache_folder
    from raymem.storage.store import ColdStore
    from raymem.train import TrainSettings
    from raymem.train import train as fit

    fields: dict[str, Any] = {
        **{"kind": kind, "steps": steps, "rate": rate, "seed": seed, "max_rows": max_rows},
        **{"goal": goal, "keep_rate": keep_rate, "model": model},
    }
    settings = checked(TrainSettings, fields)
    with output.progress(f"training {kind} on {bank}") as report:
        made = fit(
            ColdStore.open(cold or store), bank, settings, folder=cache_folder() / "train", fresh=fresh, progress=report
        )
    if into is not None:
        with opened(store, cold) as memory:
            memory.create(into, made.spec)
    output.show(made, lambda done: _told(done, into))


def _told(done: TrainReport, into: str | None) -> Any:
    from rich.console import Group

    rows = [[name, f"{figure:.4f}"] for name, figure in done.figures.items()]
    went = f", from step {done.resumed_from} on" if done.resumed_from else ""
    title = f"{done.steps:,} steps{went} on {done.rows - done.held:,} rows; {done.held:,} held out: {done.metric}"
    options = "".join(f" --option {name}={value}" for name, value in done.spec.options.items())
    use = f"created {into}" if into else f"to use it: raymem bank create … --kind {done.spec.kind}{options} --params …"
    return Group(output.table(title, ["", "figure"], rows), done.params, use)
