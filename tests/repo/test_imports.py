"""Imports go one way between the rooms of the package, imports within functions included."""

import ast

import pytest

import raymem

# a room may import itself and the rooms before it
ORDER = "root kernels memory encode storage bank host partition client lm train actors serving demo bench cli".split()
# `connect()` picks a backend by its address: the Ray room is loaded when an address asks for it
LAZY = ("client/store.py", "raymem.actors.backend")
MOST_AT_ROOT = 12


def room(name: str) -> str:
    """The room of a dotted name: `raymem.bank.owner` is of `bank`, `raymem.errors` of the root."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in ORDER else "root"


def imports(source: str) -> set[str]:
    """The names of raymem that a file imports, wherever in it, by their full paths."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    ours = {name for name in found if name.split(".")[0] == "raymem"}
    # what the package offers at its root lives in a room
    homes = {f"raymem.{name}": f"raymem.{home}.{name}" for name, home in raymem._HOME.items()}
    return {homes.get(name, name) for name in ours}


def wrong_way(sources: dict[str, str]) -> list[str]:
    """Imports from a room into a later one, in files by their paths within the package."""
    found = []
    for file, source in sources.items():
        here = ORDER.index(room(f"raymem/{file}".removesuffix(".py").replace("/", ".")))
        for name in sorted(imports(source)):
            if ORDER.index(room(name)) > here and not (file == LAZY[0] and name.startswith(LAZY[1])):
                found.append(f"{file} imports {name}")
    return found


@pytest.fixture(scope="module")
def sources(root) -> dict[str, str]:
    package = root / "raymem"
    paths = [
        path for folder in (package, *(package / linked for linked in raymem.ROOMS)) for path in folder.rglob("*.py")
    ]
    # the root's own file only says where the names that it offers live
    return {str(path.relative_to(package)): path.read_text() for path in paths if path != package / "__init__.py"}


def test_imports_go_one_way(sources):
    assert len(sources) > 200
    assert wrong_way(sources) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("encode/encoder.py", "from raymem.storage.journal.tombstones import Tombstones"),
        ("storage/catalog.py", "import raymem.bank.replica"),
        ("kernels/dispatch.py", "from raymem.memory import build"),
        ("config.py", "from raymem.encode import keys"),
        ("client/store.py", "def late():\n    from raymem.serving.app import make_app"),
        ("client/bank.py", "from raymem.actors import backend"),
        ("actors/shard.py", "from raymem.cli import output"),
        ("bank/owner.py", "from raymem import connect"),
    ],
)
def test_an_arrow_turned_round_is_found(sources, file, line):
    turned = sources | {file: f"{sources[file]}\n\n{line}\n"}
    found = wrong_way(turned)
    assert len(found) == 1
    assert found[0].startswith(f"{file} imports raymem.")


def test_the_root_holds_few_modules(root):
    assert len(list((root / "raymem").glob("*.py"))) <= MOST_AT_ROOT
