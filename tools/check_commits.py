"""Check the subjects of commits: `scope: Verb what`, imperative, at most 72 characters, without a full stop.

    python tools/check_commits.py [--since REVISION]

Merge commits are not checked, nor are SINCE and the commits before it, which are older than this check. Where SINCE is
not in the history (a shallow clone, or a tarball without .git) nothing is checked, and the output says so.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

# the last commit before the check began
SINCE = "9661bd22aa8575eaaa070db5af76cee1d83e867c"

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 72
SCOPES = frozenset(
    "root kernels memory encode storage bank host partition client lm train actors serving demo bench cli "
    "docs tests tools ci examples benchmarks build all".split()
)
FORM = re.compile(r"(?P<scope>[a-z]+): (?P<verb>[A-Z][A-Za-z-]*)(?=,? \S)")
# verbs whose ending the rule below would refuse
VERBS = {"alias", "bias", "embed", "focus"}


def is_imperative(word: str) -> bool:
    """Whether a sentence may begin with this word: False for forms like Adds, Added and Adding."""
    word = word.lower()
    if word in VERBS or (word.endswith(("eed", "ss")) and word not in {"agreed", "freed"}):
        return True
    # without a vowel before the ending it is a part of the verb: bring, shed
    return not (word.endswith("s") or re.search(r"[aeiouy].*(ed|ing)$", word))


def faults(subject: str) -> list[str]:
    """What is wrong with the subject of a commit; nothing if it is sound."""
    found = []
    if len(subject) > LONGEST:
        found.append(f"it has {len(subject)} characters, {LONGEST} are allowed")
    if subject.endswith("."):
        found.append("it ends with a full stop")
    form = FORM.match(subject)
    if form is None:
        found.append("it has not the form `scope: Verb what`, as in `storage: Flush rows of the log by bank`")
    elif form["scope"] not in SCOPES:
        found.append(f"{form['scope']!r} is no scope; the scopes are {', '.join(sorted(SCOPES))}")
    elif not is_imperative(form["verb"]):
        found.append(f"{form['verb']!r} is not imperative: write Add, not Adds, Added or Adding")
    return found


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # the checkout may belong to another user than the one who runs the check
    return subprocess.run(["git", "-c", "safe.directory=*", *arguments], cwd=root, capture_output=True, text=True)


def check(root: Path, since: str) -> tuple[bool, list[str]]:
    """Whether the commits after `since` in the repository at `root` are sound, and the lines that say why."""
    if _git(root, "merge-base", "--is-ancestor", since, "HEAD").returncode:
        return True, [f"commit subjects: not checked, as {since[:12]} is not in this history"]
    log = _git(root, "log", "--no-merges", "--format=%h %s", f"{since}..HEAD").stdout
    commits = [line.split(" ", 1) for line in log.splitlines()]
    lines = [f"{commit} {subject!r}: {fault}" for commit, subject in commits for fault in faults(subject)]
    return not lines, lines or [f"commit subjects: {len(commits)} checked"]


def main() -> int:
    """Print what is wrong; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default=SINCE, metavar="REVISION", help="check the commits after this one")
    sound, lines = check(ROOT, parser.parse_args().since)
    print(*lines, sep="\n", file=sys.stdout if sound else sys.stderr)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
