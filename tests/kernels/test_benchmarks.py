"""The benchmarks run, and a wrong result gets no speed. No figure is tested."""

import json
import subprocess
import sys

import pytest
import registry
import torch
from run import main


def run(root, *arguments):
    command = [sys.executable, "benchmarks/run.py", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def test_every_benchmark_runs_small_and_its_runs_agree(root, tmp_path):
    done = run(root, "--small", "--repeats", "1", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    kernels, mechanisms = {"search", "delta_update", "vocab_scatter"}, {"titans_peer", "write", "read", "learn"}
    assert {line["bench"] for line in figures} == kernels | mechanisms
    assert all(line["ms"] > 0 for line in figures)


def test_a_wrong_result_gets_no_speed(monkeypatch, capsys):
    monkeypatch.setattr(registry, "topk_cosine", lambda queries, *_: (torch.zeros(len(queries), 32), None))
    assert main(["search", "--small", "--repeats", "1"]) == 1
    out, err = capsys.readouterr()
    assert "wrong results" in err
    assert "ms=" not in out


def test_a_peer_that_is_not_installed_is_named_and_the_rest_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert main(["titans_peer", "search", "--small", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert "faiss is not installed" in err
    assert "titans_peer {'steps': 32, 'width': 8}: skipped" in err
    assert "torch fp32" in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_benchmark_runs_small_on_a_gpu(root):
    done = run(root, "--small", "--repeats", "1", "--device", "cuda")
    assert done.returncode == 0, done.stderr
