"""Tables of LanceDB, and what makes a commit to them durable and exclusive."""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any


def _import_when_used(name: str) -> None:
    """Have the code of a package run once one of its names is asked for; its submodules can be imported before."""
    spec = find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    package, loader = module_from_spec(spec), spec.loader

    def load(wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        if find_spec(f"{name}.{wanted}"):
            return import_module(f"{name}.{wanted}")
        del package.__dict__["__getattr__"]
        loader.exec_module(package)
        return getattr(package, wanted)

    package.__dict__["__getattr__"] = load
    sys.modules[name] = package


# LanceDB imports this generated client of a REST service for its data types. what calls the service is half of
# LanceDB's import, which every command, worker and shard waits for, and nothing here calls it
_import_when_used("lance_namespace_urllib3_client")
