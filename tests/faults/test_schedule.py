"""A short schedule of faults with real processes: nothing that was acknowledged is lost or doubled."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from faultkit.schedule import Outcome, Schedule

pytestmark = pytest.mark.timeout(120)
BEFORE_THE_COMMIT = [{"op": "add", "table": table, "when": "before"} for table in ("journal", "log")]


def run(folder: Path, seed: int, faults: int, mutation: str = "", **options: Any) -> Outcome:
    schedule = Schedule(str(folder / "memory"), folder / "scratch", seed, mutation)
    return asyncio.run(schedule.run(faults, **options))


# owners of odd seeds wait for leases, those of even seeds have the fence alone
@pytest.mark.parametrize("seed", [1, 4])
def test_no_fault_of_a_short_schedule_loses_or_doubles_a_row(tmp_path: Path, seed: int):
    outcome = run(tmp_path, seed, faults=4)
    print(outcome)
    outcome.verdict.require()
    assert outcome.count == 4
    assert outcome.verdict.acknowledged > 100


def test_the_checker_finds_rows_that_were_acknowledged_before_the_commit(tmp_path: Path):
    # what waits for the journal is in the log by then
    log = BEFORE_THE_COMMIT[1:]
    outcome = run(tmp_path, seed=2, faults=1, mutation="early", kinds=["kill"], places=log)
    assert outcome.verdict.lost > 0, outcome


def test_the_checker_finds_what_an_owner_wrote_whom_nobody_stopped(tmp_path: Path):
    outcome = run(tmp_path, seed=4, faults=2, mutation="unfenced", kinds=["stop"], places=BEFORE_THE_COMMIT)
    verdict = outcome.verdict
    unreadable = [text for text in verdict.wrong if "can't be read" in text]
    assert verdict.lost or verdict.doubled or unreadable, outcome
