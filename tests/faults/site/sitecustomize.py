"""Found by every Python that Ray starts under a test of faults: wraps raymem's tables once they are imported."""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

TARGET = "raymem.cold.tables"


class Sabotage(MetaPathFinder):
    """Finds one module, and adds to what it does when it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            from faultkit import mutations, sabotage

            if "FAULTS_PLANS" in os.environ:
                plans = sabotage.Plans(Path(os.environ["FAULTS_PLANS"]))
                sabotage.install(lambda tables: plans, module.Tables)
            mutations.MUTATIONS[os.environ.get("FAULTS_MUTATION", "")]()

        spec.loader.exec_module = exec_module
        return spec


if "FAULTS_PLANS" in os.environ or os.environ.get("FAULTS_MUTATION"):
    sys.meta_path.insert(0, Sabotage())
