import os
import threading
from pathlib import Path

import pytest

from raymem.config import Settings
from raymem.errors import ConfigError


def test_defaults_bind_to_loopback_and_leave_limits_finite():
    settings = Settings.load(environ={})
    assert settings.gateway.host == "127.0.0.1"
    assert settings.host.caller_bytes > 0


def test_environment_wins_over_the_file(tmp_path: Path):
    file = tmp_path / "raymem.toml"
    file.write_text("[gateway]\nport = 1234\nhost = '127.0.0.2'\n")
    settings = Settings.load(file, environ={"RAYMEM_GATEWAY__PORT": "4321"})
    assert (settings.gateway.host, settings.gateway.port) == ("127.0.0.2", 4321)


def test_the_file_can_be_named_by_the_environment(tmp_path: Path):
    file = tmp_path / "other.toml"
    file.write_text("[host]\nthreads = 3\n")
    assert Settings.load(environ={"RAYMEM_CONFIG": str(file)}).host.threads == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[gatway]\nport = 1\n", "gatway; there is cold, host, gateway, actors"),
        ("[gateway]\nprt = 1\n", "gateway.prt; there is host, port"),
        ("[gateway]\nport = 'x'\n", "gateway.port='x'"),
        ("[gateway]\nport = 70000\n", "gateway.port=70000"),
        ("[gateway\n", "can't read settings"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, named: str):
    file = tmp_path / "raymem.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Settings.load(file, environ={})
    assert named in str(caught.value)


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="can't read settings"):
        Settings.load(tmp_path / "none.toml", environ={})


def test_an_unknown_variable_is_an_error_and_other_peoples_are_not():
    assert Settings.load(environ={"HOME": "/", "RAYMEM_STORE": "x"}) == Settings()
    with pytest.raises(ConfigError, match="RAYMEM_PORT is no setting"):
        Settings.load(environ={"RAYMEM_PORT": "1"})


def test_keys_are_never_shown():
    with pytest.raises(ConfigError) as caught:
        Settings.load(environ={"RAYMEM_GATEWAY__API_KEYS": "s3cret", "RAYMEM_GATEWAY__PORT": "-1"})
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(Settings.load(environ={"RAYMEM_GATEWAY__API_KEYS": "s3cret"}))


def test_the_number_of_settings_stays_small():
    leaves = [name for section in Settings().model_dump().values() for name in section]
    assert len(leaves) <= 40


def test_a_settings_file_may_be_a_pipe_and_a_folder_of_its_name_is_an_error(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("[gateway]\nport = 9\n",))
    writer.start()
    assert Settings.load(environ={"RAYMEM_CONFIG": str(pipe)}).gateway.port == 9
    writer.join()
    (tmp_path / "raymem.toml").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"can't read settings from raymem\.toml"):
        Settings.load(environ={})


@pytest.mark.parametrize("text", ["", "   ", "ab,c"])
def test_keys_in_a_file_are_a_list(tmp_path, text):
    file = tmp_path / "raymem.toml"
    file.write_text(f'[gateway]\napi_keys = "{text}"\n')
    with pytest.raises(ConfigError, match="api_keys"):
        Settings.load(file, environ={})


def test_a_section_that_is_none_is_an_error_beside_a_variable_of_it(tmp_path):
    file = tmp_path / "raymem.toml"
    file.write_text('gateway = "oops"\n')
    with pytest.raises(ConfigError, match="gateway='oops'"):
        Settings.load(file, environ={"RAYMEM_GATEWAY__PORT": "5"})
