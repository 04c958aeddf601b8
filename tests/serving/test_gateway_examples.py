import subprocess
import sys


def test_the_example_over_http_finds_what_the_other_agent_wrote(root):
    example = root / "examples" / "over_http.py"
    assert len(example.read_text().splitlines()) < 80
    said = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=280, check=True)
    assert "hidden states are behind http://127.0.0.1:" in said.stdout
    assert "Ada Moir" in said.stdout.splitlines()[-1]
