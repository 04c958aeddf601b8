"""`ray up` takes cluster.yaml, and what it runs on the nodes is sound."""

import re
import subprocess
from typing import Any

import pytest
import yaml
from typer.main import get_command

COMMANDS = [
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]


@pytest.fixture(scope="module")
def cluster(root) -> dict[str, Any]:
    return yaml.safe_load((root / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "memory", "gpu"}


def test_ray_refuses_a_cluster_with_an_unknown_field(cluster):
    # shows that the test above can fail
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="token_auth"):
        validate_config(prepare_config(cluster | {"token_auth": True}))


@pytest.mark.parametrize("when", COMMANDS)
def test_every_command_is_valid_shell(cluster, when):
    for command in cluster[when]:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}\n{checked.stderr}"


@pytest.mark.parametrize("when", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_and_the_gateway_start_with_token_authentication(cluster, when):
    for command in cluster[when]:
        if re.search(r"bin/(ray|raymem) ", command):
            assert command.startswith("export RAY_AUTH_MODE=token;")
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_gateway_is_started_with_options_that_it_has(cluster):
    from raymem.cli.app import app

    (start,) = [command for command in cluster["head_start_ray_commands"] if "raymem serve" in command]
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    given = set(re.findall(r"(?<= )--[a-z-]+", start))
    assert given
    assert given <= known


def test_the_nodes_install_the_wheel_under_the_common_pins(cluster):
    (install,) = [command for command in cluster["setup_commands"] if "raymem[" in command]
    assert "-c ~/pins.txt" in install
    assert "raymem-*.whl" in install
    assert cluster["file_mounts"]["~/raymem"] == "./dist"
