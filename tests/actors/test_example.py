import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.ray
def test_the_bank_of_the_ray_example_moves_and_survives(root: Path, tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, str(root / "examples" / "on_ray.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("same bytes: True") == 2
    assert "killed and back: 31 rows were there already" in ran.stdout
