"""A calibration is checked as what it is, by whichever way it comes."""

import dataclasses

import httpx
import pytest
import torch

import raymem
from raymem import Calibration, KeySpec
from raymem.encode.calibration import Range
from raymem.encode.fit import Sample, fit
from raymem.errors import CalibrationNotFound, Corrupt, InvalidInput, InvalidSpec
from raymem.storage.store import ColdStore

LAYERS, WIDTH = (3, 5), 24
EYES = torch.eye(WIDTH).expand(2, -1, -1).contiguous()
KEY = KeySpec(layers=(3,))


def mean(value: float, dtype=torch.float32) -> torch.Tensor:
    return torch.full((2, WIDTH), value, dtype=dtype)


def skewed() -> torch.Tensor:
    whiten = EYES.clone()
    whiten[0, 0, 1] = 0.5
    return whiten


def indefinite() -> torch.Tensor:
    whiten = EYES.clone()
    whiten[0, 0, 1] = whiten[0, 1, 0] = 2.0
    return whiten


BAD = {
    "a mean of NaN": {"mean_LD": mean(float("nan"))},
    "a mean of Inf": {"mean_LD": mean(float("inf"))},
    "a huge mean": {"mean_LD": mean(1e30)},
    "a mean of another width": {"mean_LD": torch.zeros(3, WIDTH)},
    "an empty mean": {"mean_LD": torch.zeros(2, 0)},
    "a mean of another type": {"mean_LD": mean(0, torch.float64)},
    "whitening of NaN": {"whiten_LDD": EYES * float("nan")},
    "whitening of nothing": {"whiten_LDD": EYES * 0},
    "negative whitening": {"whiten_LDD": -EYES},
    "huge whitening": {"whiten_LDD": EYES * 1e30},
    "denormal whitening": {"whiten_LDD": EYES * 1e-40},
    "whitening of another width": {"whiten_LDD": torch.eye(WIDTH + 1).expand(2, -1, -1)},
    "skewed whitening": {"whiten_LDD": skewed()},
    "indefinite whitening": {"whiten_LDD": indefinite()},
    "layers twice": {"layers": (3, 3)},
    "no layers": {"layers": (), "mean_LD": torch.zeros(0, WIDTH), "ranges": {}},
    "layer 0": {"layers": (0, 5)},
    "shrink beyond 1": {"shrink": 2.0},
    "shrink below 0": {"shrink": -1.0},
    "no ranges": {"ranges": {}},
    "a range that is none": {"ranges": {KEY: Range(0.9, 0.9), KeySpec(layers=(5,)): Range(0.1, 0.9)}},
    "a range upside down": {"ranges": {KEY: Range(0.9, 0.1), KeySpec(layers=(5,)): Range(0.1, 0.9)}},
    "a range of no cosines": {"ranges": {KEY: Range(-5.0, 7.0), KeySpec(layers=(5,)): Range(0.1, 0.9)}},
    "a range of other layers": {"ranges": {KeySpec(layers=(9,)): Range(0.1, 0.9)}},
    "a model without a name": {"model": ""},
}
# what only a caller in this process can hand over
NO_FILE = {
    "half a character as a model": {"model": "\ud800"},
    "a mean without values": {"mean_LD": torch.zeros(2, WIDTH, device="meta")},
    "a sparse mean": {"mean_LD": mean(0).to_sparse()},
    "a mean with a gradient": {"mean_LD": mean(0).requires_grad_()},
    "whitening without values": {"whiten_LDD": EYES.to("meta")},
    "ranges that are none": {"ranges": None},
    "ranges in a list": {"ranges": [KEY]},
    "a range of no key": {"ranges": {"x": Range(0.1, 0.9)}},
    "a range of three ends": {"ranges": {KEY: (0.1, 0.5, 0.9)}},
    "a range of text": {"ranges": {KEY: Range("a", "b")}},  # type: ignore[arg-type]
}


@pytest.fixture
def store(tmp_path):
    with raymem.connect(tmp_path / "memory") as opened:
        yield opened


@pytest.mark.parametrize("what", BAD)
def test_one_that_no_keys_can_be_made_with_is_refused(store, tiny, what):
    bad = dataclasses.replace(tiny.calibration, **BAD[what])
    with pytest.raises(InvalidInput, match="raymem calibrate"):
        store.put_calibration(bad)
    with pytest.raises(CalibrationNotFound):
        store.calibration("content", LAYERS)


@pytest.mark.parametrize("what", [what for what in BAD if "layers" not in BAD[what] or BAD[what]["layers"]])
def test_so_it_is_over_http_with_a_status_that_says_whose_fault_it_is(gateway, tiny, what):
    data = dataclasses.replace(tiny.calibration, **BAD[what]).to_bytes()
    answer = httpx.put(f"{gateway}/v1/calibrations", content=data, headers={"Content-Type": "application/octet-stream"})
    assert (answer.status_code, list(answer.json())) == (422, ["error"]), answer.text
    assert answer.json()["error"]["code"] in ("corrupt", "invalid_input")


@pytest.fixture(scope="module")
def gateway(run_gateway, tmp_path_factory):
    with run_gateway(tmp_path_factory.mktemp("gateway") / "memory", raymem.Settings()) as url:
        yield url


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"\0" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null"],
)
@pytest.mark.parametrize("path", ["calibrations", "params"])
def test_what_is_no_such_file_at_all_is_the_senders_fault(gateway, path, data):
    answer = httpx.put(f"{gateway}/v1/{path}", content=data, headers={"Content-Type": "application/octet-stream"})
    assert (answer.status_code, list(answer.json())) == (422, ["error"]), answer.text


@pytest.mark.parametrize("what", ["a mean of NaN", "a range upside down", "whitening of nothing", "no ranges"])
def test_one_that_an_earlier_release_kept_is_passed_over(tmp_path, tiny, what):
    bad = dataclasses.replace(tiny.calibration, **BAD[what])
    cold = ColdStore.open(str(tmp_path / "memory"))
    with raymem.connect(tmp_path / "memory") as store:
        spec = tiny.spec("spalm")
        open_spec = spec.model_copy(update={"fingerprint": tiny.fingerprint})
        cold.calibrations.put(bad.hash, "content", LAYERS, bad.to_bytes())
        with pytest.raises(Corrupt, match="raymem calibrate"):
            store.create("lab/a", open_spec)
        assert store.banks() == []
        store.put_calibration(tiny.calibration)
        cold.calibrations.put(bad.hash + "2", "content", LAYERS, bad.to_bytes())
        assert store.create("lab/a", open_spec).info().spec.fingerprint.calibration == tiny.calibration.hash


def sample(states) -> Sample:
    return Sample([states() for _ in range(4)], [states() for _ in range(4)], [states() for _ in range(4)])


GOOD = {
    "states": lambda: torch.randn(120, 2, WIDTH),
    "one direction": lambda: torch.randn(30, 2, WIDTH) * torch.tensor([1.0] + [0.0] * (WIDTH - 1)),
}
NONE = {
    "zeros": lambda: torch.zeros(120, 2, WIDTH),
    "constant": lambda: torch.ones(120, 2, WIDTH),
    "one layer constant": lambda: torch.randn(120, 2, WIDTH) * torch.tensor([[1.0], [0.0]]),
    "one row": lambda: torch.randn(1, 2, WIDTH),
    "NaN": lambda: torch.full((120, 2, WIDTH), float("nan")),
    "huge": lambda: torch.randn(120, 2, WIDTH) * 1e30,
    "beyond float32": lambda: torch.full((120, 2, WIDTH), 3e38) * torch.randn(120, 1, 1).sign(),
}


@pytest.mark.parametrize("shrink", [None, 0.1])
@pytest.mark.parametrize("what", GOOD)
def test_what_is_fitted_is_sound(what, shrink):
    made = fit("content", LAYERS, sample(GOOD[what]), shrink=shrink)
    assert made.check() is made
    assert Calibration.from_bytes(made.to_bytes()).hash == made.hash


@pytest.mark.parametrize("shrink", [None, 0.1])
@pytest.mark.parametrize("what", NONE)
def test_states_that_nothing_can_be_fitted_to_are_refused_with_the_reason(what, shrink):
    with pytest.raises(InvalidInput, match="calibrat"):
        fit("content", LAYERS, sample(NONE[what]), shrink=shrink)


@pytest.mark.parametrize("what", NO_FILE)
def test_an_object_that_is_none_is_refused_as_well(store, tiny, what):
    with pytest.raises(InvalidInput, match=r"the calibration.s (model|mean|whitening|ranges)"):
        store.put_calibration(dataclasses.replace(tiny.calibration, **NO_FILE[what]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tensors": None}, "tensors"),
        ({"tensors": {3: torch.ones(3)}}, "no weight"),
        ({"tensors": {"memory.gate.weight": "x"}}, "no weight"),
        ({"tensors": {"memory.gate.\ud800": torch.ones(3)}}, "no weight"),
        ({"tensors": {"memory.gate.weight": torch.ones(3, device="meta")}}, "no weight"),
        ({"tensors": {"memory.gate.weight": torch.ones(3).to_sparse()}}, "no weight"),
        ({"about": {"loss": float("nan")}}, "about of the params is nan"),
        ({"about": {1: 2}}, "about of the params is 1"),
        ({"options": {"learned": object()}}, "options of the params"),
    ],
)
def test_weights_that_no_file_holds_are_refused(store, changes, match):
    from raymem.memory.learned import Learned

    good = {"kind": "titans", "tensors": {"memory.gate.weight": torch.ones(3, 4)}, "options": {"learned": True}}
    with pytest.raises(InvalidSpec, match=match):
        store.put_params(Learned(**good | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "nothing"}, "unknown kind"),
        ({"kind": 7}, "kind"),
        ({"options": {"nothing": 1}}, "options"),
        ({"options": [1]}, "options"),
        ({"about": 7}, "about"),
        ({"tensors": {"memory.gate.weight": torch.full((3, 4), float("nan"))}}, "NaN or Inf"),
        ({"tensors": {"memory.other": torch.ones(3)}}, "memory.other"),
        ({"tensors": {"other": torch.ones(3)}}, "other"),
        ({"tensors": {"memory.gate.weight": torch.ones(3, dtype=torch.int64)}}, "int64"),
        ({"tensors": {"memory.gate.weight": torch.ones(0)}}, "no weight"),
    ],
)
def test_weights_are_checked_as_those_of_their_kind(store, changes, match):
    from raymem.memory.learned import Learned, name_of

    good = {"kind": "titans", "tensors": {"memory.gate.weight": torch.ones(3, 4)}, "options": {"learned": True}}
    store.put_params(Learned(**good))
    bad = Learned(**good | changes)
    with pytest.raises(InvalidSpec, match=match):
        store.put_params(bad)
    if not isinstance(bad.options, list) and not isinstance(bad.about, int):
        data = bad.to_bytes()
        with pytest.raises(Corrupt, match=match):
            Learned.from_bytes(data, name_of(data))
