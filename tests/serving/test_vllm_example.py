"""The example with two agents runs as it stands in the repository."""

import re

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_two_agents_share_what_one_of_them_read(run_example):
    printed = run_example("vllm_two_agents.py")

    assert "agent A read 768 tokens into lab/library, 0 were shed" in printed
    without, with_memory, unplugged = (
        float(found) for found in re.findall(r": (?:perplexity )?(\d+\.\d\d)$", printed, re.M)
    )
    assert with_memory < without
    assert unplugged == without
