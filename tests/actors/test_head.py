"""Ray's head may be out of reach for long: whoever asks hears so in time, and no thread is lost to each question."""

import asyncio
import threading

import pytest

from raymem.actors import cluster
from raymem.actors.placement import Node
from raymem.errors import BackendUnavailable


async def test_questions_to_a_head_that_is_cut_off_end_in_time_and_share_a_thread(monkeypatch: pytest.MonkeyPatch):
    back, asked = threading.Event(), []

    def cut_off() -> list[Node]:
        asked.append(threading.current_thread())
        back.wait(30)
        return []

    monkeypatch.setattr(cluster, "living_nodes", cut_off)
    head = cluster.Head(0.05)
    shard = f"shard-{'a' * 12}-0"
    for _ in range(3):
        answers = await asyncio.gather(*(head.has_lost(shard) for _ in range(4)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [BackendUnavailable] * 4
    assert len(asked) == 1
    back.set()
    async with asyncio.timeout(10):
        while not await head.has_lost(shard):
            pass
    assert await head.has_lost("elsewhere")
