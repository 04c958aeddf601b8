"""A writer that is stopped in the middle of a write and wakes when its bank is gone: its rows are nowhere."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from faultkit import made
from faultkit.fleet import Fleet, Process, Refused, lay_out
from faultkit.ledger import Ledger, check

pytestmark = pytest.mark.timeout(120)
BANK, RUN, OTHER = "lab/a", ("agent", "late"), ("agent", "new")
# shorter than this and a busy machine ends leases by itself
LEASE_S = 1.5


async def _until_allowed(process: Process, *command: Any) -> Any:
    """The bank is its old owner's until that one's lease has run out."""
    for _ in range(200):
        try:
            return await process.ask(*command)
        except Refused:
            await asyncio.sleep(0.1)
    return await process.ask(*command)


@pytest.mark.parametrize(
    ("when", "again"),
    [
        pytest.param("before", True, id="before the commit, made again"),
        pytest.param("before", False, id="before the commit, dropped", marks=pytest.mark.slow),
        pytest.param("after", True, id="after the commit, made again", marks=pytest.mark.slow),
        pytest.param("after", False, id="after the commit, dropped"),
    ],
)
async def test_a_writer_that_wakes_after_its_bank_was_dropped_hears_so_and_leaves_nothing(
    tmp_path: Path, when: str, again: bool
):
    uri, plans, ledger = str(tmp_path / "memory"), tmp_path / "plans", Ledger()
    plans.mkdir()
    made.open_cold(uri)
    async with Fleet(uri, plans, "", LEASE_S) as fleet:
        await fleet.current.ask("create", BANK, "spalm")
        await fleet.current.ask("write", BANK, *RUN, 0, 7)
        stopped = asyncio.create_task(lay_out(plans, {"do": "stop", "op": "add", "table": "log", "when": when}, 20))
        await asyncio.sleep(0)
        late = fleet.current.ask("write", BANK, *RUN, 7, 7)
        assert await stopped

        sleeper = await fleet.replace()
        await _until_allowed(fleet.current, "delete", BANK)
        if again:
            await fleet.current.ask("create", BANK, "spalm")
            ledger.kinds[BANK] = "spalm"
            ledger.send(BANK, OTHER, 9)
            await fleet.current.ask("write", BANK, *OTHER, 0, 9)
            ledger.acknowledge(BANK, OTHER, 9)
        sleeper.signal(signal.SIGCONT)
        with pytest.raises(Refused) as refused:
            await asyncio.wait_for(late, 30)
        # asked again, by name, it finds the bank that there is now or none
        with pytest.raises(Refused):
            await asyncio.wait_for(sleeper.ask("write", BANK, *RUN, 14, 7), 30)

    # the local store names who has the bank now
    assert refused.value.kind in (("Conflict",) if again else ("NotOwner", "BankNotFound")), refused.value
    verdict = check(uri, ledger, tmp_path / "undisturbed")
    verdict.require()
    assert verdict.acknowledged == (9 if again else 0)
