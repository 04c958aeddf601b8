"""How files of tests are spread over workers: the longest first, those that share something on one worker."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# seconds that each file took in a whole run. each run keeps its own in durations.json at the root
DURATIONS: dict[str, float] = json.loads((ROOT / "tests" / "durations.json").read_text())
# files that share one vLLM engine, or the nodes of one Ray cluster, in the order in which they run. the last one may
# leave it broken
SHARED = {
    "engine": (
        "tests/serving/test_vllm_sampling.py",
        "tests/serving/test_vllm_attend.py",
        "tests/serving/test_vllm_engine.py",
    ),
    "cluster": (
        *("tests/congruence/test_congruence.py", "tests/fuzz/test_inputs.py", "tests/actors/test_example.py"),
        "tests/actors/test_ray.py",
    ),
}
GROUPS = {file: group for group, files in SHARED.items() for file in files}
SECONDS: Counter[str] = Counter()


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def group_of(nodeid: str) -> str:
    """What runs on one worker: a file, or the files that share something."""
    return GROUPS.get(file_of(nodeid), file_of(nodeid))


def _place(item: pytest.Item) -> tuple[float, str, int]:
    group, file = group_of(item.nodeid), file_of(item.nodeid)
    files = SHARED.get(group, (file,))
    # a file that was never measured comes early
    return -sum(DURATIONS.get(each, 60.0) for each in files), group, files.index(file)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that two workers end together."""
    items.sort(key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As loadfile does, but in this order, and with groups."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what each file takes."""
    SECONDS[file_of(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the durations of files, of those that ran and of earlier runs, longest first."""
    file = ROOT / "durations.json"
    if not hasattr(session.config, "workerinput"):
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept |= {name: round(took, 1) for name, took in SECONDS.items()}
        file.write_text(json.dumps(dict(sorted(kept.items(), key=lambda each: -each[1])), indent=1) + "\n")
