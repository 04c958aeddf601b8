"""What `make lint` accepts and refuses as the subject of a commit."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("raymem_check_commits", root / "tools" / "check_commits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a way to run git in a repository of its own, which has one commit of the old form."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    person = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]

    def git(*arguments):
        ran = subprocess.run(["git", *person, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return ran.stdout.strip()

    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "Some subject without a scope.")
    return git


@pytest.mark.parametrize(
    "subject",
    [
        "storage: Flush rows of the log by bank",
        "tests: Address what two runs share",
        "docs: Feed, embed and bring the words together",
        "bank: Process what Exceed, Need and Miss leave",
        "encode: Embed rows without their first token",
        "all: Bring the rooms into one order",
        "host: Shed what no caller waits for",
        "kernels: Compress keys",
        "cli: " + "X" + "x" * 64 + " y",
    ],
)
def test_a_sound_subject_is_accepted(script, subject):
    assert script.faults(subject) == []


@pytest.mark.parametrize(
    ("subject", "fault"),
    [
        ("Flush rows of the log by bank", "form"),
        ("storage: flush rows of the log", "form"),
        ("storage:Flush rows", "form"),
        ("storage: Flush", "form"),
        ("cellar: Flush rows of the log", "'cellar' is no scope"),
        ("storage: Flushes rows of the log", "not imperative"),
        ("storage: Adds a log", "not imperative"),
        ("storage: Fixed the log", "not imperative"),
        ("storage: Freed the log", "not imperative"),
        ("storage: Flushing rows of the log", "not imperative"),
        ("storage: Flush rows of the log.", "full stop"),
        ("cli: " + "X" + "x" * 65 + " y", "73 characters"),
    ],
)
def test_an_unsound_subject_is_refused_for_its_fault(script, subject, fault):
    (found,) = script.faults(subject)
    assert fault in found


def test_every_room_is_a_scope(script, root):
    rooms = {path.parent.name for path in (root / "raymem").glob("*/__init__.py")} | {"kernels", "root"}
    assert rooms <= script.SCOPES


def test_only_commits_after_the_first_checked_one_count(script, repository, tmp_path):
    since = repository("rev-parse", "HEAD")
    assert script.check(tmp_path, since) == (True, ["commit subjects: 0 checked"])
    repository("commit", "-q", "--allow-empty", "-m", "docs: Say what a subject is")
    assert script.check(tmp_path, since) == (True, ["commit subjects: 1 checked"])
    repository("commit", "-q", "--allow-empty", "-m", "Says what a subject is")
    sound, (line,) = script.check(tmp_path, since)
    assert not sound
    assert "'Says what a subject is'" in line


def test_merges_pass(script, repository, tmp_path):
    since = repository("rev-parse", "HEAD")
    repository("checkout", "-q", "-b", "side")
    repository("commit", "-q", "--allow-empty", "-m", "docs: Go another way")
    repository("checkout", "-q", "main")
    repository("commit", "-q", "--allow-empty", "-m", "docs: Go on")
    repository("merge", "-q", "side", "-m", "Merged a branch.")
    assert script.check(tmp_path, since) == (True, ["commit subjects: 2 checked"])


def test_without_the_first_commit_nothing_is_checked(script, repository, tmp_path):
    sound, (line,) = script.check(tmp_path, "f" * 40)
    assert sound
    assert "not checked" in line


def test_without_a_repository_nothing_is_checked(script, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    sound, (line,) = script.check(tmp_path, "f" * 40)
    assert sound
    assert "not checked" in line


def test_the_command_says_what_it_checked(script, root):
    ran = subprocess.run(
        [sys.executable, str(root / "tools" / "check_commits.py"), "--since", "HEAD"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "commit subjects: 0 checked\n")
