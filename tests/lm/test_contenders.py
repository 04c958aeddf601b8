"""Who takes part in an evaluation, and with what."""

import pytest
import torch

from raymem import BankSpec, Fingerprint
from raymem.encode.calibration import Calibration
from raymem.errors import InvalidSpec
from raymem.lm.contenders import Size, contenders
from raymem.lm.gate import combined_kinds
from raymem.memory import kinds

CALIBRATION = Calibration("m", (3,), torch.zeros(1, 96))
PLAIN = BankSpec(
    kind="spalm",
    fingerprint=Fingerprint(model="m", content="m", layers=(3,), width=96, tokenizer="t", calibration=CALIBRATION.hash),
)


def found(*names, size=Size(150_000)):  # noqa: B008
    return {who.name: who for who in contenders(names, PLAIN, CALIBRATION, size)}


def test_all_is_every_kind_at_the_same_bytes_and_the_combined_bank():
    everyone = found("all")
    assert list(everyone) == [*kinds(), "combined"]
    for name, who in everyone.items():
        assert [spec.kind for spec in who.specs] == (list(combined_kinds()) if name == "combined" else [name])
        assert all(spec.budget_bytes == 150_000 for spec in who.specs)
        assert who.budget_bytes == 150_000 * len(who.specs)


def test_without_a_budget_kinds_have_their_own_defaults():
    for name, who in found("spalm", "titans", size=Size()).items():
        (spec,) = who.specs
        assert spec == PLAIN.model_copy(update={"kind": name})


@pytest.mark.parametrize("names", [(), ("spolm",), ("spalm", "spalm"), ("all", "spalm")])
def test_other_names_are_refused_with_what_there_is(names):
    with pytest.raises(InvalidSpec, match=r"choose among .*spalm.*combined"):
        found(*names)
