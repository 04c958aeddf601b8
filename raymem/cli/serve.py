"""`raymem serve`."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from raymem.cli import output
from raymem.cli.options import DEFAULT_STORE, ColdOption, JsonOption, StoreOption


def serve(
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 unless set.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port; 8765 unless set, 0 for any.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Put a store on the network: HTTP for people, tensors for agents. Ctrl-C stops it and flushes its banks.

    Other machines need keys: RAYMEM_GATEWAY__API_KEYS, or gateway.api_keys in raymem.toml. With --json, one document
    with the address is printed as soon as it listens.

    For example:

        raymem serve

        RAYMEM_GATEWAY__API_KEYS=secret raymem serve --host 0.0.0.0 --store ray --cold s3://bucket/memory
    """
    from raymem.config import Settings
    from raymem.serving.server import run

    output.set_log_level(logging.INFO)
    settings = Settings.load()
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update={"gateway": settings.gateway.model_copy(update=given)})
    run(store, cold, settings, on_listen=_announce)


def _announce(url: str, store: str) -> None:
    output.show(
        {"url": url, "store": store}, lambda did: f"memory of {did['store']} at {did['url']}, described at /docs"
    )
