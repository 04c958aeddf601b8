from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch

from raymem.encode import Calibration, Encoder, KeyMaker, Range, calibrate
from raymem.encode.fit import RESERVED_TOPICS, Sample, bundled_texts, fit, read_sample
from raymem.errors import Corrupt, InvalidInput, InvalidSpec
from raymem.types import KeySpec

Kit = SimpleNamespace


class Model:
    """Reads letters; a state is the letter's own vector plus a third of the one before."""

    content_hash = "m" * 64

    def __init__(self) -> None:
        self.letters_VLD = torch.randn(256, 2, 13, generator=torch.Generator().manual_seed(5)) + 4

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode()))

    def check_length(self, tokens: int, what: str) -> None:
        assert tokens, what

    def run_cached(self, tokens_T: torch.Tensor, layers: object) -> SimpleNamespace:
        hidden_TLD = self.letters_VLD[tokens_T].clone()
        hidden_TLD[1:] += hidden_TLD[:-1] / 3
        hidden_TLD[0] = 1e4
        return SimpleNamespace(hidden_TLd=hidden_TLD.bfloat16())


def test_a_calibration_comes_back_from_its_bytes(calibration: Calibration) -> None:
    again = Calibration.from_bytes(calibration.to_bytes())
    assert again.hash == calibration.hash
    assert (again.model, again.layers, again.shrink) == (calibration.model, calibration.layers, calibration.shrink)
    assert dict(again.ranges) == dict(calibration.ranges)
    assert torch.equal(again.mean_LD, calibration.mean_LD)


def test_every_part_is_in_the_hash(calibration: Calibration) -> None:
    ranges = {key: Range(lo, hi + 0.001) for key, (lo, hi) in calibration.ranges.items()}
    changes = [
        {"model": "other"},
        {"layers": (3, 8)},
        {"mean_LD": calibration.mean_LD + 1e-6},
        {"ranges": ranges},
        {"shrink": 0.7},
        {"whiten_LDD": torch.eye(13).repeat(2, 1, 1)},
    ]
    fields = ("model", "layers", "mean_LD", "whiten_LDD", "shrink", "ranges")
    same = {name: getattr(calibration, name) for name in fields}
    assert Calibration(**same).hash == calibration.hash
    assert len({calibration.hash, *(Calibration(**(same | change)).hash for change in changes)}) == 7


def test_any_damaged_byte_is_corrupt(calibration: Calibration) -> None:
    good = calibration.to_bytes()
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 0x11
        with pytest.raises(Corrupt):
            assert Calibration.from_bytes(bytes(bad)).to_bytes() == good
    for length in (0, 7, 8, 100, len(good) - 1):
        with pytest.raises(Corrupt):
            Calibration.from_bytes(good[:length])


def test_relevance_is_0_at_unrelated_1_at_matching_and_never_leaves_0_to_1(calibration: Calibration, kit: Kit) -> None:
    for key, (lo, hi) in calibration.ranges.items():
        similarity_Q = torch.tensor([-1.0, lo, (lo + hi) / 2, hi, 1.0])
        relevance_Q = Encoder(kit.spec_for(calibration, key), calibration).relevance(similarity_Q)
        torch.testing.assert_close(relevance_Q, torch.tensor([0, 0, 0.5, 1, 1]))


def test_a_key_function_that_was_not_measured_takes_the_nearest() -> None:
    def window(length: int, *layers: int) -> KeySpec:
        return KeySpec(function="window", window=length, layers=layers)

    ranges = {
        KeySpec(layers=(3,)): Range(0.1, 0.9),
        window(8, 3): Range(0.2, 0.8),
        KeySpec(layers=(7,)): Range(0.3, 0.7),
    }
    calibration = Calibration("m", (3, 7), torch.zeros(2, 5), ranges=ranges)
    assert calibration.range_of(window(2, 3)) == Range(0.1, 0.9)
    assert calibration.range_of(window(3, 3)) == Range(0.2, 0.8)
    assert calibration.range_of(KeySpec(function="span", window=64, layers=(3,))) == Range(0.2, 0.8)
    assert calibration.range_of(KeySpec()) == pytest.approx(Range(0.2, 0.8))
    assert calibration.range_of(window(8)) == pytest.approx(Range(0.25, 0.75))
    with pytest.raises(InvalidSpec, match=r"layers \[4\]"):
        calibration.range_of(KeySpec(layers=(4,)))


def test_whitened_states_have_no_directions_left() -> None:
    generator = torch.Generator().manual_seed(0)
    mix_DD = torch.eye(13) + torch.randn(13, 13, generator=generator) / 8
    hidden = torch.randn(4_001, 2, 13, generator=generator) @ mix_DD + 7
    calibration = fit("m", (3, 7), Sample([hidden], [hidden[:99]], [hidden[:99]]), shrink=1e-4)
    white_NLD = torch.einsum("nld,lde->nle", hidden[1:] - calibration.mean_LD, calibration.whiten_LDD)
    # 4,000 rows know a covariance to about 1 / sqrt(4,000)
    torch.testing.assert_close(torch.cov(white_NLD[:, 0].T), torch.eye(13), atol=0.05, rtol=0)


@pytest.mark.parametrize("shrink", [0.0, -1.0, 1.5])
def test_a_shrink_out_of_range_is_refused(shrink: float, kit: Kit) -> None:
    with pytest.raises(InvalidInput, match=str(shrink)):
        fit("m", (3, 7), kit.sample_of(), shrink=shrink)


@pytest.mark.parametrize("whiten", [False, True])
def test_calibrating_reads_the_bundled_text_and_leaves_the_sink_out(whiten: bool) -> None:
    seen = []
    calibration = calibrate(Model(), (3, 7), whiten=whiten, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(1, 11)]
    assert (calibration.model, calibration.layers, calibration.width) == ("m" * 64, (3, 7), 13)
    assert (calibration.whiten_LDD is not None) == whiten
    assert calibration.mean_LD.abs().max() < 20
    assert calibration.hash == calibrate(Model(), (3, 7), whiten=whiten).hash


def test_what_evaluation_and_tuning_read_is_not_in_the_calibration() -> None:
    reserved = sorted(topics.values(), key=len)[-RESERVED_TOPICS:]
    assert not set(reserved) & set(bundled_texts())
    assert len(bundled_texts()) == 20


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InvalidInput, match="1 texts"):
        read_sample(Model(), (3, 7), ["x" * 500, "short"])


def test_a_real_model_finds_stored_text_more_relevant_than_related_and_that_than_unrelated() -> None:
    from raymem.lm.models import LanguageModel

    model = LanguageModel.load("smollm2-135m")
    texts = bundled_texts()
    known, unseen = read_sample(model, (26,), texts[:4]), read_sample(model, (26,), texts[4:6])
    calibration = fit(model.content_hash, (26,), known)
    for key in (KeySpec(), KeySpec(function="window")):
        maker = KeyMaker(calibration, key)
        bank_NK = torch.cat([maker.of_run(hidden)[1:] for hidden in unseen.bank])
        queries = {
            "stored": bank_NK,
            "related": torch.cat([maker.of_run(hidden, start=1)[16:] for hidden in unseen.matching]),
            "unrelated": torch.cat([maker.of_run(hidden)[1:] for hidden in unseen.unrelated]),
        }
        lo, hi = calibration.range_of(key)
        median = {
            name: float((((asked_QK @ bank_NK.T).amax(1) - lo) / (hi - lo)).clamp(0, 1).median())
            for name, asked_QK in queries.items()
        }
        # measured: 1, 0.95 and 0.95, 0.18 and 0.15
        assert median["stored"] == 1
        assert 0.8 < median["related"] < 1
        assert median["unrelated"] < 0.3
