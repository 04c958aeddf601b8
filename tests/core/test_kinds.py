"""What every kind promises as a bank in a store, beyond what its mechanism promises (mechanisms.md section 9)."""

import pytest
import torch

import raymem
from raymem import Trace
from raymem.errors import InvalidTrace, NonFinite
from raymem.memory import kinds

BUDGET = 16_384


@pytest.fixture
def store(tmp_path, tiny):
    with raymem.connect(tmp_path / "memory") as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


@pytest.fixture(params=kinds())
def make_bank(request, store, tiny):
    """A new bank of each kind in turn, small enough that the rows below overflow it."""
    spec = tiny.spec(request.param).model_copy(update={"budget_bytes": BUDGET})
    return lambda name="a/bank": store.create(name, spec)


def test_u2_cutting_traces_and_sleeping_between_them_changes_nothing(make_bank, tiny):
    whole, cut = make_bank("a/whole"), make_bank("a/cut")
    whole.write(tiny.trace(300))
    for start, end in ((0, 0), (0, 1), (1, 64), (64, 250), (250, 300)):
        cut.write(tiny.trace(end - start, seq=start))
        cut.detach()
        cut.attach()
    assert cut.digest() == whole.digest()


def test_u4_banks_written_in_turns_are_what_each_is_alone(make_bank, tiny):
    together = [make_bank(f"a/{place}") for place in range(3)]
    for start in range(0, 200, 50):
        for seed, bank in enumerate(together):
            bank.write(tiny.trace(50, seq=start, seed=seed))
    for seed, bank in enumerate(together):
        alone = make_bank(f"b/{seed}")
        alone.write(tiny.trace(200, seed=seed))
        assert alone.digest() == bank.digest()
        assert len({bank.digest() for bank in together}) == 3


def test_u6_and_u9_what_is_not_finite_or_has_another_shape_is_refused_and_changes_nothing(make_bank, tiny):
    bank, trace = make_bank(), tiny.trace(40)
    bank.write(trace)
    before = bank.digest()
    for bad in (float("nan"), float("inf"), -float("inf")):
        more = tiny.trace(9, seq=40)
        more.hidden[7, 1, 3] = bad
        with pytest.raises(NonFinite):
            bank.write(more)
        with pytest.raises(NonFinite):
            bank.read(more.hidden)
        assert bank.digest() == before
    narrower, shallower = trace.hidden[..., :-1], trace.hidden[:, :1]
    for hidden in (narrower, shallower, trace.hidden.float()):
        with pytest.raises(InvalidTrace):
            bank.write(Trace(hidden, trace.tokens, "s", "other"))
        with pytest.raises(InvalidTrace):
            bank.read(hidden)
    assert bank.digest() == before


def test_u10_rows_written_again_after_a_restart_count_once(make_bank, tmp_path, store, tiny):
    bank = make_bank()
    bank.write(tiny.trace(90))
    before = bank.digest()
    store.close()
    with raymem.connect(tmp_path / "memory") as reopened:
        bank = reopened.bank("a/bank")
        bank.attach()
        # what a client sends again that never saw the answer, and a little more
        assert bank.write(tiny.trace(90)).duplicates == 90
        assert bank.digest() == before
        assert bank.write(tiny.trace(70, seq=50)).duplicates == 40
        whole = reopened.create("a/whole", bank.info().spec)
        whole.write(tiny.trace(120))
        assert whole.digest() == bank.digest()


def test_u8_a_bank_stays_in_its_budget_and_answers_from_what_came_last(make_bank, tiny):
    bank = make_bank()
    for start in range(0, 4000, 1000):
        bank.write(tiny.trace(1000, seq=start))
        assert bank.info().bytes <= BUDGET
    found = bank.read(tiny.trace(40, seq=3950).hidden, 8, start=3950)
    assert torch.isfinite(found.scores_Qk[found.tokens_Qk >= 0]).all()
    hits = (found.tokens_Qk == tiny.trace(40, seq=3951).tokens[:, None]).any(1)
    # 50 tokens of which 8 are named: 0.16 by chance. larimar weighs all 4,000 rows alike, and is not far above it
    assert hits.float().mean() >= 0.3
