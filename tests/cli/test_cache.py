"""What this machine keeps beside the stores is shown, private, and goes when it is told to."""

import os
import stat
from pathlib import Path

import pytest
import torch

PARTS = ["passes", "digests", "models", "train"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a file of three bytes in each part, and some that raymem didn't make."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYMEM_CACHE", str(folder))
    files = ("passes/aa.safetensors", "digests/ab12", "models/smollm2-135m/config.json", "train/abc/state")
    for name in (*files, "passes/notes.txt", "other/mine.txt", "mine.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"abc")
    (folder / "models/.smollm2-135m.lock").write_bytes(b"")
    return folder


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_each_part_is_shown_with_its_size(raymem, cache):
    shown = raymem("cache", "show", "--json").json

    assert (shown["folder"], shown["bytes"]) == (str(cache), 12)
    assert [(part["name"], part["files"], part["bytes"]) for part in shown["parts"]] == [(name, 1, 3) for name in PARTS]
    assert "hidden states of texts" in " ".join(raymem("cache", "show").out.split())


@pytest.mark.parametrize("part", ["passes", "digests", "models"])
def test_only_what_is_named_goes(raymem, cache, part):
    before = left(cache)

    made = raymem("cache", "clear", f"--{part}", "--json").json

    assert (made["bytes"], [each["name"] for each in made["parts"]]) == (3, [part])
    gone = before - left(cache)
    assert len(gone) == 1
    assert gone.pop().startswith(f"{part}/")
    assert raymem("cache", "clear", f"--{part}", "--json").json["bytes"] == 0


def test_without_a_name_all_goes_that_can_be_made_again(raymem, cache):
    assert "passes, digests, models" in raymem("cache", "clear").out

    kept = {"passes/notes.txt", "other/mine.txt", "mine.txt", "models/.smollm2-135m.lock", "train/abc/state"}
    assert left(cache) == kept
    assert raymem("cache", "clear", "--train", "--yes").code == 0
    assert left(cache) == kept - {"train/abc/state"}


def test_a_link_goes_and_what_it_leads_to_stays(raymem, cache, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"abc")
    (cache / "models/linked").symlink_to(outside)
    (cache / "passes/linked.safetensors").symlink_to(outside / "file")

    assert raymem("cache", "clear").code == 0

    assert (outside / "file").exists()
    assert not any(path.is_symlink() for path in cache.rglob("*"))


def test_a_cache_that_is_not_there_is_empty(raymem, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "none"))

    assert raymem("cache", "show", "--json").json["bytes"] == 0
    assert raymem("cache", "clear", "--json").json["bytes"] == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may delete anything")
def test_what_can_not_be_deleted_is_one_red_line(raymem, cache):
    (cache / "passes").chmod(0o500)
    said = raymem("cache", "clear", "--passes")
    (cache / "passes").chmod(0o700)

    assert (said.code, "can't delete" in said.err) == (1, True)


def test_passes_are_for_their_owner_alone_and_go(raymem, tmp_path, monkeypatch):
    from raymem.lm.models import BUNDLED_MODEL, LanguageModel

    model = LanguageModel.load(BUNDLED_MODEL)
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))
    # made by an earlier release, open to all
    (tmp_path / "cache" / "passes").mkdir(parents=True)
    tokens = model.encode("The access code is 4711.")
    kept = model.run_cached(tokens, (3,))

    files = list((tmp_path / "cache").rglob("*.safetensors"))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (*files, files[0].parent)]
    assert modes == [0o600, 0o700]
    assert raymem("cache", "clear", "--passes", "--json").json["parts"][0]["files"] == 1
    assert list((tmp_path / "cache" / "passes").iterdir()) == []
    assert torch.equal(model.run_cached(tokens, (3,)).hidden_TLd, kept.hidden_TLd)
