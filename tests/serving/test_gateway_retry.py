import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from raymem import AsyncStore, Settings, connect
from raymem.client import routes, wire
from raymem.config import GatewaySettings, HostSettings
from raymem.errors import Overloaded

BANK = "lab/busy"
BUSY = Settings(host=HostSettings(caller_requests=1), gateway=GatewaySettings(api_keys=("alice", "bob")))


@pytest.fixture(scope="module")
def busy(tmp_path_factory, run_gateway, tiny, gateway_spec) -> Iterator[str]:
    """A gateway that lets each caller have one request in flight."""
    with run_gateway(tmp_path_factory.mktemp("busy") / "memory", BUSY) as url:
        with connect(url, api_key="alice") as store:
            store.put_calibration(tiny.calibration)
            store.create(BANK, gateway_spec)
        yield url


def refused(url: str) -> int:
    with connect(url, api_key="bob") as store:
        return int(store.stats()["shards"][0]["refused_overload"])


async def write_at_once(store: AsyncStore, make_rows, name: str) -> list[int | Overloaded]:
    bank = store.bank(BANK)
    writes = [bank.write(make_rows(200, stream=name, run=str(number))) for number in range(24)]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    return [outcome if isinstance(outcome, BaseException) else outcome.rows for outcome in outcomes]


async def test_a_client_comes_back_until_its_refused_writes_are_taken(busy, make_rows):
    before = await asyncio.to_thread(refused, busy)
    store = await AsyncStore.connect(busy, api_key="alice")
    assert await write_at_once(store, make_rows, "patient") == [200] * 24
    assert (await store.bank(BANK).info()).rows >= 24 * 200
    await store.close()
    assert await asyncio.to_thread(refused, busy) > before


async def test_a_client_without_patience_hears_that_its_writes_were_refused(busy, make_rows):
    settings = Settings(gateway=GatewaySettings(retry_s=0.0))
    store = await AsyncStore.connect(busy, api_key="alice", settings=settings)
    outcomes = await write_at_once(store, make_rows, "hasty")
    await store.close()
    assert {type(outcome) for outcome in outcomes} == {int, Overloaded}


async def test_a_caller_with_too_much_in_flight_takes_nothing_from_the_holder_of_another_key(busy, make_rows):
    store = await AsyncStore.connect(busy, api_key="alice")
    before = await asyncio.to_thread(refused, busy)
    flood = asyncio.create_task(write_at_once(store, make_rows, "flood"))
    asked = {"Authorization": "Bearer bob", "Content-Type": routes.MSGPACK}
    answers = []
    async with httpx.AsyncClient(base_url=busy, headers=asked) as client:
        while not flood.done():
            trace = make_rows(1, stream="calm", run=str(len(answers)))
            answers.append(await client.post(routes.WRITE.url(BANK), content=wire.pack(trace, 2**20)))
    await flood
    await store.close()
    assert await asyncio.to_thread(refused, busy) > before
    assert len(answers) > 5
    assert {answer.status_code for answer in answers} == {200}


class Proxy:
    """Stands before a gateway, and says a few times that it is too busy, in words of its own."""

    def __init__(self, app, times: int) -> None:
        self._app = app
        self.times = times

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] == routes.HEALTH.path or self.times == 0:
            await self._app(scope, receive, send)
            return
        self.times -= 1
        while (await receive()).get("more_body", False):
            pass
        await PlainTextResponse("busy", 429, {"Retry-After": "1"})(scope, receive, send)


@pytest.fixture
def behind(tmp_path, run_gateway, tiny, gateway_spec, make_rows):
    """A proxy that will be busy, the gateway behind it, and a bank there that was exported."""
    proxies = []

    def wrap(app):
        proxies.append(Proxy(app, 0))
        return proxies[0]

    with run_gateway(tmp_path / "memory", Settings(), wrap=wrap) as url:
        with connect(url) as store:
            store.put_calibration(tiny.calibration)
            store.create("lab/a", gateway_spec).write(make_rows(30))
            store.bank("lab/a").export(tmp_path / "a.raymem")
        yield proxies[0], url


def test_a_busy_proxy_is_believed_about_when_to_come_back_and_gets_the_whole_file_again(behind, tmp_path: Path):
    proxy, url = behind
    with connect(url) as store:
        proxy.times, began = 1, time.monotonic()
        copy = store.import_(tmp_path / "a.raymem", "lab/b")
        assert time.monotonic() - began >= 1.0
        copy.attach()
        assert copy.digest() == store.bank("lab/a").digest()


def test_the_time_for_coming_back_is_bounded(behind):
    proxy, url = behind
    settings = Settings(gateway=GatewaySettings(retry_s=1.5))
    with connect(url, settings=settings) as store:
        proxy.times, began = 100, time.monotonic()
        with pytest.raises(Overloaded, match="429"):
            store.banks()
        # the second pause would have ended after the time was up
        assert 1.0 <= time.monotonic() - began < 15.0
        assert proxy.times == 98
