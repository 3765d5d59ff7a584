"""Set-up of the fault tests: a bucket with a model and images, Ray clusters, and segray started as a command."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from segray.config import IMAGE_EXTENSIONS
from tests.faults.buckets import BUCKET, Bucket, S3Bucket
from tests.faults.proxy import FaultProxy
from tests.poison import build_poison, encode
from tests.processes import find_workers

ROOT = Path(__file__).parents[2]
FRAGMENT_SIZE = 3
NUM_GOOD = 17
TIMEOUT_S = 300
# Folders whose files depend on when a run was interrupted: how often counts are saved depends on time.
NOT_COMPARED = {"plan", "counts"}
NO_COUNTS = r"^(?!.*/counts/)"
_NAMES = ["a b", "c#d", "e%20f", "g?h", "ü", ".dot", "_under", "sub/a b", "sub//x", "i+j", "k&l=m"]
SETTINGS = {
    "fragment_size": FRAGMENT_SIZE,
    "num_predictors": 1,
    "batch_size": 2,
    "precision": "fp32",
    "max_error_fraction": 1,
    "num_report_images": 0,
    "max_image_px": 1_000_000,
}


def fill_bucket(bucket: Bucket, bundle: Path) -> None:
    """Upload a model, images (some with odd names, some broken) and masks."""
    for path in bundle.rglob("*"):
        if path.is_file():
            bucket.put(f"bundle/{path.relative_to(bundle)}", path.read_bytes())
    for key, content in build_files(with_empty_names=isinstance(bucket, S3Bucket)).items():
        bucket.put(key, content)
    bucket.put("images/folder/", b"")
    bucket.put("images/notes.txt", b"no image")


def build_files(with_empty_names: bool) -> dict[str, bytes]:
    """Return images, some of them broken, and masks, by key; segray refuses names such as ``a//b`` except in S3."""
    files = {}
    rng = np.random.default_rng(11)
    for index in range(NUM_GOOD):
        name = _NAMES[index] if index < len(_NAMES) else f"image-{index}"
        if not with_empty_names:
            name = name.replace("//", "/")
        size = (40 + 3 * index, 80 - 2 * index)
        for key, pixels in (
            (f"images/{name}.png", rng.integers(0, 256, (*size, 3), np.uint8)),
            (f"masks/{name}.png", rng.choice([0, 1, 2, 3], size).astype(np.uint8)),
        ):
            files[key] = encode(Image.fromarray(pixels))
    return files | {f"images/{key}": content for key, content in pick_poison().items()}


def pick_poison() -> dict[str, bytes]:
    """Return broken files by key, one of each kind."""
    chosen: dict[object, tuple[str, bytes]] = {}
    for poison in build_poison():
        if poison.kind is not None and poison.name.lower().endswith(IMAGE_EXTENSIONS):
            chosen.setdefault(poison.kind, (poison.name, poison.content))
    return dict(chosen.values())


@dataclass
class Cluster:
    """A Ray cluster of a head and more nodes, which runs in other processes from `__enter__` to `__exit__`.

    Attributes:
        environment: Additional environment variables of the cluster.
        num_nodes: Number of nodes besides the head.
        address: For RAY_ADDRESS.
        head: Process ids of the head's control store and raylet.
        raylets: Process ids of the other nodes' raylets.
        session: Folder with the logs of all processes.
    """

    environment: dict[str, str]
    num_nodes: int = 2
    address: str = ""
    head: list[int] = field(default_factory=list)
    raylets: list[int] = field(default_factory=list)
    session: Path = Path()

    def __enter__(self) -> Self:
        self._host = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.cluster_host", str(self.num_nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=build_environment(**self.environment),
            cwd=ROOT,
            text=True,
        )
        assert self._host.stdout is not None
        started = json.loads(self._host.stdout.readline())
        self.address, self.head, self.raylets = started["address"], started["head"], started["raylets"]
        self.session = Path(started["session"])
        return self

    def __exit__(self, *error: object) -> None:
        family = psutil.Process(self._host.pid).children(recursive=True)
        assert self._host.stdin is not None
        self._host.stdin.close()
        try:
            self._host.wait(20)
        except subprocess.TimeoutExpired:
            self._host.kill()
        for process in family:
            if process.is_running():
                process.kill()

    def find_workers(self, title: str) -> list[int]:
        """Return the ids of worker processes whose command line contains a text, such as the class of an actor."""
        return [process.pid for process in find_workers(title, self._host.pid)]


def build_environment(**more: str) -> dict[str, str]:
    """Return the environment of a user who has set no Ray variables except the token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    ray = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # As in tests/conftest.py.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Keeps a whole cluster on loopback.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # Give up a lost head after 5 s instead of 60 s.
    }
    return {**inherited, **ray, **more}


@dataclass
class Scene:
    """A bucket behind a proxy, and a cluster that processes it; a context manager that ends what it started."""

    bucket: Bucket
    proxy: FaultProxy
    cluster: Cluster | None
    log: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, output: str, *arguments: str, images: str = "images", **settings: object) -> "Run":
        """Start `segray segment` on the bucket, on the cluster or, if it is None, on a private Ray."""
        where = self.bucket.uri
        output_uri = output if output.startswith("/") else f"{where}/{output}"
        command = [str(Path(sys.executable).parent / "segray"), "segment", "--bundle", f"{where}/bundle"]
        command += ["--images", f"{where}/{images}", "--masks", f"{where}/masks", "--output", output_uri, *arguments]
        for name, value in {**SETTINGS, **settings}.items():
            command += ["--set", f"segment.{name}={value}"]
        environment = build_environment(**self.bucket.build_environment(self.proxy.endpoint))
        if self.cluster is not None:
            environment["RAY_ADDRESS"] = self.cluster.address
        number = len(self.running)
        out, err = self.log / f"{number}.out", self.log / f"{number}.err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr, start_new_session=True)
        self.running.append(process)
        return Run(process, out, err)

    def run(self, output: str, *arguments: str, **settings: Any) -> "Run":
        """Run `segray segment` and wait for its end."""
        run = self.start(output, *arguments, **settings)
        run.wait()
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the commands that still run, with their private Rays."""
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def wait_for_silence(self) -> None:
        """Wait until the workers of a killed driver are gone: the store gets no request for two seconds."""
        number = -1
        while len(self.proxy.requests) != number:
            number = len(self.proxy.requests)
            time.sleep(2)

    def read_files(self, output: str) -> dict[str, bytes]:
        """Return the Parquet files of a run without plan and counts, read directly from the store."""
        return read_files(self.bucket, output)

    def read_json(self, output: str) -> Any:
        """Return the content of a run's `run.json`."""
        return json.loads(self.bucket.get(f"{output}/run.json"))


@dataclass
class Run:
    """One process of `segray segment`."""

    process: "subprocess.Popen[bytes]"
    out: Path
    err: Path
    started_s: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        return self.process.wait(TIMEOUT_S)

    def kill(self) -> None:
        """Kill only the driver."""
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        """Everything that it printed."""
        return self.out.read_text() + self.err.read_text()

    @property
    def error(self) -> str:
        """Its error line, or an empty string."""
        return next((line for line in self.err.read_text().splitlines() if line.startswith("error: ")), "")


@dataclass(frozen=True)
class Clean:
    """The fault-free run: its files, and how often it read images and masks and wrote files."""

    files: dict[str, bytes]
    num_image_reads: int
    num_writes: int


def read_files(bucket: Bucket, output: str) -> dict[str, bytes]:
    """Return the Parquet files of a run without plan and counts, by path below its folder."""
    keys = bucket.list_keys(f"{output}/")
    chosen = [key for key in keys if key.endswith(".parquet") and key.split("/")[-2] not in NOT_COMPARED]
    return {key.removeprefix(f"{output}/"): bucket.get(key) for key in chosen}


def read_table(files: dict[str, bytes]) -> pa.Table:
    """Return all rows, sorted by URI."""
    parts = [pq.read_table(io.BytesIO(files[name])) for name in sorted(files) if name.startswith("images/")]
    return pa.concat_tables(parts).sort_by("uri")


def require_invariant(files: dict[str, bytes], clean: dict[str, bytes], except_for: Sequence[str] = ()) -> None:
    """Assert that a run equals the fault-free one: each image once, and every byte of all rows, masks and the summary.

    Args:
        files: Files of the run.
        clean: Files of the fault-free run.
        except_for: Keys of images whose rows may differ. With any, only the rows of the other images are compared.
    """
    rows, expected = read_table(files).to_pylist(), read_table(clean).to_pylist()
    # Each image once: none lost, none duplicated.
    assert [row["uri"] for row in rows] == [row["uri"] for row in expected]
    excluded = {row["uri"] for row in rows if row["uri"].partition(f"/{BUCKET}/")[2] in except_for}
    assert len(excluded) == len(except_for)
    for row, other in zip(rows, expected, strict=True):
        assert row["uri"] in excluded or row == other
    if not excluded:
        assert files.keys() == clean.keys()
        for name, content in files.items():
            assert content == clean[name], f"{name} differs from the fault-free run's file"
