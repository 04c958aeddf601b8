"""`raymem recall`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from raymem.cli import output
from raymem.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    ColdOption,
    JsonOption,
    ModelOption,
    StoreOption,
    api_key,
    is_http,
    require_store,
)

if TYPE_CHECKING:
    from rich.console import Group

    from raymem.serving.schemas import RecallAnswer


def recall(
    name: Annotated[str, typer.Argument(help="The bank, for example research/alice.")],
    text: Annotated[str, typer.Argument(help="What to look for, in words.")],
    k: Annotated[int, typer.Option("-k", help="How many spans.", min=1, max=100)] = 5,
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="A tag or a time: ask what the bank was. 2026-01-31T12:00:00Z")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Go without partitions of the bank that don't answer in time.")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Ask a bank in words: the text runs through the bank's model, the answer is text that was written there.

    With a gateway as the store, its model is used and none is needed here.

    For example:

        raymem recall research/alice "how is a class body executed?"

        raymem recall research/alice "tides" --as-of before-merge

        raymem recall research/alice "tides" -k 3 --store http://127.0.0.1:8765 --json
    """
    with output.waiting("reading …"):
        answer = asyncio.run(_recall(name, text, k, as_of, allow_partial, model, store, cold))
    output.show(answer, _render)


async def _recall(
    name: str, text: str, k: int, as_of: str | None, allow_partial: bool, model: str, store: str, cold: str | None
) -> RecallAnswer:
    from raymem.client.store import AsyncStore
    from raymem.serving.recall import RecallModel, recall
    from raymem.serving.schemas import RecallAnswer

    require_store(store)
    memory = await AsyncStore.connect(store, cold=cold, api_key=api_key(store))
    try:
        bank = memory.bank(name)
        if is_http(store):
            from raymem.client.http import HttpBackend

            assert isinstance(memory.backend, HttpBackend)
            return RecallAnswer.model_validate(await memory.backend.recall(name, text, k, as_of, allow_partial))
        return await recall(bank, RecallModel(model), text, k, as_of, allow_partial)
    finally:
        await memory.close()


def _render(answer: RecallAnswer) -> Group:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    head = f"{answer.bank} ({answer.kind}): relevance {answer.relevance:.2f}"
    if answer.missing:
        head += f"; no answer from partition {', '.join(map(str, answer.missing))}"
    if not answer.provenance:
        words = [[candidate.text, f"{candidate.score:.3f}"] for candidate in answer.candidates]
        note = "this kind keeps no rows, so it can't quote: these are the words it expects next"
        return Group(head, note, output.table("", ["token", "score"], words))
    panels = [
        Panel(
            Text(span.text),
            title=f"{span.stream} · {span.run} · rows {span.seq_from}–{span.seq_to}",
            subtitle=f"score {span.score:.2f}, relevance {span.relevance:.2f}",
            title_align="left",
            subtitle_align="left",
        )
        for span in answer.spans
    ]
    return Group(head, *panels)
