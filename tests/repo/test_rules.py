"""Rules of the house that no linter knows."""

import re
from pathlib import Path

import pytest

CODE = {".py", ".sh", ".toml", ".yaml", ".yml", ".md", ""}
LONGEST = 600


def _texts(root: Path, committed: list[Path], *suffixes: str) -> dict[Path, str]:
    return {
        path: (root / path).read_text()
        for path in committed
        if path.suffix in suffixes and (root / path).is_file() and not (root / path).is_symlink()
    }


def _hits(texts: dict[Path, str], pattern: str) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def _library(path: Path) -> bool:
    return path.parts[0] not in {"tests"}


# torch.load may fall back to pickle; numpy's does so when asked. none of them reads disk or wire here
UNPICKLERS = (
    r"\b(pickle|cloudpickle|dill|joblib)\.(load|loads|Unpickler)\b"
    r"|(?<![\w.])torch\.load\((?!.*weights_only=True)"
    r"|allow_pickle\s*=\s*True"
    r"|\bimport (pickle|dill|shelve|marshal)\b"
)


@pytest.mark.parametrize("line", ["pickle.loads(b)", "torch.load(p)", "np.load(p, allow_pickle=True)", "import pickle"])
def test_the_rule_against_unpickling_bites(line):
    assert re.search(UNPICKLERS, line)


@pytest.mark.parametrize("line", ["safetensors.torch.load(b)", "torch.load(p, weights_only=True)", "json.loads(b)"])
def test_the_rule_against_unpickling_lets_the_safe_ways_pass(line):
    assert not re.search(UNPICKLERS, line)


def test_nothing_is_unpickled_from_disk_or_wire(root, committed):
    texts = {path: text for path, text in _texts(root, committed, ".py").items() if _library(path)}
    assert texts
    assert _hits(texts, UNPICKLERS) == []


def test_no_path_of_one_machine_is_written_down(root, committed):
    texts = {path: text for path, text in _texts(root, committed, *CODE).items() if _library(path)}
    assert _hits(texts, r"""(^|["'\s(=])/(work|tmp|home|root|opt)/""") == []


def test_no_file_grows_past_what_one_can_read(root, committed):
    lengths = {path: text.count("\n") for path, text in _texts(root, committed, ".py").items()}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


ROOTS = ("raymem", "actors", "kernels", "serving", "tests", "tools", "docs", "examples", "benchmarks", ".ci")
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, ROOTS))})/[\w./-]*)`")


def test_every_path_named_in_the_docs_exists(root, committed):
    texts = _texts(root, committed, ".md")
    missing = [
        f"{page}: {named}"
        for page, text in texts.items()
        for named in PATH.findall(text)
        if not (root / named).exists()
    ]
    assert missing == []


LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def test_every_relative_link_in_the_docs_leads_somewhere(root, committed):
    missing = [
        f"{page}: {target}"
        for page, text in _texts(root, committed, ".md").items()
        for target in LINK.findall(text)
        if not (root / page.parent / target).exists()
    ]
    assert missing == []


NAME = re.compile(r"\braymem((?:\.\w+)+)\b(?!\.)")
# a file, and what an export's schema holds
NO_MODULES = {".toml", ".layers", ".holes"}


def _leads_nowhere(root: Path, dotted: str) -> bool:
    """Whether the name is neither a module of raymem nor in the source of one."""
    *parts, last = dotted.strip(".").split(".")
    parent = (root / "raymem").joinpath(*parts)
    if (parent / last).is_dir() or (parent / f"{last}.py").is_file():
        return False
    source = parent / "__init__.py" if parent.is_dir() else parent.with_suffix(".py")
    return not source.is_file() or re.search(rf"\b{last}\b", source.read_text()) is None


def test_every_dotted_name_in_the_docs_exists(root, committed):
    names = {
        f"{page}: raymem{dotted}"
        for page, text in _texts(root, committed, ".md").items()
        for dotted in NAME.findall(text)
        # the changelog names what was
        if page.name != "CHANGELOG.md" and dotted not in NO_MODULES and _leads_nowhere(root, dotted)
    }
    assert names == set()


@pytest.mark.parametrize("dotted", [".runtime", ".lm.mixing.Blender", ".bank.nothing.Owner"])
def test_a_dotted_name_that_is_gone_is_found(root, dotted):
    assert _leads_nowhere(root, dotted)


def _code(root: Path, committed: list[Path]) -> dict[Path, str]:
    return {
        path: text
        for path, text in _texts(root, committed, ".py").items()
        if path.parts[0] in {"raymem", "actors", "kernels", "serving"}
    }


def test_sentences_name_their_subject(root, committed):
    assert _hits(_code(root, committed), r"(?i)\b(whoever|nobody|somebody)\b") == []


def test_no_two_classes_have_one_name(root, committed):
    places: dict[str, list[str]] = {}
    for path, text in _code(root, committed).items():
        for name in re.findall(r"^class (\w+)", text, re.MULTILINE):
            places.setdefault(name, []).append(str(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
