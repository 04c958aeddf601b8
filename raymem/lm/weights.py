"""A model's weights as tensors: which files hold them, what each one is, and under which name a model loads it."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raymem.errors import Corrupt, ModelNotFound

# as transformers looks for them
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SAFE_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U8": "uint8", "I8": "int8", "I16": "int16"},
    **{"I32": "int32", "I64": "int64", "U16": "uint16", "U32": "uint32", "U64": "uint64"},
}
_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
_MAX_HEAD = 2**28


class TensorFacts(NamedTuple):
    """One tensor of a file: its name, dtype as torch calls it, shape, and SHA-256 of its bytes, row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Names(NamedTuple):
    """A model's names of tensors: all of them, doubles by their source, and patterns that loading passes over."""

    known: frozenset[str]
    tied: Mapping[str, str]
    prefix: str
    passed_over: tuple[str, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a model's weights from.

    Raises:
        ModelNotFound: there are none, or an index names some that are not there.
    """
    for single in _SINGLE:
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            return _sharded(index)
    raise ModelNotFound(f"no weights in {folder}: expected model.safetensors (save the model with save_pretrained)")


def tensors_of(file: Path) -> Iterator[TensorFacts]:
    """What a file of weights holds.

    Raises:
        Corrupt: it is no such file.
    """
    try:
        yield from _of_safetensors(file) if file.suffix == ".safetensors" else _of_torch(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise Corrupt(f"{file} holds no weights ({type(error).__name__}: {str(error)[:200]}): save it again") from error


def loaded_names(model: Any) -> Names:
    """What a model, which may be an empty one, calls its tensors."""
    passed_over = model._keys_to_ignore_on_load_unexpected or ()
    return Names(
        frozenset(model.state_dict()), dict(model.all_tied_weights_keys), model.base_model_prefix, tuple(passed_over)
    )


def canonical(tensors: Iterable[TensorFacts], names: Names, folder: Path) -> list[TensorFacts]:
    """Tensors under the names that they are loaded under, sorted; doubles and those that nothing loads left out.

    Raises:
        ModelNotFound: the folder lacks some that the model has, which would be made up at random.
    """
    by_name: dict[str, TensorFacts] = {}
    for facts in tensors:
        name = _loaded_as(facts.name, names)
        source = names.tied.get(name, name)
        # the double of a tied tensor counts only where the tensor itself isn't in any file
        if source not in by_name or name == source:
            by_name[source] = facts._replace(name=source)
    wanted = names.known - names.tied.keys()
    if wanted <= by_name.keys():
        # whatever else lies there is not loaded: masks and tables that older releases kept in files
        return [by_name[name] for name in sorted(wanted)]
    # some are made of several others while they are loaded: then all may be part of one
    idle = re.compile("|".join(f"(?:{pattern})" for pattern in (*names.passed_over, *_BUFFERS)))
    found = [facts for name, facts in sorted(by_name.items()) if not idle.search(name)]
    missing = sorted(wanted - by_name.keys())
    if all(facts.name in names.known for facts in found):
        raise ModelNotFound(
            f"the weights in {folder} lack {len(missing)} tensors of the model, {missing[0]} for one: it would be "
            "predicted with random numbers; save the whole causal language model with save_pretrained"
        )
    return found


def _sharded(index: Path) -> list[Path]:
    try:
        named = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{index} is no index of weights ({error!r}): save the model again") from error
    files = [index.parent / name for name in named]
    missing = [file.name for file in files if not file.is_file() or file.parent.resolve() != index.parent.resolve()]
    if missing or not files:
        raise ModelNotFound(f"{index} names {', '.join(missing) or 'no files'}, not there: fetch the whole model")
    return files


def _loaded_as(name: str, names: Names) -> str:
    inner = name.removeprefix(f"{names.prefix}.")
    return next((known for known in (name, f"{names.prefix}.{name}", inner) if known in names.known), name)


def _of_safetensors(file: Path) -> Iterator[TensorFacts]:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        length = int.from_bytes(data[:8], "little")
        if length > min(_MAX_HEAD, len(data) - 8):
            raise ValueError(f"a head of {length} bytes in a file of {len(data)}")
        head = json.loads(data[8 : 8 + length])
        head.pop("__metadata__", None)
        with memoryview(data) as view:
            for name, said in head.items():
                start, stop = (8 + length + int(offset) for offset in said["data_offsets"])
                if not 8 + length <= start <= stop <= len(data):
                    raise ValueError(f"tensor {name!r} lies outside of the file")
                dtype = _SAFE_DTYPES.get(said["dtype"], str(said["dtype"]).lower())
                with view[start:stop] as part:
                    yield TensorFacts(name, dtype, tuple(said["shape"]), hashlib.sha256(part).hexdigest())


def _of_torch(file: Path) -> Iterator[TensorFacts]:
    import torch

    from raymem.tensors import dtype_name, to_bytes

    # numbers and tensors alone: what else a pickle may hold is refused
    for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file)).items():
        digest = hashlib.sha256(to_bytes(tensor).data).hexdigest()
        yield TensorFacts(name, dtype_name(tensor.dtype), tuple(tensor.shape), digest)


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
