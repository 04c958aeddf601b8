import subprocess
import sys
from pathlib import Path

LINES = 80


def test_examples_are_short(root: Path):
    long = {file.name: len(file.read_text().splitlines()) for file in (root / "examples").glob("*.py")}
    assert long
    assert {name: lines for name, lines in long.items() if lines > LINES} == {}


def test_every_example_is_run_by_a_test(root: Path):
    tests = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    assert [file.name for file in (root / "examples").glob("*.py") if file.name not in tests] == []


def test_the_quickstart_finds_what_it_wrote_and_the_same_bytes_after_unplugging(root: Path, tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, str(root / "examples" / "quickstart.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "it remembers ' Mo'" in ran.stdout
    assert "the same bytes: True" in ran.stdout
