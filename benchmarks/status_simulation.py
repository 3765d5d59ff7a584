"""Measure `segray status`, the summary and a repeated complete run at 100,000 fragments and 20 ms per request.

    python benchmarks/status_simulation.py [NUM_FRAGMENTS]

The store is simulated: it is in memory, lists 1,000 keys per request, and each request takes 20 ms. Everything else is
the real code. All fragments have the same rows: 64 images of 20 classes with ground truth; every hundredth has an error
row. Without saved counts, which is what segray did before, 2,000 fragments are read by 8 threads, and the time is
multiplied.
"""

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from measuring import report
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.data.classes import ClassMap
from segray.progress import build_quiet_console
from segray.results import saved_counts
from segray.results.counts import count_rows_of_fragment
from segray.results.saved_counts import CountsLog, compact_counts, load_counts
from segray.results.status import read_status
from segray.results.summary import find_error_rows, format_summary_parquet, load_summary, summarize_run
from segray.runs.plan import Plan
from segray.runs.run_file import RunFile, RunFingerprint, get_run_uri
from segray.runs.written import list_written_fragments
from segray.schema import IMAGES_SCHEMA
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning.binding import bind_run
from segray.segmentation.planning.freeze import open_inputs
from segray.storage import StoredFile, files, join_uri, list_names, write_bytes
from segray.storage.store import Content

_OUTPUT = "s3://bucket/run"
_REQUEST_S = 0.02
_PAGE_SIZE = 1000
_NUM_CLASSES = 20
_NUM_IMAGES = 64
_NUM_READ_BEFORE = 2000
_NUM_UNSAVED = 150  # fragments that a driver wrote after it saved counts for the last time, and before it was killed


class SlowStore:
    """A bucket in memory.

    Attributes:
        contents: Files by key.
        num_requests: Number of requests since it was last set to 0.
        request_s: Duration of a request.
    """

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.num_requests = 0
        self.request_s = 0.0
        self._lock = threading.Lock()

    def _request(self) -> None:
        with self._lock:
            self.num_requests += 1
        if self.request_s:
            time.sleep(self.request_s)

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``."""
        for number, key in enumerate(self._list_keys(f"{folder}/{start}")):
            if number % _PAGE_SIZE == 0:
                self._request()
            yield StoredFile(f"s3://bucket/{key}", len(self.contents[key]), "tag", number / 10)

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        names = {key[len(folder) + 1 :] for key in self._list_keys(f"{folder}/")}
        names = {name.split("/")[0] for name in names if ("/" in name) == folders}
        for _ in range(max(1, -(-len(names) // _PAGE_SIZE))):
            self._request()
        return names

    def _list_keys(self, prefix: str) -> Iterator[str]:
        return iter(sorted(key for key in self.contents if key.startswith(prefix)))

    def find(self, key: str) -> StoredFile | None:
        """See ``Store.find``."""
        self._request()
        return StoredFile(f"s3://bucket/{key}", len(self.contents[key]), "tag", 0) if key in self.contents else None

    def read(self, key: str) -> Content:
        """See ``Store.read``."""
        self._request()
        return Content(self.contents[key], "tag")

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""
        self._request()
        return self.contents[key][start:end]

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``."""
        self._request()
        self.contents[key] = bytes(content)

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``."""
        is_new = key not in self.contents
        self.write(key, content)
        return is_new

    def remove(self, key: str) -> None:
        """See ``Store.remove``."""
        self._request()
        self.contents.pop(key, None)


def make_fragment(num_errors: int) -> pa.Table:
    """Return the rows of a fragment."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(_NUM_IMAGES):
        row: dict[str, Any] = {"uri": f"s3://bucket/images/{number}.jpg", "status": "error", "error_kind": "truncated"}
        if number >= num_errors:
            counts = {name: rng.integers(0, 10**5, _NUM_CLASSES).tolist() for name in ("pixel_count", "tp_px", "fp_px")}
            scores = {name: rng.random(_NUM_CLASSES).tolist() for name in ("iou", "dice")}
            row = {**row, **counts, **scores, "fn_px": counts["fp_px"], "status": "ok", "error_kind": None}
        rows.append(row)
    return pa.Table.from_pylist(rows, IMAGES_SCHEMA)


def fill(store: SlowStore, num_fragments: int) -> RunFile:
    """Write all fragments, and save the counts of all but the last as a driver saves them."""
    tables = [make_fragment(num_errors) for num_errors in (0, 1)]
    buffers = [io.BytesIO(), io.BytesIO()]
    for table, buffer in zip(tables, buffers, strict=True):
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    contents = [buffer.getvalue() for buffer in buffers]
    counts = [count_rows_of_fragment(0, table, _NUM_CLASSES) for table in tables]
    log = CountsLog(_OUTPUT)
    for fragment in range(num_fragments):
        kind = int(fragment % 100 == 0)
        store.contents[f"run/images/part-{fragment:08d}.parquet"] = contents[kind]
        if fragment < num_fragments - _NUM_UNSAVED:
            log.add({**counts[kind], "fragment": fragment, "size_bytes": len(contents[kind])})
    log.save()
    plan = Plan("a" * 64, "b" * 64, num_fragments * _NUM_IMAGES, num_fragments)
    settings = SegmentSettings()
    fingerprint = RunFingerprint(bundle_sha256="c" * 64, config={**settings.row_settings, "ground_truth": False})
    inputs: dict[str, Any] = {"bundle": "s3://bucket/bundle", "images": ["s3://bucket/images"], "masks": []}
    record = RunFile.start(fingerprint, plan, inputs, settings)
    write_bytes(get_run_uri(_OUTPUT), record.format())
    return record


def repeat_run() -> None:
    """Do what a repeated complete run does, without listing its images."""
    settings = SegmentSettings(relist=False)
    console = build_quiet_console()
    job = SegmentJob("s3://bucket/bundle", ("s3://bucket/images",), _OUTPUT, (), settings)
    run = bind_run(job, open_inputs(job, (512, 512), "c" * 64, console), "c" * 64, lambda: None, console)
    assert run.is_complete
    assert list_names(_OUTPUT) >= {"summary.parquet"}
    load_summary(_OUTPUT)


def main() -> None:
    """Measure each command and print a table."""
    num_fragments = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    classes = ClassMap(tuple(f"class {index}" for index in range(_NUM_CLASSES)), tuple(range(_NUM_CLASSES)))
    store = SlowStore()
    rows: list[list[str]] = []
    figures: dict[str, Any] = {"num_fragments": num_fragments, "request_s": _REQUEST_S}

    def measure(name: str, act: Callable[[], object], times: float = 1) -> None:
        store.num_requests, store.request_s = 0, _REQUEST_S
        began, cpu_began = time.monotonic(), time.process_time()
        act()
        seconds, cpu_s = (time.monotonic() - began) * times, (time.process_time() - cpu_began) * times
        num_requests = round(store.num_requests * times)
        store.request_s = 0
        figures[name] = {"seconds": seconds, "cpu_s": cpu_s, "requests": num_requests}
        rows.append([name, f"{seconds:,.1f}", f"{cpu_s:,.1f}", f"{num_requests:,}"])

    with mock.patch.object(files, "_open_store", return_value=store):
        record = fill(store, num_fragments)
        written = list_written_fragments(_OUTPUT)
        some = {fragment: written[fragment] for fragment in range(min(_NUM_READ_BEFORE, num_fragments))}
        share = len(some) / num_fragments
        with mock.patch.multiple(saved_counts, _NUM_READERS=8, _list_files=lambda _: []):
            measure("rows, without counts", lambda: load_counts(_OUTPUT, some, _NUM_CLASSES), 1 / share)
        measure("status, after a killed driver", lambda: read_status(_OUTPUT))
        measure("summary", lambda: summarize_run(_OUTPUT, record.plan, classes))
        run = summarize_run(_OUTPUT, record.plan, classes)
        measure("replacing the files of counts by one", lambda: compact_counts(_OUTPUT, run.counts))
        write_bytes(join_uri(_OUTPUT, "summary.parquet"), format_summary_parquet(run.summary))
        write_bytes(get_run_uri(_OUTPUT), record.complete(run.tally.num_ok, run.tally.errors).format())
        measure("status of the complete run", lambda: read_status(_OUTPUT))
        measure("repeating the complete run", repeat_run)
        measure("error rows for retry_errors (1% of the fragments)", lambda: find_error_rows(_OUTPUT, written))
        figures["counts_bytes"] = sum(len(data) for key, data in store.contents.items() if "/counts/" in key)
    report("status_simulation", ["", "s", "CPU s", "requests"], rows, figures)


if __name__ == "__main__":
    main()
