"""The gateway as a Ray Serve deployment: `serve run raymem.serving.deploy:app cold=s3://bucket/memory`.

The one file of this room that imports Ray.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from raymem.client.store import AsyncStore
from raymem.config import Settings
from raymem.errors import ConfigError
from raymem.serving.app import create_app

_ARGUMENTS = {"cold", "replicas"}


def deployment(settings: Settings, cold: str | None = None, replicas: int = 1) -> Application:
    """The gateway over the running cluster's shards, to hand to `serve.run`.

    Args:
        settings: as for `raymem serve`; keys are needed as soon as Serve's proxy listens to other machines, whose
            callers are otherwise turned away. Serve decides where to listen: `gateway.host` and `port` are not used.
        cold: the cold store that all nodes share; see `raymem.connect`.
        replicas: gateways to run; each holds its own model once recall in text has been asked for.
    """

    # called in each replica, because an open store can't be pickled
    def build() -> FastAPI:
        async def opener() -> AsyncStore:
            return await AsyncStore.connect("ray", cold=cold, settings=settings)

        return create_app(opener, settings)

    gateway = serve.ingress(build)()
    options: dict[str, Any] = {"name": "raymem", "num_replicas": replicas, "max_ongoing_requests": 256}
    # a gateway mostly waits for shards, so it reserves little of a core
    options["ray_actor_options"] = {"num_cpus": 0.1}
    made: Application = serve.deployment(**options)(gateway).bind()
    return made


def app(args: dict[str, str]) -> Application:
    """What `serve run` calls, with settings from file and environment.

    Args:
        args: `cold=…`, `replicas=…` as given on its command line.

    Raises:
        ConfigError: another argument, or a number that is none.
    """
    unknown = sorted(set(args) - _ARGUMENTS)
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; there is {', '.join(sorted(_ARGUMENTS))}")
    replicas = str(args.get("replicas", 1))
    if not replicas.isdigit() or int(replicas) < 1:
        raise ConfigError(f"replicas={replicas!r} is not a number of 1 or more")
    return deployment(Settings.load(), args.get("cold"), int(replicas))
