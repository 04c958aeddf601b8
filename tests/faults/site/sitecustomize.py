"""Found by every Python that Ray starts under a test of faults: changes modules of raymem as they are loaded."""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path


def break_storage(tables):
    """Wrap the tables, as the plans say."""
    from faultkit import sabotage

    plans = sabotage.Plans(Path(os.environ["FAULTS_PLANS"]))
    sabotage.install(lambda tables: plans, tables.Tables)


def changes():
    """What to do to which module of raymem."""
    from faultkit import mutations

    found = dict(mutations.MUTATIONS[os.environ.get("FAULTS_MUTATION", "")])
    return found | {"raymem.storage.tables.tables": break_storage} if "FAULTS_PLANS" in os.environ else found


class Change(MetaPathFinder):
    """Finds raymem's modules, and adds to what some do when they are loaded."""

    def __init__(self, changes):
        self._changes = changes

    def find_spec(self, name, path, target=None):
        change = self._changes.get(name)
        if change is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


if "FAULTS_PLANS" in os.environ or os.environ.get("FAULTS_MUTATION"):
    sys.meta_path.insert(0, Change(changes()))
