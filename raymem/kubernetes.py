"""Variables that Kubernetes puts into every container for each Service, and that look like settings of ours.

A Service named raymem, or raymem-gateway, gives `RAYMEM_PORT=tcp://10.0.0.1:8765`, `RAYMEM_SERVICE_HOST` and more. They
are known by name and value together, so that a setting that was misspelt is still an error.
"""

from __future__ import annotations

import re
from ipaddress import ip_address

# no Service's name ends with a hyphen, so RAYMEM_GATEWAY__PORT is never one of these
_SERVICE = r"RAYMEM(_+[A-Z0-9]+)*"
_PROTOCOL = r"(TCP|UDP|SCTP)"
_LINK = re.compile(rf"{_SERVICE}_PORT(_\d+_{_PROTOCOL})?")
_ADDRESS = re.compile(rf"{_SERVICE}_(SERVICE_HOST|PORT_\d+_{_PROTOCOL}_ADDR)")
_NUMBER = re.compile(rf"{_SERVICE}_(SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_{_PROTOCOL}_PORT)")
_NAME = re.compile(rf"{_SERVICE}_PORT_\d+_{_PROTOCOL}_PROTO")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_URL = re.compile(r"(tcp|udp|sctp)://(\[[0-9a-fA-F:.]+\]|[0-9.]+):\d{1,5}")


def is_service(name: str, value: str) -> bool:
    """Whether a variable is one that Kubernetes made from a Service."""
    # a Service may be called raymem-port-80-tcp: a name can be of two kinds, a value of one
    return bool(
        (_LINK.fullmatch(name) and _URL.fullmatch(value))
        or (_ADDRESS.fullmatch(name) and _is_address(value))
        or (_NUMBER.fullmatch(name) and _PORT.fullmatch(value))
        or (_NAME.fullmatch(name) and value in ("tcp", "udp", "sctp"))
    )


def _is_address(value: str) -> bool:
    try:
        ip_address(value)
    except ValueError:
        return False
    return True
