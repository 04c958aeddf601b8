"""The `raymem` command."""

from __future__ import annotations

from raymem.cli.app import main

__all__ = ["main"]
