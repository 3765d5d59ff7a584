"""Decode a range of mutated files in child processes that may crash, and resume where an earlier call ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from segray.runtime.connect import MEMORY_VARIABLES
from tests.data.fuzzing.child import Result
from tests.data.fuzzing.generate import generate_file

CHILD = ("-m", "tests.data.fuzzing.child")  # Arguments of Python.
_ROOT = Path(__file__).parents[3]
_LIMITS = {signal.SIGPROF: "took too much CPU time", signal.SIGALRM: "took too long"}


def run_chunk(seed: int, start: int, stop: int, path: Path) -> list[Result]:
    """Decode the files from ``start`` to ``stop`` of a seed, and return one result per file.

    Args:
        seed: Seed of the files.
        start: Index of the first file.
        stop: Index after the last file.
        path: Where the results are kept, as lines of JSON; files that have one there are not decoded again.

    Raises:
        RuntimeError: The child process failed for another reason than one of the files.
    """
    while len(results := read_results(path)) < stop - start:
        at = start + len(results)
        _keep_results(path, results)  # Without a last line that was cut off.
        command = [sys.executable, *CHILD, str(seed), str(at), str(stop), str(path)]
        environment = {**os.environ, **MEMORY_VARIABLES}  # As in the processes that decode.
        done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode > 0:
            raise RuntimeError(f"seed {seed}, files {at} to {stop}: exit code {done.returncode}\n{done.stderr}")
        if done.returncode < 0:
            results = read_results(path)
            index = start + len(results)
            number = signal.Signals(-done.returncode)
            finding = _LIMITS.get(number, f"crashed with {number.name}")
            _keep_results(path, [*results, Result(index, generate_file(seed, index)[0], "finding", "finding", finding)])
    return results


def read_results(path: Path) -> list[Result]:
    """Return the results in a file; a last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Result(**json.loads(line)) for line in lines if line.endswith("\n")]


def _keep_results(path: Path, results: list[Result]) -> None:
    path.write_text("".join(json.dumps(vars(result)) + "\n" for result in results))
