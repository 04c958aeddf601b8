"""A bank travels in one file that others can read, and a damaged file brings nothing with it."""

import hashlib
import json
import random
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import safetensors.torch
import torch

from raymem.encode.calibration import Calibration, Range
from raymem.errors import BankExists, BankNotFound, Corrupt, InvalidName, StorageError
from raymem.storage.export.export import export_bank
from raymem.storage.export.imports import import_bank
from raymem.storage.journal.journal import Journal
from raymem.storage.store import ColdStore
from raymem.types import BankSpec, KeySpec

STATE = {"keys": torch.arange(12.0).reshape(3, 4).bfloat16(), "cov": torch.eye(3).double(), "count": torch.tensor(7)}


@pytest.fixture
def calibration() -> Calibration:
    ranges = {KeySpec(layers=(layer,)): Range(0.2, 0.9) for layer in (3, 5)}
    return Calibration(model="c", layers=(3, 5), mean_LD=torch.randn(2, 9), ranges=ranges)


@pytest.fixture
def spec(spec: BankSpec, calibration: Calibration) -> BankSpec:
    return spec.model_copy(
        update={"fingerprint": spec.fingerprint.model_copy(update={"calibration": calibration.hash})}
    )


@pytest.fixture
def exported(store: ColdStore, journal: Journal, rows, calibration: Calibration, tmp_path: Path) -> Path:
    """lab/a with 17 rows of two owners, a calibration, a state and a tag, as a file."""
    store.calibrations.put(calibration.hash, calibration.model, calibration.layers, calibration.to_bytes())
    journal.append(rows(5, 0), rows(3, 5))
    entry = store.catalog.claim("lab/a", "me", 0)
    journal = store.journal(entry)
    journal.append(rows(9, 8, stream="it's"))
    store.snapshots(entry).save(11, STATE, {"n": [1]})
    store.catalog.tag("lab/a", "then", 8)
    path = tmp_path / "a.raymem"
    report = export_bank(store, "lab/a", path)
    assert (report.path, report.rows, report.bytes) == (path, 17, path.stat().st_size)
    return path


@pytest.fixture
def elsewhere(tmp_path: Path) -> ColdStore:
    return ColdStore.open(str(tmp_path / "elsewhere"))


def journal_table(store: ColdStore, name: str) -> pa.Table:
    return pa.concat_tables([rows.to_arrow() for rows in store.journal(store.catalog.get(name)).scan()])


def said(table: pa.Table) -> pa.Table:
    """A journal without what its store says of it."""
    return table.drop_columns(["epoch"])


def test_pyarrow_and_safetensors_alone_can_read_it(store: ColdStore, exported: Path, calibration: Calibration):
    with zipfile.ZipFile(exported) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        manifest = json.loads(archive.read("manifest.json"))
        table = pa.ipc.open_file(archive.read("journal.arrow")).read_all()
        state = safetensors.torch.load(archive.read("state.safetensors"))
        means = safetensors.torch.load(archive.read("calibration.safetensors"))
    assert (manifest["format"], manifest["version"], manifest["rows"]) == ("raymem-bank", 2, 17)
    assert manifest["state"] == {"pos": 11, "meta": {"n": [1]}}
    assert manifest["spec"]["fingerprint"]["layers"] == [3, 5]
    assert table.equals(journal_table(store, "lab/a"))
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    assert any(torch.equal(tensor, calibration.mean_LD) for tensor in means.values())


def test_an_import_is_the_same_bank_under_its_own_identity(
    store: ColdStore, exported: Path, elsewhere: ColdStore, calibration
):
    seen: list[tuple[int, int]] = []
    entry = import_bank(elsewhere, exported, "lab/b", progress=lambda done, total: seen.append((done, total)))
    original = store.catalog.get("lab/a")
    assert elsewhere.catalog.get("lab/b") == entry
    assert (entry.spec, entry.tags) == (original.spec, {"then": 8})
    assert (entry.epoch, entry.generation, entry.state, entry.owner) == (0, 0, "cold", None)
    assert entry.id != original.id
    assert seen[-1] == (17, 17)
    assert said(journal_table(elsewhere, "lab/b")).equals(said(journal_table(store, "lab/a")))
    assert set(journal_table(elsewhere, "lab/b")["epoch"].to_pylist()) == {0}
    # a state is a function of the rows: a file's is not believed
    assert elsewhere.snapshots(entry).latest(strict=True) is None
    assert Calibration.from_bytes(elsewhere.calibrations.get(calibration.hash)).hash == calibration.hash


def test_an_imported_bank_goes_on(exported: Path, elsewhere: ColdStore, rows):
    import_bank(elsewhere, exported, "lab/b")
    journal = elsewhere.journal(elsewhere.catalog.claim("lab/b", "me", 0))
    journal.append(rows(2, 17))
    assert journal.end() == 19


def test_an_empty_bank_travels_too(store: ColdStore, spec: BankSpec, elsewhere: ColdStore, tmp_path: Path):
    store.catalog.create("lab/empty", spec)
    assert export_bank(store, "lab/empty", tmp_path / "e.raymem").rows == 0
    entry = import_bank(elsewhere, tmp_path / "e.raymem", "lab/empty")
    assert elsewhere.journal(entry).end() == 0
    assert elsewhere.snapshots(entry).latest() is None


def test_names_are_checked_and_kept(store: ColdStore, exported: Path, tmp_path: Path):
    with pytest.raises(BankExists, match="lab/a"):
        import_bank(store, exported, "lab/a")
    with pytest.raises(InvalidName):
        import_bank(store, exported, "../a")
    with pytest.raises(BankNotFound):
        export_bank(store, "lab/none", tmp_path / "none.raymem")
    with pytest.raises(StorageError, match="No such file"):
        export_bank(store, "lab/a", tmp_path / "missing" / "a.raymem")
    assert not list(tmp_path.glob("*none*"))


def test_a_corrupt_journal_is_not_exported(store: ColdStore, exported: Path, tmp_path: Path):
    table = store.tables.open(f"journal-{store.catalog.get('lab/a').id}")
    table.update(where="pos = 9", values={"token": 1})
    with pytest.raises(Corrupt, match="position"):
        export_bank(store, "lab/a", tmp_path / "b.raymem")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.raymem"]


def everything(store: ColdStore) -> set[str]:
    return {path.name for path in Path(store.uri).iterdir()}


def test_no_damage_gets_in_and_nothing_is_left_of_the_try(exported: Path, elsewhere: ColdStore, tmp_path: Path):
    whole = exported.read_bytes()
    spans = {info.filename: info for info in zipfile.ZipFile(exported).infolist()}
    before = everything(elsewhere)
    generator = random.Random(5)
    bad = tmp_path / "bad.raymem"
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:cut] for cut in cuts]
    for info in spans.values():
        # the member's own bytes begin behind its local header, a name and an extra field
        header = whole[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        for _ in range(12):
            flipped = bytearray(whole)
            flipped[start + generator.randrange(info.file_size)] ^= 1 << generator.randrange(8)
            damaged.append(bytes(flipped))
    for data in damaged:
        bad.write_bytes(data)
        with pytest.raises(Corrupt, match=r"bad\.raymem .*export the bank again"):
            import_bank(elsewhere, bad, "lab/b")
    assert everything(elsewhere) == before
    assert elsewhere.catalog.list() == []


def rewrite(path: Path, changes: dict[str, bytes], manifest_changes: dict[str, object]) -> None:
    """Change members and let the manifest's hashes agree, as a hostile or buggy writer would."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    manifest = json.loads(members.pop("manifest.json")) | manifest_changes
    manifest["members"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members.items()
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("manifest.json", json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "manifest_changes", "message"),
    [
        ({"journal.arrow": b"nonsense"}, {}, "journal.arrow"),
        ({}, {"rows": 99}, "17 rows, and the manifest says 99"),
        ({"other.bin": b"nonsense"}, {}, "other.bin"),
        ({"calibration.safetensors": b"nonsense"}, {}, "calibration"),
        ({}, {"version": 3}, "use the release that wrote it"),
        ({}, {"surprise": 1}, "surprise"),
        ({}, {"state": {"pos": 99, "meta": {}}}, "pos"),
    ],
)
def test_a_file_that_agrees_with_itself_is_still_checked(
    exported: Path, elsewhere: ColdStore, changes: dict[str, bytes], manifest_changes: dict[str, object], message: str
):
    rewrite(exported, changes, manifest_changes)
    before = everything(elsewhere)
    with pytest.raises(Corrupt, match=message):
        import_bank(elsewhere, exported, "lab/b")
    assert everything(elsewhere) == before
    assert elsewhere.catalog.list() == []


def test_another_models_calibration_is_refused(exported: Path, elsewhere: ColdStore, calibration: Calibration):
    other = Calibration("c", (3, 5), calibration.mean_LD + 1, ranges=calibration.ranges)
    rewrite(exported, {"calibration.safetensors": other.to_bytes()}, {})
    with pytest.raises(Corrupt, match="is not the calibration"):
        import_bank(elsewhere, exported, "lab/b")
    assert elsewhere.calibrations.find("c", (3, 5)) is None
