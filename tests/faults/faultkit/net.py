"""Machines that are namespaces of this one: each has its own network, processes and Ray, all see the same files.

They hang on a bridge in the network namespace of this process, which is 10.99.0.254 there. It has to be the first
process in namespaces of its own, see `ALONE`, so that nothing of the real machine's network is touched and nothing
stays behind: what runs in such namespaces ends with their first process, and that one with who started it.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

HERE = "10.99.0.254"
# the kernel ends what runs there with the process that started it
ALONE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
# where Ray keeps sessions, and says which cluster runs here
_RAY = Path("/tmp/ray")
_ADDRESS = "10.99.0."


class Machine:
    """One machine, with a network that has nothing but loopback."""

    def __init__(self, folder: Path) -> None:
        script = f'mount --bind "$0" {_RAY} && ip link set dev lo up && echo up && exec sleep infinity'
        self._process = subprocess.Popen([*ALONE, "sh", "-c", script, str(folder)], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"up\n":
            raise OSError("a machine did not start")
        self.pid = psutil.Process(self._process.pid).children()[0].pid

    def command(self, *command: str) -> list[str]:
        """The command that runs another one there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", *command]

    def ip(self, arguments: str) -> None:
        """Change its network."""
        _run(["nsenter", "--target", str(self.pid), "--net", "ip", *arguments.split()])

    def pids(self, named: str) -> list[int]:
        """Processes there with that in their title or program, by their numbers here."""
        mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [process.pid for process in psutil.process_iter() if _is(process.pid, mine, named)]

    def close(self) -> None:
        """End everything that runs there."""
        self._process.kill()
        self._process.wait()


class Net:
    """Machines by name, at `addresses`; see `network`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.machines: dict[str, Machine] = {}
        self.addresses: dict[str, str] = {}
        self._folder = folder
        self._stack = stack
        for arguments in ("set dev lo up", "add dev bridge type bridge", "set dev bridge up"):
            _run(["ip", "link", *arguments.split()])
        _run(["ip", "address", "add", f"{HERE}/24", "dev", "bridge"])

    def add(self, name: str) -> None:
        """A machine, or an empty one in the place of the one of that name."""
        if name in self.machines:
            _run(["ip", "link", "delete", "dev", name])
            self.machines[name].close()
        self.addresses.setdefault(name, f"{_ADDRESS}{len(self.addresses) + 1}")
        made = self.machines[name] = Machine(Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folder)))
        self._stack.callback(made.close)
        _run(["ip", "link", "add", "dev", name, "type", "veth", "peer", "name", "eth0", "netns", str(made.pid)])
        _run(["ip", "link", "set", "dev", name, "master", "bridge"])
        self.heal(name)
        made.ip(f"address add {self.addresses[name]}/24 dev eth0")
        made.ip("link set dev eth0 up")
        # leads nowhere: Ray asks by which address the world would be reached, and sends nothing
        made.ip("route add default dev eth0")

    def cut(self, name: str) -> None:
        """From now on a machine hears nobody else, and nobody hears it; what is sent is not refused but lost."""
        _run(["ip", "link", "set", "dev", name, "down"])

    def heal(self, name: str) -> None:
        """Undo `cut`."""
        _run(["ip", "link", "set", "dev", name, "up"])


@contextmanager
def network(names: Sequence[str]) -> Iterator[Net]:
    """Machines of these names, at 10.99.0.1 and so on; on the way out all that runs on them is ended.

    Raises:
        OSError: this process is in the namespaces of the real machine.
    """
    if os.getpid() != 1:
        raise OSError("run this in namespaces of its own: see ALONE")
    _RAY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="raymem-net-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        net = Net(Path(folder), stack)
        for name in names:
            net.add(name)
        yield net


def why_none() -> str:
    """Why there can be no such machines here; empty if there can."""
    try:
        _run([*ALONE, "ip", "link", "add", "dev", "bridge", "type", "bridge"])
        _run(["nsenter", "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        return f"no machines of namespaces here, which takes root: {said.decode().strip()}"
    return ""


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def _is(pid: int, namespace: str, named: str) -> bool:
    try:
        if os.readlink(f"/proc/{pid}/ns/pid") != namespace:
            return False
        command = psutil.Process(pid).cmdline()
    except (OSError, psutil.Error):
        return False
    return bool(command) and named in command[0]
