"""What users install holds everything, under one name, and costs little to import."""

import ast
import json
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import raymem

HEAVY = ["fastapi", "lancedb", "ray", "torch", "transformers", "triton", "vllm"]
LINKS = {"raymem/actors", "raymem/kernels", "raymem/serving"}
# on a GPU machine that only computes, these are not installed
NOT_FOR_ARITHMETIC = ["fastapi", "lance", "lancedb", "msgpack", "pyarrow", "ray", "structlog", "transformers", "vllm"]


@pytest.fixture(scope="module")
def wheel(clean_copy, python, tmp_path_factory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    built: subprocess.CompletedProcess[str] = python(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), ".", at=clean_copy
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def _shipped(committed: list[Path]) -> Iterator[str]:
    for path in committed:
        if path.name == "README.md" or path.parts in {
            ("raymem", "actors"),
            ("raymem", "kernels"),
            ("raymem", "serving"),
        }:
            continue
        if path.parts[0] == "raymem":
            yield str(path)
        if path.parts[0] in {"actors", "kernels", "serving"}:
            yield str("raymem" / path)


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel, committed):
    built = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert built == set(_shipped(committed))


def test_the_wheel_has_one_top_level_name(wheel):
    (record,) = [name for name in wheel.namelist() if name.endswith(".dist-info/top_level.txt")]
    assert wheel.read(record).decode().split() == ["raymem"]
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"raymem"}


def test_the_wheel_alone_imports_with_its_rooms(wheel, python, tmp_path):
    wheel.extractall(tmp_path)
    # -S: without site-packages, where an editable installation would lend its rooms
    ran = python(
        "-S", "-c", "import raymem.actors, raymem.kernels, raymem.serving; print(raymem.__file__)", at=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))


def test_the_wheel_registers_the_command_and_the_plugin(wheel):
    (record,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    entries = wheel.read(record).decode()
    assert "raymem = raymem.cli.app:main" in entries
    assert "[vllm.general_plugins]\nraymem = raymem.serving.vllm.plugin:register" in entries
    assert "[vllm.endpoint_plugins]\nraymem = raymem.serving.vllm.endpoint:MemoryEndpoint" in entries


@pytest.mark.parametrize(
    "entry",
    ["raymem.cli.app:main", "raymem.serving.vllm.plugin:register", "raymem.serving.vllm.endpoint:MemoryEndpoint"],
)
def test_an_entry_point_leads_to_what_it_names(root, entry):
    module, _, function = entry.partition(":")
    folder = root.joinpath(*module.split("."))
    source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    defined = {getattr(node, "name", None) for node in ast.parse(source.read_text()).body}
    assert function in defined, f"{source} does not define {function}"


def test_importing_raymem_is_quick_and_pulls_in_nothing_heavy(root, python):
    script = (
        "import time; t = time.process_time(); import raymem; took = time.process_time() - t\n"
        f"import json, sys; print(json.dumps([took, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    runs = [json.loads(python("-c", script, at=root).stdout) for _ in range(3)]
    assert runs[0][1] == []
    # the best of three, as the files may not be in memory yet
    assert min(took for took, _ in runs) < 1


def test_what_the_tables_do_not_call_is_imported_once_it_is_used(root, python):
    script = (
        "import sys, raymem.storage.tables.tables\n"
        "client = 'lance_namespace_urllib3_client'\n"
        "print([name for name in sys.modules if name.startswith(client + '.api')])\n"
        "from lance_namespace_urllib3_client.api.table_api import TableApi\n"
        "import lance_namespace_urllib3_client as client\n"
        "print(client.TableApi is TableApi, hasattr(client, 'nothing'), client.models.__name__)"
    )
    ran = python("-c", script, at=root)
    assert ran.stdout.splitlines() == ["[]", "True False lance_namespace_urllib3_client.models"], ran.stderr


def test_the_arithmetic_needs_torch_alone(root, python):
    script = (
        "import importlib, pkgutil, sys\n"
        f"for name in {NOT_FOR_ARITHMETIC}: sys.modules[name] = None\n"
        "import raymem.kernels, raymem.memory\n"
        "for room in (raymem.kernels, raymem.memory):\n"
        "    for module in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "        if not module.name.endswith('.triton'): importlib.import_module(module.name)\n"
    )
    ran = python("-c", script, at=root)
    assert ran.returncode == 0, ran.stderr


def test_the_version_is_stated_once_and_the_changelog_agrees(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "raymem.__version__"}
    headings = [line for line in (root / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    latest = next(line for line in headings if not line.startswith("## [Unreleased]"))
    assert latest.startswith(f"## [{raymem.__version__}]")


def test_the_packages_the_project_stands_on_are_named_and_pinned(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = " ".join([*project["dependencies"], *chain(*project["optional-dependencies"].values())])
    pinned = {line.partition("==")[0] for line in (root / "constraints.txt").read_text().splitlines()}
    for package in ["fastapi", "lancedb", "msgpack", "pyarrow", "ray", "torch", "vllm"]:
        assert re.search(rf"(^| ){package}[\[>]", named), f"{package} is not a requirement"
        assert package in pinned


def test_every_pin_is_one_exact_version_for_all_builds(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for pin in pins:
        name, equals, version = pin.partition("==")
        assert equals, f"{pin} is not exact"
        assert "+" not in version, f"{name}: {version} names one build of many"
    assert len({pin.partition("==")[0].lower() for pin in pins}) == len(pins)
