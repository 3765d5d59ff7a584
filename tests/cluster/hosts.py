"""Run several hosts on one machine: Linux namespaces that are connected by a bridge and isolated from other networks.

Each host has its own network, processes, sshd, ``/tmp/ray``, ``/dev/shm``, ``/run`` and home folder; the rest of the
disk is shared. The process that creates them joins the bridge's network too and serves as the machine on which people
run ``ray up``; so do the processes that it starts. All hosts end with that process, even if it is killed.
"""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.faults.object_store import LIBC, prepare_child
from tests.processes import find_workers

OWN_ADDRESS = "10.77.0.254"
CLOUD = f"http://{OWN_ADDRESS}:5000"  # Endpoint of EC2 in the tests that need one.
_BRIDGE = "segray0"
_CLONE_NEWNET = 0x40000000
_START_TIMEOUT_S = 20
_SPACES = ["--net", "--pid", "--mount", "--uts", "--ipc", "--mount-proc", "--fork", "--kill-child"]
# The first process of a host reaps zombies; otherwise `ray stop` would wait 16 s for them.
_HOST_SCRIPT = """
mount --make-rprivate /
hostname {name}
ip link set lo up
mkdir -p /tmp/ray
mount -t tmpfs -o size=4g tmpfs /tmp/ray
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount -t overlay overlay -o lowerdir={home},upperdir={folder}/upper,workdir={folder}/work {home}
rm -rf {home}/.ray {home}/.ssh {home}/.aws {home}/.bashrc {home}/.profile {home}/.bash_profile
cp -r {home_files}/. {home}/
mount --bind {hosts_file} /etc/hosts
while :; do sleep 3600 & wait; done
"""
_SSHD_SETTINGS = """\
HostKey {root}/host_key
AuthorizedKeysFile {root}/client_key.pub
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""


def find_missing_programs() -> str:
    """Return a message that names the programs that hosts need but are not installed, or an empty string."""
    wanted = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")
    missing = [name for name in wanted if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    return f"{', '.join(missing)} not found; run make test-cluster to install them" if missing else ""


def find_skip_reason() -> str:
    """Return why this user is not allowed to create hosts, or an empty string."""
    if os.getuid() != 0:
        return "hosts are network namespaces, which only root can create"
    attempt = "ip link add b0 type bridge && ip link add v0 type veth peer name v1"
    with suppress(FileNotFoundError):  # A missing program is not a reason to skip; see `find_missing_programs`.
        tried = subprocess.run(["unshare", *_SPACES, "sh", "-c", attempt], capture_output=True, text=True)
        if tried.returncode:
            return f"hosts are network namespaces, which root cannot create on this machine: {tried.stderr.strip()}"
    return ""


class Hosts:
    """Hosts ``n1`` to ``nN`` with addresses from 10.77.0.1, which run from ``__enter__`` to ``__exit__``.

    Args:
        root: An empty folder for their files.
        count: Number of hosts.
        home_files: Files of every host's home folder, by path within it.
    """

    def __init__(self, root: Path, count: int, home_files: dict[str, str]) -> None:
        self.root = root
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self._home_files = home_files
        self._first: dict[str, psutil.Process] = {}  # The first process of each host.
        self._unshares: list[subprocess.Popen[bytes]] = []

    @property
    def client_key(self) -> Path:
        """The private key with which root can log in to every host."""
        return self.root / "client_key"

    def get_address(self, name: str) -> str:
        """Return the address of a host."""
        return f"10.77.0.{name.removeprefix('n')}"

    def __enter__(self) -> Self:
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, name: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and wait for its end."""
        return subprocess.run(self._enter(name, command), capture_output=True, text=True, check=check)

    def find_processes(self, name: str, title: str) -> list[psutil.Process]:
        """Return a host's processes whose command line contains a text."""
        return find_workers(title, self._first[name].pid)

    def find_open_ports(self, name: str) -> dict[int, str]:
        """Return the TCP ports of a host that others can reach, except sshd's, with the processes that listen."""
        lines = self.run(name, "ss", "--no-header", "-tlnp").stdout.splitlines()
        found = {}
        for line in lines:
            _, _, _, local, _, *users = line.split()
            address, _, port = local.rpartition(":")
            if "127.0.0.1" not in address and port != "22":
                found[int(port)] = " ".join(users)
        return found

    def kill_raylet(self, name: str) -> None:
        """Kill the raylet of a host; its workers end with it."""
        (raylet,) = self.find_processes(name, "raylet/raylet")
        raylet.kill()

    def disconnect(self, name: str) -> None:
        """Disconnect a host from the network; its processes keep running and are not notified."""
        self.run(name, "ip", "link", "set", "eth0", "down")

    def reconnect(self, name: str) -> None:
        """Connect a host to the network again."""
        self.run(name, "ip", "link", "set", "eth0", "up")

    def end_processes(self, name: str) -> None:
        """Kill all processes of a host except its first process and its sshd."""
        kept = {self._first[name].pid, *(process.pid for process in self.find_processes(name, "sshd"))}
        for process in self._first[name].children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.pid not in kept and process.name() != "sleep":
                    process.kill()

    def _enter(self, name: str, command: Sequence[str]) -> list[str]:
        pid = str(self._first[name].pid)
        clean = ["env", "-i", f"HOME={Path.home()}", "TERM=xterm", "LANG=C.UTF-8", f"PATH={os.environ['PATH']}"]
        return ["nsenter", "-t", pid, "-n", "-p", "-m", "-u", "-i", *clean, *command]

    def _start(self) -> None:
        _require_zero(LIBC.unshare(_CLONE_NEWNET))
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{OWN_ADDRESS}/24", "dev", _BRIDGE)
        for device in ("lo", _BRIDGE):
            _ip("link", "set", device, "up")
        lines = ["127.0.0.1 localhost", *(f"{self.get_address(name)} {name}" for name in self.names)]
        (self.root / "hosts").write_text("\n".join(lines) + "\n")  # gloo looks up its own host name.
        for key in ("host_key", "client_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / key], check=True)
        (self.root / "sshd_config").write_text(_SSHD_SETTINGS.format(root=self.root))
        for path, content in self._home_files.items():
            target = self.root / "home" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)
        for name in self.names:
            self._start_host(name)

    def _start_host(self, name: str) -> None:
        folder = self.root / name
        for part in ("upper", "work"):
            (folder / part).mkdir(parents=True)
        values = {"name": name, "folder": folder, "home": Path.home(), "home_files": self.root / "home"}
        script = "set -e" + _HOST_SCRIPT.format(hosts_file=self.root / "hosts", **values)
        with (folder / "log").open("wb") as log:
            unshare = subprocess.Popen(
                ["unshare", *_SPACES, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare_child,
            )
        self._unshares.append(unshare)
        # The host is ready when its first process has started its loop, in which it has a child named sleep.
        self._first[name] = _wait_for_first(unshare, folder / "log")
        inside = str(self._first[name].pid)
        _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", inside)
        _ip("link", "set", f"v{name}", "master", _BRIDGE, "up")
        self.run(name, "ip", "addr", "add", f"{self.get_address(name)}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")
        sshd = shutil.which("sshd", path="/usr/sbin")
        self.run(name, str(sshd), "-f", str(self.root / "sshd_config"), "-E", str(folder / "sshd.log"))

    def _stop(self) -> None:
        for unshare in self._unshares:
            unshare.kill()  # The kernel then ends all processes in its namespaces.
            unshare.wait()
        for first in self._first.values():
            if first.is_running():
                first.wait(10)
        _require_zero(LIBC.setns(self._outside, _CLONE_NEWNET))
        os.close(self._outside)


def _wait_for_first(unshare: subprocess.Popen[bytes], log: Path) -> psutil.Process:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while unshare.poll() is None and time.monotonic() < deadline_s:
        for first in psutil.Process(unshare.pid).children():
            with suppress(psutil.NoSuchProcess):  # A child may end between the two calls.
                if any(child.name() == "sleep" for child in first.children()):
                    return first
        time.sleep(0.02)
    raise RuntimeError(f"a host did not start: {log.read_text()}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _require_zero(status: int) -> None:
    if status:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
