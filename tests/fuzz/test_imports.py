"""Exported files changed at random, with hashes that hold: refused without a trace, or a bank for which all works.

Each case is a number that is printed when it fails; FUZZ_FROM is the first one.
"""

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from bankfile import BankFile, changed, exported, filled
from fuzzing import SECONDS, lasting, seeded
from safetensors import SafetensorError

import raymem
from raymem.errors import BankNotFound, RaymemError

# in `make test`: some seconds of them
CASES = 60
NUMBERS = [-1, 0, 1, 2, 39, 40, 41, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), 2**70, 0.5, -0.0, 1e38, 1e300]
THINGS: list[Any] = [*NUMBERS, None, True, "", "x", "../x", "\0", "é" * 300, [], {}, [[]], [1], {"x": 1}]


@pytest.fixture(scope="module")
def store(file_store):
    return file_store


@pytest.fixture(scope="module")
def files(store, tiny, tmp_path_factory):
    """A bank of each kind as a file, small, some with erased rows."""
    made = exported(store, tiny, tmp_path_factory.mktemp("files"), budget_bytes=2**18, erased=("spalm", "larimar"))
    return list(made.values())


def any_place(at: Any, dice: random.Random) -> tuple[Any, Any]:
    """A container somewhere in plain data, and one of its keys."""
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = dice.choice(list(keys))
        if not isinstance(at[key], dict | list) or not at[key] or dice.random() < 0.2:
            return at, key
        at = at[key]


def field(file: BankFile, dice: random.Random) -> None:
    at, key = any_place(file.manifest, dice)
    if dice.random() < 0.2:
        del at[key]
    else:
        at[key] = dice.choice(THINGS)


def option(file: BankFile, dice: random.Random) -> None:
    names = ["slots", "fine", "coarse", "ratio", "memory_rows", "tokens", "key_dims", "seed", "strength", "eviction"]
    names += [
        "theta",
        "eta",
        "alpha",
        "chunk",
        "depth",
        "expansion",
        "hidden",
        "policy",
        "log",
        "ridge",
        "tau",
        "values",
    ]
    file.manifest["spec"]["options"][dice.choice(names)] = dice.choice([*THINGS, "learned", "st", "im", "lru"])


def row(file: BankFile, dice: random.Random) -> None:
    rows = file.rows
    column = dice.choice(["pos", "epoch", "seq", "token", "time", "stream", "run", "hidden", "value"])
    at = dice.randrange(len(rows))
    if column == "hidden":
        value: Any = [dice.choice([0, 0x7F7F, 0x7F80, 0xFFFF, 0x0001])] * 48
    elif column == "value":
        value = [dice.choice([0.0, 1e38])] * dice.choice([0, 1, 24])
    elif column == "time":
        value = dice.choice([float("nan"), float("inf"), -1e300, 1e11, 0.0])
    elif column in ("stream", "run"):
        value = dice.choice(["", "x" * 300, "a\0", "s", "other", "cafe\u0301", "\u202e", "'; --"])
    else:
        value = dice.choice([n for n in NUMBERS if type(n) is int and -(2**63) <= n < 2**63])
    file.rows = changed(rows, column, at, value, signed=dice.random() < 0.9)


def order(file: BankFile, dice: random.Random) -> None:
    rows = file.rows
    picked = list(range(len(rows)))
    for _ in range(dice.randrange(1, 4)):
        what = dice.randrange(3)
        if what == 0:
            picked.pop(dice.randrange(len(picked)))
        elif what == 1:
            picked.insert(dice.randrange(len(picked)), dice.choice(picked))
        else:
            one, two = dice.randrange(len(picked)), dice.randrange(len(picked))
            picked[one], picked[two] = picked[two], picked[one]
    rows = rows.take(picked)
    if dice.random() < 0.5:
        place = rows.schema.get_field_index("pos")
        rows = rows.set_column(place, rows.schema.field(place), pa.array(range(len(rows)), pa.int64()))
        file.manifest["end"] = len(rows)
    file.rows = rows


def state(file: BankFile, dice: random.Random) -> None:
    tensors = file.state
    name = dice.choice(sorted(tensors))
    tensors[name] = filled(tensors[name], dice.choice([float("nan"), -1.0, 1e38, 2**62, 0.0]))
    if dice.random() < 0.3:
        tensors[name] = torch.zeros(dice.choice([(), (0,), (3, 3)]))
    file.state = tensors


def member(file: BankFile, dice: random.Random) -> None:
    names = sorted(file.members)
    one, two = dice.choice(names), dice.choice(names)
    what = dice.randrange(3)
    if what == 0:
        file.members[one], file.members[two] = file.members[two], file.members[one]
    elif what == 1:
        del file.members[one]
    else:
        file.members[dice.choice(["params.safetensors", "x", "../x"])] = file.members[two]


def bytes_of(file: BankFile, dice: random.Random) -> None:
    name = dice.choice(sorted(file.members))
    data = bytearray(file.members[name])
    for _ in range(dice.randrange(1, 5)):
        at = dice.randrange(min(len(data), 2000)) if dice.random() < 0.5 else dice.randrange(len(data))
        data[at] = dice.randrange(256)
    file.members[name] = bytes(data[: dice.randrange(len(data))] if dice.random() < 0.1 else data)


CHANGES: list[Callable[[BankFile, random.Random], None]] = [field, option, row, order, state, member]


def mutated(files: list[BankFile], dice: random.Random, path: Path) -> Path:
    file = dice.choice(files).copy()
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
        try:
            dice.choice(CHANGES)(file, dice)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, OSError, SafetensorError):
            # an earlier change left nothing there to change
            continue
    if file.members and dice.random() < 0.2:
        # last: no later change here reads what is damaged
        bytes_of(file, dice)
    how = zipfile.ZIP_DEFLATED if dice.random() < 0.05 else zipfile.ZIP_STORED
    file.write(path, how)
    if dice.random() < 0.1:
        whole = bytearray(path.read_bytes())
        whole[dice.randrange(len(whole))] ^= dice.randrange(1, 256)
        path.write_bytes(whole)
    return path


def use(store, name: str, folder: Path) -> None:
    """Everything works: attach, read, write, come back, leave as a file, forget, go."""
    bank = store.bank(name)
    info = bank.attach()
    spec, rows = info.spec, info.rows
    assert rows == len(set(range(rows)))
    hidden = torch.randn(3, len(spec.fingerprint.layers), spec.fingerprint.width).to(
        getattr(torch, spec.fingerprint.dtype)
    )
    assert bool(torch.isfinite(bank.read(hidden).relevance_Q).all())
    values = torch.randn(3, spec.fingerprint.width) if spec.fingerprint.values else None
    trace = raymem.Trace(hidden, torch.arange(3), "new", "r", values=values, time=1.0)
    assert bank.write(trace).rows == 3
    digest = bank.digest()
    bank.detach()
    bank.attach()
    assert bank.digest() == digest
    bank.export(folder / "again")
    copy = store.import_(folder / "again", f"{name}-copy")
    copy.attach()
    assert copy.digest() == digest
    store.delete(copy.name)
    assert bank.erase(stream="new", rebuild=True).rows == 3
    store.delete(name)


def test_a_changed_file_is_refused_without_a_trace_or_is_a_bank_for_which_all_works(store, files, tmp_path):
    taken, refused = 0, 0
    first = int(os.environ.get("FUZZ_FROM", seeded(0).randrange(2**31) if SECONDS else 0))
    for number in lasting(CASES):
        path = mutated(files, random.Random(first + number), tmp_path / "file")
        case = f"case {first + number}"
        try:
            store.import_(path, "lab/fuzz")
        except RaymemError as error:
            status = error.http_status
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}") from error
        else:
            try:
                use(store, "lab/fuzz", tmp_path)
            except Exception as error:
                raise AssertionError(f"{case}, taken: {error!r}") from error
            taken += 1
            continue
        assert status in (413, 422), case
        with pytest.raises(BankNotFound):
            store.bank("lab/fuzz").info()
        refused += 1
    print(json.dumps({"cases": taken + refused, "taken": taken, "refused": refused}))
    assert taken
    assert refused
    assert store.banks() == []
