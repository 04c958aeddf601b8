"""Faults on a real Ray cluster: nothing that was acknowledged, directly or through a gateway, is lost or doubled."""

import pytest
from faultkit.cluster import KINDS, run_cluster

pytestmark = pytest.mark.ray


@pytest.mark.timeout(240)
def test_a_shard_killed_at_a_write_and_the_directory_killed_lose_and_double_nothing():
    outcome = run_cluster(seed=1, kinds=["place", "directory"])
    print(outcome)
    outcome.verdict.require()
    assert outcome.count > 0
    assert outcome.verdict.acknowledged > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_fault_of_a_cluster_loses_or_doubles_a_row():
    outcome = run_cluster(seed=2, kinds=KINDS)
    print(outcome)
    outcome.verdict.require()
    assert outcome.count >= len(KINDS) - 2
