"""A bank on two Ray nodes: it moves while it is read, and comes back with every row after its process was killed.

Run: python examples/on_ray.py
On a cluster of your own, leave `local_nodes` out and name storage that all nodes share: connect("ray", cold="s3://…").
"""

import os
import signal
import tempfile

import raymem
from raymem.actors.cluster import local_nodes
from raymem.encode.fit import calibrate
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel

LAYERS = (26,)
TEXT = "The lighthouse on Skerry Rock was built in 1844. Its keeper, Ada Moir, wrote every storm into a green book."


def owner(store: raymem.Store, bank: raymem.Bank) -> int:
    """The id of the process in which a bank is hot."""
    return next(shard["pid"] for shard in store.stats()["shards"] if bank.name in shard["banks"])


def tour(store: raymem.Store) -> None:
    model = LanguageModel.load("smollm2-135m")
    # hidden states, tokens, and what made them: a bank of another model would refuse them
    trace = model.trace(TEXT, LAYERS, stream="book", run="first-reading")
    store.put_calibration(calibrate(model, LAYERS))
    bank = store.create("lab/keeper", raymem.BankSpec(kind="spalm", fingerprint=fingerprint(model, LAYERS)))
    bank.write(trace)
    digest = bank.digest()
    print(f"{bank.info().rows} hidden states are on {bank.info().node}; there is {' and '.join(store.nodes())}")

    elsewhere = next(node for node in store.nodes() if node != bank.info().node)
    report = bank.migrate(elsewhere)
    print(
        f"moved to {report.target}, writes paused for {report.pause_ms:.0f} ms, same bytes: {bank.digest() == digest}"
    )

    os.kill(owner(store, bank), signal.SIGKILL)
    # the row's identity is (stream, run, seq): writing again what may or may not have arrived does no harm
    ack = bank.write(trace)
    print(f"killed and back: {ack.duplicates} rows were there already, same bytes: {bank.digest() == digest}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, local_nodes(2), raymem.connect("ray", cold=folder) as store:
        tour(store)


if __name__ == "__main__":
    main()
