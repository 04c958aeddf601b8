import json
import subprocess
import sys
from pathlib import Path

import pytest

FIELDS = {
    "base_ppl",
    "memory_ppl",
    "attended_ppl",
    "both_ppl",
    "text_ppl",
    "after_migration_ppl",
    "after_reattach_ppl",
    "detached_ppl",
    "rows_streamed",
    "traces_shed",
    "bank_bytes",
    "migration_pause_ms",
}


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_what_one_agent_read_helps_another_wherever_the_bank_is(tmp_path: Path):
    file = tmp_path / "figures.json"
    command = [str(Path(sys.executable).with_name("raymem")), "demo", "--json", str(file)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert set(figures) >= FIELDS
    assert figures["memory_ppl"] <= 0.88 * figures["base_ppl"]
    # attending beats as much text, and mixing adds to it
    assert figures["both_ppl"] < figures["attended_ppl"] < figures["base_ppl"]
    assert figures["both_ppl"] < figures["text_ppl"]
    assert figures["after_migration_ppl"] == figures["after_reattach_ppl"] == figures["memory_ppl"]
    assert figures["detached_ppl"] == figures["base_ppl"]
    # every prompt token and every generated one but the last, which the engine never runs
    assert (figures["rows_streamed"], figures["traces_shed"]) == (3072 + 15, 0)
    assert "__del__" in figures["answer"]
    assert "plugged in again" in ran.stdout
