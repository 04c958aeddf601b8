"""Logs go to stderr, or where the application sends them; stdout belongs to results."""

import logging
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, structlog
import raymem.host.host, raymem.bank.owner, raymem.storage.tables.disk, raymem.storage.snapshots, raymem.host.lease
from raymem.logs import get_logger
assert not logging.getLogger().handlers and not logging.getLogger("raymem").handlers, "an import set up a handler"
raymem.host.host.log.warning("bank not flushed on close", bank="lab/a", share="100%")
raymem.host.lease.log.info("nobody asked for this")
try:
    1 / 0
except ZeroDivisionError:
    get_logger("raymem.any").exception("it broke")
structlog.configure(logger_factory=structlog.PrintLoggerFactory())
get_logger("raymem.late").error("the application's own structlog prints elsewhere")
logging.basicConfig(format="app: %(name)s %(message)s", force=True)
raymem.bank.owner.log.error("bank lost", bank="lab/b")
"""


def test_a_library_logs_on_stderr_and_through_the_application_s_handlers():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout == ""
    assert "bank not flushed on close bank='lab/a' share='100%'" in ran.stderr
    assert "it broke" in ran.stderr
    assert "ZeroDivisionError" in ran.stderr
    assert "elsewhere" in ran.stderr
    assert "nobody asked" not in ran.stderr
    assert "app: raymem.bank.owner bank lost bank='lab/b'" in ran.stderr


def test_a_command_logs_each_line_once_and_to_the_stderr_of_now(capsys):
    from raymem import logs

    root = logging.getLogger(logs.ROOT)
    before = root.handlers[:], root.propagate, root.level
    try:
        logs.on_stderr(logging.INFO)
        logs.on_stderr(logging.WARNING)
        logs.get_logger("raymem.test").warning("one line", n=1)
        logs.get_logger("raymem.test").info("not this one")
    finally:
        root.handlers[:], root.propagate, _ = before
        root.setLevel(before[2])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("one line n=1") == 1
    assert "not this one" not in err


def test_no_module_has_a_logger_of_another_kind(root: Path):
    for path in root.glob("*/**/*.py"):
        if path.is_relative_to(root / "tests") or path.name == "logs.py" or ".venv" in path.parts:
            continue
        assert "structlog" not in path.read_text(), f"{path}: use raymem.logs.get_logger"
