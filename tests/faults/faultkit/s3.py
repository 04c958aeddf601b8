"""A local S3 server in a process of its own, and the variables with which LanceDB finds it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BUCKET = "bucket"


@contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[str]:
    """Serve an empty bucket; inside, s3:// means this server, here and in processes started from here.

    Yields:
        The bucket's address.
    """
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    address = f"http://{host}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": address,
        "AWS_ALLOW_HTTP": "true",
    }
    saved = {name: os.environ.get(name) for name in variables}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(f"{address}/moto-api/")
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
        os.environ.update(variables)
        yield f"s3://{BUCKET}"
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        server.kill()
        server.wait()


def _wait(address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(address).close()
            return
        time.sleep(0.1)
    raise TimeoutError(f"no S3 server at {address}")
