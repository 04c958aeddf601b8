"""A cut of the network that leaves both sides of a cluster alive, with a directory each: one owner, nothing lost."""

import pytest
from faultkit.cut import BANKS, LEFT, RIGHT, Outcome, run_cut
from faultkit.net import why_none

# why, if there can be none
NONE = why_none()
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.skipif(bool(NONE), reason=NONE)]


def require_both_lived(outcome: Outcome) -> None:
    """Nothing is proven where one side did not live on, or was not served."""
    assert all(outcome.directories[side] for side in (LEFT, RIGHT))
    assert outcome.looks["answered"] > 0
    assert all(outcome.during[f"{LEFT}: {bank}"] > 0 for bank in BANKS)
    assert all(outcome.acknowledged[side] > 100 for side in (LEFT, RIGHT))


def test_both_sides_write_during_a_cut_and_a_shard_that_stood_still_for_a_lease_has_lost_its_banks():
    outcome = run_cut("folder")
    print(outcome)
    require_both_lived(outcome)
    # to the same banks, the one side after the other
    assert all(outcome.during[f"{RIGHT}: {bank}"] > 0 for bank in ("cut/right", "cut/deltas"))
    assert outcome.late == 0
    # the shard itself says so, and the client finds no other one
    assert outcome.looks["Moved"] > 0
    assert outcome.presses["Moved"] > 0
    assert outcome.reads[:2] == ["BackendUnavailable", "BackendUnavailable"]
    outcome.verdict.require()


@pytest.mark.slow
def test_a_side_that_loses_the_store_as_well_answers_no_read_after_its_lease():
    outcome = run_cut("s3")
    print(outcome)
    require_both_lived(outcome)
    assert outcome.late == 0
    assert outcome.reads[0] == "BackendUnavailable"
    outcome.verdict.require()


@pytest.mark.slow
def test_a_shard_that_never_lets_go_and_is_not_fenced_is_found():
    outcome = run_cut("folder", "unleased")
    print(outcome)
    require_both_lived(outcome)
    assert outcome.late > 0
    assert outcome.verdict.lost + outcome.verdict.doubled > 0
