"""Run the registry: each comparison is checked, then timed; one whose results differ shows no speed.

python benchmarks/run.py [NAME ...] [--json FILE] [--small] [--repeats 5] [--threads 1] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from registry import REGISTRY
from torch.profiler import ProfilerActivity, profile

from raymem.bench.comparison import Benchmark, measure


def run_bench(bench: Benchmark, sizes: dict[str, Any], repeats: int, device: str = "cpu") -> list[dict[str, Any]]:
    """One line of figures for each way of doing the work."""
    torch.manual_seed(0)
    # naming the device where it is the default anyway would be a part of what is timed
    with torch.no_grad(), nullcontext() if device == "cpu" else torch.device(device):
        comparison = bench.make(**sizes)
        taken = measure(comparison, repeats)
        busy = {name: {} if device == "cpu" else {"gpu_ms": _busy_ms(run)} for name, run in comparison.runs.items()}
    *_, last = taken
    return [
        {
            "bench": bench.name,
            "sizes": sizes,
            "run": name,
            "ms": 1e3 * seconds,
            **busy[name],
            f"us_per_{comparison.unit}": 1e6 * seconds / comparison.work,
            f"times {last}": seconds / taken[last],
        }
        for name, seconds in taken.items()
    ]


def _machine(device: str) -> dict[str, Any]:
    name = device if device == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _busy_ms(run: Callable[[], Any]) -> float:
    """How long the GPU works on one call: its own time, without the caller's wait for the end of each call."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e3


def main(arguments: list[str]) -> int:
    """Run what was asked for; 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help=f"any of {', '.join(bench.name for bench in REGISTRY)}; all by default"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that torch may use")
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu or cuda")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - {bench.name for bench in REGISTRY}:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    torch.set_num_threads(asked.threads)
    figures, failed = [], False
    for bench in REGISTRY:
        if asked.names and bench.name not in asked.names:
            continue
        for sizes in [bench.small] if asked.small else bench.sizes:
            try:
                lines = run_bench(bench, sizes, asked.repeats, asked.device)
            except ModuleNotFoundError as error:
                print(f"{bench.name} {sizes}: skipped, its peer is not installed: {error}", file=sys.stderr)
                continue
            except AssertionError as error:
                print(f"{bench.name} {sizes}: wrong results, no speed reported\n{error}", file=sys.stderr)
                failed = True
                continue
            figures += lines
            for line in lines:
                print(
                    "  ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{v}" for n, v in line.items()), flush=True
                )
    if asked.json:
        asked.json.write_text(json.dumps({**_machine(asked.device), "figures": figures}, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
