"""The example with two agents runs as it stands in the repository."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_two_agents_share_what_one_of_them_read(root: Path, tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, str(root / "examples" / "vllm_two_agents.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "agent A read 768 tokens into lab/library, 0 were shed" in ran.stdout
    without, with_memory, unplugged = (
        float(found) for found in re.findall(r": (?:perplexity )?(\d+\.\d\d)$", ran.stdout, re.M)
    )
    assert with_memory < without
    assert unplugged == without
