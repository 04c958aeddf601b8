"""Banks in partitions: one call on the bank becomes calls on the banks that have its rows.

This is the one layer that knows of it, under `Store` and over the backends that see the cold store. A gateway uses the
same store, so that its clients make one call.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    BankNotFound,
    Conflict,
    InvalidInput,
    Overloaded,
    Partitioned,
    Reassigned,
    TagNotFound,
    Unavailable,
    Unsupported,
)
from raymem.host.backend import Backend, ColdBackend, detached
from raymem.host.locks import Locks
from raymem.memory import keeps_rows
from raymem.partition.gather import combine, merge_readouts, one_receipt
from raymem.partition.rebalance import Mover
from raymem.storage.branching import fork_together, positions_of, restore_together, tag_together, untag_together
from raymem.storage.catalog import part_name, part_of, part_prefix
from raymem.storage.export.export import export_together
from raymem.storage.history import seconds
from raymem.storage.partitions import MOST, Layout
from raymem.storage.vanished import telling
from raymem.types import (
    Ack,
    BankInfo,
    BankSpec,
    EraseReceipt,
    MergeReport,
    MigrationReport,
    Readout,
    RebalanceReport,
    RestoreReport,
    Selection,
    Trace,
    shorten,
)

T = TypeVar("T")
_MOST_PLACES = 2**16
# whoever moves a stream holds its writers for a moment; one that died in it holds nobody for longer than this
_HOLD_S = 5.0
_PAUSE_S = 0.01
_TRIES = 20


@telling
class PartitionedBackend:
    """The verbs of a store for all banks: those that are whole go to `banks` as they are, and cost nothing more.

    Args:
        banks: the backend for one bank at a time.
    """

    def __init__(self, banks: ColdBackend) -> None:
        self._inner = banks
        self._partitions = banks.cold.partitions
        self._layouts: dict[str, Layout] = {}
        self._assignments: dict[tuple[str, str], int] = {}
        self._asked: defaultdict[str, set[str]] = defaultdict(set)
        self._asking = Locks(asyncio.Lock)

    def __getattr__(self, verb: str) -> Any:
        # no partition has to do with the others, or what a whole bank answers says what to do
        return getattr(self._inner, verb)

    async def create(self, name: str, spec: BankSpec, partitions: int) -> BankInfo:
        """Create a bank and attach it.

        Raises:
            Unsupported: partitions of a kind that keeps one state.
        """
        if not 1 <= partitions <= MOST:
            raise InvalidInput(f"partitions is {partitions}; a bank has 1 to {MOST}")
        if partitions == 1:
            return await self._inner.create(name, spec)
        checked = await asyncio.to_thread(self._inner.complete, spec)
        if not keeps_rows(spec.kind):
            raise Unsupported(
                f"a {spec.kind} bank is one bounded state that every row changes, so it can't be in {partitions} "
                "partitions; leave partitions out, or create a bank for each stream and merge them"
            )
        self._layouts[name] = await asyncio.to_thread(self._partitions.create, name, checked, partitions)
        return await self.attach(name, None)

    async def info(self, name: str) -> BankInfo:
        """One bank's line."""
        layout = await self._layout(name)
        return await self._inner.info(name) if layout is None else combine(name, await self._infos(layout))

    async def banks(self, prefix: str) -> list[BankInfo]:
        """The lines of banks whose names begin with `prefix`, by name."""
        # no name has a dot, but those of partitions
        infos = await self._inner.banks(prefix) if "." not in prefix else []
        found: defaultdict[str, dict[int, BankInfo]] = defaultdict(dict)
        for info in infos:
            bank, index = part_of(info.name) or (info.name, -1)
            found[bank][index] = info
        return [
            parts[-1] if -1 in parts else combine(bank, [parts[index] for index in sorted(parts)])
            for bank, parts in sorted(found.items())
        ]

    async def delete(self, name: str, materialise: bool) -> None:
        """Remove a bank with everything in it."""
        catalog = self._inner.cold.catalog
        line = await asyncio.to_thread(catalog.line, name)
        if line.state != "split":
            return await self._inner.delete(name, materialise)
        there = await asyncio.to_thread(catalog.lines, part_prefix(name))
        for part in there if not materialise else []:
            await asyncio.to_thread(catalog.require_no_forks, part)
        for part in there:
            await self._inner.delete(part.name, materialise)
        await asyncio.to_thread(self._partitions.drop, line.id)
        # last: what was cut short before can be asked for again
        await asyncio.to_thread(self._inner.cold.remove, name)
        self._layouts.pop(name, None)
        return None

    async def write(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Write a trace, to the partition that its stream lives in; the Ack's position counts there."""
        layout = self._layouts.get(name)
        if layout is None:
            try:
                return await self._inner.write(name, trace, durable)
            except Partitioned:
                layout = await self._must(name)
        try:
            return await self._write(layout, trace, durable)
        except BankNotFound:
            # another bank may have the name now
            del self._layouts[name]
            if await self._layout(name) == layout:
                raise
            return await self.write(name, trace, durable)

    async def _write(self, layout: Layout, trace: Trace, durable: bool) -> Ack:
        if (layout.id, trace.stream) not in self._assignments:
            trace.validate(layout.spec.fingerprint)
        began = time.monotonic()
        while True:
            part = part_name(layout.name, await self._home(layout, trace.stream))
            try:
                return await self._as_one(layout, self._inner.write(part, trace, durable))
            except Reassigned:
                if time.monotonic() - began > 2 * _HOLD_S:
                    raise
                await self._reassigned(layout, trace.stream, began)

    async def _home(self, layout: Layout, stream: str) -> int:
        key = layout.id, stream
        if key not in self._assignments:
            self._asked[layout.id].add(stream)
            # those that come while one asks are asked about together
            async with self._asking[layout.id]:
                if key not in self._assignments:
                    streams = self._asked.pop(layout.id, set()) | {stream}
                    found = await asyncio.to_thread(self._partitions.assign, layout, streams)
                    if len(self._assignments) >= _MOST_PLACES:
                        self._assignments.clear()
                    self._assignments |= {(layout.id, name): place.home for name, place in found.items()}
        return self._assignments[key]

    async def _reassigned(self, layout: Layout, stream: str, since: float) -> None:
        self._assignments.pop((layout.id, stream), None)
        place = await asyncio.to_thread(self._partitions.find, layout.id, stream)
        if place is not None and place.held and time.monotonic() - since > _HOLD_S:
            await asyncio.to_thread(self._partitions.cancel, layout, stream)
        await asyncio.sleep(_PAUSE_S)

    async def read(
        self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None, allow_partial: bool
    ) -> Readout:
        """Read a bank, or what it was: all partitions at once.

        Raises:
            Unavailable: naming the partition that does not answer, unless `allow_partial`; then it is among the
                readout's `missing`.
        """
        layout = self._layouts.get(name)
        if layout is None:
            try:
                return await self._inner.read(name, hidden_QLD, k, start, as_of)
            except Partitioned:
                layout = await self._must(name)
        wait_s = self._inner.settings.host.partial_s if allow_partial else None

        def ask(part: str) -> Awaitable[Readout]:
            return _in_time(self._inner.read(part, hidden_QLD, k, start, as_of), wait_s)

        for _ in range(_TRIES):
            if as_of is not None:
                await asyncio.to_thread(self._check_past, layout, as_of)
            answers = await asyncio.gather(*map(ask, layout.parts), return_exceptions=True)
            # a stream that moved meanwhile may have been in neither of two partitions when each was asked
            if await asyncio.to_thread(self._partitions.stands, layout):
                found, missing = _answered(layout, answers, allow_partial)
                return await asyncio.to_thread(merge_readouts, found, layout.spec, k, missing)
            layout = await self._must(name)
        raise Overloaded(f"streams of bank {name} move faster than it can be read; try again", retry_after_s=1.0)

    def _check_past(self, layout: Layout, as_of: str | float) -> None:
        """Refuse a time before rows were moved, which their new partition had later than they were written."""
        if isinstance(as_of, str) and as_of in self._inner.cold.catalog.tags(layout.parts[0]):
            return
        moment = seconds(as_of) if isinstance(as_of, str) else as_of
        if moment is None:
            raise TagNotFound(f"bank {layout.name} has no tag {shorten(str(as_of))!r}, which is no time either")
        if moment < layout.moved:
            raise InvalidInput(
                f"streams of bank {layout.name} were moved between its partitions at {layout.moved:.0f}, and what it "
                f"was before, at {moment:.0f}, can't be read any more; tag or export a bank before rebalancing it"
            )

    async def attach(self, name: str, node: str | None) -> BankInfo:
        """Load a bank; of a partitioned one each partition where there is room then."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.attach(name, node)
        # one after the other: each goes where the others left most room
        return combine(name, [await self._inner.attach(part, node) for part in layout.parts])

    async def detach(self, name: str) -> BankInfo:
        """Settle, snapshot and free a bank."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.detach(name)
        hot = await self._hot(layout)
        if not hot:
            raise detached(name)
        await asyncio.gather(*map(self._inner.detach, hot))
        return await self.info(name)

    async def migrate(self, name: str, to: str, partition: int | None) -> MigrationReport:
        """Move a bank to another node, or one of its partitions."""
        layout = await self._layout(name)
        there = [name] if layout is None else layout.parts
        if partition is not None and not (layout is not None and 0 <= partition < len(there)):
            has = "is not partitioned" if layout is None else f"has partitions 0 to {len(there) - 1}"
            raise InvalidInput(f"bank {name} {has}; there is no partition {partition} to migrate")
        if layout is None:
            return await self._inner.migrate(name, to)
        chosen = there if partition is None else [there[partition]]
        reports = [await self._as_one(layout, self._inner.migrate(part, to)) for part in chosen]
        return MigrationReport(
            name,
            ", ".join(sorted({report.source for report in reports})),
            ", ".join(sorted({report.target for report in reports})),
            rows=sum(report.rows for report in reports),
            pause_ms=max(report.pause_ms for report in reports),
            total_ms=sum(report.total_ms for report in reports),
        )

    async def pin(self, name: str, pinned: bool) -> BankInfo:
        """Keep a bank in memory when room is needed, or no longer."""
        return await self._each(name, lambda part: self._inner.pin(part, pinned), combine)

    async def set_ttl(self, name: str, ttl_s: float | None) -> BankInfo:
        """Let rows expire."""
        return await self._each(name, lambda part: self._inner.set_ttl(part, ttl_s), combine)

    async def digest(self, name: str) -> str:
        """sha256 of a bank's state; of a partitioned one of its partitions' digests."""
        return await self._each(name, self._inner.digest, lambda _, all_: _hash(all_))

    async def tag(self, name: str, tag: str) -> dict[str, int]:
        """Name the present position, of each partition its own, in one commit."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.tag(name, tag)
        # also what was written without waiting
        await asyncio.gather(*(self._inner.release(part, None) for part in await self._hot(layout)))
        await asyncio.to_thread(tag_together, self._inner.cold, layout, tag)
        return (await self.info(name)).tags

    async def untag(self, name: str, tag: str) -> dict[str, int]:
        """Forget a tag."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.untag(name, tag)
        await asyncio.to_thread(untag_together, self._inner.cold, layout, tag)
        return (await self.info(name)).tags

    async def fork(self, source: str, target: str, at: str | int | None) -> BankInfo:
        """Create a bank that begins with another's rows; of a partitioned one it has as many partitions."""
        layout = await self._layout(source)
        if layout is None:
            return await self._inner.fork(source, target, at)
        await asyncio.to_thread(fork_together, self._inner.cold, layout, target, at)
        return await self.info(target)

    async def restore(self, name: str, at: str | int) -> RestoreReport:
        """Go back to a tag; what came after stays in a bank of its own, in as many partitions."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.restore(name, at)
        cold, hot = self._inner.cold, await self._hot(layout)
        entries = [await asyncio.to_thread(cold.catalog.get, part) for part in layout.parts]
        await asyncio.to_thread(positions_of, cold, layout, entries, at)
        await asyncio.gather(*map(self._inner.detach, hot))
        try:
            return await asyncio.to_thread(restore_together, cold, layout, at)
        finally:
            for part in hot:
                await self._inner.attach(part, None)

    async def materialise(self, name: str) -> BankInfo:
        """Give a fork rows of its own, one partition after the other; what was cut short goes on."""
        layout = await self._layout(name)
        for part in [name] if layout is None else layout.parts:
            await self._inner.materialise(part)
        return await self.info(name)

    async def merge(self, target: str, sources: list[str], rebuild: bool, rename: bool) -> MergeReport:
        """Create a bank from the rows of several; it is partitioned if one of them is."""
        layouts = [await self._layout(source) for source in sources]
        if not any(layouts):
            return await self._inner.merge(target, sources, rebuild, rename)
        from raymem.bank.merge import merge_partitions

        cold = self._inner.cold
        return await asyncio.to_thread(merge_partitions, cold, target, sources, layouts, rename=rename)

    async def tokens(self, name: str, stream: str, run: str, seq_from: int, seq_to: int) -> Tensor:
        """Token ids of a run's rows."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.tokens(name, stream, run, seq_from, seq_to)
        while True:
            place = await asyncio.to_thread(self._partitions.find, layout.id, stream)
            part = part_name(name, 0 if place is None else place.home)
            found = await self._inner.tokens(part, stream, run, seq_from, seq_to)
            if await asyncio.to_thread(self._partitions.stands, layout):
                return found
            layout = await self._must(name)

    async def export(self, name: str, path: Path) -> int:
        """Write a bank to one file: that of one bank with the rows of all partitions, in the order of their times."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.export(name, path)
        await asyncio.to_thread(export_together, self._inner.cold, name, layout.parts, path)
        return path.stat().st_size

    async def erase(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows; the receipt is that of all partitions together."""
        layout = await self._layout(name)
        if layout is None:
            return await self._inner.erase(name, what, rebuild)
        # a stream on its way stays at home, and nobody copies rows of it any more
        await asyncio.to_thread(self._partitions.cancel, layout, what.stream)
        for part in await self._hot(layout):
            await self._inner.release(part, what.stream)
        return one_receipt(name, layout.id, [await self._inner.erase(part, what, rebuild) for part in layout.parts])

    async def grow(self, name: str, partitions: int) -> BankInfo:
        """Add empty partitions, to which some of the streams go that come from now on.

        Raises:
            Unsupported: the bank is not partitioned.
        """
        layout = await self._layout(name)
        if layout is None:
            raise _whole(name)
        wider = await asyncio.to_thread(self._partitions.grow, layout, partitions)
        hot = len(await self._hot(layout)) == layout.count
        for part in wider.parts[layout.count :]:
            if hot:
                await self._inner.attach(part, None)
        if wider.count > layout.count:
            await asyncio.to_thread(self._partitions.widen, wider)
        return await self.info(name)

    async def rebalance(self, name: str) -> RebalanceReport:
        """Move streams to where they would go if they came now; see `raymem.partition.rebalance`.

        Raises:
            Unsupported: the bank is not partitioned. Conflict: it has tags or forks, which would lose rows.
        """
        layout = await self._layout(name)
        if layout is None:
            raise _whole(name)
        return await self._as_one(layout, Mover(self._inner, layout).run())

    async def _layout(self, name: str) -> Layout | None:
        layout = await asyncio.to_thread(self._partitions.get, name)
        if layout is None:
            self._layouts.pop(name, None)
        else:
            self._layouts[name] = layout
        return layout

    async def _must(self, name: str) -> Layout:
        layout = await self._layout(name)
        if layout is None:
            raise Conflict(f"bank {name} was made anew meanwhile, without partitions; try again")
        return layout

    async def _infos(self, layout: Layout) -> list[BankInfo]:
        found = {info.name: info for info in await self._inner.banks(part_prefix(layout.name))}
        missing = [part for part in layout.parts if part not in found]
        if missing:
            raise BankNotFound(f"bank {layout.name} lacks partitions, as if it was being removed: {', '.join(missing)}")
        return [found[part] for part in layout.parts]

    async def _hot(self, layout: Layout) -> list[str]:
        return [info.name for info in await self._infos(layout) if info.state == "hot"]

    async def _each(self, name: str, verb: Callable[[str], Awaitable[T]], together: Callable[[str, list[T]], T]) -> T:
        layout = await self._layout(name)
        if layout is None:
            return await verb(name)
        return together(name, list(await self._as_one(layout, asyncio.gather(*map(verb, layout.parts)))))

    async def _as_one(self, layout: Layout, work: Awaitable[T]) -> T:
        try:
            return await work
        except BankDetached:
            raise detached(layout.name) from None


def partitioned(banks: ColdBackend) -> Backend:
    """A backend for all banks; the verbs that partitions have nothing to do with are those of `banks`."""
    return cast(Backend, PartitionedBackend(banks))


def _answered(
    layout: Layout, answers: Sequence[Readout | BaseException], allow_partial: bool
) -> tuple[dict[int, Readout], list[int]]:
    found = {index: answer for index, answer in enumerate(answers) if isinstance(answer, Readout)}
    failed = {index: answer for index, answer in enumerate(answers) if isinstance(answer, BaseException)}
    if found and allow_partial and all(isinstance(error, Unavailable) for error in failed.values()):
        return found, list(failed)
    for index, error in failed.items():
        if isinstance(error, BankDetached):
            raise detached(layout.name)
        if isinstance(error, Unavailable):
            about = {**error.details, "partition": index}
            raise type(error)(f"partition {index} of bank {layout.name}: {error.message}", **about) from error
        raise error
    return found, []


async def _in_time(work: Awaitable[T], wait_s: float | None) -> T:
    try:
        async with asyncio.timeout(wait_s):
            return await work
    except TimeoutError:
        raise BackendUnavailable(f"no answer within {wait_s:g} s") from None


def _hash(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _whole(name: str) -> Unsupported:
    return Unsupported(
        f"bank {name} is not partitioned; create one with partitions=N (`raymem bank create --partitions N`) and write "
        "the streams there"
    )
