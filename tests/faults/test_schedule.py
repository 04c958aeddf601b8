"""A short schedule of faults with real processes: nothing that was acknowledged is lost or doubled."""

import asyncio
from pathlib import Path

import pytest
from faultkit.schedule import Outcome, Schedule


def run(folder: Path, seed: int, faults: int, mutation: str = "", **options) -> Outcome:
    schedule = Schedule(str(folder / "memory"), folder / "scratch", seed, mutation)
    return asyncio.run(schedule.run(faults, **options))


@pytest.mark.timeout(120)
def test_no_fault_of_a_short_schedule_loses_or_doubles_a_row(tmp_path: Path):
    outcome = run(tmp_path, seed=1, faults=8)
    print(outcome)
    outcome.verdict.require()
    assert outcome.count == 8
    assert outcome.verdict.acknowledged > 100


BEFORE_THE_COMMIT = [{"op": "add", "table": table, "when": "before"} for table in ("journal", "log")]


def test_the_checker_finds_rows_that_were_acknowledged_before_the_commit(tmp_path: Path):
    outcome = run(tmp_path, seed=2, faults=2, mutation="early", kinds=["kill"], places=BEFORE_THE_COMMIT)
    assert outcome.verdict.lost > 0, outcome


def test_the_checker_finds_what_an_owner_wrote_that_nobody_stopped(tmp_path: Path):
    outcome = run(tmp_path, seed=3, faults=3, mutation="unfenced", kinds=["stop"], places=BEFORE_THE_COMMIT)
    assert outcome.verdict.doubled or outcome.verdict.lost or outcome.verdict.wrong, outcome
