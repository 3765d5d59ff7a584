"""Decode mutated image files, and report crashes, hangs, excessive memory and anything but an array or an `ImageFault`.

    python benchmarks/fuzz_decode.py [--files 100000] [--seed 0] [--workers 2]

The files are made from small valid ones in every format and mode: changed headers, lengths, counts, tables, offsets,
dimensions and orientations, with checksums corrected, and flipped, cut, inserted and spliced bytes. Each is decoded as
`segray segment` decodes an image and its mask, in child processes with limits on memory and time. A file depends only
on its seed and index: `generate_file(seed, index)` of `tests/data/fuzzing` makes it again. Rerun the same command to
resume. The exit code is 1 if there are findings; results/fuzz_decode.json lists them.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import report

from tests.data.fuzzing.child import MAX_CPU_S, MAX_PEAK_BYTES, MAX_PX, Result
from tests.data.fuzzing.chunk import read_results, run_chunk

_FOLDER = Path(__file__).parents[1] / "runs/benchmarks/fuzz"
_CHUNK = 1000  # Files per child process.
_OUTCOMES = ("ok", "unreadable", "truncated", "unsupported", "too_large", "finding")
_MAX_LISTED = 20


def decode_files(num_files: int, seed: int, num_workers: int) -> tuple[list[Result], float]:
    """Decode all files that an earlier call has not decoded; return all results, and how many it decoded per second."""
    folder = _FOLDER / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_files, _CHUNK)
    num_before = sum(len(read_results(folder / f"{start}.jsonl")) for start in starts)
    began_s, results = time.monotonic(), list[Result]()

    def run(start: int) -> list[Result]:
        return run_chunk(seed, start, min(start + _CHUNK, num_files), folder / f"{start}.jsonl")

    with ThreadPoolExecutor(num_workers) as pool:
        for decoded in pool.map(run, starts):
            results += decoded
            findings = sum(bool(result.finding) for result in results)
            print(f"{len(results):,} of {num_files:,} files, {findings} findings", flush=True)
    return results, max(0, len(results) - num_before) / (time.monotonic() - began_s)


def make_rows(results: list[Result]) -> list[list[str]]:
    """Return the rows of the table: the outcomes of each format, and the most time and memory that a file took."""
    rows = []
    for name in [*sorted({result.format for result in results}), "all"]:
        of_format = [result for result in results if name in (result.format, "all")]
        outcomes = Counter("finding" if result.finding else result.image for result in of_format)
        rows.append(
            [
                *(name, f"{len(of_format):,}"),
                *(f"{outcomes[outcome]:,}" for outcome in _OUTCOMES),
                f"{sum(result.mask == 'ok' for result in of_format):,}",
                f"{max(result.cpu_s for result in of_format):.2f}",
                f"{max(result.peak_bytes for result in of_format) / 2**20:.0f}",
            ]
        )
    return rows


def _list_most(results: list[Result], figure: str) -> list[dict[str, Any]]:
    """Return the files with the highest values of a figure."""
    most = sorted(map(vars, results), key=lambda result: -float(result[figure]))
    return [{name: result[name] for name in ("index", "format", "image", figure)} for result in most[:5]]


def main() -> None:
    """Decode the files and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    results, files_per_s = decode_files(arguments.files, arguments.seed, arguments.workers)
    findings = [result for result in results if result.finding]
    for result in findings[:_MAX_LISTED]:
        print(f"seed {arguments.seed}, index {result.index}, {result.format}: {result.finding}")
    columns = ["format", "files", *_OUTCOMES[:-1], "findings", "mask ok", "most s", "most MiB"]
    figures = {
        "seed": arguments.seed,
        "files_per_s": round(files_per_s, 1),
        "limits": {"px": MAX_PX, "cpu_s": MAX_CPU_S, "peak_mib": MAX_PEAK_BYTES // 2**20},
        "slowest": _list_most(results, "cpu_s"),
        "largest": _list_most(results, "peak_bytes"),
        "findings": [{"seed": arguments.seed, **vars(result)} for result in findings],
    }
    report("fuzz_decode", columns, make_rows(results), figures)
    print(f"{files_per_s:.0f} files/s with {arguments.workers} workers; {len(findings)} findings")
    shutil.rmtree(_FOLDER / f"seed-{arguments.seed}")
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    main()
