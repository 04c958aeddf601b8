"""raymem: hidden-state memory banks for fleets of LLM agents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raymem import _layout

_layout.check()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from raymem.config import Settings
    from raymem.encode.calibration import Calibration
    from raymem.errors import RaymemError
    from raymem.store import AsyncStore, Bank, Store, connect
    from raymem.types import (
        Ack,
        BankInfo,
        BankSpec,
        EraseReceipt,
        Fingerprint,
        KeySpec,
        MigrationReport,
        Readout,
        RowRef,
        SweepReport,
        Trace,
    )

# importing torch takes longer than everything else together: names resolve on first use
_HOME = {
    "Ack": "types",
    "AsyncStore": "store",
    "Bank": "store",
    "BankInfo": "types",
    "BankSpec": "types",
    "Calibration": "encode.calibration",
    "EraseReceipt": "types",
    "Fingerprint": "types",
    "KeySpec": "types",
    "MigrationReport": "types",
    "RaymemError": "errors",
    "Readout": "types",
    "RowRef": "types",
    "Settings": "config",
    "Store": "store",
    "SweepReport": "types",
    "Trace": "types",
    "connect": "store",
}

__all__ = [
    "Ack",
    "AsyncStore",
    "Bank",
    "BankInfo",
    "BankSpec",
    "Calibration",
    "EraseReceipt",
    "Fingerprint",
    "KeySpec",
    "MigrationReport",
    "RaymemError",
    "Readout",
    "RowRef",
    "Settings",
    "Store",
    "SweepReport",
    "Trace",
    "__version__",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'raymem' has no attribute {name!r}")
    return getattr(importlib.import_module(f"raymem.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
