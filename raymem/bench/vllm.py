"""What memory costs a vLLM engine: tokens a second and time to first token, with and without it, in turn in one run.

Three engines of the same model are up at once, of which one works at a time: one without raymem, one that streams and
mixes, one that attends. Every round takes all modes, so that all see the same load of the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import raymem
from raymem.encode.fit import calibrate
from raymem.errors import StorageError
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel, model_path
from raymem.serving.vllm import attach_rows, engine_args, raymem_params
from raymem.types import BankSpec, KeySpec

BANK, WRITTEN = "bench/read", "bench/written"
# what is prefilled at once when the bank is filled
_PIECE_TOKENS = 500
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ServingSizes:
    """How much is served: `requests` at once of `prompt` tokens that get `answer` tokens, from a bank of `bank_rows`.

    One request of `question` tokens at a time, behind `attended` rows or as many tokens of text, is timed to its first
    token; `attending` of them at once are timed while they decode.
    """

    requests: int = 16
    prompt: int = 100
    answer: int = 64
    bank_rows: int = 10_000
    question: int = 64
    attended: int = 512
    attending: int = 4
    rounds: int = 7


SMALL = ServingSizes(requests=2, prompt=20, answer=4, bank_rows=300, attended=128, attending=2, rounds=2)


@dataclass(frozen=True)
class ServingFigures:
    """Ratios, each the median over rounds of two modes of the same round, and every mode's own figures.

    `tokens_mix_over_plain` is mixing over the same engine while nothing is mixed, extraction included. Attending is
    over the same engine with as many tokens of text before the question, prefilled: seconds to the first token, and
    tokens a second after it. `attach_s` is how long the bank's rows took to be computed.
    """

    tokens_extract_over_plain: float
    tokens_stream_over_extract: float
    tokens_mix_over_plain: float
    ttft_attend_over_text: float
    tokens_attend_over_text: float
    attach_s: float
    modes: dict[str, dict[str, float]] = field(default_factory=dict)


def run(model: str, layers: tuple[int, ...], folder: Path, sizes: ServingSizes, report: Report) -> ServingFigures:
    """Start the engines, fill the bank, and time the modes.

    Args:
        model: as `LanguageModel.load` takes it.
        layers: that are streamed; the last one is the bank's key.
        folder: an empty one.
        sizes: how much is served.
        report: called with rounds done and their number.

    Raises:
        MissingExtra, ModelNotFound: vLLM or the model isn't here.
    """
    text = _Text(LanguageModel.load(model))
    _make_banks(str(folder), text.model, layers)
    with ExitStack() as stack:
        plain = stack.enter_context(_engine(model, {"enforce_eager": True}))
        streaming = stack.enter_context(_engine(model, engine_args(str(folder), layers)))
        _fill(streaming, text, sizes.bank_rows)
        # every bank is to do with every question here
        attending = stack.enter_context(_engine(model, engine_args(str(folder), stream=False, attend_floor=0.0)))
        attach_s = _attach(attending)
        modes = _modes(plain, streaming, text, sizes) | _attending_modes(attending, text, sizes)
        for work in modes.values():
            # what is compiled or allocated once
            work()
        taken: dict[str, list[float]] = {name: [] for name in modes}
        for done in range(sizes.rounds):
            report(done, sizes.rounds)
            for name, work in modes.items():
                taken[name].append(work())
        report(sizes.rounds, sizes.rounds)
    return _figures(taken, attach_s)


def _modes(plain: Any, streaming: Any, text: _Text, sizes: ServingSizes) -> dict[str, Callable[[], float]]:
    """Each mode's tokens a second, all requests at once."""

    def rate(engine: Any, **asked: Any) -> Callable[[], float]:
        def work() -> float:
            prompts = text.prompts(sizes.requests, sizes.prompt)
            return sizes.requests * sizes.answer / _generate(engine, prompts, sizes.answer, **asked)

        return work

    return {
        "plain": rate(plain),
        "extract": rate(streaming),
        "stream": rate(streaming, bank=WRITTEN),
        "mix": rate(streaming, read=[BANK]),
    }


def _attending_modes(engine: Any, text: _Text, sizes: ServingSizes) -> dict[str, Callable[[], float]]:
    """Seconds to the first token of one request, and tokens a second of some after it."""
    asked = {"attend": [BANK], "rows": sizes.attended}

    def first(before: int, **asked: Any) -> float:
        return _generate(engine, text.prompts(1, before + sizes.question), 1, **asked)

    def rate(before: int, **asked: Any) -> float:
        prompts = text.prompts(sizes.attending, before + sizes.question)
        return sum(map(_decode_rate, _answers(engine, prompts, sizes.answer, **asked)))

    return {
        "first_attend": lambda: first(0, **asked),
        "first_text": lambda: first(sizes.attended),
        "decode_attend": lambda: rate(0, **asked),
        "decode_text": lambda: rate(sizes.attended),
    }


def _decode_rate(answer: Any) -> float:
    stats = answer.metrics
    return float((stats.num_generation_tokens - 1) / (stats.last_token_ts - stats.first_token_ts))


def _figures(taken: dict[str, list[float]], attach_s: float) -> ServingFigures:
    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[above], taken[below], strict=True))

    modes = {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in taken.items()
    }
    return ServingFigures(
        tokens_extract_over_plain=ratio("extract", "plain"),
        tokens_stream_over_extract=ratio("stream", "extract"),
        tokens_mix_over_plain=ratio("mix", "extract"),
        ttft_attend_over_text=ratio("first_attend", "first_text"),
        tokens_attend_over_text=ratio("decode_attend", "decode_text"),
        attach_s=attach_s,
        modes=modes,
    )


class _Text:
    """Prompts of real prose, another one each time: nothing comes from a prefix cache."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._tokens_T = model.encode("\n\n".join(topics[name] for name in sorted(topics)))
        self._at = 0

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """The next prompts, `count` of so many tokens."""
        return [self._next(length) for _ in range(count)]

    def _next(self, length: int) -> list[int]:
        if self._at + length > len(self._tokens_T):
            self._at = 0
        self._at += length
        tokens: list[int] = self._tokens_T[self._at - length : self._at].tolist()
        return tokens


@contextmanager
def _engine(model: str, args: dict[str, Any]) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(
        model=str(model_path(model)),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=32,
        kv_cache_memory_bytes=2**30,
        disable_log_stats=False,
        **args,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _make_banks(uri: str, model: LanguageModel, layers: tuple[int, ...]) -> None:
    calibration = calibrate(model, layers)
    spec = BankSpec(
        kind="spalm", fingerprint=fingerprint(model, layers, calibration.hash), key=KeySpec(layers=layers[-1:])
    )
    with raymem.connect(uri) as store:
        store.put_calibration(calibration)
        for name in (BANK, WRITTEN):
            store.create(name, spec)


def _fill(engine: Any, text: _Text, rows: int) -> None:
    pieces = -(-rows // _PIECE_TOKENS)
    _generate(engine, text.prompts(pieces, rows // pieces), 1, bank=BANK)
    engine.collective_rpc("flush_memory")
    (found,) = engine.collective_rpc("attach_bank", args=(BANK,))
    if found["rows"] < rows // pieces * pieces:
        raise StorageError(f"{BANK} has {found['rows']} rows and {rows} were streamed: look at the engine's log")


def _attach(engine: Any) -> float:
    """Seconds until all rows are there, computed from the journal's tokens."""
    found = attach_rows(engine, BANK)
    if found.rebuilt != found.rows:
        raise StorageError(f"of {found.rows} rows of {BANK} the engine computed {found.rebuilt}")
    return found.seconds


def _generate(engine: Any, prompts: list[list[int]], tokens: int, **asked: Any) -> float:
    """Seconds that answers of so many tokens take."""
    began = time.perf_counter()
    _answers(engine, prompts, tokens, **asked)
    return time.perf_counter() - began


def _answers(engine: Any, prompts: list[list[int]], tokens: int, **asked: Any) -> list[Any]:
    """Answers of so many tokens, at temperature 1.

    Raises:
        StorageError: a request attended to other rows than it asked for.
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=raymem_params(**asked))
    answers: list[Any] = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    for answer in answers if "attend" in asked else ():
        told = (answer.kv_transfer_params or {}).get("raymem", {})
        if told.get("attended", {}).get("rows") != asked["rows"]:
            raise StorageError(f"a request was to attend to {asked['rows']} rows of {BANK}, and the engine says {told}")
    return answers
