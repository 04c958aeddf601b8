"""What Kubernetes injects for a Service is no setting; a setting that was misspelt still is an error."""

import os
import subprocess
import sys

import pytest

from raymem import Settings
from raymem.errors import ConfigError


def _service(name: str, address: str = "10.96.7.1", port: int = 8765, protocol: str = "tcp") -> dict[str, str]:
    """As in the documentation of Kubernetes, with one port that has a name."""
    url = f"{protocol}://{f'[{address}]' if ':' in address else address}:{port}"
    start = name.upper().replace("-", "_")
    link = f"{start}_PORT_{port}_{protocol.upper()}"
    return {
        f"{start}_SERVICE_HOST": address,
        f"{start}_SERVICE_PORT": str(port),
        f"{start}_SERVICE_PORT_HTTP": str(port),
        f"{start}_SERVICE_PORT_HTTP_METRICS": str(port),
        f"{start}_PORT": url,
        link: url,
        f"{link}_PROTO": protocol,
        f"{link}_PORT": str(port),
        f"{link}_ADDR": address,
    }


@pytest.mark.parametrize(
    "name",
    ["raymem", "raymem-gateway", "raymem-cold", "raymem-gateway--port", "raymem--x", "raymem-2", "raymem-service"],
)
@pytest.mark.parametrize(("address", "protocol"), [("10.96.7.1", "tcp"), ("fd00::1", "udp"), ("10.0.0.1", "sctp")])
def test_a_service_of_any_name_is_passed_over(name, address, protocol):
    environ = _service(name, address, protocol=protocol) | {"RAYMEM_GATEWAY__PORT": "9"}
    assert Settings.load(environ=environ) == Settings.load(environ={"RAYMEM_GATEWAY__PORT": "9"})


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("RAYMEM_GATEWAY_PORT", "8765", "RAYMEM_GATEWAY__PORT"),
        ("RAYMEM_HOST_LEASE_S", "3", "RAYMEM_HOST__LEASE_S"),
        ("RAYMEM_COLD_SYNC", "none", "RAYMEM_COLD__SYNC"),
        ("RAYMEM_PORT", "8765", "RAYMEM_GATEWAY__PORT"),
        ("RAYMEM_SERVICE_HOST", "gateway.local", "SECTION__KEY"),
        ("RAYMEM_SERVICE_PORT", "all", "SECTION__KEY"),
        ("RAYMEM_SERVICE_PORT", "9" * 5000, "SECTION__KEY"),
        ("RAYMEM_PORT_8765_TCP", "8765", "SECTION__KEY"),
        ("RAYMEM_PORT_8765_TCP_PROTO", "https", "SECTION__KEY"),
        ("RAYMEM_PORT", "tcp://10.0.0.1", "SECTION__KEY"),
    ],
)
def test_a_misspelt_setting_is_an_error_with_the_right_spelling(variable, value, right):
    with pytest.raises(ConfigError, match=f"{variable} is no setting.*{right}"):
        Settings.load(environ={variable: value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAYMEM_GATEWAY__PORT", "tcp://10.0.0.1:8765"), ("RAYMEM_GATEWAY__PROT", "1"), ("RAYMEM_HOST__LEASE_S", "inf")],
)
def test_a_setting_s_bad_value_is_an_error_still(variable, value):
    with pytest.raises(ConfigError):
        Settings.load(environ={variable: value})


def test_a_command_runs_beside_services(tmp_path):
    environ = os.environ | _service("raymem") | _service("raymem-gateway")
    ran = subprocess.run(
        [sys.executable, "-m", "raymem.cli", "status", "--store", str(tmp_path), "--json"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
