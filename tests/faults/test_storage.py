"""Storage that fails, tears or loses its process at any single write: whatever was acknowledged is there."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from faultkit import made
from faultkit.double import MODES, Double, Doubles, doubles
from faultkit.ledger import Ledger, check

from raymem import AsyncStore, Settings
from raymem.client import local
from raymem.client.store import AsyncBank
from raymem.errors import BankDetached, BankExists, RaymemError
from raymem.storage.journal import journal

BANK, RUN = "lab/a", ("agent", "run")
STEPS = ("create", "write", "write", "snapshot", "write", "detach", "attach", "tag", "write")
_TRIES = 6


class Life:
    """A bank's life in few writes, gone on with by the next incarnation wherever one ends."""

    def __init__(self, uri: str, kind: str, present: Doubles) -> None:
        self.uri = uri
        self.kind = kind
        self.ledger = Ledger({BANK: kind})
        self._doubles = present

    async def live(self, steps: Sequence[str], double: Double) -> None:
        """One incarnation, whose writes go through `double`; it ends early if its process is killed."""
        self._doubles.present = double
        store = None
        todo, refusals = list(steps), []
        while todo:
            try:
                if store is None:
                    made.open_cold(self.uri)
                    store = await AsyncStore.connect(self.uri, settings=Settings())
                await self._step(store, todo[0], double)
                todo.pop(0)
            except RaymemError as error:
                refusals.append(f"{todo[0]}: {error}")
                if double.dead:
                    return
            assert len(refusals) < _TRIES, refusals
        assert store is not None
        await store.close()

    async def _step(self, store: AsyncStore, step: str, double: Double) -> None:
        bank = store.bank(BANK)
        match step:
            case "create":
                try:
                    await store.create(BANK, made.spec(self.kind))
                except BankExists:
                    await bank.attach()
            case "write":
                await self._write(bank, double)
            case "snapshot":
                await store.backend.host.snapshot(BANK)
            case "detach":
                try:
                    await bank.detach()
                except BankDetached:
                    return
            case "attach":
                await bank.attach()
            case "tag":
                await bank.tag("here")

    async def _write(self, bank: AsyncBank, double: Double) -> None:
        start = self.ledger.acknowledged[BANK][RUN]
        # rows that were sent and not acknowledged are sent again as they were
        end = max(self.ledger.sent[BANK][RUN], start + 7)
        self.ledger.send(BANK, RUN, end)
        await bank.write(made.trace(*RUN, start, end - start))
        if not double.dead:
            self.ledger.acknowledge(BANK, RUN, end)


async def lives(folder: Path, at: int, mode: str) -> Double:
    """A life whose write number `at` meets `mode`, and the beginning of the next one."""
    with doubles() as present:
        life = Life(str(folder / "memory"), "titans" if at % 2 else "spalm", present)
        first = Double(at, mode)
        await life.live(STEPS, first)
        await life.live(("create", "write"), Double())
        check(life.uri, life.ledger, folder / "undisturbed").require()
        assert life.ledger.rows >= 7
    return first


@pytest.fixture(autouse=True)
def _compact_soon_and_take_banks_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_runs", lambda known: False)
    monkeypatch.setattr(journal, "_COMPACT_EVERY", 3)


@pytest.mark.parametrize("mode", MODES)
async def test_no_write_that_fails_tears_or_is_the_last_loses_what_was_acknowledged(tmp_path: Path, mode: str):
    plain = await lives(tmp_path / "plain", -1, "")
    some = range(MODES.index(mode), plain.writes, 1 + plain.writes // 2)
    for at in some:
        print(mode, plain.where[at])
        await lives(tmp_path / f"{at}", at, mode)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
async def test_every_write_meets_every_fault(tmp_path: Path, mode: str):
    plain = await lives(tmp_path / "plain", -1, "")
    for at in range(plain.writes):
        await lives(tmp_path / f"{at}", at, mode)
