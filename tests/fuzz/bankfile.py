"""Exported files taken apart and put together again, with hashes that hold: what a hostile or buggy writer can make."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from crc32c import crc32c
from torch import Tensor

from raymem import Store
from raymem.memory import kinds

JOURNAL, STATE, CALIBRATION = "journal.arrow", "state.safetensors", "calibration.safetensors"


@dataclass
class BankFile:
    """The manifest and the other members of one file."""

    manifest: dict[str, Any]
    members: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> BankFile:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        return cls(json.loads(members.pop("manifest.json")), members)

    def copy(self) -> BankFile:
        return BankFile(json.loads(json.dumps(self.manifest)), dict(self.members))

    def write(self, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
        """With hashes of the members as they are."""
        listed = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.members.items()
        }
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in self.members.items():
                archive.writestr(name, data)
            archive.writestr("manifest.json", json.dumps(self.manifest | {"members": listed}))
        return path

    @property
    def rows(self) -> pa.Table:
        return pa.ipc.open_file(io.BytesIO(self.members[JOURNAL])).read_all()

    @rows.setter
    def rows(self, table: pa.Table) -> None:
        self.members[JOURNAL] = arrow_file(table)
        self.manifest["rows"] = len(table)

    @property
    def state(self) -> dict[str, Tensor]:
        return safetensors.torch.load(self.members[STATE])

    @state.setter
    def state(self, tensors: dict[str, Tensor]) -> None:
        self.members[STATE] = safetensors.torch.save(tensors)


def exported(
    store: Store, tiny: Any, folder: Path, *, budget_bytes: int | None = None, erased: tuple[str, ...] = ()
) -> dict[str, BankFile]:
    """A bank of each kind as a file, with a tag and two streams; the kinds in `erased` with three rows erased."""
    made = {}
    for kind in kinds():
        spec = tiny.spec(kind)
        bank = store.create(f"made/{kind}", spec.model_copy(update={"budget_bytes": budget_bytes or spec.budget_bytes}))
        bank.write(tiny.trace(20))
        bank.tag("then")
        bank.write(tiny.trace(20, stream="other", seed=1))
        if kind in erased:
            bank.erase(stream="s", run="r", seq_from=3, seq_to=6)
        bank.detach()
        bank.export(folder / kind)
        made[kind] = BankFile.read(folder / kind)
        store.delete(bank.name)
    return made


def arrow_file(table: pa.Table, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def changed(table: pa.Table, column: str, row: int, value: Any, *, signed: bool = True) -> pa.Table:
    """A journal with one entry changed, its row's checksum too."""
    place = table.schema.get_field_index(column)
    values = table[column].to_pylist()
    values[row] = value
    table = table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    return signed_rows(table) if signed else table


def signed_rows(table: pa.Table) -> pa.Table:
    """A journal whose checksums are those of its rows."""
    table = table.combine_chunks()
    sums = [_crc(row) for row in table.to_pylist()]
    place, kind = table.schema.get_field_index("crc32c"), table.schema.field("crc32c")
    return table.set_column(place, kind, pa.array(sums, pa.uint32()))


def _crc(row: dict[str, Any]) -> int:
    # hidden states of bfloat16 lie there as their bits
    content = np.array([row["seq"], row["token"]], np.int64).tobytes() + np.array(row["hidden"], np.uint16).tobytes()
    if row["value"] is not None:
        content += np.array(row["value"], np.float32).tobytes()
    return int(crc32c(content, crc32c(f"{row['stream']}\0{row['run']}".encode())))


def filled(tensor: Tensor, value: float) -> Tensor:
    """A tensor of one value, or the nearest that its type has."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, value)
    if tensor.dtype == torch.bool:
        return torch.full_like(tensor, bool(value))
    about = torch.iinfo(tensor.dtype)
    return torch.full_like(tensor, int(min(max(value if value == value else 0, about.min), about.max)))
