"""The three rooms are linked, guarded, and importable under one name."""

from pathlib import Path

import pytest

ROOMS = ["actors", "kernels", "serving"]


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_a_relative_link_to_its_folder(root, room):
    link = root / "raymem" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    assert link.resolve() == root / room


def test_kernels_has_no_root_module(root):
    assert not (root / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", ["actors", "serving"])
def test_a_room_refuses_to_be_imported_under_its_top_level_name(root, python, room):
    ran = python("-c", f"import {room}", at=root)
    assert ran.returncode == 1
    assert f"ImportError: imported as '{room}'" in ran.stderr
    assert f"import raymem.{room}" in ran.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_under_raymem(root, python, room):
    ran = python("-c", f"import raymem.{room}", at=root)
    assert ran.returncode == 0, ran.stderr


def test_a_checkout_without_symlinks_says_so_on_import(python, without_links):
    ran = python("-c", "import raymem", at=without_links)
    assert ran.returncode == 1
    assert "ImportError: raymem was checked out without symlinks: actors, kernels, serving" in ran.stderr
    assert "core.symlinks" in ran.stderr


def test_a_checkout_without_symlinks_refuses_to_build(python, without_links, tmp_path):
    wheel = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    ran = python(*wheel, at=without_links)
    assert ran.returncode != 0
    assert "checked out without symlinks" in ran.stdout + ran.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_checkout_without_symlinks_is_not_set_up(python, without_links):
    ran = python("tools/setup.py", at=without_links)
    assert ran.returncode == 1
    assert "setup failed: raymem was checked out without symlinks" in ran.stderr
    assert not (without_links / ".venv").exists()
