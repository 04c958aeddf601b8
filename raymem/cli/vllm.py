"""`raymem vllm`: vLLM's OpenAI server with memory."""

from __future__ import annotations

import os
import shlex
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
    StoreOption,
    parse_layers,
    require_store,
)
from raymem.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

app = typer.Typer(
    no_args_is_help=True, help="Serve a model with memory: vLLM's OpenAI routes, reading and writing banks."
)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"{DEFAULT_MODEL}, a folder, or a name that vLLM finds.")
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on.")]
WriteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--write-banks", metavar="GLOB", help="Banks that requests may write to, such as 'team/*'; repeat it."
    ),
]
ReadOption = Annotated[
    list[str] | None, typer.Option("--read-banks", metavar="GLOB", help="Banks that requests may read; repeat it.")
]
AttendOption = Annotated[
    list[str] | None, typer.Option("--attend-banks", metavar="GLOB", help="Banks that requests may attend; repeat it.")
]
AttendOnlyOption = Annotated[
    bool,
    typer.Option(
        "--attend-only",
        help="Extract no hidden states: requests attend, and neither write nor mix. The engine compiles, and keeps its "
        "speculative slot.",
    ),
]
AttachOption = Annotated[
    bool, typer.Option("--attach-on-use/--no-attach-on-use", help="Attach a bank when a request first asks for it.")
]


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: ModelArgument,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    layers: LayersOption = "26",
    host: HostOption = "127.0.0.1",
    write_banks: WriteOption = None,
    read_banks: ReadOption = None,
    attend_banks: AttendOption = None,
    attend_only: AttendOnlyOption = False,
    attach_on_use: AttachOption = True,
) -> None:
    """Serve a model with vLLM: its chat and completions take a `memory` field.

    MODEL comes first; all other flags are vLLM's: --port, --max-model-len, --api-key, --dtype …

    Without names of banks, requests may touch every bank; a --host that lets others in needs names.

    For example:

        raymem vllm serve smollm2-135m --max-model-len 2048

        raymem vllm serve org/model --store s3://bucket/memory --host 0.0.0.0 --read-banks 'team/*' --api-key KEY

    Then, with the openai package:

        client.chat.completions.create(…, extra_body={"memory": {"read": ["team/notes"], "write": "chats/ann"}})
    """
    from raymem.serving.vllm import launch

    banks = {"write_banks": write_banks, "read_banks": read_banks, "attend_banks": attend_banks}
    if host not in _LOOPBACK and not any(banks.values()):
        raise ConfigError(
            f"--host {host} lets others in: name the banks that their requests may touch, --read-banks 'library/*' "
            "--write-banks 'chats/*'"
        )
    engine_args = _engine_args(store, cold, layers, banks, stream=not attend_only, attach_on_use=attach_on_use)
    given: list[str] = context.args
    launch.check_free(given, engine_args)
    names = [] if _has(given, "--served-model-name") else ["--served-model-name", model]
    command = launch.command(_found(model), [*names, "--host", host, *launch.flags(engine_args), *given])
    environment = os.environ | {"VLLM_PLUGINS": launch.plugins(os.environ.get("VLLM_PLUGINS"))}
    # vLLM takes this process over, so that signals reach it and its exit code is the command's
    os.execve(command[0], command, environment)


@app.command("args")
def args(
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    layers: LayersOption = "26",
    write_banks: WriteOption = None,
    read_banks: ReadOption = None,
    attend_banks: AttendOption = None,
    attend_only: AttendOnlyOption = False,
    attach_on_use: AttachOption = True,
    json_: JsonOption = False,
) -> None:
    """Print the flags that `raymem vllm serve` gives to vLLM, for a launcher of your own.

    With --json: the flags as a list, the same as arguments of vllm.LLM, and the variables that vLLM needs.

    For example:

        raymem vllm args --store s3://bucket/memory --read-banks 'library/*'

        raymem vllm args --json
    """
    from raymem.serving.vllm import launch

    banks = {"write_banks": write_banks, "read_banks": read_banks, "attend_banks": attend_banks}
    engine_args = _engine_args(store, cold, layers, banks, stream=not attend_only, attach_on_use=attach_on_use)
    environment = {"VLLM_PLUGINS": launch.plugins(os.environ.get("VLLM_PLUGINS"))}
    flags = launch.flags(engine_args)
    if json_:
        output.show({"flags": flags, "engine_args": engine_args, "environment": environment})
        return
    print(shlex.join(flags))
    output.say(f"for the memory field, vLLM also needs VLLM_PLUGINS={environment['VLLM_PLUGINS']}")


def _engine_args(
    store: str, cold: str | None, layers: str, banks: Mapping[str, list[str] | None], **settings: Any
) -> dict[str, Any]:
    from raymem.serving.vllm import engine_args

    require_store(store)
    # once some are named, the others are closed
    every = [] if any(banks.values()) else ["*"]
    named: dict[str, Any] = {name: globs or every for name, globs in banks.items()}
    if not settings["stream"]:
        for name in ("write_banks", "read_banks"):
            if banks[name]:
                raise ConfigError(f"{name} {banks[name]} need hidden states, and --attend-only extracts none: drop one")
            named[name] = []
    if cold is not None:
        settings["cold"] = cold
    return engine_args(store, parse_layers(layers), **named, **settings)


def _found(model: str) -> str:
    """The folder of the model that raymem finds by its name; other names are for vLLM."""
    if model != DEFAULT_MODEL or Path(model).exists():
        return model
    from raymem.lm.models import model_path

    return str(model_path(model))


def _has(given: Sequence[str], flag: str) -> bool:
    return any(each.partition("=")[0].replace("_", "-") == flag for each in given)
