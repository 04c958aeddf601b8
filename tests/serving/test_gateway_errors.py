import json

import httpx
import msgpack
import pytest
from fastapi import FastAPI
from jsonschema import validate

from raymem import Settings
from raymem.client import routes, wire
from raymem.client.routes import Route
from raymem.config import GatewaySettings
from raymem.errors import Overloaded, RaymemError, TooLarge
from raymem.serving import errors
from raymem.serving.app import create_app
from raymem.serving.intake import COMMAND, ROWS, Budget, check_json

TABLE = [route for route in vars(routes).values() if isinstance(route, Route)]


def every(cls: type[RaymemError]) -> list[type[RaymemError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in every(sub))]


@pytest.fixture(scope="module")
def openapi() -> dict:
    async def opener():
        raise AssertionError("not started")

    return create_app(opener, Settings()).openapi()


@pytest.mark.parametrize("route", TABLE, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_of_the_table_is_served_and_documented(openapi, route):
    told = openapi["paths"][route.path][route.method.lower()]
    assert told["summary"]
    assert told["description"].endswith(".")
    assert {"401", "413", "422", "429", "500", "503"} <= told["responses"].keys()


def test_nothing_is_served_that_the_table_does_not_know(openapi):
    served = {(method.upper(), path) for path, methods in openapi["paths"].items() for method in methods}
    assert served == {(route.method, route.path) for route in TABLE}


def test_every_documented_error_has_the_one_model_and_names_its_codes(openapi):
    checked = 0
    for methods in openapi["paths"].values():
        for told in methods.values():
            for status, response in told["responses"].items():
                if int(status) >= 400:
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}
                    assert "`" in response["description"]
                    checked += 1
    assert checked > 6 * len(TABLE)


def test_every_reference_in_openapi_leads_somewhere(openapi):
    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    found = {reference.rsplit("/", 1)[1] for reference in references(openapi)}
    assert {"WriteBody", "ReadBody", "PackedTensor"} <= found
    assert found <= openapi["components"]["schemas"].keys()


@pytest.mark.parametrize("cls", every(RaymemError), ids=lambda cls: cls.__name__)
async def test_every_error_leaves_with_its_status_and_comes_back_as_itself(openapi, cls):
    app = FastAPI()
    errors.install(app)

    @app.get("/fail")
    async def fail():
        raise cls("the value 7; do this", value=7, retry_after_s=1.5)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get("/fail")
    assert answer.status_code == cls.http_status
    validate(answer.json(), {"$ref": "#/components/schemas/ErrorBody", "components": openapi["components"]})
    back = RaymemError.from_wire(answer.json()["error"])
    assert (type(back), back.message, back.details["value"]) == (cls, "the value 7; do this", 7)
    assert answer.headers.get("Retry-After") == ("2" if cls is Overloaded else None)


ASKED = [
    ("GET", "/v1/banks/lab/nobody", None, 404, "bank_not_found"),
    ("GET", "/v1/banks/lab/no.dots", None, 422, "invalid_name"),
    ("GET", f"/v1/banks/lab/{'x' * 10_000}", None, 422, "invalid_name"),
    ("GET", "/v1/banks/one/two/three", None, 404, "not_found"),
    ("PATCH", "/v1/banks", None, 405, "invalid_input"),
    ("POST", "/v1/banks", {"name": "lab/new"}, 422, "invalid_input"),
    ("POST", "/v1/banks", {"name": "lab/new", "spec": {}, "colour": "red"}, 422, "invalid_input"),
    ("POST", "/v1/banks/lab/nobody/attach", {}, 404, "bank_not_found"),
    ("POST", "/v1/banks/lab/nobody/attach", {"nod": "x"}, 422, "invalid_input"),
    ("POST", "/v1/banks/lab/nobody/write", {"stream": "s"}, 422, "invalid_input"),
    ("POST", "/v1/banks/lab/nobody/read", {"hidden": [], "k": "many"}, 422, "invalid_input"),
    ("POST", "/v1/banks/lab/nobody/recall", {"text": ""}, 422, "invalid_input"),
    ("POST", "/v1/banks/lab/nobody/recall", {"text": "x", "k": 0}, 422, "invalid_input"),
    ("GET", "/v1/banks/lab/nobody/tokens?stream=s&run=r&seq_from=-1&seq_to=2", None, 422, "invalid_input"),
    ("GET", "/v1/calibrations?content=none&layers=3", None, 404, "calibration_not_found"),
    ("GET", "/v1/calibrations?content=none&layers=three", None, 422, "invalid_input"),
    ("PUT", "/v1/calibrations", {"not": "one"}, 422, "corrupt"),
    ("PUT", "/v1/params", {"not": "some"}, 422, "corrupt"),
    ("GET", "/v1/params?params=none", None, 404, "not_found"),
    ("PUT", "/v1/banks/lab/new/import", {"not": "one"}, 422, "corrupt"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), ASKED, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_answered_in_the_one_shape(gateway, openapi, method, path, body, status, code):
    answer = httpx.request(method, f"{gateway}{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    validate(answer.json(), {"$ref": "#/components/schemas/ErrorBody", "components": openapi["components"]})


SENT = [
    ("recall", '{"text": "x"}', "application/x-www-form-urlencoded", "send application/json"),
    ("write", '{"stream": "s"}', "text/plain", "send application/json, application/msgpack"),
    ("write", '{"stream": "s", ', "application/json", "body: Invalid JSON"),
    ("read", '{"hidden": [[1.0]]}', "application/json", "0.0: Input should be a valid array"),
    ("recall", '["text"]', "application/json", "body: Input should be"),
]


@pytest.mark.parametrize(("verb", "body", "kind", "says"), SENT, ids=lambda value: str(value)[:30])
def test_the_message_names_what_was_wrong_with_a_body(gateway, verb, body, kind, says):
    answer = httpx.post(f"{gateway}/v1/banks/lab/nobody/{verb}", content=body, headers={"content-type": kind})
    assert answer.status_code == 422
    assert says in answer.json()["error"]["message"]


@pytest.fixture
def bank_url(gateway, gateway_spec, bank_name):
    body = {"name": bank_name, "spec": gateway_spec.model_dump(mode="json")}
    httpx.post(f"{gateway}/v1/banks", json=body).raise_for_status()
    return f"{gateway}/v1/banks/{bank_name}"


BODIES = [
    ({"hidden": [[[1.0]]]}, "invalid_trace", "width 24"),
    ({"hidden": [[[1.0] * 24, [1.0] * 23]]}, "invalid_trace", "equal lengths"),
    ({"hidden": [[[1e39] * 24, [1.0] * 24]]}, "non_finite", "row 0"),
    ({"hidden": {"dtype": "bfloat16", "shape": [1, 2, 24], "base64": "AAAA"}}, "invalid_trace", "3 bytes"),
    ({"hidden": {"dtype": "bfloat16", "shape": [1, 2, 24], "base64": "A!"}}, "invalid_trace", "base64"),
    ({"hidden": {"dtype": "int8", "shape": [1], "base64": "AA=="}}, "invalid_input", "dtype"),
    ({"hidden": [[[1.0] * 24] * 2], "k": 5000}, "invalid_input", "k: 5000; give a whole number"),
    ({"hidden": [[[1.0] * 24] * 2], "start": -1}, "invalid_input", "-1"),
]


@pytest.mark.parametrize(("body", "code", "says"), BODIES, ids=lambda value: str(value)[:30])
def test_a_bad_question_is_told_what_is_wrong_with_it(bank_url, body, code, says):
    error = httpx.post(f"{bank_url}/read", json=body).json()["error"]
    assert error["code"] == code
    assert says in error["message"] or says in str(error["details"])


@pytest.mark.parametrize("token", [-1, 2**63, 1.5, "x"])
def test_a_token_that_is_none_is_refused(bank_url, token):
    body = {"stream": "s", "run": "r", "tokens": [token], "hidden": [[[1.0] * 24] * 2]}
    assert httpx.post(f"{bank_url}/write", json=body).status_code == 422


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("text/plain", b"hello", "application/msgpack"),
        ("application/msgpack", b"\xc1", "not a raymem message"),
        ("application/msgpack", b"\x07", "takes a Trace"),
        ("application/vnd.apache.arrow.stream", b"nothing", "not an Arrow stream"),
        ("application/json", b"{", "JSON"),
    ],
)
def test_a_body_that_is_not_what_it_says_is_refused(bank_url, kind, content, says):
    answer = httpx.post(f"{bank_url}/write", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("seq", "1", "seq is '1'"),
        ("seq", 1.5, "seq is 1.5"),
        ("stream", 7, "stream is 7"),
        ("time", True, "time is True"),
        ("hidden", [[[1.0]]], "hidden is"),
        ("fingerprint", 5, "fingerprint is 5"),
        ("fingerprint", {"$": "Fingerprint", "layers": "all"}, "Fingerprint"),
        ("more", 1, "no field 'more'"),
        ("$", "Traces", "'Traces'"),
    ],
)
def test_a_field_of_another_type_is_the_senders_mistake_and_no_damage(bank_url, make_rows, field, value, says):
    def keep(code: int, data: bytes) -> msgpack.ExtType:
        return msgpack.ExtType(code, data)

    body = msgpack.unpackb(wire.pack(make_rows(2)), ext_hook=keep) | {field: value}
    headers = {"Content-Type": "application/msgpack"}
    answer = httpx.post(f"{bank_url}/write", content=msgpack.packb(body), headers=headers)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_input"
    assert says in answer.json()["error"]["message"]


ODD = [
    (b"[" * 100_000, 413),
    (b"[" * 1000, 422),
    (b'{"target": ' + b"9" * 5000 + b', "sources": []}', 422),
    (b'{"target": NaN, "sources": []}', 422),
    (b'{"target": "\xff", "sources": []}', 422),
    (b'{"target": "\\ud800", "sources": []}', 422),
    (b"{" + b",".join(b'"%d": 0' % number for number in range(100_000)) + b"}", 413),
    (b'{"' + b"k" * 100_000 + b'": 1}', 422),
    (b"[" + b",".join([b"[]"] * 100_000) + b"]", 413),
    (b'"' * 100_000, 413),
    (b"null", 422),
    (b"", 422),
]


@pytest.mark.parametrize("path", ["/v1/merge", "/v1/banks/lab/nobody/read", "/v1/banks/lab/nobody/write"])
@pytest.mark.parametrize(("content", "status"), ODD, ids=lambda value: str(value)[:30])
def test_odd_json_is_refused_without_ado(gateway, openapi, path, content, status):
    answer = httpx.post(f"{gateway}{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in {status, 422}
    assert len(answer.content) < 10_000
    validate(answer.json(), {"$ref": "#/components/schemas/ErrorBody", "components": openapi["components"]})


@pytest.mark.parametrize("path", ["/v1/merge", "/v1/banks/lab/nobody/write"])
def test_json_has_a_limit_of_its_own(gateway, path):
    body = b'{"stream": "' + b"x" * 2**23 + b'"}'
    answer = httpx.post(f"{gateway}{path}", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert "max_json_bytes" in answer.json()["error"]["message"]


def test_text_with_brackets_and_commas_is_no_structure():
    text = json.dumps({"text": '[,{":\\"' * 10_000}).encode()
    check_json(text, COMMAND)
    with pytest.raises(TooLarge):
        check_json(b"[" * 10_000, COMMAND)
    # 32,768 of them held the interpreter for 0.4 s: each is a problem of its own
    with pytest.raises(TooLarge, match="64 keys"):
        check_json(b'{"a": 0' + b', "b": 0' * 64 + b"}", ROWS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", b"\xff", {1: 2}, object()])
def test_every_answer_is_json_that_any_parser_takes(value):
    encoded = errors.encode({"error": {"details": {"value": value, "list": [value]}}})

    def refuse(constant):
        raise AssertionError(constant)

    assert "error" in json.loads(encoded.decode(), parse_constant=refuse)


@pytest.mark.parametrize("seq", [2**63, -1, 2**70, "1.5", ""])
@pytest.mark.parametrize("which", ["seq_from", "seq_to"])
def test_a_row_number_that_no_journal_has_is_refused(gateway, which, seq):
    asked = {"stream": "s", "run": "r", "seq_from": 0, "seq_to": 1, which: seq}
    assert httpx.get(f"{gateway}/v1/banks/lab/nobody/tokens", params=asked).status_code == 422


def test_bodies_that_are_held_are_bounded_in_all_and_for_each():
    budget = Budget(GatewaySettings(max_body_bytes=1024, max_held_bytes=4096))
    with budget.share("a") as take, budget.share("b") as take_b:
        take(2048)
        with pytest.raises(Overloaded, match="2048 of them yours"):
            take(1)
        take_b(2000)
        with budget.share("c") as take_c, pytest.raises(Overloaded):
            take_c(49)
    with budget.share("a") as take:
        take(2048)


async def test_a_bug_says_nothing_of_itself():
    app = FastAPI()
    errors.install(app)

    @app.get("/fail")
    async def fail():
        raise KeyError("secret")

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/fail")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "raymem_error")
    assert "secret" not in answer.text


def test_the_page_about_http_lists_every_route(root):
    page = (root / "docs" / "http.md").read_text()
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed == {f"{route.method} {route.path}" for route in TABLE}


def test_a_command_has_a_megabyte_at_most(gateway):
    content = b'{"name": "' + b"a" * 2**20 + b'"}'
    answer = httpx.post(f"{gateway}/v1/banks", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "1048576 bytes at most" in answer.json()["error"]["message"]
