"""Two agents share a memory through a gateway: one writes what it reads, the other asks in words.

Run: python examples/over_http.py
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

import raymem
from raymem.encode.fit import calibrate
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel

LAYERS = (1,)
TEXT = "The lighthouse on Skerry Rock was built in 1844. Its keeper, Ada Moir, wrote every storm into a green book."


@contextmanager
def gateway(folder: str) -> Iterator[str]:
    """`raymem serve`, as one would start it in a terminal."""
    command = [sys.executable, "-m", "raymem.cli", "serve", "--store", folder, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["url"]
        process.terminate()


def write(url: str) -> None:
    model = LanguageModel.load("smollm2-135m")
    # hidden states, tokens, and what made them: a bank of another model would refuse them
    trace = model.trace(TEXT, LAYERS, stream="book", run="first-reading")
    with raymem.connect(url) as store:
        store.put_calibration(calibrate(model, LAYERS))
        spec = raymem.BankSpec(
            kind="spalm",
            fingerprint=fingerprint(model, LAYERS),
            # early layers and a window of words find facts from other contexts
            key=raymem.KeySpec(function="window", window=8),
        )
        ack = store.create("lab/keeper", spec).write(trace)
    print(f"{ack.rows} hidden states are behind {url}")


def ask(url: str, text: str) -> None:
    """No model and no raymem here: the gateway reads the question."""
    answer = httpx.post(f"{url}/v1/banks/lab/keeper/recall", json={"text": text, "k": 1}, timeout=60).json()
    span = answer["spans"][0]
    print(f"{text!r} → {span['text'].strip()!r} from {span['stream']}, relevance {span['relevance']:.2f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, gateway(folder) as url:
        write(url)
        ask(url, "The keeper, Ada Moir, wrote")


if __name__ == "__main__":
    main()
