from pathlib import Path

LINES = 80


def test_examples_are_short(root: Path):
    long = {file.name: len(file.read_text().splitlines()) for file in (root / "examples").glob("*.py")}
    assert long
    assert {name: lines for name, lines in long.items() if lines > LINES} == {}


def test_every_example_is_run_by_a_test(root: Path):
    tests = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    assert [file.name for file in (root / "examples").glob("*.py") if file.name not in tests] == []


def test_the_quickstart_finds_what_it_wrote_and_the_same_bytes_after_unplugging(run_example):
    printed = run_example("quickstart.py")

    assert "it remembers ' Mo'" in printed
    assert "the same bytes: True" in printed
