import socket

import pytest

import raymem
from raymem.actors.cluster import local_nodes
from raymem.errors import BackendUnavailable, ConfigError


@pytest.fixture
def dead_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_without_ray_the_error_says_how_to_start_it(monkeypatch, dead_port, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port}")

    with pytest.raises(BackendUnavailable, match=rf"no Ray cluster at '127.0.0.1:{dead_port}'.*`ray start --head`"):
        raymem.connect("ray", cold=str(tmp_path))


def test_without_a_client_server_the_error_says_what_to_check(dead_port, tmp_path):
    with pytest.raises(BackendUnavailable, match=rf"no Ray cluster at 'ray://127.0.0.1:{dead_port}'.*10001"):
        raymem.connect(f"ray://127.0.0.1:{dead_port}", cold=str(tmp_path))


def test_nodes_of_ones_own_need_a_process_that_is_not_connected(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)

    with pytest.raises(ConfigError, match=r"connected to a Ray cluster already"), local_nodes(1):
        pass
