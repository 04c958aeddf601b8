"""The long schedule of faults: `make soak`, or `python tests/faults/soak.py --faults 200 --json soak.json`.

Schedules of one seed each, every one checked on its own, until enough faults have been injected. With --json the sum is
kept after each schedule, and a later call goes on from there.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

# read once, by torch
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faultkit.cluster import KINDS, run_cluster
from faultkit.s3 import s3_server
from faultkit.schedule import PLACES, Outcome, Schedule

OPS = sorted({place["op"] for place in PLACES})
FRESH = {"seeds": 0, "faults": {}, "acknowledged": 0, "lost": 0, "doubled": 0, "fragments": 0, "wrong": []}


def add(total: dict[str, Any], outcome: Outcome, seed: int) -> None:
    """Sum one schedule up."""
    verdict = outcome.verdict
    total["seeds"] += 1
    total["comparisons"] = total.get("comparisons", 0) + outcome.comparisons
    total["faults"] = dict(Counter(total["faults"]) + Counter(outcome.faults))
    total["recoveries_s"] = total.get("recoveries_s", []) + [round(taken, 3) for taken in outcome.recoveries_s]
    for name in ("acknowledged", "lost", "doubled"):
        total[name] += getattr(verdict, name)
    total["fragments"] = max(total["fragments"], verdict.fragments)
    total["wrong"] = total["wrong"] + [f"seed {seed}: {text}" for text in verdict.wrong]


def line(total: dict[str, Any]) -> str:
    """The sum for people."""
    taken = total.get("recoveries_s") or [0.0]
    return (
        f"{sum(total['faults'].values())} faults, {total['acknowledged']} rows acknowledged, {total['lost']} lost, "
        f"{total['doubled']} doubled, {len(total['wrong'])} other findings "
        f"in {total.get('comparisons', 0)} comparisons; recovery {statistics.median(taken):.2f} s "
        f"(median), {max(taken):.2f} s (longest); at most {total['fragments']} fragments"
    )


def one(over: str, seed: int, faults: int, at: str) -> Outcome:
    """One schedule over a folder, over a local S3 server, or on a Ray cluster of this machine."""
    places = [place for place in PLACES if not at or place["op"] in at.split(",")]
    if over == "cluster":
        chosen = random.Random(seed)
        return run_cluster(seed, [chosen.choice(KINDS) for _ in range(faults)])
    with tempfile.TemporaryDirectory(prefix="raymem-soak-") as folder:
        scratch = Path(folder) / "scratch"
        if over == "folder":
            return asyncio.run(Schedule(f"{folder}/memory", scratch, seed).run(faults, places=places))
        with s3_server() as bucket:
            return asyncio.run(Schedule(f"{bucket}/memory", scratch, seed).run(faults, places=places))


def main() -> int:
    """Run; 1 if anything was lost, doubled or otherwise wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many in all")
    parser.add_argument("--each", type=int, default=20, help="how many in one schedule")
    parser.add_argument("--over", choices=["folder", "s3", "cluster"], default="folder", help="what is put to the test")
    parser.add_argument("--at", default="", help=f"not on a cluster: at these writes alone, of {', '.join(OPS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no schedule after so long")
    parser.add_argument("--json", type=Path, help="keep the sum here, and go on from what is there")
    asked = parser.parse_args()
    if unknown := set(asked.at.split(",")) - {"", *OPS}:
        parser.error(f"no write is called {', '.join(sorted(unknown))}; there is {', '.join(OPS)}")
    if asked.at and asked.over == "cluster":
        parser.error("--at is for a folder or s3: on a cluster faults strike processes, not writes")
    total = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else dict(FRESH)
    began = time.monotonic()
    while sum(total["faults"].values()) < asked.faults and time.monotonic() - began < asked.seconds:
        seed = asked.seed + total["seeds"]
        outcome = one(asked.over, seed, asked.each, asked.at)
        add(total, outcome, seed)
        for text in outcome.verdict.wrong:
            print(f"seed {seed}: {text}", file=sys.stderr, flush=True)
        print(f"seed {seed}: {line(total)}", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(total, indent=2) + "\n")
    print(line(total))
    return int(bool(total["lost"] or total["doubled"] or total["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
