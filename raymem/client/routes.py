"""Where each verb of a store lives over HTTP: one table, read by the gateway and by its client."""

from __future__ import annotations

from typing import NamedTuple

API = "/v1"
BANK = f"{API}/banks/{{namespace}}/{{bank}}"

JSON = "application/json"
MSGPACK = "application/msgpack"
ARROW = "application/vnd.apache.arrow.stream"
BYTES = "application/octet-stream"


class Route(NamedTuple):
    """A method and a path; `{namespace}/{bank}` stands for a bank's name."""

    method: str
    path: str

    def url(self, name: str = "") -> str:
        """The path for a bank; the name has been checked, so it needs no quoting."""
        return self.path.replace("{namespace}/{bank}", name)


HEALTH = Route("GET", "/healthz")
READY = Route("GET", "/readyz")
METRICS = Route("GET", "/metrics")

BANKS = Route("GET", f"{API}/banks")
CREATE = Route("POST", f"{API}/banks")
INFO = Route("GET", BANK)
DELETE = Route("DELETE", BANK)
WRITE = Route("POST", f"{BANK}/write")
READ = Route("POST", f"{BANK}/read")
ATTEND = Route("POST", f"{BANK}/attend")
PUT_ROWS = Route("POST", f"{BANK}/rows")
RECALL = Route("POST", f"{BANK}/recall")
TOKENS = Route("GET", f"{BANK}/tokens")
ATTACH = Route("POST", f"{BANK}/attach")
DETACH = Route("POST", f"{BANK}/detach")
MIGRATE = Route("POST", f"{BANK}/migrate")
GROW = Route("POST", f"{BANK}/grow")
REBALANCE = Route("POST", f"{BANK}/rebalance")
PIN = Route("POST", f"{BANK}/pin")
TAG = Route("POST", f"{BANK}/tag")
UNTAG = Route("POST", f"{BANK}/untag")
RESTORE = Route("POST", f"{BANK}/restore")
FORK = Route("POST", f"{BANK}/fork")
MATERIALISE = Route("POST", f"{BANK}/materialise")
DIGEST = Route("GET", f"{BANK}/digest")
EXPORT = Route("GET", f"{BANK}/export")
IMPORT = Route("PUT", f"{BANK}/import")
MERGE = Route("POST", f"{API}/merge")
ERASE = Route("POST", f"{BANK}/erase")
RECEIPTS = Route("GET", f"{BANK}/receipts")
FORGET_NAMES = Route("POST", f"{BANK}/receipts/forget-names")
TTL = Route("PUT", f"{BANK}/ttl")
SWEEP = Route("POST", f"{API}/sweep")
PUT_CALIBRATION = Route("PUT", f"{API}/calibrations")
CALIBRATION = Route("GET", f"{API}/calibrations")
PUT_PARAMS = Route("PUT", f"{API}/params")
PARAMS = Route("GET", f"{API}/params")
NODES = Route("GET", f"{API}/nodes")
SHARDS = Route("GET", f"{API}/shards")
DRAIN = Route("POST", f"{API}/drain")
STATS = Route("GET", f"{API}/stats")
