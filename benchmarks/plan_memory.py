"""Measure the memory and time that the driver needs to plan a run over a million images.

    python benchmarks/plan_memory.py [NUM_IMAGES]

The inputs are an S3 prefix, a text list of as many URIs, and a local folder with a tenth of them. S3 is simulated by a
server on loopback that answers ListObjectsV2 page by page; planning needs no other call. The peak is the resident
memory of the driver (VmHWM); each input is planned in a separate process.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

_PAGE = 1000
_PLAN = """
import json, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory
from segray.config import SegmentSettings
from segray.segmentation import driver
from segray.segmentation.planning.inputs import merge_sources, open_sources
from segray.runs.plan import cut_fragments, spool_plan

begin = time.monotonic()
settings = SegmentSettings()
with TemporaryDirectory() as folder:
    sources = open_sources([sys.argv[1]], [], settings)
    plan = spool_plan(cut_fragments(merge_sources(sources), settings), Path(folder))
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps({"images": plan.num_images, "fragments": plan.num_fragments, "peak_mb": peak / 1024,
                  "plan_mb": size / 2**20, "seconds": time.monotonic() - begin}))
"""


def make_key(number: int) -> str:
    """Return the key of a simulated object; keys sort in the order of the numbers."""
    return f"images/2026/camera-{number // 10_000:04d}/frame-{number:010d}.jpg"


class _Lister(BaseHTTPRequestHandler):
    num_images = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        begin = int(query.get("continuation-token", ["0"])[0])
        end = min(begin + _PAGE, self.num_images)
        entries = "".join(
            f"<Contents><Key>{make_key(n)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{n:032x}&quot;</ETag><Size>100000</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for n in range(begin, end)
        )
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < self.num_images else ""
        body = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{entries}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def plan(uri: str, environment: dict[str, str]) -> dict[str, float]:
    """Plan a run in a separate process and return its measurements."""
    done = subprocess.run([sys.executable, "-c", _PLAN, uri], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    """Plan the three inputs and print one line for each."""
    _Lister.num_images = num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Lister)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        results["S3 prefix"] = plan("s3://bucket/images", environment)
        path = Path(scratch, "list.txt")
        path.write_text("".join(f"s3://bucket/{make_key(number)}\n" for number in range(num_images)))
        results["text list"] = plan(str(path), environment)
        path.unlink()
        for number in range(num_images // 10):
            file = Path(scratch, make_key(number))
            if number % 10_000 == 0:
                file.parent.mkdir(parents=True)
            file.touch()
        results["local folder"] = plan(scratch, environment)
    server.shutdown()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(time.strftime("%Y-%m-%d"))
    for name, result in results.items():
        print(
            f"{name:<13} {result['images']:>9,.0f} images, {result['fragments']:>6,.0f} fragments: peak "
            f"{result['peak_mb']:,.0f} MB, {result['seconds']:.0f} s, plan {result['plan_mb']:.1f} MB"
        )


if __name__ == "__main__":
    main()
