"""The store around the banks: calibrations, nodes, counters; and the gateway's own health."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

import raymem
from raymem.client import routes
from raymem.encode.calibration import Calibration
from raymem.errors import CalibrationNotFound, Conflict, Corrupt, InvalidInput, NotFound, StorageError
from raymem.memory.learned import Learned, name_of
from raymem.serving.intake import Intake
from raymem.serving.metrics import CONTENT_TYPE, Metrics
from raymem.serving.routes.common import BYTES_BODY, StoreDep, serve
from raymem.serving.schemas import CalibrationHash, Drain, Health, Nodes, ParamsName
from raymem.types import DrainReport, ShardInfo, SweepReport

router = APIRouter(tags=["store"], route_class=Intake)
probes = APIRouter(tags=["probes"], route_class=Intake)
# as many as a model has, and more
Layers = Annotated[list[Annotated[int, Field(ge=0, lt=2**16)]], Query(min_length=1, max_length=256)]


@serve(
    router,
    routes.PUT_CALIBRATION,
    *(Corrupt, StorageError),
    openapi_extra=BYTES_BODY,
)
async def put_calibration(store: StoreDep, request: Request) -> CalibrationHash:
    """Keep a calibration, a safetensors file as `raymem calibrate` makes it."""
    calibration = Calibration.from_bytes(await request.body())
    return CalibrationHash(hash=await store.put_calibration(calibration))


@serve(router, routes.CALIBRATION, CalibrationNotFound, response_class=Response)
async def calibration(store: StoreDep, content: str, layers: Layers) -> Response:
    """Get the calibration of a model's content hash and layers, a safetensors file."""
    found = await store.calibration(content, tuple(layers))
    return Response(found.to_bytes(), media_type=routes.BYTES)


@serve(router, routes.PUT_PARAMS, *(Corrupt, StorageError), openapi_extra=BYTES_BODY)
async def put_params(store: StoreDep, request: Request) -> ParamsName:
    """Keep weights, a safetensors file as `raymem train` makes it."""
    data = await request.body()
    return ParamsName(params=await store.put_params(Learned.from_bytes(data, name_of(data))))


@serve(router, routes.PARAMS, NotFound, Corrupt, response_class=Response)
async def params(store: StoreDep, params: str) -> Response:
    """Get the weights of that name, a safetensors file."""
    found = await store.params(params)
    return Response(found.to_bytes(), media_type=routes.BYTES)


@serve(router, routes.NODES)
async def nodes(store: StoreDep) -> Nodes:
    """List where banks can live."""
    return Nodes(nodes=await store.nodes())


@serve(router, routes.SHARDS)
async def shards(store: StoreDep) -> list[ShardInfo]:
    """List the processes that banks are hot in, and the room each has."""
    return await store.shards()


@serve(router, routes.DRAIN, InvalidInput, Conflict, StorageError)
async def drain(store: StoreDep, body: Drain) -> DrainReport:
    """Move every bank away from a node; it takes no new ones until `undo`."""
    return await store.drain(body.node, undo=body.undo)


@serve(router, routes.STATS)
async def stats(store: StoreDep) -> dict[str, object]:
    """Show the counters of the backend, its shards and their banks."""
    return await store.stats()


@serve(router, routes.SWEEP, StorageError)
async def sweep(store: StoreDep, dry_run: bool = False) -> SweepReport:
    """Delete tables that no bank names any more, and finish erasures that were cut short."""
    return await store.sweep(dry_run=dry_run)


@serve(probes, routes.HEALTH)
async def healthz() -> Health:
    """Tell that the gateway lives; needs no key."""
    return Health(status="ok", version=raymem.__version__)


@serve(probes, routes.READY)
async def readyz(store: StoreDep) -> Health:
    """Tell that the store behind the gateway answers; needs no key."""
    await store.nodes()
    return Health(status="ready", version=raymem.__version__)


@serve(probes, routes.METRICS, response_class=Response)
async def metrics(store: StoreDep, request: Request) -> Response:
    """Show the gateway's and the store's counters in Prometheus' text format."""
    kept: Metrics = request.app.state.metrics
    return Response(kept.render(await store.stats()), media_type=CONTENT_TYPE)
