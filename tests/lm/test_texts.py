"""Texts that no model can read are refused with the reason, everywhere; names of special tokens are text."""

from dataclasses import replace

import httpx
import pytest
import torch
from modelzoo import SPECIAL, save_tiny

from raymem import BankSpec, Calibration, KeySpec, Settings, connect
from raymem.config import GatewaySettings
from raymem.encode.calibration import Range
from raymem.encode.fit import calibrate
from raymem.errors import FingerprintMismatch, InvalidInput, InvalidTrace, ModelNotFound
from raymem.lm.fingerprint import fingerprint, fingerprint_of
from raymem.lm.identity import identity
from raymem.lm.models import BUNDLED_MODEL, LanguageModel

HALF = "half a character: \ud83d, and no more"
LONG = "word " * 40
SHORT = "the tide"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with 64 positions."""
    return save_tiny(tmp_path_factory.mktemp("texts") / "short")


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel.load(folder)


@pytest.fixture(scope="module")
def bundled():
    return LanguageModel.load(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def told(tmp_path_factory, model):
    """A store with a bank of that model that was told a short text."""
    where = tmp_path_factory.mktemp("told") / "memory"
    with connect(where) as store:
        mean = torch.zeros(1, model.width)
        store.put_calibration(
            Calibration(model.content_hash, (2,), mean, ranges={KeySpec(layers=(2,)): Range(0.0, 1.0)})
        )
        bank = store.create("lab/a", BankSpec(kind="spalm", fingerprint=fingerprint(model, (2,))))
        bank.write(model.trace("The tide comes in at noon.", (2,), stream="sea", run="1"))
    return where


def test_more_tokens_than_positions_are_refused_with_the_limit(model):
    tokens = model.encode("a" * 65)
    model.forward(tokens[:64], (1,))
    for read in (model.forward, model.run, model.run_cached):
        with pytest.raises(InvalidInput, match=r"65 tokens, and short has 64 positions"):
            read(tokens, (1,))
    with pytest.raises(InvalidInput, match="64 positions"):
        model.trace(LONG, (1,), stream="s", run="r")
    with pytest.raises(InvalidInput, match="64 positions"):
        calibrate(model, (1,))


def test_a_family_without_positions_has_no_limit(tmp_path):
    model = LanguageModel.load(save_tiny(tmp_path / "bloom", "bloom"))
    assert model.positions is None
    assert model.forward(model.encode("b" * 300), (1,))[0].shape == (300, 1, 32)


def test_no_text_and_no_text_at_all_are_refused(model):
    assert model.encode("").shape == (0,)
    for read in (model.forward, model.run, model.run_cached):
        with pytest.raises(InvalidInput, match="empty"):
            read(model.encode(""), (1,))
    for text in (HALF, "\udcff", "\ud83d" * 3):
        with pytest.raises(InvalidInput, match="surrogate"):
            model.encode(text)
    # both halves together are a character
    assert len(model.encode("😀")) == 4


@pytest.mark.parametrize("ids", [[-1, 3], [3, 258], [2**40]], ids=str)
def test_ids_that_the_model_does_not_know_are_refused(model, ids):
    with pytest.raises(InvalidInput, match=r"is none of the model's 0 to 257"):
        model.run(torch.tensor(ids), (1,))
    for odd in (torch.ones(3), torch.ones(1, 3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), [1, 2], None):
        with pytest.raises(InvalidInput, match="ids, a tensor of int64"):
            model.run(odd, (1,))


@pytest.mark.parametrize("layers", [1, "1", (1.0,), (True,), (), None, (0,), (4,), ("1",)], ids=repr)
def test_what_is_no_layer_is_refused(model, folder, layers):
    tokens = model.encode(SHORT)
    for look in (
        lambda: model.run(tokens, layers),
        lambda: model.run_cached(tokens, layers),
        lambda: model.trace(SHORT, layers, stream="s", run="r"),
        lambda: fingerprint(model, layers),
        lambda: fingerprint_of(str(folder), layers),
    ):
        with pytest.raises(InvalidInput, match="layers 1 to 3"):
            look()


@pytest.mark.parametrize("text", [b"bytes", None, 7, ["a"]], ids=repr)
def test_what_is_no_text_is_refused(model, text):
    with pytest.raises(InvalidInput, match="string"):
        model.encode(text)


@pytest.mark.parametrize("name", ["x" * 10_000, "a\0b", "", "no/such"], ids=lambda name: name[:5] or "empty")
def test_what_can_be_no_folder_is_no_model(name):
    with pytest.raises(ModelNotFound) as caught:
        LanguageModel.load(name)
    assert len(str(caught.value)) < 500


def test_what_was_kept_and_damaged_is_made_again(model, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path))
    known, states = identity(folder), model.run_cached(model.encode(SHORT), (1,)).hidden_TLd
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(kept) == 3
    for file in kept:
        file.write_bytes(file.read_bytes()[:-9])
    assert identity(folder) == known
    assert torch.equal(model.run_cached(model.encode(SHORT), (1,)).hidden_TLd, states)


@pytest.mark.parametrize("which", ["model", "bundled"])
def test_the_names_of_special_tokens_are_text_unless_they_are_meant(which, request):
    model = request.getfixturevalue(which)
    name = {"model": SPECIAL[0], "bundled": "<|im_start|>"}[which]
    special = set(model.tokenizer.all_special_ids)
    for text in (name, f"before {name} after", f"{name}{name}", f" {name}\n", f"{name[:-1]}{name}"):
        plain = model.encode(text)
        assert not special & set(plain.tolist())
        assert model.tokenizer.decode(plain.tolist()) == text
        meant = model.encode(text, special=True)
        assert special & set(meant.tolist())
        assert len(meant) < len(plain)
        # one call leaves nothing behind for the next
        assert torch.equal(model.encode(text), plain)


def test_a_trace_says_what_made_it(model, told):
    with connect(told) as store:
        bank = store.bank("lab/a")
        bank.attach()
        for layers in ((1,), (3,)):
            with pytest.raises(FingerprintMismatch, match="layers"):
                bank.write(model.trace(SHORT, layers, stream="s", run="r"))
        assert bank.write(model.trace(SHORT, (2,), stream="s", run="r")).rows == len(SHORT)
        bank.erase(stream="s")
        with pytest.raises(InvalidTrace, match=r"raymem\.Fingerprint"):
            bank.write(replace(model.trace(SHORT, (2,), stream="s", run="r"), fingerprint="mine"))


@pytest.mark.parametrize(("text", "says"), [(LONG, "64 positions"), (HALF, "surrogate"), ("", "empty")])
def test_recall_on_the_command_line_says_what_is_wrong(raymem, told, folder, text, says):
    with connect(told) as store:
        store.bank("lab/a").attach()
    said = raymem("recall", "lab/a", text, "--model", folder, "--store", told)
    assert said.code == 1
    assert said.err.startswith("error: ")
    assert says in said.err


def test_recall_through_the_gateway_says_what_is_wrong(told, folder, run_gateway):
    with run_gateway(told, Settings(gateway=GatewaySettings(model=str(folder)))) as url:
        with connect(url) as store:
            store.bank("lab/a").attach()
        ask = f"{url}/v1/banks/lab/a/recall"
        assert httpx.post(ask, json={"text": SHORT}).status_code == 200
        for body in (b'{"text": "%s"}' % LONG.encode(), b'{"text": ""}', b'{"text": "\\ud83d"}'):
            answer = httpx.post(ask, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422, answer.text
            assert answer.json()["error"]["message"]
        assert "64 positions" in httpx.post(ask, json={"text": LONG}).json()["error"]["message"]


def test_calibrate_and_eval_say_what_is_wrong(raymem, folder, tmp_path):
    said = raymem("calibrate", "--model", folder, "--layers", "1", "--store", tmp_path / "memory")
    assert (said.code, "64 positions" in said.err) == (1, True)
    assert not (tmp_path / "memory").exists()
    (tmp_path / "a.txt").write_text(LONG * 3)
    said = raymem("eval", "lm", "--text", tmp_path / "a.txt", "--model", folder)
    assert (said.code, "64 positions" in said.err, "--max-tokens" in said.err) == (1, True, True)
