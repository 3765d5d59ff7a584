"""Run a real S3-compatible object store: OpenStack Swift with s3api, which checks every signature."""

import ctypes
import os
import pwd
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config

ACCOUNT, USER, SECRET_KEY = "segray", "tests", "not-a-secret"
REGION = "us-east-1"
BACKENDS = ("account", "container", "object")  # Their ports follow the proxy's, in this order.
START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 10

LIBC = ctypes.CDLL(None, use_errno=True)  # Loaded here because nothing may be imported between fork and exec.
PR_SET_PDEATHSIG = 1

COMMON_SETTINGS = """\
[DEFAULT]
bind_ip = {address}
bind_port = {port}
workers = 0
user = {user}
swift_dir = {root}
log_level = WARNING
log_address = {root}/no-syslog
"""

# There is only one replica, so clients must wait for slow responses on a busy machine: no other server can answer, no
# updater adds late entries to listings, and a server that is considered broken would not be used for a minute.
TIMEOUT_SETTINGS = """\
conn_timeout = 10
node_timeout = 60
container_update_timeout = 60
error_suppression_limit = 1000000000
"""

BACKEND_SETTINGS = """\
devices = {root}/devices
mount_check = false
disable_fallocate = true
[pipeline:main]
pipeline = healthcheck {name}-server
[filter:healthcheck]
use = egg:swift#healthcheck
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY_SETTINGS = """\
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo \
versioned_writes symlink proxy-server
[filter:s3api]
use = egg:swift#s3api
location = {region}
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{account_user} = {secret_key} .admin
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache_port}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""
PLAIN_FILTERS = (
    "catch_errors, gatekeeper, healthcheck, listing_formats, bulk, copy, slo, dlo, versioned_writes, symlink"
)

SWIFT_SETTINGS = """\
[swift-hash]
swift_hash_path_suffix = segray
swift_hash_path_prefix = segray
[storage-policy:0]
name = only
default = yes
"""

# Replaces nine runs of swift-ring-builder.
MAKE_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for name, port in zip(sys.argv[2::2], sys.argv[3::2]):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev(dict(region=1, zone=1, ip=sys.argv[1], port=int(port), device="device", weight=1.0))
    builder.rebalance()
    builder.get_ring().save(name + ".ring.gz")
"""


def find_swift() -> Path:
    """Return the folder of Swift's commands, in an environment of their own because their dependencies conflict."""
    folder = Path(__file__).parents[2] / ".venv-swift" / "bin"
    if not (folder / "swift-proxy-server").exists():
        raise FileNotFoundError(
            f"no object store for the tests: Swift is not installed in {folder.parent}; run make test-all to install it"
        )
    return folder


class ObjectStore:
    """The store's servers, which run from `__enter__` to `__exit__`.

    Args:
        root: A folder for their files. The objects of an earlier start are kept.
        address: Where they listen: on loopback, or at an address in the tests' own network.
    """

    def __init__(self, root: Path, address: str = "127.0.0.1") -> None:
        self.root = root
        self._address = address
        self._bin = find_swift()
        self._port = find_free_ports(len(BACKENDS) + 2)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def endpoint(self) -> str:
        """URL at which the store listens."""
        return f"http://{self._address}:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a client finds the store and its credentials."""
        return {
            "AWS_ACCESS_KEY_ID": f"{ACCOUNT}:{USER}",
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def client(self, endpoint: str | None = None, **changes: Any) -> Any:
        """Return a boto3 client without retries, for the store itself or for the proxy at `endpoint`."""
        config = Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        settings = {
            "aws_access_key_id": f"{ACCOUNT}:{USER}",
            "aws_secret_access_key": SECRET_KEY,
            "region_name": REGION,
            "endpoint_url": endpoint or self.endpoint,
        }
        return boto3.client("s3", config=config, **{**settings, **changes})

    def make_bucket(self, name: str) -> None:
        """Create a bucket; names have 3 to 63 lower-case letters, digits, dots and dashes."""
        self.client().create_bucket(Bucket=name)

    def _start(self) -> None:
        cache_port = self._port + len(BACKENDS) + 1  # Unused if memcached is not installed.
        values = {
            "root": self.root,
            "address": self._address,
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "region": REGION,
            "account": ACCOUNT,
            "account_user": USER,
            "secret_key": SECRET_KEY,
            "cache_port": cache_port,
        }
        ports = {name: self._port + index for index, name in enumerate(("proxy", *BACKENDS))}
        (self.root / "devices" / "device").mkdir(parents=True, exist_ok=True)
        (self.root / "swift.conf").write_text(SWIFT_SETTINGS)
        for name, port in ports.items():
            own = PROXY_SETTINGS if name == "proxy" else BACKEND_SETTINGS
            text = (COMMON_SETTINGS + own + TIMEOUT_SETTINGS).format(name=name, port=port, **values)
            if name == "proxy":
                text += "".join(f"[filter:{plain}]\nuse = egg:swift#{plain}\n" for plain in PLAIN_FILTERS.split(", "))
            (self.root / f"{name}.conf").write_text(text)

        rings = [word for name in BACKENDS for word in (name, str(ports[name]))]
        make_rings = [str(self._bin / "python"), "-c", MAKE_RINGS, self._address, *rings]
        subprocess.run(make_rings, cwd=self.root, env=self._environ(), check=True)
        if memcached := shutil.which("memcached"):
            command = [memcached, "-l", "127.0.0.1", "-p", str(cache_port), "-U", "0"]
            self._spawn("memcached", command, user="nobody" if os.getuid() == 0 else None)
        for name in ports:
            command = [str(self._bin / f"swift-{name}-server"), str(self.root / f"{name}.conf"), "--verbose"]
            self._spawn(name, command)
        self._wait_until_healthy()

    def _environ(self) -> dict[str, str]:
        return {"PATH": f"{self._bin}:{os.environ['PATH']}", "LANG": "C.UTF-8"}  # Without the tests' PYTHONPATH.

    def _spawn(self, name: str, command: Sequence[str], user: str | None = None) -> None:
        # Popen changes the user, because the kernel clears the parent-death signal of a program that does so itself.
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environ(),
                start_new_session=True,
                preexec_fn=prepare_child,
                user=user,
            )
        self._processes.append(process)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        ports = range(self._port, self._port + len(BACKENDS) + 1)
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            with suppress(OSError):
                for port in ports:
                    urllib.request.urlopen(f"http://{self._address}:{port}/healthcheck", timeout=5).close()
                return
            time.sleep(0.05)
        ended = [f"{process.args!r} ended" for process in self._processes if process.poll() is not None]
        reason = ", ".join(ended) or f"not ready within {START_TIMEOUT_S} s"
        logs = "".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.root.glob("*.log")))
        raise RuntimeError(f"the object store did not start: {reason}\n{logs}")

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def prepare_child() -> None:
    """Prepare a child between fork and exec: end it with its parent, and raise its limit of open sockets."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 32768), most))


def find_free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports, below those of outgoing connections and Ray's workers."""
    for _ in range(100):
        first = random.SystemRandom().randrange(20_000, 32_000)
        with ExitStack() as probes, suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"found no {count} consecutive free ports")
