"""What comes in as a file is checked as what it is, and nothing in it grows."""

import base64
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from bankfile import CALIBRATION, JOURNAL, BankFile, arrow_file, changed, exported, filled, signed_rows

import raymem
from raymem import Calibration, Settings
from raymem.client.routes import BYTES
from raymem.errors import Corrupt, RaymemError
from raymem.memory import kinds


@pytest.fixture(scope="module")
def store(file_store):
    return file_store


@pytest.fixture(scope="module")
def files(store, tiny, tmp_path_factory):
    """A bank of each kind as a file, with a tag and two streams."""
    return exported(store, tiny, tmp_path_factory.mktemp("files"))


@pytest.fixture
def file(files):
    return files["larimar"].copy()


def refused(store, file: BankFile, tmp_path: Path, match: str, error=Corrupt):
    """Nothing of a refused file can be seen, not even a table."""
    before = sorted(path.name for path in Path(store.stats()["cold"]).iterdir())
    try:
        with pytest.raises(error, match=match) as found:
            store.import_(file.write(tmp_path / "bad"), "lab/bad")
    except pytest.fail.Exception:
        store.delete("lab/bad")
        raise
    assert len(str(found.value)) < 2000
    assert sorted(path.name for path in Path(store.stats()["cold"]).iterdir()) == before
    assert store.banks() == []


MANIFEST = {
    "epoch": [-1, 2**63 - 1, 2**70, 1.5, "1", None, True],
    "rows": [-1, 39, 41, 2**63, 1.5, "40"],
    "end": [-1, 39, 41, 2**62, 2**53 - 1, "40"],
    "tags": [{"then": -1}, {"then": 41}, {"then": 1.0}, {"then": "1"}, {"": 1}, {"a\0": 1}, {"x" * 300: 1}, [], None],
    "created": ["now", None, []],
    "exported": ["now", None],
    "made_by": [1, "x" * 2000, None],
    "bank": [1, "x" * 2000, None],
    "state": [{"pos": -1, "meta": {}}, {"pos": 41, "meta": {}}, {"pos": 1}, {"pos": 1, "meta": []}, [], 1],
    "members": None,
    "spec": [{}, None, [], "spec"],
    "more": [1],
    "format": ["zip", None],
    "version": [0, 3, "2", 2.5, None],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in MANIFEST.items() for value in values or []],
    ids=lambda value: str(value)[:40].replace("\0", "0"),
)
def test_every_field_of_the_manifest_has_a_domain(store, file, tmp_path, name, value):
    file.manifest[name] = value
    refused(store, file, tmp_path, r"bad")


SPECS = {
    ("kind",): ["nothing", "", 1, "../x"],
    ("budget_bytes",): [-1, 0, 2**70, 1.5, "1024", 1024],
    ("params",): ["x", "sha256:" + "0" * 64, 1],
    ("options",): [{"nothing": 1}, {"memory_rows": -1}, {"seed": 2**70}, {"key_dims": 2**40}, {"key_dims": 25}, []],
    ("key", "layers"): [[7], [3, 3], [-1], ["x"], [2**70]],
    ("key", "window"): [0, 5000, 2**70],
    ("fingerprint", "width"): [0, -1, 23, 25, 2**40, 2**62, 1.5],
    ("fingerprint", "layers"): [[], [3], [3, 3], [0, 3], [-3, 5], list(range(1, 5000))],
    ("fingerprint", "dtype"): ["float64", "float32", 1],
    ("fingerprint", "content"): ["another", 1],
    ("fingerprint", "calibration"): ["another", 1],
    ("fingerprint", "values"): ["head", 1],
}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in SPECS.items() for value in values], ids=lambda v: str(v)[:40]
)
def test_a_spec_that_can_not_be_used_is_refused_before_anybody_attaches_it(store, file, tmp_path, path, value):
    at = file.manifest["spec"]
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    refused(store, file, tmp_path, r"bad")


ROWS = [
    ("pos", 0, -1, "pos -1 in row 0"),
    ("pos", 3, 4, "pos 4 in row 3"),
    ("pos", 39, 2**62, "pos 4611686018427387904"),
    ("seq", 3, -1, "seq"),
    ("seq", 3, 2, "seq 2 of"),
    ("seq", 39, 2**63 - 1, "seq"),
    ("token", 3, -1, "token id -1"),
    ("token", 3, 2**31, "token id 2147483648"),
    ("stream", 0, "", "no bank takes"),
    ("stream", 0, "x" * 300, "no bank takes"),
    ("run", 0, "a\nb", "no bank takes"),
    ("hidden", 3, [0x7F80] * 48, "NaN or Inf"),
    ("hidden", 3, [0x7FC0] * 48, "NaN or Inf"),
    ("value", 3, [1.0] * 24, "leave values out"),
]


@pytest.mark.parametrize(("column", "row", "value", "match"), ROWS, ids=lambda value: str(value)[:30])
def test_a_row_that_no_bank_would_take_is_refused_with_its_value(store, file, tmp_path, column, row, value, match):
    file.rows = changed(file.rows, column, row, value)
    refused(store, file, tmp_path, match)


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), -1e300, 1e300])
def test_a_time_that_is_none_is_as_good_as_unknown(store, file, tmp_path, moment):
    file.rows = changed(file.rows, "time", 3, moment)
    bank = store.import_(file.write(tmp_path / "timed"), "lab/timed")
    bank.attach()
    # 1970: what has no time of its own goes first
    assert bank.erase(before=0.5, rebuild=True).rows == 1
    bank.detach()
    store.delete("lab/timed")


def test_a_row_without_its_checksum_is_refused(store, file, tmp_path):
    file.rows = changed(file.rows, "token", 3, 1, signed=False)
    refused(store, file, tmp_path, "position 3 does not match its checksum")


def test_a_name_in_another_spelling_is_the_same_name(store, file, tmp_path):
    rows = file.rows
    place = rows.schema.get_field_index("stream")
    spelt = ["cafe\u0301" if name == "s" else name for name in rows["stream"].to_pylist()]
    file.rows = signed_rows(rows.set_column(place, rows.schema.field(place), pa.array(spelt)))
    bank = store.import_(file.write(tmp_path / "spelt"), "lab/spelt")
    assert len(bank.tokens("caf\u00e9", "r", 0, 20)) == 20
    bank.attach()
    assert bank.erase(stream="caf\u00e9", rebuild=True).rows == 20
    store.delete("lab/spelt")


def test_rows_in_another_order_or_twice_are_refused(store, file, tmp_path):
    rows = file.rows
    swapped = pa.concat_tables([rows.slice(20), rows.slice(0, 20)])
    file.rows = swapped
    refused(store, file, tmp_path, "pos 20 in row 0")
    # positions that count on, of one row twice
    twice = pa.concat_tables([rows, rows.slice(39)])
    file.rows = changed(twice, "pos", 40, 40)
    file.manifest["end"] = 41
    refused(store, file, tmp_path, "twice or too late")


def test_rows_without_what_a_row_has_are_refused(store, file, tmp_path):
    rows = file.rows
    loose = pa.schema([field.with_nullable(True) for field in rows.schema], rows.schema.metadata)
    for name in ("stream", "token", "hidden"):
        values = rows[name].to_pylist()
        values[1] = None
        place = rows.schema.get_field_index(name)
        spoilt = rows.cast(loose).set_column(place, loose.field(name), pa.array(values, loose.field(name).type))
        # said to have none
        file.members[JOURNAL] = arrow_file(pa.table(spoilt.columns, schema=rows.schema))
        refused(store, file, tmp_path, "damaged")


@pytest.mark.parametrize(
    "steps", [(0, 40), (2**60, 2**60, 40), (-1, 1, 40), (0, 2, 38), (39, 2, 1)], ids=lambda steps: str(steps)
)
def test_positions_said_to_be_erased_are_those_that_no_row_has(store, file, tmp_path, steps):
    text = base64.b64encode(zlib.compress(np.array(steps, "<i8").tobytes()))
    rows = file.rows
    file.rows = rows.replace_schema_metadata({**rows.schema.metadata, b"raymem.holes": text})
    file.manifest["end"] = min(sum(steps), 2**53 - 1)
    refused(store, file, tmp_path, "bad")


def test_what_the_store_decides_is_not_in_a_file_to_decide(store, file, tmp_path):
    file.manifest |= {"epoch": 7, "created": 1.0, "exported": 1.0, "bank": "other/name", "made_by": "me"}
    rows = file.rows
    place = rows.schema.get_field_index("epoch")
    file.rows = rows.set_column(place, rows.schema.field(place), pa.array([2**62] * len(rows), pa.int64()))
    bank = store.import_(file.write(tmp_path / "good"), "lab/good")
    info = bank.info()
    assert (info.name, info.epoch, info.owner, info.tags) == ("lab/good", 0, None, {"then": 20})
    assert info.created > 1e9
    bank.attach()
    bank.detach()
    store.delete("lab/good")


@pytest.mark.parametrize("kind", kinds())
def test_a_state_is_made_of_the_rows_whatever_a_file_says(store, files, tmp_path, tiny, kind):
    good = store.import_(files[kind].write(tmp_path / "good"), "lab/good")
    good.attach()
    for number, value in enumerate((float("nan"), 2**62)):
        file = files[kind].copy()
        file.state = {name: filled(tensor, value) for name, tensor in file.state.items()}
        file.manifest["state"] = {"pos": 40, "meta": {"encoder": {"sources": [["s", "r"]] * 3}}}

        bank = store.import_(file.write(tmp_path / "lie"), f"lab/lie{number}")
        bank.attach()

        assert bank.digest() == good.digest(), value
        assert bank.write(tiny.trace(3, stream="new")).rows == 3
        assert bool(torch.isfinite(bank.read(tiny.trace(3, seed=2).hidden).relevance_Q).all())
        store.delete(bank.name)
    store.delete(good.name)


def calibration_of(tiny, **changes) -> Calibration:
    made = tiny.calibration
    return Calibration(
        **{
            "model": made.model,
            "layers": made.layers,
            "mean_LD": made.mean_LD,
            "whiten_LDD": made.whiten_LDD,
            "shrink": made.shrink,
            "ranges": made.ranges,
        }
        | changes
    )


def with_calibration(file: BankFile, data: bytes, hash: str) -> BankFile:
    file.members[CALIBRATION] = data
    file.manifest["spec"]["fingerprint"]["calibration"] = hash
    return file


def test_a_files_calibration_is_checked_and_not_the_default_where_there_is_another(tmp_path, files, tiny):
    mean = tiny.calibration.mean_LD
    brought = calibration_of(tiny, mean_LD=mean + 1)
    file = with_calibration(files["spalm"].copy(), brought.to_bytes(), brought.hash)
    with raymem.connect(tmp_path / "memory") as store:
        store.import_(file.write(tmp_path / "a"), "lab/a")
        # the only one there is
        assert store.calibration("content", tiny.layers).hash == brought.hash
        store.put_calibration(tiny.calibration)
        newer = calibration_of(tiny, mean_LD=mean + 2)
        store.import_(with_calibration(file, newer.to_bytes(), newer.hash).write(tmp_path / "b"), "lab/b")
        assert store.calibration("content", tiny.layers).hash == tiny.calibration.hash
        # one that is made here counts as made here, though a file brought it before
        assert store.put_calibration(newer) == newer.hash
        assert store.calibration("content", tiny.layers).hash == newer.hash
    bad = calibration_of(tiny, mean_LD=mean.clone().fill_(float("nan")))
    with raymem.connect(tmp_path / "other") as store:
        refused(store, with_calibration(file, bad.to_bytes(), bad.hash), tmp_path, "NaN or Inf")


def zip_of(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/../journal.arrow", "journal.arrow", "manifest.json", "x"])
def test_a_file_has_its_members_once_and_no_others(store, file, tmp_path, name):
    path = file.write(tmp_path / "bad")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"{}")
    with pytest.raises(Corrupt, match="is there twice or is no part of an export"):
        store.import_(path, "lab/bad")


def test_a_file_with_any_byte_changed_is_refused_by_raymem(store, file, tmp_path):
    whole = file.write(tmp_path / "good").read_bytes()
    directory = whole.rindex(b"PK\x01\x02") - 600
    generator = np.random.default_rng(0)
    for at in [*range(directory, len(whole), 3), *generator.integers(0, len(whole), 100)]:
        spoilt = bytearray(whole)
        spoilt[at] ^= int(generator.integers(1, 256))
        (tmp_path / "bad").write_bytes(spoilt)
        try:
            store.import_(tmp_path / "bad", "lab/bad")
        except RaymemError:
            assert store.banks() == []
        else:
            # a byte that says nothing, such as the date of a member
            store.delete("lab/bad")


MEASURE = """
import json, sys
from pathlib import Path
import raymem
from raymem.client.routes import BYTES
from raymem.errors import RaymemError

def highest():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

with raymem.connect(sys.argv[1]) as store:
    store.import_(sys.argv[2], "lab/good")
    for path in sys.argv[3:]:
        # the high-water mark falls to what is used now
        open("/proc/self/clear_refs", "w").write("5")
        before, said = highest(), ("", 0)
        try:
            store.import_(path, "lab/bomb")
        except RaymemError as error:
            said = (error.message[:300], error.http_status)
        print(json.dumps([Path(path).name, highest() - before, *said]))
"""


def manifest_of(file: BankFile, data: bytes, path: Path) -> None:
    zip_of(path, [*file.members.items(), ("manifest.json", data)])


def deflated(file: BankFile, name: str, path: Path) -> None:
    members = file.members | {"manifest.json": json.dumps(file.manifest).encode()}
    zip_of(path, [*members.items()][: len(members) - (name == "manifest.json")])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, data in members.items():
            if each != name:
                archive.writestr(zipfile.ZipInfo(each), data)
        with archive.open(name, "w", force_zip64=True) as out:
            for _ in range(300):
                out.write(bytes(2**20))


def compressed(file: BankFile, codec: str, path: Path) -> None:
    rows = file.rows
    many = rows.take(pa.array(np.zeros(2**20, np.int64)))
    file.members[JOURNAL] = arrow_file(many, codec)
    file.write(path)


def erased(file: BankFile, path: Path) -> None:
    text = base64.b64encode(zlib.compress(bytes(300 * 2**20), 1))
    rows = file.rows
    file.rows = rows.replace_schema_metadata({**rows.schema.metadata, b"raymem.holes": text})
    file.write(path)


def tensors(file: BankFile, head: bytes, path: Path, length: int | None = None) -> None:
    file.members[CALIBRATION] = struct.pack("<Q", length or len(head)) + head
    file.write(path)


def width(file: BankFile, path: Path) -> None:
    file.manifest["spec"]["fingerprint"]["width"] = 2**30
    file.write(path)


SHAPE = json.dumps({"mean": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
MANY = json.dumps({str(n): {"dtype": "F32", "shape": [0] * 50, "data_offsets": [0, 0]} for n in range(9_000)}).encode()
BOMBS = {
    "a deflated manifest": lambda file, path: deflated(file, "manifest.json", path),
    "a deflated journal": lambda file, path: deflated(file, JOURNAL, path),
    "a manifest of empty lists": lambda file, path: manifest_of(file, b"[" + b"[]," * 2**24 + b"[]]", path),
    "a deep manifest": lambda file, path: manifest_of(file, b"[" * 9_000, path),
    "a long manifest": lambda file, path: manifest_of(file, b" " * (2**26 + 1), path),
    "a long number": lambda file, path: manifest_of(
        file, json.dumps(file.manifest).replace('"rows": 40', '"rows": ' + "9" * 10**6).encode(), path
    ),
    "zstd": lambda file, path: compressed(file, "zstd", path),
    "lz4": lambda file, path: compressed(file, "lz4", path),
    "erased positions": erased,
    "a long head of tensors": lambda file, path: tensors(file, b" " * 2**26, path),
    "a head of no length": lambda file, path: tensors(file, b"{}", path, 2**63),
    "a tensor of any shape": lambda file, path: tensors(file, SHAPE, path),
    "very many tensors": lambda file, path: tensors(file, MANY, path),
    "very many members": lambda file, path: zip_of(path, [(str(number), b"") for number in range(100_000)]),
    "very wide rows": width,
}


def test_nothing_grows_on_its_way_in(files, tmp_path):
    """Each of these is under 70 MB, and would be 160 MB to 600 MB or never end."""
    (tmp_path / "bombs").mkdir()
    for name, make in BOMBS.items():
        make(files["spalm"].copy(), tmp_path / "bombs" / name)
        assert (tmp_path / "bombs" / name).stat().st_size < 70 * 2**20
    good = files["spalm"].write(tmp_path / "good")
    paths = [str(tmp_path / "bombs" / name) for name in BOMBS]
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "memory"), str(good), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: (grew, error, status) for name, grew, error, status in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(BOMBS)
    for name, (grew, error, status) in found.items():
        assert status in (413, 422), (name, error)
        assert grew < 150e6, (name, grew, error)


def test_over_http_and_by_command_it_is_the_senders_fault(files, tmp_path, run_gateway, raymem):
    bad = files["spalm"].copy()
    bad.manifest["epoch"] = 2**63 - 1
    bad.write(tmp_path / "bad")
    zip_of(tmp_path / "deflated", [("manifest.json", b" " * 2**20)], zipfile.ZIP_DEFLATED)
    (tmp_path / "cut").write_bytes((tmp_path / "bad").read_bytes()[:999])
    (tmp_path / "none").write_bytes(b"")
    with run_gateway(tmp_path / "memory", Settings()) as url:
        for name in ("bad", "deflated", "cut", "none"):
            path = f"{url}/v1/banks/lab/bad/import"
            answer = httpx.put(path, content=(tmp_path / name).read_bytes(), headers={"Content-Type": BYTES})
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "corrupt"), (name, answer.text)
            ran = raymem("bank", "import", tmp_path / name, "lab/bad", "--store", tmp_path / "local")
            assert (ran.code, "nothing was imported" in ran.err) == (1, True), ran.err
        assert httpx.get(f"{url}/v1/banks").json() == []
