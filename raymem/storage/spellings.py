"""Labels in another Unicode form than raymem compares them in: rows that earlier versions took have them.

Labels are composed at the door (NFC); the name of an old row can be another spelling of the same text: decomposed, or
with one of the characters that Unicode has twice. Such rows keep their names, which their checksums cover, and are
found by any spelling.
"""

from __future__ import annotations

import re
import unicodedata

from raymem.inputs import composed
from raymem.storage.tables.tables import quote

# the three characters of ASCII that others (the sign for kelvin, for one) are the same as
_PLAIN = re.compile(r"[^\x80-\U0010ffffK;`]*")


def has_others(label: str) -> bool:
    """Whether there may be another spelling of a label."""
    return not _PLAIN.fullmatch(label)


def alike(column: str, label: str) -> str:
    """An SQL condition that holds for all spellings of a label, maybe for other labels too: `same` tells them apart."""
    if not has_others(label):
        return f"{column} = {quote(label)}"
    plain = _PLAIN.match(label)
    assert plain is not None
    return f"starts_with({column}, {quote(plain[0])})" if plain[0] else "true"


def same(given: str, label: str) -> bool:
    """Whether two labels are the same text."""
    return given == label or composed(given) == composed(label)


def spellings(label: str) -> list[str]:
    """The spellings of a label that are common, the given one first."""
    forms = () if label.isascii() else (unicodedata.normalize(form, label) for form in ("NFC", "NFD"))
    return list(dict.fromkeys([label, *forms]))
