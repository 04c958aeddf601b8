import json

import pytest

REFUSED = [
    (["--kind", "spolm"], "spolm"),
    (["--max-docs", "0"], "max_docs=0"),
    (["--window", "1"], "window=1"),
    (["--model", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(
    ("args", "says"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_can_not_be_measured_is_refused_in_one_line(raymem, tmp_path, args, says):
    (tmp_path / "a.txt").write_text("word " * 200)
    said = raymem("eval", "lm", "--text", tmp_path, *args)
    assert (said.code, said.out) == (1, "")
    assert says in said.err
    assert said.err.startswith("error: ")


def test_texts_must_be_named_and_there(raymem, tmp_path):
    assert raymem("eval", "lm").code == 2
    said = raymem("eval", "lm", "--text", tmp_path / "nowhere")
    assert said.code == 1
    assert "nowhere" in said.err


def test_two_short_documents_are_measured(raymem, tmp_path):
    from pydoc_data.topics import topics

    for name in ("booleans", "lambda"):
        (tmp_path / f"{name}.txt").write_text(topics[name])
    file = tmp_path / "figures" / "out.json"
    said = raymem(
        *("eval", "lm", "--text", tmp_path / "booleans.txt", tmp_path / "lambda.txt", "--kind", "spalm"),
        *("--max-tokens", "100", "--window", "16", "--json", file),
    )
    assert said.code == 0, said.err
    figures = json.loads(file.read_text())
    assert figures["base"]["ppl"] > figures["full_context"]["ppl"] > 1
    assert {"ppl", "gap_closed", "wrong_memory_ratio", "bytes", "write_rows_per_s", "read_us_per_query"} <= figures[
        "kinds"
    ]["spalm"].keys()
    assert "perplexity" in said.out
    assert "spalm" in said.out
