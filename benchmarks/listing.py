"""Compare listing an S3 prefix with several requests at a time with listing it page by page.

    python benchmarks/listing.py [--num-images 300000]

The server of `listing_server.py` takes 50 ms for a page, like S3, and runs in a process of its own. "before" is what
segray did until 2026-11: one page after the other, parsed by boto3.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from listing_server import LAYOUTS, listing_server
from measuring import report

from segray import storage
from segray.storage import files
from segray.storage.s3 import S3Store
from segray.storage.s3_pages import take_entries
from segray.storage.store import StoredFile

_DELAY_MS = 50


def list_before(client: Any) -> Iterator[StoredFile]:
    """List page by page."""
    options: dict[str, Any] = {"Bucket": "bucket", "Prefix": "images/"}
    while True:
        page = client.list_objects_v2(**options)
        for entry in page["Contents"]:
            uri = f"s3://bucket/{entry['Key']}"
            yield StoredFile(uri, entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp())
        if not page["IsTruncated"]:
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def measure(act: Callable[[], Iterator[StoredFile]], num_images: int) -> tuple[float, float]:
    """Return the wall time and this process's CPU time for a page of a thousand images, in ms."""
    wall, cpu = time.monotonic(), time.process_time()
    num_listed = sum(1 for _ in act())
    assert num_listed == num_images, num_listed
    return (time.monotonic() - wall) / num_images * 1e6, (time.process_time() - cpu) / num_images * 1e6


def main() -> None:
    """List each layout in both ways."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-images", type=int, default=300_000)
    parser.add_argument("--num-before", type=int, default=30_000, help="images that are listed page by page")
    arguments = parser.parse_args()
    rows, figures = [], {}
    for layout in LAYOUTS:
        with listing_server(arguments.num_before, layout, _DELAY_MS) as environment:
            os.environ.update(environment)
            client = S3Store("bucket")._get_client()
            client.meta.events.unregister("before-parse.*.ListObjectsV2", take_entries)
            before = measure(lambda own=client: list_before(own), arguments.num_before)  # type: ignore[misc]
        with listing_server(arguments.num_images, layout, _DELAY_MS) as environment:
            os.environ.update(environment)
            files._open_store.cache_clear()
            now = measure(lambda: storage.list_files("s3://bucket/images"), arguments.num_images)
        figures[layout] = {"before_ms, cpu_ms": before, "now_ms, cpu_ms": now, "ratio": before[0] / now[0]}
        cells = [f"{value:.1f}" for value in (*before, *now)]
        rows.append([layout, *cells, f"{before[0] / now[0]:.1f}"])
    columns = ["layout", "before: ms/page", "CPU ms/page", "now: ms/page", "CPU ms/page ", "ratio"]
    report("listing", columns, rows, figures, "boto3")


if __name__ == "__main__":
    main()
