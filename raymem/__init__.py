"""raymem: hidden-state memory banks for fleets of LLM agents. Standard library only: the build runs this file too."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

ROOMS = ("actors", "kernels", "serving")


def check_rooms(package: Path = Path(__file__).parent) -> None:
    """Raise unless every linked room of the package is a folder.

    Args:
        package: The folder of the `raymem` package to look at.

    Raises:
        ImportError: A room is a plain file or missing, as in a checkout without symlink support.
    """
    hollow = [room for room in ROOMS if not (package / room).is_dir()]
    if hollow:
        raise ImportError(
            f"raymem was checked out without symlinks: {', '.join(hollow)} in {package} should be links to the folders "
            "beside it. Fix: `git config core.symlinks true`, then `git checkout -- raymem` (on Windows, switch on "
            "developer mode first), or install the wheel."
        )


check_rooms()

if TYPE_CHECKING:
    from raymem.client.store import AsyncStore, Bank, Store, connect
    from raymem.config import Settings
    from raymem.encode.calibration import Calibration
    from raymem.errors import RaymemError
    from raymem.rows import AttendedRows, Trace
    from raymem.types import (
        Ack,
        BankInfo,
        BankSpec,
        EraseReceipt,
        Fingerprint,
        KeySpec,
        MemoryTokens,
        MigrationReport,
        Readout,
        RowRef,
        SweepReport,
    )

# importing torch takes longer than everything else together: names resolve on first use
_HOME = {
    "Ack": "types",
    "AsyncStore": "client.store",
    "AttendedRows": "rows",
    "Bank": "client.store",
    "BankInfo": "types",
    "BankSpec": "types",
    "Calibration": "encode.calibration",
    "EraseReceipt": "types",
    "Fingerprint": "types",
    "KeySpec": "types",
    "MemoryTokens": "types",
    "MigrationReport": "types",
    "RaymemError": "errors",
    "Readout": "types",
    "RowRef": "types",
    "Settings": "config",
    "Store": "client.store",
    "SweepReport": "types",
    "Trace": "rows",
    "connect": "client.store",
}

__all__ = [
    "Ack",
    "AsyncStore",
    "AttendedRows",
    "Bank",
    "BankInfo",
    "BankSpec",
    "Calibration",
    "EraseReceipt",
    "Fingerprint",
    "KeySpec",
    "MemoryTokens",
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
