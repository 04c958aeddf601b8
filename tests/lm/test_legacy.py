"""Banks and calibrations of releases that hashed a model's files go on working, and don't let another model in."""

import hashlib
import shutil

import pytest
import torch
from modelzoo import save_tiny
from safetensors.torch import load_file, save_file

from raymem import BankSpec, Calibration, Fingerprint, KeySpec, connect
from raymem.encode.calibration import Range
from raymem.errors import CalibrationNotFound, FingerprintMismatch
from raymem.lm.fingerprint import fingerprint, fingerprint_of
from raymem.lm.models import LanguageModel
from raymem.serving.recall import RecallModel

LAYERS = (2,)
TEXT = "What an earlier release wrote."


def hash_of_old(*files):
    """As raymem 0.3 and earlier hashed a folder's files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("legacy") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel.load(folder)


@pytest.fixture
def old(folder, model, tmp_path):
    """A store with a bank and a calibration under the hashes of that time."""
    content = hash_of_old(folder / "model.safetensors")
    tokenizer = hash_of_old(folder / "tokenizer.json", folder / "tokenizer_config.json")
    mark = Fingerprint(model="tiny", content=content, layers=LAYERS, width=model.width, tokenizer=tokenizer)
    ranges = {KeySpec(layers=LAYERS): Range(0.0, 1.0)}
    with connect(tmp_path / "memory") as store:
        store.put_calibration(Calibration(content, LAYERS, torch.zeros(1, model.width), ranges=ranges))
        store.create("lab/old", BankSpec(kind="spalm", fingerprint=mark)).write(
            model.trace(TEXT, LAYERS, stream="s", run="old")
        )
        yield store


def test_the_model_writes_to_an_old_bank_and_reads_it(old, model, folder):
    bank = old.bank("lab/old")
    assert bank.write(model.trace(TEXT, LAYERS, stream="s", run="new")).rows == len(TEXT)
    mark = bank.info().spec.fingerprint
    assert (mark.legacy, mark.content[:2]) == (None, model.legacy_hashes[0][:2])
    mark.accept(fingerprint_of(str(folder), LAYERS))
    assert RecallModel(str(folder)).states(TEXT, mark).shape == (len(TEXT), 1, model.width)
    with pytest.raises(FingerprintMismatch, match="layers"):
        bank.write(model.trace(TEXT, (3,), stream="s", run="other"))


def test_another_models_rows_stay_out_of_an_old_bank(old, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    other = LanguageModel.load(copied)
    with pytest.raises(FingerprintMismatch, match="content"):
        old.bank("lab/old").write(other.trace(TEXT, LAYERS, stream="s", run="new"))


def test_a_new_bank_takes_the_old_calibration(old, model):
    made = old.create("lab/new", BankSpec(kind="spalm", fingerprint=fingerprint(model, LAYERS)))
    mark = made.info().spec.fingerprint
    assert mark.calibration == old.bank("lab/old").info().spec.fingerprint.calibration
    assert mark.content == model.content_hash
    made.write(model.trace(TEXT, LAYERS, stream="s", run="new"))
    made.detach()
    made.attach()
    # and both are banks of one model
    assert old.merge("lab/both", ["lab/old", "lab/new"]).rows == 2 * len(TEXT)


def test_no_calibration_of_another_model_is_taken(old, model):
    other = fingerprint(model, LAYERS).model_copy(update={"content": "2:other", "legacy": ("other", "other")})
    with pytest.raises(CalibrationNotFound):
        old.create("lab/new", BankSpec(kind="spalm", fingerprint=other))
