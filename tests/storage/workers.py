"""What other processes do to a cold store: started as a script, so that nothing is forked."""

import json
import os
import resource
import signal
import sys

import pyarrow as pa
import torch

from raymem.errors import BankExists, NotOwner, RaymemError
from raymem.rows import JournalRows, Trace
from raymem.storage.journal.log import Log
from raymem.storage.store import ColdStore
from raymem.storage.tables.tables import Tables
from raymem.types import BankSpec, Fingerprint

LAYERS, WIDTH = 2, 9
SPEC = BankSpec(
    kind="spalm",
    fingerprint=Fingerprint(model="m", content="c", layers=(3, 5), width=WIDTH, tokenizer="t"),
)


def rows(count: int, pos: int, epoch: int = 0) -> JournalRows:
    """Rows that follow from their position, so that any process can say what they must be."""
    hidden = torch.arange(pos, pos + count)[:, None, None].expand(count, LAYERS, WIDTH).bfloat16()
    return JournalRows.of(Trace(hidden, torch.arange(pos, pos + count), "s", "r", pos, time=1.0), pos, epoch)


def say(*words: object) -> None:
    print(*words, flush=True)


def race(uri: str, me: str, rounds: str) -> None:
    say("ready")
    sys.stdin.readline()
    store = ColdStore.open(uri)
    won: dict[str, list[int]] = {"created": [], "claimed": []}
    for number in range(int(rounds)):
        try:
            store.catalog.create(f"race/bank{number}", SPEC)
            won["created"].append(number)
        except BankExists:
            continue
    for epoch in range(int(rounds)):
        try:
            store.catalog.claim("race/bank0", me, epoch)
            won["claimed"].append(epoch)
        except NotOwner:
            pass
        store.catalog.tag("race/bank0", f"{me}-{epoch}", epoch)
    say(json.dumps({"nonce": store.nonce(), **won}))


def share(uri: str, me: str, rounds: str) -> None:
    """Tables that others make at the same moment, each with a row of every process."""
    tables = Tables(uri, "none")
    say("ready")
    for number in range(int(rounds)):
        sys.stdin.readline()
        table = tables.share(f"t{number}", pa.table({"who": ["maker"]}))
        table.add(pa.table({"who": [me]}))
        say("added")


def append(uri: str, name: str) -> None:
    store = ColdStore.open(uri)
    entry = store.catalog.get(name)
    entry = store.catalog.claim(name, "writer", entry.epoch)
    journal = store.journal(entry)
    journal.fence()
    pos = journal.end()
    while True:
        count = 1 + pos % 7
        journal.append(rows(count, pos, entry.epoch))
        pos += count
        say(pos)
        journal.maintain()


def log_rows(uri: str, name: str, where: str) -> None:
    """Rows in a log of this process's own, which stops at one step of flushing them and waits to be killed."""
    store = ColdStore.open(uri)
    log = Log(store.tables, f"of-{os.getpid()}")
    log.create()
    entry = store.catalog.claim(name, "writer", store.catalog.get(name).epoch, log.id)
    journal = store.journal(entry, log)
    pos = 0
    for count in (3, 1, 5):
        journal.accept(rows(count, pos, entry.epoch))
        log.commit([(entry, rows(count, pos, entry.epoch))])
        pos += count

    def stop(*args: object, **values: object) -> None:
        say(pos)
        sys.stdin.readline()

    if where == "between":
        # the table has them, and nobody has noted that the log is done with them
        log.flushed = stop  # type: ignore[method-assign]
    if where != "logged":
        journal.flush()
        log.purge()
    stop()


def small_files(uri: str, name: str) -> None:
    store = ColdStore.open(uri)
    journal = store.journal(store.catalog.create(name, SPEC))
    journal.append(rows(3, 0))
    # what a full disk does, for a process that can't mount one
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
    try:
        journal.append(rows(20_000, 3))
        say("accepted")
    except RaymemError as error:
        say(error.code, error.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append(rows(4, 3))
    say(journal.end())


def read(uri: str, name: str) -> None:
    store = ColdStore.open(uri)
    entry = store.catalog.get(name)
    crcs = [int(crc) for part in store.journal(entry).scan() for crc in part.crc_T]
    found = store.snapshots(entry).latest()
    assert found is not None
    tensors = {key: tensor.view(torch.uint8).tolist() for key, tensor in found[1].items()}
    say(json.dumps({"crcs": crcs, "pos": found[0], "tensors": tensors, "meta": found[2]}))


if __name__ == "__main__":
    commands = (race, share, append, small_files, log_rows, read)
    {command.__name__: command for command in commands}[sys.argv[1]](*sys.argv[2:])
