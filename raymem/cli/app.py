"""All commands in one place, and what happens when one fails."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import raymem
from raymem.cli import (
    bank,
    bench,
    cache,
    calibrate,
    demo,
    doctor,
    erase,
    evaluate,
    output,
    recall,
    serve,
    shard,
    status,
    train,
    vllm,
)
from raymem.errors import MissingExtra, RaymemError

# commands import packages when they run; the extra that installs each
_EXTRAS = {
    "accelerate": "lm",
    "fastapi": "serve",
    "gguf": "lm",
    "prometheus_client": "serve",
    "ray": "ray",
    "tokenizers": "lm",
    "transformers": "lm",
    "uvicorn": "serve",
    "vllm": "vllm",
}
app = typer.Typer(
    name="raymem",
    help="""Memory made of hidden states, in banks that fleets of LLM agents share.

    Start here:

        raymem doctor                                  what is installed, what is missing

        raymem calibrate                               once for a store and a model

        raymem bank create research/alice --kind spalm

        raymem serve                                   the store over HTTP, on this machine

        raymem recall research/alice "what did the report say about tides?"

        raymem vllm serve smollm2-135m                 vLLM's OpenAI server, with memory

    A store is a folder (./memory), an object-store address, "ray", or the http:// address of a gateway: --store, or
    the variable RAYMEM_STORE.
    """,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(bank.app, name="bank")
app.add_typer(shard.app, name="shard")
app.command("recall")(recall.recall)
app.add_typer(erase.app, name="store")
app.add_typer(vllm.app, name="vllm")
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
app.command("train")(train.train)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"raymem {raymem.__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    output.reset()


def main() -> None:
    """Run the command line; a RaymemError or a package that isn't there becomes one red line and exit code 1."""
    try:
        app(prog_name="raymem")
    except RaymemError as error:
        output.fail(error)
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        output.fail(MissingExtra(f"{package!r} is not installed: `pip install 'raymem[{_EXTRAS[package]}]'`"))
        sys.exit(1)
