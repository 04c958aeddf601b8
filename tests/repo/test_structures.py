"""docs/structures.md names classes that are there, and no path through more than six of them."""

import re

import pytest

MOST = 6
STEP = re.compile(r"^(\d+)\. `(\w+)`, \[([\w./]+)\]\(\.\./\3\)[,:]", re.MULTILINE)
NUMBERED = re.compile(r"^\d+\. ", re.MULTILINE)
PATHS = [
    *("A write", "A read", "An attach", "A detach", "A migration"),
    *("A state out of vLLM", "Memory while decoding", "Rows before a prompt"),
]


@pytest.fixture(scope="module")
def sections(root):
    _, *parts = (root / "docs" / "structures.md").read_text().split("\n## ")
    return dict(part.split("\n", 1) for part in parts)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_names_a_few_classes_and_their_files(root, sections, path):
    steps = STEP.findall(sections[path])
    assert len(steps) == len(NUMBERED.findall(sections[path])), "a step is not `Class`, [file](../file): what it does"
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert 3 <= len(steps) <= MOST
    for _, name, file in steps:
        assert re.search(rf"^class {name}\b", (root / file).read_text(), re.MULTILINE), f"{file} has no class {name}"


def test_no_other_numbered_list_is_left_unchecked(sections):
    assert [name for name, text in sections.items() if NUMBERED.search(text)] == PATHS


def test_every_room_is_in_the_drawing(root, sections):
    rooms = {path.parent.name for path in (root / "raymem").glob("*/__init__.py")} | {"kernels"}
    drawn = sections["Rooms"].split("```")[1]
    assert {room for room in rooms if not re.search(rf"\b{room}\b", drawn)} == set()
