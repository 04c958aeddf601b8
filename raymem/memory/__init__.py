"""The memory mechanisms, one file each, built by name."""

from raymem.memory.base import (
    blend,
    build,
    class_of,
    compacts,
    keeps_rows,
    kinds,
    merge_rule,
    option_names,
    shows_rows,
)

__all__ = [
    "blend",
    "build",
    "class_of",
    "compacts",
    "keeps_rows",
    "kinds",
    "merge_rule",
    "option_names",
    "shows_rows",
]
