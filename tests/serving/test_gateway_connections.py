"""A real gateway process with few file descriptors, and callers on raw sockets who mean it no good."""

import itertools
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from raymem.logs import RateLimit

WAIT_S = 1.0
DESCRIPTORS = 256
CROWD = 190
JSON = "Content-Type: application/json\r\n"


class Served(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)


@contextmanager
def served(folder: Path, environ: dict[str, str]) -> Iterator[Served]:
    command = [sys.executable, "-m", "raymem.cli", "serve", "--port", "0", "--json", "--store", str(folder / "memory")]
    limited = ["bash", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "bash", *command]
    log = folder / "log"
    with (
        log.open("w") as err,
        subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=err, text=True, env=environ) as process,
    ):
        try:
            assert process.stdout is not None
            said = "".join(itertools.takewhile(lambda line: line != "}\n", process.stdout)) + "}"
            yield Served(process, json.loads(said)["url"], log)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    return os.environ | {"RAYMEM_GATEWAY__WAIT_S": str(WAIT_S), "RAYMEM_GATEWAY__MAX_BODY_BYTES": str(2**20)}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]) -> Iterator[Served]:
    # this process holds the other ends
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    with served(tmp_path_factory.mktemp("gateway"), environ) as found:
        yield found
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def dial(gateway: Served, data: bytes) -> socket.socket:
    caller = socket.create_connection(gateway.address, timeout=20)
    caller.sendall(data)
    return caller


def heard(caller: socket.socket) -> bytes:
    """Everything until the other side closes, however it does."""
    told = b""
    try:
        while piece := caller.recv(2**16):
            told += piece
    except ConnectionError:
        pass
    return told


def post(path: str, headers: str, body: bytes = b"", host: str = "127.0.0.1") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n".encode() + body


HALF = post("/v1/merge", f"{JSON}Content-Length: 100000\r\n", b"{")
HALVES = {
    "nothing": b"",
    "half a line": b"GET /v1/ban",
    "half a head": b"GET /v1/banks HTTP/1.1\r\nHost: 127.0.0.1\r\n",
    "half a body": HALF,
    "half a chunk": post("/v1/merge", f"{JSON}Transfer-Encoding: chunked\r\n", b"ff\r\n{"),
    "half a refused body": post("/v1/merge", f"{JSON}Content-Length: 100000\r\n", b"{", host="evil.example"),
    "half an upload": post("/v1/banks/lab/a/import", "Content-Length: 100000\r\n", b"x").replace(b"POST", b"PUT", 1),
}


# what waits for a head, what waits for a body, and what was answered before its body came
CROWDS = [
    ("nothing", "half a line", "half a head"),
    ("half a body", "half a chunk", "half an upload"),
    ("half a refused body",),
]


def test_every_half_is_in_a_crowd():
    assert sorted(itertools.chain(*CROWDS)) == sorted(HALVES)


@pytest.mark.parametrize("halves", CROWDS, ids=", ".join)
def test_a_crowd_that_sends_halves_silences_nobody_and_fills_no_log(gateway, halves):
    sent = itertools.islice(itertools.cycle(HALVES[half] for half in halves), CROWD)
    with ExitStack() as crowd:
        callers = [crowd.enter_context(dial(gateway, half)) for half in sent]
        for _ in range(5):
            start = time.perf_counter()
            assert httpx.get(f"{gateway.url}/healthz", timeout=10).status_code == 200
            assert httpx.get(f"{gateway.url}/v1/banks", timeout=10).json() == []
            assert time.perf_counter() - start < 5
        answers = [heard(caller) for caller in callers]
    # those who were told at once may hear nothing more
    assert all(answer == b"" or answer.startswith(b"HTTP/1.1 4") for answer in answers)
    assert gateway.log.stat().st_size < 20_000
    assert gateway.process.poll() is None


def test_a_caller_that_dribbles_is_told_that_it_is_too_slow(gateway):
    with dial(gateway, HALF) as caller:
        caller.settimeout(0.2)
        start, told = time.perf_counter(), b""
        while not told and time.perf_counter() - start < 20:
            try:
                told = caller.recv(4096)
            except TimeoutError:
                caller.send(b" ")
    assert told.startswith(b"HTTP/1.1 408")
    assert json.loads(told.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_input"


def test_a_caller_that_sends_steadily_has_all_the_time_it_needs(gateway):
    with dial(gateway, post("/v1/merge", f"{JSON}Content-Length: 40000\r\nConnection: close\r\n")) as caller:
        # twice as long as a silent caller has
        for _ in range(20):
            caller.sendall(b" " * 2000)
            time.sleep(0.1)
        assert heard(caller).startswith(b"HTTP/1.1 422")


def test_a_caller_that_sent_much_at_once_may_not_hold_it_for_hours(gateway):
    with dial(gateway, post("/v1/params", "Content-Length: 1000000\r\n").replace(b"POST", b"PUT", 1)) as caller:
        caller.sendall(b"x" * 900_000)
        start = time.perf_counter()
        caller.settimeout(30)
        assert caller.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.perf_counter() - start < 10


def test_a_caller_that_takes_no_answer_is_dropped(gateway):
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.connect(gateway.address)
    with caller:
        caller.settimeout(0.2)
        start = time.perf_counter()
        dropped = False
        # asks again and again without listening: the answers pile up until nothing is taken any more
        while not dropped and time.perf_counter() - start < 30:
            try:
                caller.send(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            except TimeoutError:
                continue
            except ConnectionError:
                dropped = True
            time.sleep(0.05)
    assert dropped
    assert httpx.get(f"{gateway.url}/healthz").status_code == 200


ODD = [
    (b"\x00" * 100, 400),
    (b"GET\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 431),
    (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 70_000, 431),
    (b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    (post("/v1/merge", "Content-Length: 1\r\nContent-Length: 2\r\n", b"ab"), 400),
    (post("/v1/merge", "Content-Length: -1\r\n"), 400),
    (post("/v1/merge", "Content-Length: 99999999999999999999999\r\n"), 400),
    (post("/v1/merge", "Content-Length: 2000000\r\nConnection: close\r\n"), 413),
    (post("/v1/merge", "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", b"0\r\n\r\n"), 400),
    (post("/v1/merge", "Transfer-Encoding: chunked\r\n", b"zz\r\n"), 400),
    (post("/v1/merge", "Transfer-Encoding: gzip\r\n", b"zz\r\n"), 400),
    (post("/v1/merge", "Transfer-Encoding: chunked\r\n", b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 200), 431),
    (b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
    (b"GET /%00%ff%zz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", 404),
    (b"GET /v1/banks/%00/%0a HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", 422),
    (b"HEAD /v1/banks HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", 405),
    (b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", 404),
    (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 3 + b"GET /x HTTP/1.0\r\n\r\n", 200),
]


@pytest.mark.parametrize(("data", "status"), ODD, ids=lambda value: str(value)[:40])
def test_what_is_odd_is_answered_and_closed(gateway, data, status):
    with dial(gateway, data) as caller:
        told = heard(caller)
    statuses = {int(line.split()[1]) for line in told.splitlines() if line.startswith(b"HTTP/1.1 ")}
    assert status in statuses
    assert not {found for found in statuses if found >= 500}
    assert gateway.log.stat().st_size < 20_000


def test_a_hundred_requests_before_the_first_answer_are_too_many(gateway):
    with dial(gateway, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 100) as caller:
        assert heard(caller).count(b"HTTP/1.1 200") < 100


def test_a_signal_ends_it_beside_halves_and_slow_readers(tmp_path, environ):
    with served(tmp_path, environ | {"RAYMEM_GATEWAY__WAIT_S": "60"}) as gateway, ExitStack() as crowd:
        callers = [crowd.enter_context(dial(gateway, half)) for half in HALVES.values() for _ in range(5)]
        assert httpx.get(f"{gateway.url}/healthz").status_code == 200
        start = time.perf_counter()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(30)
        assert time.perf_counter() - start < 5
        assert all(b"HTTP/1.1 5" not in heard(caller) for caller in callers)
        assert "Traceback" not in gateway.log.read_text()


def test_a_flood_of_lines_is_cut_and_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = logging.getLogger("quiet.test")
    quiet: Callable[[logging.LogRecord], bool] = RateLimit(most=3, window_s=10.0)
    logger.addFilter(quiet)
    now[0] = 100.0
    for number in range(10):
        logger.warning("line %d", number)
    now[0] = 111.0
    logger.warning("line %d", 10)
    assert [record.getMessage() for record in caplog.records] == [
        *("line 0", "line 1", "line 2"),
        "(7 lines of quiet.test were left out) line 10",
    ]
