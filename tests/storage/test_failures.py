"""What a library in Rust raises becomes an error that somebody handles."""

import pytest

from raymem.errors import Corrupt, StorageError
from raymem.storage.tables.disk import reading, writing


class PanicException(BaseException):
    """As Rust's bindings raise it: no Exception."""


def test_a_panic_is_an_error_of_the_store():
    with pytest.raises(StorageError, match=r"save a: LanceDB panicked: index out of bounds"), writing("save a"):
        raise PanicException("index out of bounds")
    with pytest.raises(Corrupt, match=r"read a: .*LanceDB panicked"), reading("read a"):
        raise PanicException("index out of bounds")


def test_what_ends_a_process_is_none():
    for context in (reading("read a"), writing("save a")):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
