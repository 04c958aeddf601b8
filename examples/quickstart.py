"""A memory of hidden states in a folder: write it, read it, detach it, attach it again.

Run: python examples/quickstart.py
"""

import tempfile

import raymem
from raymem.encode.fit import calibrate
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel

LAYERS = (26,)
TEXT = "The lighthouse on Skerry Rock was built in 1844. Its keeper, Ada Moir, wrote every storm into a green book."


def main() -> None:
    model = LanguageModel.load("smollm2-135m")
    # hidden states, tokens, and what made them: a bank of another model would refuse them
    trace = model.trace(TEXT, LAYERS, stream="book", run="first-reading")
    with tempfile.TemporaryDirectory() as folder, raymem.connect(folder) as store:
        store.put_calibration(calibrate(model, LAYERS))
        bank = store.create("lab/keeper", raymem.BankSpec(kind="spalm", fingerprint=fingerprint(model, LAYERS)))
        ack = bank.write(trace)
        print(f"{ack.rows} hidden states are in {bank.name}, durable: {ack.durable}")

        asked = model.encode(TEXT[: TEXT.index(" Moir")])
        states, _ = model.forward(asked, LAYERS)
        readout = bank.read(states[-1:], k=1, start=len(asked) - 1)
        found = readout.rows(0)[0]
        print(f"after 'Its keeper, Ada' it remembers {model.tokenizer.decode(readout.tokens_Qk[0].tolist())!r}")
        print(f"  from row {found.seq} of {found.stream}/{found.run}, relevance {float(readout.relevance_Q[0]):.2f}")

        before = bank.digest()
        print(f"detached: {bank.detach().state}")
        print(f"attached again: {bank.attach().state}, the same bytes: {bank.digest() == before}")


if __name__ == "__main__":
    main()
