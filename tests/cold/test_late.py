"""A take-over that comes late hides rows for a moment: nothing may make that moment last."""

from pathlib import Path

import raymem
from raymem.cold.store import ColdStore


def test_rows_that_a_late_fence_hides_are_not_lost_to_a_rewriting(tmp_path: Path, tiny):
    with raymem.connect(tmp_path) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec("spalm"))
        bank.write(tiny.trace(9, stream="alice"))
        bank.detach()
        cold = ColdStore.open(str(tmp_path))
        late = cold.tables.open(f"journal-{cold.catalog.get('lab/a').id}")
        bank.attach()
        bank.write(tiny.trace(7, stream="bob"))
        bank.detach()
        bank.attach()
        # of an owner that stood still for long, and dies before it brings back what it undid
        late.restore(late.version)

        assert bank.erase(stream="alice").status == "complete"
        assert bank.info().rows == 7
        assert bank.tokens("bob", "r", 0, 7).shape == (7,)
