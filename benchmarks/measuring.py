"""Shared code of the benchmarks: describe the machine, measure processes, write a table and a JSON file."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from segray.runtime.connect import MEMORY_VARIABLES

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks/results"
_PACKAGES = ("ray", "torch", "torchvision", "segmentation-models-pytorch", "pyarrow", "numpy", "pillow")


@dataclass(frozen=True)
class Measured:
    """A process measured from its start to its end.

    Attributes:
        wall_s: Elapsed time.
        busy_core_s: Busy time of all cores of the machine in that time, including other processes such as Ray's.
        started_s: Start, in seconds since 1970.
        output: Everything that it printed to both streams.
        samples: Time in seconds since 1970 and ``count_busy_core_s``, twice a second.
    """

    wall_s: float
    busy_core_s: float
    started_s: float
    output: str
    samples: list[tuple[float, float]]

    def count_busy_core_s(self, from_s: float, to_s: float) -> float:
        """Return the busy core-seconds between two times in seconds since 1970, interpolated between samples."""
        times, busy = zip(*self.samples, strict=True)
        return float(np.interp(to_s, times, busy) - np.interp(from_s, times, busy))


def restart_with_kept_memory() -> None:
    """Start this script again with the memory settings of segray's processes, which are read when a process starts."""
    if not MEMORY_VARIABLES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY_VARIABLES})


def describe_machine(*packages: str) -> dict[str, str]:
    """Return the conditions of a measurement: date, processor, cores, memory, GPU, versions of Python and packages."""
    names = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    processor = next((line.split(":")[1].strip() for line in names if line.startswith("model name")), "")
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor or platform.processor() or platform.machine(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _describe_gpu(),
        "python": platform.python_version(),
    }
    for package in (*_PACKAGES, *packages):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "none"
    return described


def _describe_gpu() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return "none"
    return asked.stdout.strip() or "none"


def count_busy_core_s() -> float:
    """Return the busy core-seconds of the machine since it started, summed over all cores."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "steal", 0))


def run_measured(command: list[str], environment: dict[str, str] | None = None) -> Measured:
    """Run a process in the project's root and wait for its end.

    Raises:
        SystemExit: The process failed; the message contains its output.
    """
    samples = [(time.time(), count_busy_core_s())]
    with TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while process.poll() is None:
            time.sleep(0.5)
            samples.append((time.time(), count_busy_core_s()))
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{text}\nexit code {process.returncode}")
    (started_s, busy), (ended_s, busy_at_end) = samples[0], samples[-1]
    return Measured(ended_s - started_s, busy_at_end - busy, started_s, text, samples)


def read_results(name: str) -> dict[str, Any]:
    """Return the content that ``report`` wrote to ``results/<name>.json``."""
    results: dict[str, Any] = json.loads((_RESULTS / f"{name}.json").read_text())
    return results


def report(name: str, columns: list[str], rows: list[list[str]], figures: dict[str, Any], *packages: str) -> None:
    """Print a table, and write it with the figures and the machine's description to ``results/<name>.json``."""
    machine = describe_machine(*packages)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console = Console(width=120)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    _RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine, **figures, "table": [dict(zip(columns, row, strict=True)) for row in rows]}
    path = _RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: {path}", highlight=False)
