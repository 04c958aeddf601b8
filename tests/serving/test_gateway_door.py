import time

import httpx
import pytest

from raymem import Settings, connect
from raymem.config import GatewaySettings
from raymem.errors import BackendUnavailable, ConfigError, TooLarge, Unauthorized
from raymem.serving.door import Door, check_bind, is_loopback
from raymem.serving.server import bind

KEY = "correct horse battery stäple"
LIMIT = 4096


@pytest.fixture(scope="module")
def locked(tmp_path_factory, run_gateway):
    """A gateway with a key and a small limit."""
    gateway = GatewaySettings(api_keys=("other", KEY), max_body_bytes=LIMIT)
    with run_gateway(tmp_path_factory.mktemp("locked") / "memory", Settings(gateway=gateway)) as url:
        yield url


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(KEY[:-1]), {"Authorization": f"Basic {KEY}".encode()}, {"Authorization": b"Bearer"}],
)
@pytest.mark.parametrize("path", ["/v1/banks", "/v1/stats", "/metrics"])
def test_without_a_right_key_nothing_is_told(locked, headers, path):
    answer = httpx.get(f"{locked}{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "unauthorized"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in answer.text


@pytest.mark.parametrize("key", ["other", KEY])
def test_each_key_opens(locked, key):
    assert httpx.get(f"{locked}/v1/banks", headers=bearer(key)).json() == []


def test_the_client_sends_its_key(locked):
    with connect(locked, api_key="other") as store:
        assert store.nodes() == ["local"]
    with connect(locked, api_key="wrong") as store, pytest.raises(Unauthorized, match="api_key"):
        store.nodes()


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_key(locked, path):
    assert httpx.get(f"{locked}{path}").status_code == 200


def test_a_body_over_the_limit_is_refused_before_it_is_read(locked):
    body = b"x" * (LIMIT + 1)
    answer = httpx.put(f"{locked}/v1/calibrations", content=body, headers=bearer(KEY))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert str(LIMIT) in answer.json()["error"]["message"]
    assert str(LIMIT + 1) in answer.json()["error"]["message"]


def test_a_body_of_unsaid_length_is_cut_off_at_the_limit(locked):
    def endless():
        for _ in range(50):
            yield b"x" * 1000

    answer = httpx.put(f"{locked}/v1/banks/lab/big/import", content=endless(), headers=bearer(KEY))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_large_refused_body_still_hears_why(locked):
    body = b"x" * 8_000_000
    for _ in range(5):
        answer = httpx.post(f"{locked}/v1/banks/lab/a/write", content=body, headers=bearer(KEY))
        assert answer.status_code == 413


def test_a_body_at_the_limit_passes(locked):
    answer = httpx.put(f"{locked}/v1/calibrations", content=b"x" * LIMIT, headers=bearer(KEY))
    assert answer.json()["error"]["code"] == "corrupt"


def test_the_client_refuses_what_the_gateway_would(locked, make_rows):
    settings = Settings(gateway=GatewaySettings(max_body_bytes=LIMIT))
    with connect(locked, api_key=KEY, settings=settings) as store, pytest.raises(TooLarge, match="4,096"):
        store.bank("lab/a").write(make_rows(200))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_without_keys_a_gateway_does_not_listen_to_other_machines(host):
    with pytest.raises(ConfigError, match="RAYMEM_GATEWAY__API_KEYS"):
        check_bind(GatewaySettings(host=host))
    check_bind(GatewaySettings(host=host, api_keys=("k",)))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_loopback_needs_no_keys(host):
    assert is_loopback(host)
    check_bind(GatewaySettings(host=host))


@pytest.mark.parametrize("client", [("10.1.2.3", 5), None])
async def test_without_keys_other_machines_are_turned_away(client):
    async def app(scope, receive, send):
        raise AssertionError("let in")

    door = Door(app, GatewaySettings())
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    await door({"type": "http", "path": "/v1/banks", "headers": [], "client": client}, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example:80"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "["}]
)
def test_without_keys_a_web_page_gets_nothing(gateway, headers):
    answer = httpx.post(f"{gateway}/v1/banks/lab/a/detach", headers=headers)
    assert answer.status_code in (400, 401)


@pytest.mark.parametrize(
    "headers", [{"Host": "localhost:80"}, {"Origin": "http://127.0.0.1:8765"}, {"Host": "[::1]:80"}]
)
def test_without_keys_ones_own_pages_are_served(gateway, headers):
    assert httpx.get(f"{gateway}/v1/nodes", headers=headers).status_code == 200


def test_answers_are_not_held_back(locked):
    with httpx.Client(base_url=locked, headers=bearer(KEY)) as client:
        waits = []
        for _ in range(20):
            start = time.perf_counter()
            client.get("/v1/nodes")
            waits.append(time.perf_counter() - start)
    # Nagle's algorithm against delayed acknowledgements costs 40 ms each time; without, this takes 2 ms
    assert sorted(waits)[len(waits) // 4] < 0.03


def test_a_taken_port_is_named():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            bind("127.0.0.1", port)


def test_nobody_there_is_said_with_the_fix():
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with pytest.raises(BackendUnavailable, match=rf"127\.0\.0\.1:{port}.*raymem serve"):
        connect(f"http://127.0.0.1:{port}")


def test_a_server_of_another_kind_is_recognised():
    import http.server
    import threading

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(BackendUnavailable, match="no raymem gateway"):
            connect(f"http://127.0.0.1:{server.server_port}")
        thread.join()
