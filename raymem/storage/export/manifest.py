"""What an exported file says of itself: the domain of every field of `manifest.json`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from raymem.errors import Corrupt, InvalidInput
from raymem.types import BankSpec, check_label, shorten

FORMAT = "raymem-bank"
VERSION = 2
# what this release reads; 1 had no erased rows
_READS = (1, 2)
MANIFEST, JOURNAL, STATE, CALIBRATION, PARAMS = (
    "manifest.json",
    "journal.arrow",
    "state.safetensors",
    "calibration.safetensors",
    "params.safetensors",
)
MEMBERS = (JOURNAL, STATE, CALIBRATION, PARAMS)
# the names of a million runs, which the state's part has
MANIFEST_BYTES = 64 * 2**20
# numbers that JSON carries everywhere, far inside the 64 bits of a journal's columns
COUNT_END = 2**53
# of one row, in all its layers
_ROW_NUMBERS = 2**24

_Count = Annotated[int, Field(ge=0, lt=COUNT_END)]


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Member(_ManifestPart):
    """Bytes and sha256 of one member."""

    bytes: _Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ExportedState(_ManifestPart):
    """Where the state stands, and plain data that belongs to its tensors."""

    pos: _Count
    meta: dict[str, Any]


class ExportManifest(_ManifestPart):
    """The compatibility surface of the format: what `manifest.json` says."""

    format: str
    version: int
    made_by: str = Field(max_length=1000)
    bank: str = Field(max_length=1000)
    spec: BankSpec
    epoch: _Count
    created: float
    exported: float
    tags: dict[str, _Count]
    rows: _Count
    end: _Count | None = None
    state: ExportedState | None
    members: dict[str, Member]

    @property
    def last(self) -> int:
        """The position that the next row gets."""
        return self.rows if self.end is None else self.end


def parse(data: bytes, where: str) -> ExportManifest:
    """Read a manifest; `where` names the file in errors.

    Raises:
        Corrupt: naming the field that is outside its domain and its value.
    """
    try:
        said = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Corrupt(f"can't be read ({str(error)[:200]})") from error
    made = (said.get("format"), said.get("version")) if isinstance(said, dict) else None
    if made not in [(FORMAT, version) for version in _READS]:
        raise Corrupt(
            f"{where} says it is {shorten(str(made))}; this raymem reads {FORMAT} of versions "
            f"{', '.join(map(str, _READS))}: use the release that wrote it, or a later one",
            other_format=True,
        )
    del said
    try:
        manifest = ExportManifest.model_validate_json(data)
        for tag in manifest.tags:
            check_label("tag", tag)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise Corrupt(
            f"does not make sense: {shorten(field)} is {shorten(repr(first['input']))}: {first['msg']}"
        ) from error
    except InvalidInput as error:
        raise Corrupt(f"does not make sense: {error.message}") from error
    _fit(manifest)
    return manifest


def _fit(manifest: ExportManifest) -> None:
    """What holds between the fields."""
    end, fingerprint = manifest.last, manifest.spec.fingerprint
    needed = {JOURNAL} | ({STATE} if manifest.state else set()) | ({PARAMS} if manifest.spec.params else set())
    late = {tag: pos for tag, pos in manifest.tags.items() if pos > end}
    numbers = len(fingerprint.layers) * fingerprint.width
    if manifest.state and manifest.state.pos > end:
        raise Corrupt(f"has a state at pos {manifest.state.pos} and ends at {end}")
    if late:
        raise Corrupt(f"has tags behind its end, {end}: {shorten(str(late))}")
    if missing := needed - set(manifest.members):
        raise Corrupt(f"does not list {', '.join(sorted(missing))}")
    if odd := set(manifest.members) - set(MEMBERS):
        raise Corrupt(f"lists {shorten(str(sorted(odd)))}, which no export has")
    if manifest.spec.budget_bytes >= COUNT_END:
        raise Corrupt(f"has budget_bytes {shorten(str(manifest.spec.budget_bytes))}; the limit is {COUNT_END}")
    if numbers > _ROW_NUMBERS or len(set(fingerprint.layers)) < len(fingerprint.layers) or min(fingerprint.layers) < 1:
        raise Corrupt(
            f"says that a row has {len(fingerprint.layers)} layers of width {fingerprint.width}; layers are different "
            f"numbers from 1 on, and a row has at most {_ROW_NUMBERS} numbers"
        )
