"""Refuse to build a hollow wheel; everything else about the build is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

runpy.run_path(str(Path(__file__).parent / "raymem" / "__init__.py"))
setup()
