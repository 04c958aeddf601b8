"""Requests made from OpenAPI, right and wrong ones, to a real gateway over a real store."""

from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from fuzzing import bounded
from hypothesis import given
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from raymem import Settings
from raymem.client import routes
from raymem.serving.app import create_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@schemathesis.serializer(routes.MSGPACK, routes.ARROW)
def _as_it_is(context: schemathesis.SerializationContext, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


async def _never() -> Any:
    raise AssertionError("only described, not started")


DESCRIBED = schemathesis.openapi.from_dict(create_app(_never, Settings()).openapi())
OPERATIONS = [found.ok() for found in DESCRIBED.get_all_operations()]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_gets_what_openapi_does_not_tell(operation: Any, mode: GenerationMode, fuzzed: str) -> None:
    @bounded(5, share=len(OPERATIONS) * len(GenerationMode))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=fuzzed, checks=CHECKS)

    # what takes nothing can't be asked wrongly
    with suppress(Unsatisfiable):
        ask()


def test_every_route_is_asked() -> None:
    assert len(OPERATIONS) == len([route for route in vars(routes).values() if isinstance(route, routes.Route)])
