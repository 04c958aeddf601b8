"""`raymem bank erase|ttl|receipts` and `raymem store sweep`: rows that are erased for good."""

from __future__ import annotations

import shlex
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from raymem.cli import bank, output
from raymem.cli.options import DEFAULT_STORE, ColdOption, JsonOption, StoreOption, opened

if TYPE_CHECKING:
    from rich.table import Table

    from raymem.types import EraseReceipt, Exposed, SweepReport

app = typer.Typer(no_args_is_help=True, help="Look after the cold store as a whole.")


class Scope(Enum):
    """What is erased with the rows that are named."""

    ROWS = "rows"
    RUN = "run"


@bank.app.command("erase")
def erase(
    name: bank.Name,
    stream: Annotated[str | None, typer.Option("--stream", help="Whose rows.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Only those of this run.")] = None,
    seq_from: Annotated[int | None, typer.Option("--seq-from", help="Only the run's rows from this one on.")] = None,
    seq_to: Annotated[int | None, typer.Option("--seq-to", help="And before this one.")] = None,
    before: Annotated[datetime | None, typer.Option("--before", help="Only rows older than this.")] = None,
    scope: Annotated[
        Scope,
        typer.Option("--scope", help="run: also erase what followed in the same runs, which has traces of the rows."),
    ] = Scope.ROWS,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Replay kinds that can't take rows out.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Erase rows for good: a stream, one of its runs, some rows of it, or what is old.

    A row is erased if all that is given holds for it. The receipt says whether any file still holds it, and how
    many later rows stay whose hidden states were computed with it in their context: --scope run erases those too.

    For example:

        raymem bank erase research/alice --stream alice --yes

        raymem bank erase research/alice --stream alice --run r7 --seq-from 120 --seq-to 140

        raymem bank erase research/alice --stream alice --run r7 --seq-from 120 --seq-to 140 --scope run

        raymem bank erase research/facts --before 2026-01-31 --rebuild
    """
    if not yes:
        more = " and all that followed them in their runs" if scope is Scope.RUN else ""
        typer.confirm(f"Erase these rows of {name}{more} for good?", abort=True, err=True)
    moment = before.timestamp() if before else None
    with opened(store, cold) as memory, output.waiting(f"erasing in {name} …"):
        receipt = memory.bank(name).erase(
            stream=stream, run=run, seq_from=seq_from, seq_to=seq_to, before=moment, scope=scope.value, rebuild=rebuild
        )
    output.show(receipt, lambda made: _card(made))


@bank.app.command("receipts")
def receipts(
    name: bank.Name,
    stream: Annotated[str | None, typer.Option("--stream", help="Only those that name this stream.")] = None,
    forget_names: Annotated[
        bool,
        typer.Option("--forget-names", help="For good: salted digests for streams and runs, where it is finished."),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """List what was erased in a bank; receipts stay when the bank is removed.

    Names that were forgotten are not shown; --stream still finds their receipts.

    For example:

        raymem bank receipts research/alice --json

        raymem bank receipts research/alice --forget-names

        raymem bank receipts research/alice --stream alice
    """
    with opened(store, cold) as memory:
        found = memory.bank(name).receipts(forget_names=forget_names)
    output.show([receipt for receipt in found if stream is None or receipt.is_about(stream)], _table)


@bank.app.command("ttl")
def ttl(
    name: bank.Name,
    seconds: Annotated[str, typer.Argument(help="How many seconds rows may live, or `none`.")],
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Let a bank's rows expire: the owner erases older ones in batches, with receipts.

    For example:

        raymem bank ttl research/alice 2592000

        raymem bank ttl research/alice none
    """
    with opened(store, cold) as memory:
        info = memory.bank(name).set_ttl(_seconds(seconds))
    output.show(info, lambda made: f"{made.name}: rows live {_lifetime(made.ttl_s)}")


@app.command("sweep")
def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    store: StoreOption = DEFAULT_STORE,
    cold: ColdOption = None,
    json_: JsonOption = False,
) -> None:
    """Delete tables that no bank names any more, and finish erasures that were cut short.

    Owners do so by themselves; a table younger than the setting cold.sweep_age_s is left alone.

    For example:

        raymem store sweep --dry-run
    """
    with opened(store, cold) as memory, output.waiting("sweeping …"):
        report = memory.sweep(dry_run=dry_run)
    output.show(report, lambda made: _swept(made, dry_run))


def _seconds(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no number of seconds, and not `none`") from error


def _lifetime(ttl_s: float | None) -> str:
    return "for good" if ttl_s is None else f"{ttl_s:,g} s"


def _card(receipt: EraseReceipt) -> Table:
    after = receipt.after or receipt.before
    rows = [
        [
            "rows erased",
            f"{receipt.rows:,}" + (f", {receipt.followed_rows:,} as what followed" * (receipt.followed_rows > 0)),
        ],
        ["later rows with traces", "\n".join([f"{receipt.exposed_rows:,}", *map(_exposed, receipt.exposed)])],
        ["status", receipt.status + (f": {receipt.reason}" if receipt.reason else "")],
        ["check before", f"{receipt.before.found:,} finds in {receipt.before.files:,} files"],
        ["check after", f"{after.found:,} finds in {after.files:,} files"],
        ["proves", "yes" if receipt.proves else "nothing: the check did not find the rows when they were there"],
        ["out of reach", "\n".join(f"- {words}" for words in receipt.out_of_reach)],
        ["receipt", receipt.id],
    ]
    return output.table(receipt.bank, ["", ""], rows)


def _exposed(run: Exposed) -> str:
    return f"{run.rows:,} of --stream {shlex.quote(run.stream)} --run {shlex.quote(run.run)} --seq-from {run.seq_from}"


def _table(found: list[EraseReceipt]) -> Table:
    rows = [
        [datetime.fromtimestamp(receipt.started).isoformat(" ", "seconds"), receipt.rows, receipt.status, receipt.id]
        for receipt in found
    ]
    return output.table("", ["when", "rows", "status", "receipt"], rows)


def _swept(report: SweepReport, dry_run: bool) -> str:
    did = "would delete" if dry_run else "deleted"
    finished = sum(receipt.status != "pending" for receipt in report.receipts)
    return (
        f"{did} {len(report.deleted)} tables, {output.size(report.bytes)}, and {report.unfinished} snapshots that were "
        f"cut short; {len(report.young)} are too young; "
        f"{finished} of {len(report.receipts)} open erasures finished"
    )
