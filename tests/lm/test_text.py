"""Texts as documents, and what is refused."""

import pytest
import torch

from raymem.errors import InvalidInput, NotFound
from raymem.lm.text import chunks, find_documents, split


def test_files_are_documents_in_name_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.txt", ".hidden"):
        (tmp_path / name).write_text(f"text of {name}")
    found = find_documents([tmp_path], max_docs=2)
    assert [document.name for document in found] == ["a.txt", "b.txt"]
    assert found[0].text == "text of a.txt"


def test_a_file_named_twice_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert len(find_documents([tmp_path, tmp_path / "a.txt"], max_docs=8)) == 1


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"nowhere\.txt"):
        find_documents([tmp_path / "nowhere.txt"], max_docs=8)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="at least one text file"):
        find_documents([tmp_path], max_docs=8)


def test_what_is_not_text_is_named(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"ok\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"picture\.png is not UTF-8 text \(byte 2\)"):
        find_documents([tmp_path], max_docs=8)


def test_three_quarters_are_written_and_the_rest_is_predicted_once():
    parts = split("d", torch.arange(1003), max_tokens=900, window=64)
    assert parts.written == 675
    assert parts.windows[0].start == 675
    assert parts.windows[-1].stop == 900
    assert all(a.stop == b.start for a, b in zip(parts.windows, parts.windows[1:], strict=False))


def test_a_last_window_of_one_token_is_left_out():
    parts = split("d", torch.arange(100), max_tokens=100, window=8)
    assert parts.written == 75
    assert [len(range(*span)) for span in parts.windows] == [8, 8, 8]


def test_a_document_that_is_too_short_is_refused():
    with pytest.raises(InvalidInput, match="'note' has 63 tokens; 64 or more"):
        split("note", torch.arange(63), max_tokens=4096, window=256)


@pytest.mark.parametrize(("written", "expected"), [(300, [(0, 128), (128, 256)]), (128, [(0, 128)]), (50, [(0, 50)])])
def test_chunks_are_whole_unless_there_is_none(written, expected):
    assert [tuple(span) for span in chunks(written, 128)] == expected
