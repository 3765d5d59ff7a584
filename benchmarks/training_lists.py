"""Measure time and memory of what training does with the list of labelled images, none of which need to exist.

    python benchmarks/training_lists.py [NUM_IMAGES [INPUT ...]]

An INPUT is ``parquet`` or ``csv`` (a manifest in random order), ``sorted`` (a Parquet manifest in order) or ``folders``
(two folders, whose listings are generated without a store). The default is a million images, a tenth of which are for
validation, and every input. Each step of the driver is measured in the same process, one process per input: its time,
its CPU time, and the peak of the resident memory (VmHWM) until then. The label check is fed with random reports, so
that only the driver's own work is measured. Then a training worker is simulated: it maps the list from a file in shared
memory, as it does from Ray's object store, and what it needs of its own is measured.
"""

import json
import mmap
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from listing_server import make_key
from pyarrow import csv
from pyarrow import parquet as pq

from segray.config import DataConfig
from segray.data import manifest
from segray.data.sample_list import SampleList, Splits
from segray.storage import StoredFile
from segray.training.labels.duplicates import CheckedImages, find_duplicates
from segray.training.labels.inspect import ReportBuilder, compute_chunk_size
from segray.training.labels.near_duplicates import NO_THUMBPRINT
from segray.training.labels.split_report import SplitReport
from segray.training.worker.feed import compute_step_order

_CHUNK = 100_000
_STEP = 1_000_003  # A prime, so that its multiples modulo any smaller or larger number of images are a permutation.
_NUM_CPUS = 704
_GLOBAL_BATCH_SIZE = 1024
_INPUTS = ("parquet", "csv", "sorted", "folders")
ResultT = TypeVar("ResultT")


def generate_rows(num_images: int, step: int) -> Iterator[pa.Table]:
    """Yield a manifest, in chunks; every tenth image is for validation."""
    for begin in range(0, num_images, _CHUNK):
        numbers = [number * step % num_images for number in range(begin, min(begin + _CHUNK, num_images))]
        images = [f"s3://bucket/{make_key(number)}" for number in numbers]
        masks = [f"s3://bucket/masks/{make_key(number).removesuffix('jpg')}png" for number in numbers]
        splits = ["val" if number % 10 == 9 else "train" for number in numbers]
        yield pa.table({"image_uri": images, "mask_uri": masks, "split": splits})


def write_manifest(name: str, num_images: int, path: Path) -> None:
    """Write a Parquet or CSV manifest."""
    schema = pa.schema([(column, pa.string()) for column in ("image_uri", "mask_uri", "split")])
    with csv.CSVWriter(path, schema) if name == "csv" else pq.ParquetWriter(path, schema) as writer:
        for table in generate_rows(num_images, 1 if name == "sorted" else _STEP):
            writer.write_table(table)


def list_generated(num_images: int) -> Callable[[str, Iterable[str]], Iterator[StoredFile]]:
    """Return a replacement for ``list_files``, for the folders ``s3://bucket/images`` and ``s3://bucket/masks``."""

    def list_files(uri: str, extensions: Iterable[str]) -> Iterator[StoredFile]:
        for number in range(num_images):
            key = make_key(number).removeprefix("images/")
            name = key if uri.endswith("images") else f"{key.removesuffix('jpg')}png"
            yield StoredFile(f"{uri}/{name}", 100_000, "0123456789abcdef0123456789abcdef", 0.0)

    return list_files


class Meter:
    """Prints the time and the memory of steps."""

    def measure(self, name: str, act: Callable[[], ResultT]) -> ResultT:
        """Run a step and print its measurements."""
        began_s, cpu_s = time.monotonic(), time.process_time()
        result = act()
        print(
            f"  {name:<44} {time.monotonic() - began_s:8.1f} s {time.process_time() - cpu_s:8.1f} s of CPU, peak "
            f"{_read_peak_mb():7,.0f} MB",
            flush=True,
        )
        return result


def _read_peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _read_own_mb() -> float:
    """Return the memory of this process that is not mapped from a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024


def run_driver(name: str, num_images: int, path: Path, folder: Path) -> None:
    """Measure what the driver does with the list; write the list to ``folder`` for ``run_worker``.

    Args:
        name: The kind of input.
        num_images: Number of images, if it is ``folders``.
        path: The manifest otherwise.
        folder: A folder in shared memory.
    """
    meter = Meter()
    print(f"  {'imports':<44} {'':>30} peak {_read_peak_mb():7,.0f} MB")
    data: dict[str, object] = {"class_names": ["a", "b"]}
    if name == "folders":
        vars(manifest)["list_files"] = list_generated(num_images)
        both = {"images": "s3://bucket/images", "masks": "s3://bucket/masks"}
        config = DataConfig.model_validate({**data, "train": both, "val": {"fraction": 0.1}})
    else:
        source = {"manifest": str(path)}
        config = DataConfig.model_validate({**data, "train": source, "val": source})
    splits = meter.measure("load the list", lambda: manifest.load_splits(config))
    num_bytes = sum(SampleList.of(split).num_bytes for split in splits)
    print(f"  {'memory of the list':<44} {'':>30}      {num_bytes / 2**20:7,.0f} MB")
    print(f"  sha256 {meter.measure('hash', splits.compute_sha256)[:16]}")
    meter.measure("label check: add up the reports", lambda: check(splits))
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(splits, protocol=5, buffer_callback=buffers.append)
    with (folder / "list").open("wb") as file:
        sizes = [file.write(buffer.raw()) for buffer in buffers]
    (folder / "list.pickle").write_bytes(content)
    (folder / "list.json").write_text(json.dumps(sizes))


def check(splits: Splits) -> None:
    """Do the driver's part of a label check, with reports of different images in chunks of the usual size."""
    reports = {}
    rng = np.random.default_rng(0)
    for split, samples in splits._asdict().items():
        builder = ReportBuilder(len(samples), 2, with_presence=True)
        size = compute_chunk_size(len(samples), _NUM_CPUS)
        for start in range(0, len(samples), size):
            num = min(size, len(samples) - start)
            report = replace(
                SplitReport.empty(2),
                num_samples=num,
                digests=rng.bytes(16 * num),
                thumbprints=rng.bytes(len(NO_THUMBPRINT) * num),
                presence=rng.bytes(num),
            )
            builder.add(start, report)
        reports[split] = builder.build()
    train = reports["train"]
    others = CheckedImages(splits.train, train.digests, train.thumbprints, lambda _: "train")
    find_duplicates(splits.val, reports["val"], others)


def run_worker(folder: Path) -> None:
    """Measure what a training worker needs of its own, besides the list that it shares with the others of its node."""
    meter, before = Meter(), _read_own_mb()
    with (folder / "list").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shared:
        view, buffers, start = memoryview(shared), [], 0
        for size in json.loads((folder / "list.json").read_text()):
            buffers.append(view[start : start + size])
            start += size
        splits = pickle.loads((folder / "list.pickle").read_bytes(), buffers=buffers)
        train = splits.train
        meter.measure("worker: order of the first epoch", lambda: compute_step_order(0, len(train), 8, 0))
        steps = range(100)
        began_s = time.process_time()
        for step in steps:
            order = compute_step_order(step, len(train), _GLOBAL_BATCH_SIZE, 0)
            for index in order[: _GLOBAL_BATCH_SIZE // 64]:
                train[index]
        ms = (time.process_time() - began_s) / len(steps) * 1000
        print(f"  worker: a step's samples, 16 of 1,024{'':>34} {ms:7.2f} ms of CPU")
        last = -(-len(train) // _GLOBAL_BATCH_SIZE) - 1
        meter.measure("worker: last step, in two epochs", lambda: compute_step_order(last, len(train), 1024, 0))
        own = _read_own_mb() - before
        print(f"  {'worker: memory of its own':<44} {'':>30}      {own:7,.0f} MB", flush=True)
        os._exit(0)  # The list still refers to the mapped file.


def main() -> None:
    """Measure each input in a process of its own."""
    if sys.argv[1:2] == ["--driver"]:
        run_driver(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
        return
    if sys.argv[1:2] == ["--worker"]:
        run_worker(Path(sys.argv[2]))
        return
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{time.strftime('%Y-%m-%d')}, pyarrow {pa.__version__}, numpy {np.__version__}")
    for name in sys.argv[2:] or _INPUTS:
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(dir=shared) as folder:
            path = Path(scratch, f"manifest.{'csv' if name == 'csv' else 'parquet'}")
            if name != "folders":
                write_manifest(name, num_images, path)
            print(f"{name}, {num_images:,} images", flush=True)
            driver = [sys.executable, __file__, "--driver", name, str(num_images), str(path), folder]
            subprocess.run(driver, check=True)
            subprocess.run([sys.executable, __file__, "--worker", folder], check=True)


if __name__ == "__main__":
    main()
