"""Measure the memory, disk space and time that the driver needs to plan a run over many images.

    python benchmarks/plan_memory.py [NUM_IMAGES [INPUT ...]]

An INPUT is ``parquet`` or ``csv`` (a manifest with sizes and entity tags), ``text`` (a list of URIs), each in random
order, ``sorted`` (a text list in order), ``s3`` (a prefix), or ``folder`` (a local folder with a tenth of the images).
The default is a million images and every input. ``s3`` is listed from ``listing_server.py``; planning
needs no other call. The peak is the resident memory of the driver (VmHWM); each input is planned in a separate process.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from listing_server import listing_server, make_key
from pyarrow import csv
from pyarrow import parquet as pq

_CHUNK = 100_000
_STEP = 1_000_003  # A prime, so that its multiples modulo any smaller or larger number of images are a permutation.
_PLAN = """
import json, resource, sys, time
from pathlib import Path
from segray.config import SegmentSettings
from segray.runs.listing import spool_listing
from segray.runs.plan import spool_plan
from segray.segmentation.planning.cut import FragmentLimits, cut_fragments
from segray.segmentation.planning.inputs import merge_sources, open_sources
from segray.segmentation.planning.spool import make_spool

begin = time.monotonic()
settings = SegmentSettings()
with make_spool() as folder:
    listing = spool_listing(merge_sources(open_sources([sys.argv[1]], [], settings)), folder / "listing")
    limits = FragmentLimits.resolve(settings, (352, 480), listing.num_images)
    (folder / "plan").mkdir()
    plan = spool_plan(cut_fragments(listing.read(), limits), folder / "plan")
    size = sum(path.stat().st_size for path in (folder / "plan").iterdir())
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"images": plan.num_images, "fragments": plan.num_fragments, "peak_mb": peak / 1024,
                  "plan_mb": size / 2**20, "seconds": time.monotonic() - begin,
                  "cpu_s": usage.ru_utime + usage.ru_stime}))
"""


def generate_manifest(num_images: int) -> Iterator[pa.Table]:
    """Yield a manifest in random order, in chunks."""
    for begin in range(0, num_images, _CHUNK):
        numbers = [number * _STEP % num_images for number in range(begin, min(begin + _CHUNK, num_images))]
        tags = [hashlib.md5(b"%d" % number, usedforsecurity=False).hexdigest() for number in numbers]
        uris = [f"s3://bucket/{make_key(number)}" for number in numbers]
        yield pa.table({"image_uri": uris, "size_bytes": [100_000 + number % 1000 for number in numbers], "etag": tags})


def write_input(name: str, num_images: int, folder: Path) -> str:
    """Create an input, and return its URI."""
    schema = pa.schema([("image_uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])
    if name == "s3":
        return "s3://bucket/images"
    if name == "folder":
        for number in range(num_images // 10):
            file = folder / make_key(number)
            if number % 10_000 == 0:
                file.parent.mkdir(parents=True)
            file.touch()
        return str(folder)
    path = folder / f"list.{'txt' if name in ('text', 'sorted') else name}"
    if name in ("text", "sorted"):
        step = 1 if name == "sorted" else _STEP
        with path.open("w") as lines:
            for number in range(num_images):
                lines.write(f"s3://bucket/{make_key(number * step % num_images)}\n")
    else:
        with pq.ParquetWriter(path, schema) if name == "parquet" else csv.CSVWriter(path, schema) as writer:
            for table in generate_manifest(num_images):
                writer.write_table(table)
    return str(path)


def plan(uri: str, environment: dict[str, str], spool: Path) -> dict[str, float]:
    """Plan a run in a separate process and return its measurements."""
    done = threading.Event()
    peak_bytes = [0]

    def watch() -> None:
        while not done.wait(0.2):
            with suppress(OSError):  # A file was just removed.
                peak_bytes[0] = max(peak_bytes[0], sum(path.stat().st_size for path in spool.rglob("*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    environment = {**environment, "TMPDIR": str(spool)}
    process = subprocess.run([sys.executable, "-c", _PLAN, uri], env=environment, capture_output=True, text=True)
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(process.stderr)
    result: dict[str, float] = json.loads(process.stdout)
    return {**result, "disk_mb": peak_bytes[0] / 2**20}


def main() -> None:
    """Plan the inputs and print one line for each."""
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    names = sys.argv[2:] or ["parquet", "csv", "text", "sorted", "s3", "folder"]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(time.strftime("%Y-%m-%d"))
    for name in names:
        with tempfile.TemporaryDirectory() as scratch, listing_server(num_images) as environment:
            data, spool = Path(scratch, "data"), Path(scratch, "spool")
            data.mkdir()
            spool.mkdir()
            result = plan(write_input(name, num_images, data), environment, spool)
        print(
            f"{name:<8} {result['images']:>11,.0f} images, {result['fragments']:>7,.0f} fragments: peak "
            f"{result['peak_mb']:,.0f} MB, {result['seconds']:.1f} s ({result['cpu_s']:.1f} s of CPU), plan "
            f"{result['plan_mb']:.1f} MB, temporary files {result['disk_mb']:,.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
