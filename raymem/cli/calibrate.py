"""`raymem calibrate`."""

from __future__ import annotations

from typing import Annotated

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
    opened,
    parse_layers,
)


def calibrate(
    model: ModelOption = DEFAULT_MODEL,
    layers: LayersOption = "26",
    whiten: Annotated[bool, typer.Option("--whiten", help="Also fit a whitening matrix a layer.")] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Learn what a model's states look like, once, from text that ships with Python; banks are created with it.

    For example:

        raymem calibrate

        raymem calibrate --model smollm2-135m --layers 1,26 --store ./memory
    """
    from raymem.encode.fit import calibrate as fit
    from raymem.lm.models import LanguageModel

    with output.waiting(f"loading {model} …"):
        loaded = LanguageModel.load(model)
    with output.progress(f"reading with {model}") as report:
        made = fit(loaded, parse_layers(layers), whiten=whiten, progress=report)
    with opened(store, cold, make=True) as memory:
        kept = memory.put_calibration(made)
    output.show(
        {"hash": kept, "model": made.model, "layers": made.layers, "width": made.width, "whitened": whiten},
        lambda did: f"calibration {did['hash'][:12]} of {model}, layers {layers}, is in {store}",
    )
