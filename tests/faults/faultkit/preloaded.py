"""Processes that begin with their imports behind them: forked from one that has imported raymem and done nothing else.

Each is a process like any other, to be killed, stopped and waited for, and ends as the interpreter ends.
"""

import asyncio
import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Any

KIT = Path(__file__).parents[1]
_MOST_BYTES = 2**17


class Forked:
    """As `asyncio.subprocess.Process`, as far as that is used here."""

    def __init__(self, pid: int, stdin: asyncio.WriteTransport, stdout: asyncio.StreamReader, end: int) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(end, self._end, end)

    @classmethod
    async def start(cls, code: str, arguments: list[str], stderr: IO[Any]) -> "Forked":
        """One that runs this code."""
        loop = asyncio.get_running_loop()
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        pid, end = await asyncio.to_thread(_fork, code, arguments, [theirs_in, theirs_out, stderr.fileno()])
        for theirs in (theirs_in, theirs_out):
            os.close(theirs)
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_out, "rb"))
        stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours_in, "wb"))
        return cls(pid, stdin, reader, end)

    def send_signal(self, what: signal.Signals) -> None:
        """Raises ProcessLookupError if it has ended."""
        os.kill(self.pid, what)

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def _end(self, end: int) -> None:
        asyncio.get_running_loop().remove_reader(end)
        self.returncode = _code(end)
        self.stdin.close()
        self._ended.set()


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as `subprocess.run` does with `python -c`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        _, end = _fork(code, list(arguments), [each.fileno() for each in (nothing, out, err)])
        returncode = _code(end)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(list(arguments), returncode, *said)


@cache
def _server() -> socket.socket:
    """Where the one process listens that the others are forked from; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join([str(KIT), str(KIT.parent), str(KIT.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "faultkit.preloaded", str(theirs.fileno())]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(_end, ours, server)
    return ours


def _end(listened: socket.socket, server: subprocess.Popen[bytes]) -> None:
    listened.close()
    server.wait()


def _fork(code: str, arguments: list[str], files: list[int]) -> tuple[int, int]:
    """A new process; its id, and a pipe in which its exit code will be."""
    end, says = os.pipe()
    asked = {"code": code, "arguments": arguments, "folder": os.getcwd(), "variables": dict(os.environ)}
    socket.send_fds(_server(), [json.dumps(asked).encode()], [*files, says])
    os.close(says)
    # lines of one length, so that none is read with the next
    return int(os.read(end, 12)), end


def _code(end: int) -> int:
    with os.fdopen(end) as said:
        return int(said.read())


def _serve(listening: socket.socket) -> str:
    """Fork at each request; returns in a process that was forked, with the code that it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(listening, _MOST_BYTES, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    listening.close()
    # this one waits, the next one is the process
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    says = files.pop()
    if pid := os.fork():
        for file in files:
            os.close(file)
        os.write(says, f"{pid:>12}".encode())
        os.write(says, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        os._exit(0)
    os.close(says)
    asked: dict[str, Any] = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["variables"])
    sys.argv[1:] = asked["arguments"]
    # what answers commands takes it away as it is imported
    sys.stdout = sys.__stdout__
    code: str = asked["code"]
    return code


if __name__ == "__main__":
    import conftest  # noqa: F401 - its imports, and those of an owner, are all that this is for
    import faultkit.owner  # noqa: F401

    gc.freeze()
    exec(_serve(socket.socket(fileno=int(sys.argv[1]))), globals())
