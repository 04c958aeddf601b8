"""`raymem train`: each kind learns from a bank's own rows, repeatably, and what it learned goes where its bank goes."""

import pytest
import safetensors.torch
import torch

import raymem
from raymem.errors import BankNotFound, Conflict, Corrupt, InvalidInput, InvalidSpec, NotFound
from raymem.memory.learned import Learned, name_of
from raymem.train import trainable

KINDS = ["compressive", "dct", "lemn"]
OPTIONS = {"compressive": {"strength": 4.0}, "dct": {"compressor": "mean"}, "lemn": {"hidden": 8, "slots": 12}}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def bank(kind, fill, few_of) -> str:
    return fill(kind, *few_of[kind](), **OPTIONS[kind])


def test_what_is_trained_beats_what_is_not_on_rows_that_were_held_out(kind, fill, rows_of, fit):
    bank = fill(kind, *rows_of[kind](), **OPTIONS[kind])
    report = fit(bank, kind, steps={"compressive": 400, "dct": 150, "lemn": 60}[kind], seed=1)
    trained, others = report.figures["trained"], [v for name, v in report.figures.items() if name != "trained"]
    if kind == "compressive":
        # the others are selections and pooling; a few thousand rows of noise don't give more
        assert trained < 0.97 * min(others)
    else:
        # a quarter of the tokens is all that could be told
        assert trained > max(others) + (0.02 if kind == "lemn" else 0.005)
    assert report.held > 0.19 * report.rows


class Killed(Exception):
    """What a test stops a run with."""


def test_a_run_that_was_killed_ends_with_the_bytes_of_one_that_was_not(kind, bank, fit, cold, tmp_path):
    whole = fit(bank, kind, steps=7)
    assert not list((tmp_path / "checkpoints").iterdir())

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        fit(bank, kind, steps=7, progress=kill)
    again = fit(bank, kind, steps=7)
    assert (whole.resumed_from, again.resumed_from) == (0, 4)
    assert again.params == whole.params
    assert fit(bank, kind, steps=7, seed=1).params != whole.params


def test_a_run_goes_on_with_the_rows_that_it_began_with(fill, few_of, fit, store, tiny):
    kind = "compressive"
    bank = fill(kind, *few_of[kind]())
    whole = fit(bank, kind, steps=7)

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        fit(bank, kind, steps=7, progress=kill)
    store.bank(bank).write(tiny.trace(50, run="later"))
    assert fit(bank, kind, steps=7).params == whole.params
    assert fit(bank, kind, steps=7).rows > whole.rows


def test_a_trained_bank_lives_the_life_of_any_bank(kind, bank, fit, store, folder, tiny, tmp_path):
    report = fit(bank, kind, steps=6)
    spec = report.spec.model_copy(update={"budget_bytes": 60_000})
    trained = store.create("lab/trained", spec)
    plain = store.create("lab/plain", spec.model_copy(update={"params": ""}))
    trace = tiny.trace(900)
    for made in (trained, plain):
        made.write(trace)
    digest, queries = trained.digest(), tiny.trace(7, seed=3).hidden
    answer = trained.read(queries, 5)
    assert kind == "dct" or digest != plain.digest()
    trained.detach()
    trained.attach()
    assert trained.digest() == digest
    trained.detach()
    trained.export(tmp_path / "trained.raymem")
    with raymem.connect(tmp_path / "elsewhere") as other:
        moved = other.import_(tmp_path / "trained.raymem", "far/trained")
        moved.attach()
        assert moved.digest() == digest
        assert moved.info().spec.params == report.params
        found = moved.read(queries, 5)
        assert torch.equal(found.tokens_Qk, answer.tokens_Qk)
        assert torch.equal(found.scores_Qk, answer.scores_Qk)


def test_weights_are_one_safetensors_file_that_says_what_it_is_worth(kind, bank, fit, cold):
    report = fit(bank, kind, steps=3)
    blob = cold.params.get(report.params)
    assert name_of(blob) == report.params
    learned = Learned.from_bytes(blob, report.params)
    assert learned.about["figures"] == report.figures
    assert learned.about["rows"] == report.rows
    assert safetensors.torch.load(blob).keys() == learned.tensors.keys()
    assert learned.to_bytes() == blob
    assert all(report.spec.options[name] == value for name, value in learned.options.items())


def test_weights_with_other_bytes_than_their_name_says_are_corrupt(fill, few_of, fit, cold, store):
    report = fit(fill("compressive", *few_of["compressive"]()), "compressive", steps=3)
    blob = cold.params.get(report.params)
    with pytest.raises(Corrupt, match="other bytes"):
        Learned.from_bytes(blob[:-1] + bytes([blob[-1] ^ 1]), report.params)
    other = "sha256:" + "0" * 64
    with pytest.raises(NotFound, match=other):
        store.create("lab/none", report.spec.model_copy(update={"params": other}))
    with pytest.raises(Corrupt, match="no such file"):
        Learned.from_bytes(b"nothing", name_of(b"nothing"))


def test_weights_of_another_kind_or_shape_are_refused(fill, few_of, fit, store, tiny):
    report = fit(fill("lemn", *few_of["lemn"](), hidden=8), "lemn", steps=2)
    with pytest.raises(InvalidSpec, match="of kind 'lemn' and the bank is of kind 'spalm'"):
        store.create("lab/a", tiny.spec("spalm").model_copy(update={"params": report.params}))
    with pytest.raises(InvalidSpec, match="trained for options"):
        store.create("lab/a", tiny.spec("lemn", policy="s", hidden=9).model_copy(update={"params": report.params}))
    assert [info.name for info in store.banks()] == ["lab/lemn"]


def test_wrong_banks_and_too_few_rows_are_refused_saying_what_to_do(fit, store, tiny):
    assert trainable() == ["compressive", "dct", "lemn", "spalm"]
    with pytest.raises(BankNotFound):
        fit("lab/none", "dct")
    store.create("lab/few", tiny.spec("dct")).write(tiny.trace(100))
    with pytest.raises(InvalidInput, match=r"has 98 rows .* needs 640: write more"):
        fit("lab/few", "dct")
    with pytest.raises(InvalidSpec, match="is of kind 'dct': name a bank of kind 'lemn'"):
        fit("lab/few", "lemn")
    with pytest.raises(InvalidSpec, match="'ntm' learns nothing from a journal; compressive, dct, lemn, spalm do"):
        fit("lab/few", "ntm")


def test_a_damaged_checkpoint_is_named_and_fresh_starts_anew(fill, few_of, fit, tmp_path):
    bank = fill("compressive", *few_of["compressive"]())
    whole = fit(bank, "compressive", steps=8)

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        fit(bank, "compressive", steps=8, every=1, progress=lambda done, total: kill(done, total) if done > 3 else None)
    (file,) = (tmp_path / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(Corrupt, match="--fresh"):
        fit(bank, "compressive", steps=8)
    assert fit(bank, "compressive", steps=8, fresh=True).params == whole.params


def test_a_checkpoint_of_rows_that_are_gone_is_refused(fill, few_of, fit, tmp_path, monkeypatch):
    from raymem.train import data

    bank = fill("compressive", *few_of["compressive"]())

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        fit(bank, "compressive", steps=8, progress=kill)
    with pytest.raises(Conflict, match="--fresh"):
        data.require_same(data.Lessons(None, 0, 0, "other", []), "these")


def test_auto_encoding_trains_too(fill, few_of, fit):
    bank = fill("compressive", *few_of["compressive"]())
    report = fit(bank, "compressive", steps=5, goal="auto_encoding")
    assert report.params != fit(bank, "compressive", steps=5).params
