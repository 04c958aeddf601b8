"""Loaded by every Python process of a test's cluster: lets a migration be stopped between two of its steps.

A step waits while the folder that RAYMEM_TEST_STOPS names has a file of its name; `<step>.reached` says who waits.
"""

import asyncio
import functools
import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


def _waits_at(step):
    stop = Path(os.environ["RAYMEM_TEST_STOPS"]) / (step or "no step")
    if not stop.exists():
        return False
    stop.with_suffix(".reached").touch()
    return True


async def _wait(step):
    while _waits_at(step):
        await asyncio.sleep(0.02)


def _block(step):
    while _waits_at(step):
        time.sleep(0.02)


def _stopped(method, before="", after="", blocking=False):
    @functools.wraps(method)
    def blocked(*args, **kwargs):
        _block(before)
        found = method(*args, **kwargs)
        _block(after)
        return found

    @functools.wraps(method)
    async def waits(*args, **kwargs):
        await _wait(before)
        found = await method(*args, **kwargs)
        await _wait(after)
        return found

    return blocked if blocking else waits


def _install(moving):
    from raymem.bank.primary import Primary
    from raymem.storage.catalog import Catalog

    # what nobody comes back for is to go while the test looks
    moving._ARRIVAL_S = 3.0
    host = moving.MovingHost
    host.prepare = _stopped(host.prepare, after="prepare")
    host.yield_writes = _stopped(host.yield_writes, after="yield")
    host.forget_moved = _stopped(host.forget_moved, before="forget")
    Catalog.claim = _stopped(Catalog.claim, after="claim", blocking=True)
    Primary.own = _stopped(Primary.own, after="own", blocking=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "raymem.host.handover":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _install(module)

        spec.loader.exec_module = exec_module
        return spec


if "RAYMEM_TEST_STOPS" in os.environ:
    sys.meta_path.insert(0, _Finder())
