import copy

import pytest

from raymem import errors
from raymem.errors import Overloaded, RaymemError


def every_error() -> list[type[RaymemError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, RaymemError)]


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_an_error_survives_the_wire_and_another_process(cls: type[RaymemError]):
    # copying and what Ray does between processes go through the same __reduce__
    error = cls("bank 'a/b' is odd", retry_after_s=0.5, to="shard-1")
    for twin in (RaymemError.from_wire(error.to_wire()), copy.copy(error)):
        assert (type(twin), str(twin), twin.details) == (
            cls,
            "bank 'a/b' is odd",
            {"retry_after_s": 0.5, "to": "shard-1"},
        )


def test_codes_are_unique():
    codes = [cls.code for cls in every_error()]
    assert len(codes) == len(set(codes))


def test_the_tree_is_drawn_whole():
    assert errors.__doc__ is not None
    missing = [cls.__name__ for cls in every_error() if cls.__name__ not in errors.__doc__]
    assert missing == []


def test_an_unknown_code_is_still_an_error():
    error = RaymemError.from_wire({"code": "from_the_future", "message": "hello"})
    assert type(error) is RaymemError
    assert str(error) == "hello"


def test_overloaded_says_when_to_come_back():
    assert Overloaded("full", retry_after_s=0.25).retry_after_s == 0.25
