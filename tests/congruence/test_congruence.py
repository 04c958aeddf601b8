"""One class over three backends: each verb, on each, for every kind, gives the same."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from raymem import (
    Ack,
    AsyncStore,
    AttendedRows,
    Bank,
    BankInfo,
    Calibration,
    EraseReceipt,
    MemoryTokens,
    MigrationReport,
    Readout,
    Store,
    Trace,
)
from raymem.client.store import AsyncBank
from raymem.errors import RaymemError
from raymem.memory import kinds
from raymem.memory.learned import Learned
from raymem.types import FileCheck, RebalanceReport

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class On(NamedTuple):
    """One kind on one backend."""

    store: Store
    bank: Bank
    tiny: Any
    kind: str
    folder: Path

    def other(self, name: str) -> Bank:
        return self.store.bank(f"{self.kind}/{name}")


class Step(NamedTuple):
    """A call of a verb, in the order in which it is made."""

    verb: str
    what: str
    run: Callable[[On], Any]
    # whether a kind's state has a part in it
    state: bool


STEPS: list[Step] = []
# a kind of rows and a kind of states make every step, the others those that their states have a part in
WHOLE = ("spalm", "larimar")


def steps_of(kind: str) -> list[Step]:
    return [step for step in STEPS if step.state or kind in WHOLE]


def step(verb: str, what: str, *, state: bool = True) -> Callable[[Callable[[On], Any]], None]:
    return lambda run: STEPS.append(Step(verb, what, run, state))


def alike(verb: str, what: str) -> Callable[[Callable[[On], Any]], None]:
    """A step that is answered without the bank's state, or does with it what other steps do: alike for all kinds."""
    return step(verb, what, state=False)


def _not_finite(on: On) -> Trace:
    trace = on.tiny.trace(3, run="bad")
    trace.hidden[1, 0, 0] = float("nan")
    return trace


def _put(on: On, kind: str) -> str:
    tensors = {"memory.policy.protect": torch.full((24,), 3.0)} if on.kind == "lemn" else {}
    return on.store.put_params(Learned(kind, tensors))


def _trained(on: On) -> Bank:
    options = {"policy": "im", "gamma": None, "slots": 20} if on.kind == "lemn" else {}
    spec = on.tiny.spec(on.kind, **options).model_copy(update={"params": _put(on, on.kind)})
    return on.store.create(f"{on.kind}/trained", spec)


def _made_by(on: On, run: str = "r", **other: Any) -> Trace:
    return dataclasses.replace(on.tiny.trace(3, run=run), fingerprint=on.tiny.fingerprint.model_copy(update=other))


def _weights() -> Learned:
    return Learned("lemn", {"memory.policy.weigh.bias": torch.arange(3.0)}, {"policy": "s"}, {"rows": 7})


step("Store.put_calibration", "keeps it")(lambda on: on.store.put_calibration(on.tiny.calibration))
alike("Store.calibration", "finds it")(lambda on: on.store.calibration("content", (3, 5)))
alike("Store.put_params", "keeps them")(lambda on: on.store.put_params(_weights()))
alike("Store.params", "gives them back")(lambda on: on.store.params(on.store.put_params(_weights())).to_bytes())
alike("Store.params", "has none of another name")(lambda on: on.store.params("sha256:" + "0" * 64))
step("Store.create", "makes a bank with weights")(lambda on: _trained(on).info())
step("Bank.write", "to a bank with weights")(lambda on: on.other("trained").write(on.tiny.trace(60)))
step("Bank.read", "a bank with weights")(lambda on: on.other("trained").read(on.tiny.trace(5).hidden, 4))
step("Bank.digest", "of a bank with weights")(lambda on: on.other("trained").digest())
step("Store.delete", "a bank with weights")(lambda on: on.store.delete(f"{on.kind}/trained"))
alike("Store.create", "refuses weights of another kind")(
    lambda on: on.store.create("a/odd", on.tiny.spec(on.kind).model_copy(update={"params": _put(on, "other")}))
)
alike("Store.calibration", "has none of another model")(lambda on: on.store.calibration("other", (3, 5)))
step("Store.create", "makes a bank")(lambda on: on.store.create(on.bank.name, on.tiny.spec(on.kind)).name)
alike("Store.create", "refuses a name that is taken")(lambda on: on.store.create(on.bank.name, on.tiny.spec(on.kind)))
alike("Store.create", "refuses an unknown kind")(lambda on: on.store.create("a/kind", on.tiny.spec("none")))
alike("Store.create", "refuses an unknown option")(lambda on: on.store.create("a/opt", on.tiny.spec(on.kind, no=1)))
alike("Store.create", "refuses a bad name")(lambda on: on.store.create("../x", on.tiny.spec(on.kind)))
alike("Store.bank", "gives a handle")(lambda on: on.store.bank(on.bank.name).name)
alike("Store.bank", "refuses a bad name")(lambda on: on.store.bank("x" * 10_000))
alike("Bank.info", "of an empty bank")(lambda on: on.bank.info())
alike("Bank.info", "of no bank")(lambda on: on.other("none").info())
step("Bank.read", "an empty bank")(lambda on: on.bank.read(on.tiny.trace(3).hidden, 4))
step("Bank.write", "sixty rows")(lambda on: on.bank.write(on.tiny.trace(60)))
step("Bank.write", "the same rows")(lambda on: on.bank.write(on.tiny.trace(60)))
step("Bank.write", "rows that overlap")(lambda on: on.bank.write(on.tiny.trace(40, seq=37)))
step("Bank.write", "one row")(lambda on: on.bank.write(on.tiny.trace(1, run="one")))
alike("Bank.write", "no row")(lambda on: on.bank.write(on.tiny.trace(0)))
step("Bank.write", "after a gap")(lambda on: on.bank.write(on.tiny.trace(5, run="one", seq=9)))
alike("Bank.write", "other rows under the same names")(lambda on: on.bank.write(on.tiny.trace(5, seed=1)))
alike("Bank.write", "a row that is not finite")(lambda on: on.bank.write(_not_finite(on)))
alike("Bank.write", "one layer short")(
    lambda on: on.bank.write(Trace(on.tiny.trace(2).hidden[:, :1], on.tiny.trace(2).tokens, "s", "r"))
)
alike("Bank.write", "another dtype")(
    lambda on: on.bank.write(Trace(on.tiny.trace(2).hidden.float(), on.tiny.trace(2).tokens, "s", "r"))
)
alike("Bank.write", "rows that say what made them")(lambda on: on.bank.write(_made_by(on, model="renamed", run="made")))
alike("Bank.write", "rows of other layers")(lambda on: on.bank.write(_made_by(on, layers=(1, 5))))
alike("Bank.write", "rows of another model")(lambda on: on.bank.write(_made_by(on, content="another")))
alike("Bank.write", "a stream without a name")(lambda on: on.bank.write(on.tiny.trace(2, stream="")))
alike("Bank.write", "to no bank")(lambda on: on.other("none").write(on.tiny.trace(2)))
step("Bank.write", "without waiting")(lambda on: on.bank.write(on.tiny.trace(9, run="soon"), durable=False))
alike("Bank.write", "without waiting, not finite")(lambda on: on.bank.write(_not_finite(on), durable=False))
step("Bank.digest", "of what was written")(lambda on: on.bank.digest())
alike("Bank.digest", "of no bank")(lambda on: on.other("none").digest())
step("Bank.read", "states that were written")(lambda on: on.bank.read(on.tiny.trace(7).hidden, 4))
step("Bank.read", "states of another text")(lambda on: on.bank.read(on.tiny.trace(7, seed=2).hidden, 31))
alike("Bank.read", "from the first position")(lambda on: on.bank.read(on.tiny.trace(2).hidden, 4, start=0))
alike("Bank.read", "no state")(lambda on: on.bank.read(on.tiny.trace(0).hidden, 4))
alike("Bank.read", "no neighbour")(lambda on: on.bank.read(on.tiny.trace(2).hidden, 0))
alike("Bank.read", "before the start")(lambda on: on.bank.read(on.tiny.trace(2).hidden, 4, start=-1))
alike("Bank.read", "another dtype")(lambda on: on.bank.read(on.tiny.trace(2).hidden.float(), 4))
alike("Bank.read", "a state that is not finite")(lambda on: on.bank.read(_not_finite(on).hidden, 4))
step("Bank.attend", "states that were written")(lambda on: _attend(on, 40))
alike("Bank.attend", "tokens alone")(lambda on: on.bank.attend(None, on.tiny.trace(9, seq=33).tokens, 40))
alike("Bank.attend", "more rows than there are")(lambda on: _attend(on, 5000))
alike("Bank.attend", "spread evenly, of another layer")(lambda on: _attend(on, 20, method="even", layer=5))
alike("Bank.attend", "no row")(lambda on: _attend(on, 0))
alike("Bank.attend", "a layer that the bank lacks")(lambda on: _attend(on, 20, layer=4))
alike("Bank.attend", "by no method")(lambda on: _attend(on, 20, method="best"))
alike("Bank.attend", "nothing to choose by")(lambda on: on.bank.attend(None))
alike("Bank.attend", "a state that is not finite")(lambda on: on.bank.attend(_not_finite(on).hidden))
alike("Bank.attend", "of no bank")(lambda on: on.other("none").attend(on.tiny.trace(2).hidden))
alike("Bank.put_rows", "of a run")(lambda on: on.bank.put_rows(_kv(60)))
alike("Bank.put_rows", "in place of some")(lambda on: on.bank.put_rows(_kv(20, 50)))
alike("Bank.put_rows", "that were not written")(lambda on: on.bank.put_rows(_kv(5, 9000)))
alike("Bank.put_rows", "of other heads")(lambda on: on.bank.put_rows(_kv(5, heads=1)))
alike("Bank.put_rows", "in another dtype")(lambda on: on.bank.put_rows(_kv(5), int8=False))
alike("Bank.put_rows", "that are none")(lambda on: on.bank.put_rows(on.tiny.trace(3)))
alike("Bank.put_rows", "to no bank")(lambda on: on.other("none").put_rows(_kv(5)))
alike("Bank.attend", "with keys and values")(lambda on: _attend(on, 40))
alike("Bank.attend", "without fetching them")(lambda on: _attend(on, 40, fetch=False))
alike("Bank.info", "with keys and values")(lambda on: on.bank.info())
alike("Bank.tokens", "of a run")(lambda on: on.bank.tokens("s", "r", 10, 20).tolist())
alike("Bank.tokens", "past a run's end")(lambda on: on.bank.tokens("s", "r", 70, 200).tolist())
alike("Bank.tokens", "of no run")(lambda on: on.bank.tokens("s", "none", 0, 9).tolist())
alike("Bank.tokens", "of no bank")(lambda on: on.other("none").tokens("s", "r", 0, 9))
step("Bank.tag", "names the position")(lambda on: on.bank.tag("before"))
alike("Bank.tag", "refuses an empty name")(lambda on: on.bank.tag(""))
alike("Bank.tags", "lists them")(lambda on: on.bank.tags())
step("Bank.read", "as of a tag")(lambda on: on.bank.read(on.tiny.trace(7).hidden, 4, as_of="before"))
alike("Bank.attend", "as of a tag")(lambda on: _attend(on, 40, as_of="before"))
alike("Bank.attend", "as of no tag and no time")(lambda on: _attend(on, 40, as_of="never"))
alike("Bank.read", "as of a time before all rows")(lambda on: on.bank.read(on.tiny.trace(7).hidden, 4, as_of=0.5))
alike("Bank.read", "as of no tag and no time")(lambda on: on.bank.read(on.tiny.trace(7).hidden, 4, as_of="never"))
step("Store.fork", "at a position")(lambda on: on.store.fork(on.bank.name, f"{on.kind}/fork", 50).info())
alike("Store.fork", "at a tag")(lambda on: on.store.fork(on.bank.name, f"{on.kind}/other", "before").info().rows)
alike("Store.fork", "at no tag")(lambda on: on.store.fork(on.bank.name, f"{on.kind}/third", "never"))
alike("Store.fork", "at no position")(lambda on: on.store.fork(on.bank.name, f"{on.kind}/third", 10_000))
alike("Store.fork", "refuses a name that is taken")(lambda on: on.store.fork(on.bank.name, f"{on.kind}/fork"))
step("Bank.write", "to a fork")(lambda on: on.other("fork").write(on.tiny.trace(60)))
step("Bank.digest", "of a fork")(lambda on: on.other("fork").digest())
alike("Store.delete", "a bank with forks")(lambda on: on.store.delete(on.bank.name))
alike("Bank.materialise", "copies what a fork inherited")(lambda on: on.other("fork").materialise())
alike("Bank.digest", "of what was a fork")(lambda on: on.other("fork").digest())
alike("Bank.restore", "goes back to a position")(lambda on: on.other("fork").restore(40))
alike("Bank.restore", "to no tag")(lambda on: on.other("fork").restore("never"))
alike("Bank.read", "after it went back")(lambda on: on.other("fork").read(on.tiny.trace(7).hidden, 4))
step("Store.delete", "a fork")(lambda on: on.store.delete(f"{on.kind}/fork"))
alike("Store.delete", "the rest of it")(lambda on: on.store.delete(f"{on.kind}/fork-before-restore"))
alike("Store.delete", "another fork")(lambda on: on.store.delete(f"{on.kind}/other"))
alike("Bank.info", "before a merge")(lambda on: on.bank.info())
alike("Store.merge", "of two")(lambda on: _merge(on, "all", rebuild=True))
step("Store.merge", "of two by the kind's rule")(lambda on: _merge(on, "rule"))
alike("Store.merge", "of one under two names")(lambda on: on.store.merge(f"{on.kind}/twice", [on.bank.name] * 2))
alike("Bank.read", "what was merged")(lambda on: on.other("all").read(on.tiny.trace(7).hidden, 4))
alike("Store.delete", "what was merged")(lambda on: on.store.delete(f"{on.kind}/all"))
step("Store.delete", "what was merged by rule")(lambda on: on.store.delete(f"{on.kind}/rule"))
alike("Bank.untag", "forgets one")(lambda on: on.bank.untag("before"))
alike("Bank.untag", "no tag")(lambda on: on.bank.untag("before"))
alike("Store.banks", "by prefix")(lambda on: on.store.banks(f"{on.kind}/"))
alike("Store.banks", "none")(lambda on: on.store.banks("nothing/"))
alike("Store.nodes", "has the bank's node")(lambda on: on.bank.info().node in on.store.nodes())
alike("Store.stats", "counts the bank's rows")(
    lambda on: [
        {key: shard["banks"][on.bank.name][key] for key in ("kind", "rows", "bytes", "rows_written", "refused", "gaps")}
        for shard in on.store.stats()["shards"]
        if on.bank.name in shard["banks"]
    ]
)
alike("Store.shards", "has the bank once")(
    lambda on: sum(shard.banks for shard in on.store.shards() if shard.node == on.bank.info().node) > 0
)
alike("Store.drain", "to no node")(lambda on: on.store.drain("nowhere"))
alike("Store.drain", "undone where nothing was begun")(
    lambda on: on.store.drain(on.bank.info().node, undo=True).draining
)
alike("Bank.pin", "says so")(lambda on: on.bank.pin().pinned)
alike("Bank.pin", "no bank")(lambda on: on.other("none").pin())
alike("Bank.unpin", "says so")(lambda on: on.bank.unpin().pinned)
alike("Bank.migrate", "to where it is")(lambda on: on.bank.migrate(on.bank.info().node))
alike("Bank.migrate", "to no node")(lambda on: on.bank.migrate("nowhere"))
alike("Store.create", "in partitions")(lambda on: _partitioned(on).info())
alike("Store.create", "in no partitions")(lambda on: on.store.create("a/x", on.tiny.spec(on.kind), partitions=0))
alike("Bank.write", "to partitions")(lambda on: [on.other("parts").write(trace) for trace in _streams(on)])
alike("Bank.write", "to partitions again")(lambda on: [on.other("parts").write(trace) for trace in _streams(on)])
alike("Bank.read", "partitions")(lambda on: on.other("parts").read(on.tiny.trace(7).hidden, 9))
alike("Bank.read", "partitions, or some")(
    lambda on: on.other("parts").read(on.tiny.trace(3).hidden, 5, allow_partial=True)
)
alike("Bank.put_rows", "of partitions")(
    lambda on: [on.other("parts").put_rows(_kv(21 + number, stream=f"s{number}")) for number in range(3)]
)
alike("Bank.attend", "partitions")(lambda on: on.other("parts").attend(on.tiny.trace(7).hidden, rows=60))
alike("Bank.tag", "of partitions")(lambda on: on.other("parts").tag("now"))
alike("Bank.read", "partitions as of a tag")(lambda on: on.other("parts").read(on.tiny.trace(3).hidden, 5, as_of="now"))
alike("Bank.write", "to partitions after a tag")(lambda on: on.other("parts").write(on.tiny.trace(9, stream="late")))
alike("Store.fork", "of partitions")(lambda on: on.store.fork(f"{on.kind}/parts", f"{on.kind}/pfork", "now").info())
alike("Store.fork", "of partitions at a position")(lambda on: on.store.fork(f"{on.kind}/parts", f"{on.kind}/none", 3))
alike("Bank.read", "a fork of partitions")(lambda on: on.other("pfork").read(on.tiny.trace(7).hidden, 9))
alike("Bank.rebalance", "a fork")(lambda on: on.other("pfork").rebalance())
alike("Bank.materialise", "a fork of partitions")(lambda on: on.other("pfork").materialise())
alike("Bank.restore", "partitions")(lambda on: on.other("parts").restore("now"))
alike("Bank.read", "partitions that went back")(lambda on: on.other("parts").read(on.tiny.trace(7).hidden, 9))
alike("Store.merge", "of partitions")(
    lambda on: on.store.merge(f"{on.kind}/pall", [f"{on.kind}/pfork", f"{on.kind}/parts-before-restore"])
)
alike("Store.merge", "of partitions under their names")(
    lambda on: on.store.merge(f"{on.kind}/none", [f"{on.kind}/parts"], rename=False)
)
alike("Bank.read", "partitions that were merged")(lambda on: on.other("pall").read(on.tiny.trace(7).hidden, 9))
alike("Bank.export", "of partitions")(lambda on: on.other("pall").export(on.folder / "parts") > 0)
alike("Store.import_", "of what was in partitions")(
    lambda on: on.store.import_(on.folder / "parts", f"{on.kind}/pwhole").info().rows
)
alike("Bank.materialise", "partitions that went back")(lambda on: on.other("parts").materialise())
alike("Store.delete", "what came of partitions")(
    lambda on: [on.store.delete(f"{on.kind}/{name}") for name in ("pfork", "parts-before-restore", "pall", "pwhole")]
)
alike("Bank.untag", "of partitions")(lambda on: on.other("parts").untag("now"))
alike("Bank.set_ttl", "of partitions")(lambda on: on.other("parts").set_ttl(9e9))
alike("Bank.grow", "adds partitions")(lambda on: on.other("parts").grow(3))
alike("Bank.grow", "a bank without")(lambda on: on.bank.grow(3))
alike("Bank.rebalance", "moves streams")(lambda on: _still(on.other("parts").rebalance()))
alike("Bank.rebalance", "a bank without")(lambda on: on.bank.rebalance())
alike("Bank.migrate", "a partition that isn't there")(lambda on: on.other("parts").migrate("x", partition=7))
alike("Bank.tokens", "of partitions")(lambda on: on.other("parts").tokens("s1", "r", 3, 9).tolist())
alike("Bank.receipts", "of partitions")(lambda on: [each.rows for each in on.other("parts").receipts()])
alike("Bank.erase", "a stream of partitions")(lambda on: on.other("parts").erase(stream="s1"))
alike("Bank.detach", "partitions")(lambda on: on.other("parts").detach())
alike("Bank.read", "cold partitions")(lambda on: on.other("parts").read(on.tiny.trace(3).hidden, 5))
alike("Bank.attach", "partitions")(lambda on: on.other("parts").attach())
alike("Bank.digest", "of partitions")(lambda on: on.other("parts").digest())
alike("Bank.info", "of partitions")(lambda on: on.other("parts").info())
alike("Store.banks", "has partitions as one")(lambda on: [info.name for info in on.store.banks(f"{on.kind}/p")])
alike("Store.delete", "partitions")(lambda on: on.store.delete(f"{on.kind}/parts"))
alike("Bank.attach", "a hot bank")(lambda on: on.bank.attach())
step("Bank.detach", "settles and frees")(lambda on: on.bank.detach())
alike("Bank.detach", "a cold bank")(lambda on: on.bank.detach())
alike("Bank.detach", "no bank")(lambda on: on.other("none").detach())
alike("Bank.write", "a cold bank")(lambda on: on.bank.write(on.tiny.trace(2)))
alike("Bank.read", "a cold bank")(lambda on: on.bank.read(on.tiny.trace(2).hidden))
alike("Bank.attend", "a cold bank")(lambda on: _attend(on, 40))
alike("Bank.put_rows", "to a cold bank")(lambda on: on.bank.put_rows(_kv(5)))
alike("Bank.digest", "of a cold bank")(lambda on: on.bank.digest())
alike("Bank.migrate", "a cold bank")(lambda on: on.bank.migrate(on.store.nodes()[0]))
alike("Bank.attach", "to no node")(lambda on: on.bank.attach("nowhere"))
alike("Bank.attach", "no bank")(lambda on: on.other("none").attach())
step("Bank.attach", "a cold bank")(lambda on: on.bank.attach(on.store.nodes()[0]))
step("Bank.digest", "after it slept")(lambda on: on.bank.digest())
step("Bank.read", "after it slept")(lambda on: on.bank.read(on.tiny.trace(7).hidden, 4))
alike("Bank.attend", "after it slept")(lambda on: _attend(on, 40))
step("Bank.export", "writes one file")(
    lambda on: on.bank.export(on.folder / "bank") == (on.folder / "bank").stat().st_size
)
alike("Bank.export", "no bank")(lambda on: on.other("none").export(on.folder / "none"))
step("Store.import_", "makes a cold bank")(lambda on: on.store.import_(on.folder / "bank", f"{on.kind}/copy").info())
alike("Store.import_", "refuses a name that is taken")(lambda on: on.store.import_(on.folder / "bank", on.bank.name))
alike("Store.import_", "refuses a damaged file")(lambda on: on.store.import_(_cut_short(on), f"{on.kind}/cut"))
step("Bank.attach", "an imported bank")(lambda on: on.other("copy").attach())
step("Bank.digest", "of an imported bank")(lambda on: on.other("copy").digest() == on.bank.digest())
step("Bank.erase", "refused where it takes a replay")(lambda on: on.bank.erase(stream="s", run="soon"))
step("Bank.erase", "a run")(lambda on: on.bank.erase(stream="s", run="one", rebuild=True))
alike("Bank.erase", "some rows")(lambda on: on.bank.erase(stream="s", run="r", seq_from=3, seq_to=9, rebuild=True))
alike("Bank.erase", "what followed in the run")(
    lambda on: on.bank.erase(stream="s", run="r", seq_from=70, seq_to=72, scope="run", rebuild=True)
)
alike("Bank.erase", "no such scope")(lambda on: on.bank.erase(stream="s", scope="all"))
alike("Bank.erase", "no row")(lambda on: on.bank.erase(stream="nobody", rebuild=True))
alike("Bank.erase", "nothing named")(lambda on: on.bank.erase(run="r"))
alike("Bank.erase", "of no bank")(lambda on: on.other("none").erase(stream="s"))
step("Bank.info", "after an erasure")(lambda on: on.bank.info())
step("Bank.read", "after an erasure")(lambda on: on.bank.read(on.tiny.trace(7).hidden, 4))
step("Bank.digest", "after an erasure")(lambda on: on.bank.digest())
alike("Bank.attend", "after an erasure")(lambda on: _attend(on, 40))
step("Bank.write", "after an erasure")(lambda on: on.bank.write(on.tiny.trace(4, run="one")))
step("Bank.receipts", "of a bank")(lambda on: on.bank.receipts())
alike("Bank.receipts", "that forgot names")(
    lambda on: [each.is_about("s") for each in on.bank.receipts(forget_names=True) if each.names_forgotten]
)
alike("Bank.receipts", "of no bank")(lambda on: on.other("none").receipts())
alike("Bank.set_ttl", "sets it")(lambda on: on.bank.set_ttl(1e9))
alike("Bank.set_ttl", "takes it away")(lambda on: on.bank.set_ttl(None))
alike("Bank.set_ttl", "refuses less than nothing")(lambda on: on.bank.set_ttl(-1))
alike("Bank.set_ttl", "of no bank")(lambda on: on.other("none").set_ttl(60))
alike("Store.sweep", "finds nothing old")(lambda on: on.store.sweep().deleted)
alike("Store.sweep", "only looks")(lambda on: on.store.sweep(dry_run=True).deleted)
step("Store.delete", "a hot bank")(lambda on: on.store.delete(f"{on.kind}/copy"))
alike("Store.delete", "no bank")(lambda on: on.store.delete(f"{on.kind}/copy"))
alike("Bank.info", "of a bank that was deleted")(lambda on: on.other("copy").info())


def _attend(on: On, rows: int, **options: Any) -> MemoryTokens:
    asked = on.tiny.trace(9, seq=33)
    return on.bank.attend(asked.hidden, asked.tokens, rows, **options)


def _kv(count: int, seq: int = 0, *, stream: str = "s", heads: int = 2) -> AttendedRows:
    keys, values = torch.randn(2, 3, 100, heads, 4, generator=torch.Generator().manual_seed(0))[:, :, :count]
    return AttendedRows(stream, "r", seq, keys, values, rope="theta=10000")


def _merge(on: On, name: str, *, rebuild: bool = False) -> Any:
    other = on.store.fork(on.bank.name, f"{on.kind}/second", 40)
    try:
        return on.store.merge(f"{on.kind}/{name}", [on.bank.name, other.name], rebuild=rebuild)
    finally:
        on.store.delete(other.name)


def _partitioned(on: On) -> Bank:
    return on.store.create(f"{on.kind}/parts", on.tiny.spec(on.kind), partitions=2)


def _streams(on: On) -> list[Trace]:
    return [on.tiny.trace(21 + number, stream=f"s{number}", seed=number) for number in range(3)]


def _still(report: RebalanceReport) -> RebalanceReport:
    return dataclasses.replace(report, pause_ms=0.0, total_ms=0.0)


def _cut_short(on: On) -> Path:
    whole = (on.folder / "bank").read_bytes()
    (on.folder / "cut").write_bytes(whole[: len(whole) * 2 // 3])
    return on.folder / "cut"


# these texts name what differs between backends: nodes, paths
PLACES = {"to no node", "refuses a damaged file", "no bank", "of what was in partitions"}


def plain(outcome: Any, what: str) -> Any:
    """What has to be equal: all but owners, nodes, moments and, where they name places, texts."""
    if isinstance(outcome, RaymemError):
        return type(outcome), outcome.code, outcome.details, outcome.message if what not in PLACES else ""
    if isinstance(outcome, BankInfo):
        parts = tuple(plain(part, what) for part in outcome.partitions)
        return dataclasses.replace(outcome, owner=None, node=None, created=0.0, partitions=parts)
    if isinstance(outcome, EraseReceipt):
        # whatever it says but when it was, which files there were, and what it is called
        own = {"id": "", "bank_id": "", "generation": 0, "started": 0.0, "finished": None, "after": None}
        return dataclasses.replace(outcome, **own, before=FileCheck(0, 0, 0, 0))
    if isinstance(outcome, MigrationReport):
        return outcome.bank, outcome.rows, outcome.source == outcome.target, outcome.pause_ms, outcome.total_ms
    if isinstance(outcome, Calibration):
        return outcome.hash
    if isinstance(outcome, list):
        return [plain(item, what) for item in outcome]
    return outcome


def assert_same(got: Any, expected: Any, what: str) -> None:
    assert not isinstance(expected, Exception) or isinstance(expected, RaymemError), repr(expected)
    assert type(got) is type(expected), f"{got!r} is no {expected!r}"
    if not isinstance(got, Readout | MemoryTokens):
        assert plain(got, what) == plain(expected, what)
        return
    for field in dataclasses.fields(got):
        mine, theirs = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor) and theirs.is_floating_point():
            # design.md §3: backend against backend within 1e-6 relative
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


@pytest.fixture(scope="module")
def outcome(store_on, tiny, tmp_path_factory) -> Callable[[str, str, Step], Any]:
    """The outcome of a step, after those before it, for a kind on a backend."""

    @cache
    def run(backend: str, kind: str) -> dict[Step, Any]:
        store = store_on(backend)
        on = On(store, store.bank(f"{kind}/main"), tiny, kind, tmp_path_factory.mktemp(backend))
        return {step: _caught(step.run, on) for step in steps_of(kind)}

    return lambda backend, kind, step: run(backend, kind)[step]


def _caught(run: Callable[[On], Any], on: On) -> Any:
    try:
        return run(on)
    except Exception as error:  # noqa: BLE001 - the steps after this one still run; `assert_same` takes RaymemErrors only
        return error


@pytest.mark.parametrize("backend", ["ray", "http"])
@pytest.mark.parametrize(
    ("kind", "step"),
    [pytest.param(kind, step, id=f"{kind}-{step.verb} {step.what}") for kind in kinds() for step in steps_of(kind)],
)
def test_every_backend_gives_what_one_process_gives(outcome, backend, kind, step):
    assert_same(outcome(backend, kind, step), outcome("local", kind, step), step.what)


def found_on_one_process(outcome, kind: str) -> dict[tuple[str, str], Any]:
    return {(step.verb, step.what): outcome("local", kind, step) for step in steps_of(kind)}


@pytest.mark.parametrize("kind", kinds())
def test_the_steps_do_what_they_say(outcome, kind):
    # equal is not enough: three backends could be wrong alike
    found = found_on_one_process(outcome, kind)

    assert found["Bank.write", "sixty rows"] == Ack(60, 0, 60, 0, durable=True)
    assert found["Bank.write", "the same rows"].duplicates == 60
    assert found["Bank.write", "after a gap"].gaps == 1
    assert found["Bank.digest", "after it slept"] == found["Bank.digest", "of what was written"]
    assert found["Bank.digest", "of an imported bank"] is True
    assert found["Bank.write", "to a fork"].duplicates == 50
    erased = found["Bank.erase", "a run"]
    assert (erased.rows, erased.status, erased.proves) == (6, "complete", True)
    assert [receipt.rows for receipt in found["Bank.receipts", "of a bank"]][-3:] == (
        [6, 6, 7] if kind in WHOLE else [6]
    )


@pytest.mark.parametrize("kind", WHOLE)
def test_the_steps_that_are_alike_for_all_kinds_do_what_they_say(outcome, kind):
    found = found_on_one_process(outcome, kind)

    assert found["Store.nodes", "has the bank's node"] is True
    assert found["Bank.digest", "of a fork"] == found["Bank.digest", "of what was a fork"]
    assert found["Bank.restore", "goes back to a position"].undone == 20
    assert found["Store.merge", "of two"].rows == found["Bank.info", "before a merge"].rows + 40
    if kind == "spalm":
        assert found["Bank.read", "partitions"].partition_Qk.unique().tolist() == [0, 1]
        assert found["Bank.restore", "partitions"].kept_as == "spalm/parts-before-restore"
        assert_same(found["Bank.read", "partitions that went back"], found["Bank.read", "partitions"], "")
        assert_same(found["Bank.read", "a fork of partitions"], found["Bank.read", "partitions"], "")
        assert found["Store.merge", "of partitions"].rows == found["Store.import_", "of what was in partitions"] == 141
        assert found["Bank.rebalance", "moves streams"].streams == 1
        assert found["Store.banks", "has partitions as one"] == ["spalm/parts"]
    if kind == "spalm":
        assert found["Bank.attend", "with keys and values"].keys_LNHd.shape == (3, 40, 2, 4)
        assert found["Bank.info", "with keys and values"].attended_rows == 70
        assert_same(found["Bank.attend", "after it slept"], found["Bank.attend", "with keys and values"], "")
        assert found["Bank.attend", "partitions"].partition_N.unique().tolist() == [0, 1]
        assert found["Bank.attend", "after an erasure"].keys_LNHd is not None
    errors = {what: outcome for (_, what), outcome in found.items() if isinstance(outcome, RaymemError)}
    refused = {"a cold bank", "no bank", "to no node", "a row that is not finite", "other rows under the same names"}
    refused |= {"at no tag", "at no position", "a bank with forks", "as of no tag and no time"}
    assert refused <= set(errors)


def test_every_verb_is_compared():
    def verbs(cls: type) -> set[str]:
        return {name for name, member in inspect.getmembers(cls, callable) if not name.startswith("_")}

    assert verbs(Store) == verbs(AsyncStore) - {"connect"}
    assert verbs(Bank) == verbs(AsyncBank)
    there_are = {f"Store.{name}" for name in verbs(Store)} | {f"Bank.{name}" for name in verbs(Bank)}
    # closing ends the store that the steps share
    assert {step.verb for step in STEPS} == there_are - {"Store.close"}
