"""The demo's steps, from two empty nodes to a table of figures."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

import raymem
from raymem.cli import output
from raymem.demo.reader import ROWS, AgentB
from raymem.demo.stage import LAYERS, MAX_TOKENS, Engine, gateway, watched
from raymem.encode.fit import calibrate
from raymem.errors import MissingExtra
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel, model_path

MODEL = "smollm2-135m"
TOPIC = "specialnames"
BANK = "demo/agent-a"
QUESTION = "What is a finalizer or destructor in Python?"
# of the topic's first tokens agent A reads three quarters; agent B is asked about the rest
READ = MAX_TOKENS * 3 // 4
THINK = 16


@dataclass(frozen=True)
class Figures:
    """What the demo measured; the perplexities are agent B's on text it never saw."""

    base_ppl: float
    memory_ppl: float
    attended_ppl: float
    both_ppl: float
    text_ppl: float
    after_migration_ppl: float
    after_reattach_ppl: float
    detached_ppl: float
    rows_streamed: int
    traces_shed: int
    bank_bytes: int
    migration_pause_ms: float
    stream_s: float
    total_s: float
    question: str
    answer: str


def run(json_path: Path | None = None) -> Figures:
    """Play the demo; print a table, and write the figures as JSON where asked.

    Raises:
        MissingExtra: Ray, vLLM or another part is not installed, naming the fix.
    """
    began = time.monotonic()
    try:
        from raymem.actors.cluster import local_nodes
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name!r} is not installed; the demo needs all of raymem: `make setup`") from error
    with contextlib.ExitStack() as stage:
        folder = Path(stage.enter_context(tempfile.TemporaryDirectory(prefix="raymem-demo-")))
        with _step("Starting two Ray nodes on this machine"):
            stage.enter_context(local_nodes(2))
            store = stage.enter_context(contextlib.closing(raymem.connect("ray", cold=str(folder / "cold"))))
        with _step("Starting the HTTP gateway"):
            url = stage.enter_context(gateway(folder / "cold", folder / "gateway.log"))
        figures = _play(store, url)
    figures = replace(figures, total_s=time.monotonic() - began)
    if json_path is None or str(json_path) != "-":
        Console().print(_table(figures))
    if json_path is not None:
        output.write_json(asdict(figures), json_path)
    return figures


def _play(store: raymem.Store, url: str) -> Figures:
    first, second = store.nodes()[:2]
    with _step(f"Loading {MODEL} and calibrating its states"):
        model = LanguageModel.load(MODEL)
        store.put_calibration(calibrate(model, LAYERS))
    tokens_T = model.encode(_text())[:MAX_TOKENS]
    bank = store.create(BANK, raymem.BankSpec(kind="spalm", fingerprint=fingerprint(model, LAYERS)))
    bank.migrate(first)
    stream_s, shed = _agent_a_reads(bank, url, tokens_T[:READ].tolist())
    rows = bank.info().rows
    with _step("Agent B reads on where A stopped, without and with A's bank"):
        agent = AgentB(model, tokens_T[READ:], LAYERS)
        base, memory = agent.perplexity(None), agent.perplexity(bank)
    with _step(f"Attending to {ROWS} rows of A's bank, then reading {ROWS} tokens of what A read, found by BM25"):
        attended, both = agent.attending(bank)
        text = agent.with_text(tokens_T[:READ])
    with _step(f"Moving the bank from {first} to {second} while it is in use"):
        moved = bank.migrate(second)
        after_migration = agent.perplexity(bank)
    answer = _ask(url)
    size = bank.info().bytes
    with _step("Unplugging the bank, then plugging it in again"):
        bank.detach()
        detached = agent.perplexity(bank)
        bank.attach(first)
        after_reattach = agent.perplexity(bank)
    return Figures(
        base_ppl=base,
        memory_ppl=memory,
        attended_ppl=attended,
        both_ppl=both,
        text_ppl=text,
        after_migration_ppl=after_migration,
        after_reattach_ppl=after_reattach,
        detached_ppl=detached,
        rows_streamed=rows,
        traces_shed=shed,
        bank_bytes=size,
        migration_pause_ms=moved.pause_ms,
        stream_s=stream_s,
        total_s=0.0,
        question=QUESTION,
        answer=answer,
    )


def _agent_a_reads(bank: raymem.Bank, url: str, token_ids: list[int]) -> tuple[float, int]:
    with _step("Starting a vLLM engine that streams into the bank"):
        engine = Engine(model_path(MODEL), url)
    try:
        began = time.monotonic()
        with output.progress("Agent A reads; rows in its bank") as report:
            with watched(lambda: bank.info().rows, report, len(token_ids)):
                engine.read(token_ids, BANK, f"python/{TOPIC}", THINK)
        return time.monotonic() - began, engine.shed()
    finally:
        engine.close()


def _ask(url: str) -> str:
    with _step("Asking the gateway a question in text"):
        asked = httpx.post(f"{url}/v1/banks/{BANK}/recall", json={"text": QUESTION, "k": 8}, timeout=120)
        asked.raise_for_status()
    spans: list[dict[str, Any]] = asked.json()["spans"]
    return str(spans[0]["text"]).strip() if spans else ""


def _text() -> str:
    from pydoc_data.topics import topics

    return str(topics[TOPIC])


@contextlib.contextmanager
def _step(what: str) -> Any:
    began = time.monotonic()
    with output.waiting(f"{what} …"):
        yield
    output.say(f"{what}: {time.monotonic() - began:.1f} s")


def _table(figures: Figures) -> Table:
    table = Table(title="Agent B predicts a text it never saw (perplexity: lower is better)", title_justify="left")
    table.add_column("agent B has")
    table.add_column("perplexity", justify="right")
    table.add_column("against no memory", justify="right")
    for label, value in (
        ("no memory", figures.base_ppl),
        ("the bank that agent A filled, mixed in", figures.memory_ppl),
        (f"{ROWS} tokens of what A read, as text", figures.text_ppl),
        (f"{ROWS} rows of the bank, attended", figures.attended_ppl),
        ("the same rows attended, and the bank mixed in", figures.both_ppl),
        ("the bank mixed in, moved to the other node", figures.after_migration_ppl),
        ("the bank unplugged", figures.detached_ppl),
        ("the bank plugged in again", figures.after_reattach_ppl),
    ):
        table.add_row(label, f"{value:.2f}", f"{value / figures.base_ppl - 1:+.1%}")
    table.caption = (
        f"{figures.rows_streamed:,} hidden states streamed out of vLLM in {figures.stream_s:.1f} s "
        f"({figures.traces_shed} traces shed), {output.size(figures.bank_bytes)} of bank; "
        f"moving it paused writes for {figures.migration_pause_ms:.0f} ms.\n"
        f"Asked: {figures.question}\nRemembered: {figures.answer}"
    )
    table.caption_justify = "left"
    return table
