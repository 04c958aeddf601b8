"""The benchmarks run, and a wrong result gets no speed. No figure is tested."""

import json
import subprocess
import sys

import pytest
import torch


def run(root, *arguments, code="pass"):
    start = "import sys; sys.path.insert(0, 'benchmarks'); import registry, run"
    program = f"{start}; {code}; sys.exit(run.main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)


def test_every_benchmark_runs_small_and_its_runs_agree(root, tmp_path):
    done = run(root, "--small", "--repeats", "1", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    kernels, mechanisms = {"search", "delta_update", "vocab_scatter"}, {"titans_peer", "write", "read", "learn"}
    assert {line["bench"] for line in figures} == kernels | mechanisms
    assert all(line["ms"] > 0 for line in figures)


def test_a_wrong_result_gets_no_speed(root):
    broken = "import torch; registry.topk_cosine = lambda q, *a: (torch.zeros(len(q), 32), None)"
    done = run(root, "search", "--small", "--repeats", "1", code=broken)
    assert done.returncode == 1
    assert "wrong results" in done.stderr
    assert "ms=" not in done.stdout


def test_a_peer_that_is_not_installed_is_named_and_the_rest_runs(root):
    absent = "sys.modules['titans_pytorch'] = None; registry.find_spec = lambda name: None"
    done = run(root, "titans_peer", "search", "--small", "--repeats", "1", code=absent)
    assert done.returncode == 0, done.stderr
    assert "faiss is not installed" in done.stderr
    assert "titans_peer {'steps': 32, 'width': 8}: skipped" in done.stderr
    assert "torch fp32" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_benchmark_runs_small_on_a_gpu(root):
    done = run(root, "--small", "--repeats", "1", "--device", "cuda")
    assert done.returncode == 0, done.stderr
