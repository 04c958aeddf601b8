"""How many files and functions a write, a read and an attach go through: a reader has to follow them."""

import json
import subprocess
import sys

import pytest

# at most so many files and functions of raymem
MOST = {"write": (12, 60), "read": (15, 60), "attach": (24, 130)}


@pytest.fixture(scope="module")
def counted(root, tmp_path_factory):
    file = tmp_path_factory.mktemp("trace") / "paths.json"
    command = [sys.executable, str(root / "tools" / "trace_paths.py"), "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    lines = file.read_text().splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.parametrize("path", MOST)
def test_a_path_is_short(counted, path):
    files, functions = MOST[path]
    assert 3 < counted[path]["files"] <= files
    assert 10 < counted[path]["functions"] <= functions
