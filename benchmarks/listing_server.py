"""Simulate the listing of an S3 bucket of any size on loopback.

    python benchmarks/listing_server.py NUM_IMAGES [--layout cameras] [--delay-ms 50]

Prints its port and answers ListObjectsV2 until its standard input is closed. Nothing is stored: keys are computed from
their numbers.
"""

import argparse
import bisect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, overload
from urllib.parse import parse_qs, quote, urlsplit

_PAGE = 1000
_HASH = 0x9E3779B97F4A7C15  # An odd number, so that multiples modulo 2**64 are distinct.
LAYOUTS = ("cameras", "days", "numbers", "hashes")


def make_key(number: int) -> str:
    """Return the key of an image of the layout ``cameras``; keys sort in the order of the numbers."""
    return f"images/2026/camera-{number // 10_000:04d}/frame-{number:010d}.jpg"


class Keys(Sequence[str]):
    """The sorted keys of a layout.

    Args:
        num_images: Their number.
        layout: ``cameras``: folders of 10,000; ``days``: folders of 300, three levels deep; ``numbers``, ``hashes``: no
            folders.
    """

    def __init__(self, num_images: int, layout: str = "cameras") -> None:
        self._num_images = num_images
        self._layout = layout
        hashes = (number * _HASH % 2**64 for number in range(num_images if layout == "hashes" else 0))
        self._hashes = sorted(hashes)

    def __len__(self) -> int:
        return self._num_images

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if self._layout == "hashes":
            return f"images/{self._hashes[number]:016x}.jpg"
        if self._layout == "days":
            hour, frame = divmod(number, 300)
            day, hour = divmod(hour, 24)
            return f"images/{day // 28:04d}/{day % 28:02d}/{hour:02d}/{frame:03d}.jpg"
        return make_key(number) if self._layout == "cameras" else f"images/frame-{number:010d}.jpg"


class _Lister(BaseHTTPRequestHandler):
    keys: Keys
    delay_s = 0.0
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        ready_s = time.monotonic() + self.delay_s
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        after = query.get("continuation-token") or query.get("start-after", "")
        body = _render(self.keys, query.get("prefix", ""), after, query.get("delimiter", ""))
        time.sleep(max(0.0, ready_s - time.monotonic()))
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _render(keys: Keys, prefix: str, after: str, delimiter: str) -> bytes:
    begin = max(bisect.bisect_left(keys, prefix), bisect.bisect_right(keys, after))
    entries: list[str] = []
    last = after
    while len(entries) < _PAGE and begin < len(keys) and (key := keys[begin]).startswith(prefix):
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0:
            last = key[: cut + 1]
            entries.append(f"<CommonPrefixes><Prefix>{last}</Prefix></CommonPrefixes>")
            begin = bisect.bisect_left(keys, f"{key[:cut]}0")  # "0" follows the slash.
        else:
            last = key
            entries.append(
                f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;{begin:032x}&quot;</ETag><Size>100000</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
            begin += 1
    is_truncated = begin < len(keys) and keys[begin].startswith(prefix)
    more = f"<NextContinuationToken>{quote(last)}</NextContinuationToken>" if is_truncated else ""
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
        f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{more}{''.join(entries)}</ListBucketResult>"
    ).encode()


@contextmanager
def listing_server(num_images: int, layout: str = "cameras", delay_ms: float = 0) -> Iterator[dict[str, str]]:
    """Run the server in a process of its own; yield the environment of its clients."""
    command = [sys.executable, __file__, str(num_images), "--layout", layout, "--delay-ms", str(delay_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            yield {
                **os.environ,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            }
        finally:
            server.kill()


def main() -> None:
    """Serve until standard input is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("num_images", type=int)
    parser.add_argument("--layout", choices=LAYOUTS, default="cameras")
    parser.add_argument("--delay-ms", type=float, default=0)
    arguments = parser.parse_args()
    _Lister.keys = Keys(arguments.num_images, arguments.layout)
    _Lister.delay_s = arguments.delay_ms / 1000
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Lister)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
