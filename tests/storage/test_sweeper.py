"""What a sweep of the store deletes, and what it leaves."""

import os
import time

import raymem
from raymem import Settings
from raymem.config import ColdSettings
from raymem.storage.tables.files import Files


def test_a_sweep_takes_ghosts_and_leaves_what_is_young_or_not_a_banks(tiny, tmp_path):
    careful = Settings(cold=ColdSettings(sync="none", sweep_age_s=60))
    with raymem.connect(tmp_path, settings=careful) as store:
        store.put_calibration(tiny.calibration)
        store.create("lab/a", tiny.spec("spalm")).write(tiny.trace(7))
        for name, age in (("journal-" + "a" * 32, 120), ("snapshots-" + "b" * 32 + "-7", 5), ("mine", 120)):
            late = tmp_path / f"{name}.lance" / "data"
            late.mkdir(parents=True)
            (late / "late.lance").write_bytes(b"a late row")
            os.utime(late / "late.lance", (time.time() - age,) * 2)
        tables = Files(store._async.backend.cold.tables)
        there = tables.tables()

        planned = store.sweep(dry_run=True)
        assert tables.tables() == there
        swept = store.sweep()

        assert (swept.deleted, swept.young) == (planned.deleted, planned.young)
        assert (swept.deleted, swept.young) == (("journal-" + "a" * 32,), ("snapshots-" + "b" * 32 + "-7",))
        assert set(there) - set(tables.tables()) == set(swept.deleted)
