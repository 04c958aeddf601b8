"""`raymem eval lm` from end to end, with the real model and the product's own banks."""

import json
import math

import pytest
import torch
from modelzoo import save_tiny
from pydantic import ValidationError
from rich.console import Console

from raymem.errors import InvalidInput, InvalidSpec, ModelNotFound, NotFound
from raymem.lm.evaluate import EvalSettings, evaluate
from raymem.lm.figures import Sums, gap_closed

FIGURES = {
    *("ppl", "gap_closed", "wrong_memory_ratio", "bytes", "budget_bytes", "options"),
    *("write_rows_per_s", "read_us_per_query", "reads"),
}
READ = {
    *("ppl", "gap_closed", "gap_closed_written", "interval", "wrong_memory_ratio", "rows", "bytes"),
    *("over_text", "by_rows", "compaction", "by_compaction"),
}
BASELINES = {"recency", "text_bm25", "text_embedder", "text_oracle"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("texts")
    for name, topic in (("a.txt", "booleans"), ("b.txt", "exceptions")):
        # the end repeats the beginning: whatever remembers must do better there
        text = topics[topic]
        (folder / name).write_text(text + "\n\n" + text[: len(text) // 3])
    calls = []
    settings = EvalSettings(
        texts=(folder,),
        **{"kinds": ("spalm", "titans", "combined"), "budget_mb": 0.15, "max_tokens": 400, "window": 64},
        **{"reads": ("mix", "attend", "both"), "rows": (96,)},
    )
    found = evaluate(settings, lambda done, total: calls.append((done, total)))
    return found, calls


def test_the_json_has_the_promised_fields(report):
    data = json.loads(json.dumps(report[0].json_dict()))
    for name in ("base", "full_context", "text_retrieval_2x128", "text_retrieval_4x128"):
        assert data[name]["ppl"] > 1
    assert set(data["kinds"]) == {"spalm", "titans", "combined"}
    for figures in data["kinds"].values():
        assert set(figures) == FIGURES
        assert all(math.isfinite(value) for name, value in figures.items() if name not in ("options", "reads"))
    # banks that hold no rows, and several behind one gate, are mixed alone
    assert {kind: set(figures["reads"]) for kind, figures in data["kinds"].items()} == {
        "spalm": {"mix", "attend", "both"},
        "titans": {"mix"},
        "combined": {"mix"},
    }
    for way, figures in data["kinds"]["spalm"]["reads"].items():
        assert set(figures) == READ
        assert figures["rows"] == (0 if way == "mix" else 96)
        assert figures["by_rows"] == {}
    assert set(data["baselines"]) == BASELINES
    for name, figures in data["baselines"].items():
        assert figures["ppl"] > 1
        assert figures["flattered"] == (name == "text_oracle")
        assert (figures["mixed"] is not None) == name.startswith(("text_b", "text_e"))


def test_what_is_remembered_helps_and_what_is_not_ones_own_does_not_hurt(report):
    found = report[0]
    assert found.full_context.ppl < found.base.ppl
    for figures in found.kinds.values():
        assert figures.gap_closed > 0.02
        # the promise is 1.01 over whole documents; these are two of 400 tokens
        assert figures.wrong_memory_ratio < 1.05


def test_rows_that_are_attended_help_and_those_of_another_text_do_little_harm(report):
    found = report[0]
    reads = found.kinds["spalm"].reads
    assert found.written.ppl < found.base.ppl
    for way in ("attend", "both"):
        assert reads[way].gap_closed > 0.1
        assert reads[way].wrong_memory_ratio < 1.05
        assert 0 < reads[way].gap_closed_written
        low, high = reads[way].interval
        assert low <= reads[way].gap_closed <= high
    assert reads["both"].gap_closed > reads["mix"].gap_closed
    assert reads["mix"].ppl == pytest.approx(found.kinds["spalm"].ppl, rel=1e-6)
    # keys and values of 300 rows: 30 layers, 3 heads of 64 and a scale
    assert reads["attend"].bytes > 2 * 30 * 300 * 3 * (64 + 4)
    assert reads["both"].bytes == pytest.approx(reads["attend"].bytes + reads["mix"].bytes, abs=2)
    over = reads["both"].over_text
    best = max((found.baselines[name] for name in ("text_bm25", "text_embedder")), key=lambda each: each.gap_closed)
    assert over.gap_closed == pytest.approx(reads["both"].gap_closed - best.gap_closed)


def test_every_bank_is_held_to_the_budget_and_says_what_it_is_made_of(report):
    for name, figures in report[0].kinds.items():
        assert figures.budget_bytes == 150_000 * len(figures.options)
        # documents of 300 rows: those that keep rows hold no more than they were given
        assert 0 < figures.bytes <= figures.budget_bytes
        assert name == "combined" or figures.options.keys() == {name}
    assert report[0].kinds["titans"].bytes > 0.95 * 150_000
    assert len(report[0].kinds["combined"].options) > 1


def test_several_numbers_of_rows_are_told_apart(tmp_path):
    model = save_tiny(tmp_path / "model", max_position_embeddings=512)
    for place in range(2):
        (tmp_path / f"{place}.txt").write_text("A short text that is read byte by byte. " * 8)
    sizes = {"max_tokens": 200, "window": 25, "rows": (8, 40), "refresh": 10, "budget_mb": None}
    texts = (tmp_path / "0.txt", tmp_path / "1.txt")
    found = evaluate(
        EvalSettings(texts=texts, model=str(model), kinds=("spalm", "compressive"), reads=("attend",), **sizes)
    )
    assert set(found.kinds["spalm"].reads) == {"attend"}
    read = found.kinds["spalm"].reads["attend"]
    assert (read.rows, read.by_rows["8"].rows, set(read.by_rows)) == (40, 8, {"8"})
    assert read.wrong_memory_ratio is not None
    assert read.by_rows["8"].wrong_memory_ratio is None
    # rows that were compacted are all that is kept
    compact = found.kinds["compressive"].reads["attend"]
    assert compact.bytes < read.bytes
    assert compact.by_rows["8"].bytes < compact.bytes
    for name in ("recency", "text_bm25", "text_embedder"):
        assert (found.baselines[name].tokens, found.baselines[name].by_rows["8"].tokens) == (40, 8)


def test_kinds_that_compress_make_their_rows_in_every_way_asked_for_and_others_choose(tmp_path):
    model = save_tiny(tmp_path / "model", max_position_embeddings=512)
    for place in range(2):
        (tmp_path / f"{place}.txt").write_text("A short text that is read byte by byte. " * 8)
    kinds = ("compressive", "dnc", "larimar")
    sizes = {"max_tokens": 200, "window": 50, "rows": (16,), "budget_mb": None}
    texts, compact = (tmp_path / "0.txt", tmp_path / "1.txt"), ("match", "subsample", "mean")
    found = evaluate(
        EvalSettings(texts=texts, model=str(model), kinds=kinds, reads=("attend",), compact=compact, **sizes)
    )
    for kind in kinds:
        reads = found.kinds[kind].reads
        assert set(reads) == (set() if kind == "larimar" else {"attend"})
        for read in reads.values():
            assert read.compaction == ("match" if kind == "compressive" else None)
            assert set(read.by_compaction) == ({"subsample", "mean"} if kind == "compressive" else set())
    read = found.kinds["compressive"].reads["attend"]
    ways = [read, *read.by_compaction.values()]
    assert len({way.ppl for way in ways}) == 3
    assert all(way.wrong_memory_ratio is not None for way in ways)
    # what is made is kept: 16 of 150 rows
    assert read.bytes < found.kinds["dnc"].reads["attend"].bytes
    console = Console(width=160, record=True)
    console.print(found.table())
    assert "compressive, attend, 16 rows by subsample" in console.export_text()


def test_progress_ends_where_it_said(report):
    calls = report[1]
    assert calls[0] == (0, 4)
    assert calls[-1] == (4, 4)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_the_table_shows_every_kind_and_baseline(report):
    console = Console(width=160, record=True)
    console.print(report[0].table())
    text = console.export_text()
    words = ("none", "retrieval 2×128", "full context", "spalm", "titans", "perplexity", "spalm, both, 96 rows")
    for word in (*words, "text bm25, 96 tokens", "all that was written, attended"):
        assert word in text


@pytest.mark.parametrize(
    ("base", "found", "full", "share"), [(16, 8, 4, 0.5), (16, 16, 4, 0.0), (16, 32, 4, -0.5), (4, 4, 4, None)]
)
def test_the_gap_is_a_share_in_nats(base, found, full, share):
    assert gap_closed(base, found, full) == (None if share is None else pytest.approx(share))


def test_an_interval_is_over_documents_and_none_of_one():
    sums = Sums(torch.tensor([100.0, 200.0]), torch.tensor([50.0, 150.0]), None, 100)
    assert sums.interval(torch.tensor([25.0, 25.0])) == (0.5, 0.5)
    low, high = sums.interval(torch.tensor([50.0, 0.0]))
    assert (low, high) == (0.0, 1.0)
    assert Sums(*(torch.tensor([9.0]) for _ in range(3)), 5).interval(torch.tensor([1.0])) is None
    # full context that may be no better leaves nothing to be a share of
    assert Sums(torch.tensor([100.0, 90.0]), torch.tensor([90.0, 100.0]), None, 9).interval(torch.ones(2)) is None


@pytest.mark.parametrize(
    ("field", "why"), [({"reads": ("look",)}, "reads"), ({"rows": (0,)}, "rows"), ({"budget_mb": 0}, "0 MB")]
)
def test_odd_ways_and_numbers_are_refused(tmp_path, field, why):
    with pytest.raises(ValidationError, match=why):
        EvalSettings(texts=(tmp_path,), **field)


def test_an_unknown_kind_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(InvalidSpec, match=r"spolm.*spalm"):
        evaluate(EvalSettings(texts=(tmp_path,), kinds=("spolm",)))


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="windows"):
        EvalSettings(texts=(tmp_path,), windows=3)


def test_bad_texts_are_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(NotFound, match="no text at"):
        evaluate(EvalSettings(texts=(tmp_path / "none.txt",), model="no-such-model"))


def test_a_missing_model_and_a_text_that_is_too_short_are_named(tmp_path):
    (tmp_path / "note.txt").write_text("Too short to measure.")
    with pytest.raises(ModelNotFound, match="no-such-model"):
        evaluate(EvalSettings(texts=(tmp_path,), model="no-such-model"))
    with pytest.raises(InvalidInput, match=r"note\.txt"):
        evaluate(EvalSettings(texts=(tmp_path,)))


def test_a_trained_gate_prefers_the_expert_that_is_right_where_it_says_so():
    from raymem.lm.gate import FEATURES
    from raymem.lm.tune import Lesson, fit

    # the first feature says whether the memory is right; the model itself is always unsure
    told = (torch.arange(400) % 2).float()
    features = torch.randn(400, FEATURES)
    features[:, 0] = told
    right = torch.where(told > 0, 0.9, 0.001)[:, None]
    gate = fit([Lesson(features, right.expand(-1, 4), torch.full((400,), math.log(0.1)), 1.0)], ("spalm",))
    believed = gate.log_weights(features)[:, 1:].exp().sum(1)
    assert float(believed[told > 0].mean()) > 0.9
    assert float(believed[told == 0].mean()) < 0.1
