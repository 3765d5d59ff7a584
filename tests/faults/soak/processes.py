"""Finds, kills and measures the processes of a running ``segray segment`` with a private Ray."""

import csv
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import psutil

# Kinds of processes besides the driver, and a part of the titles that Ray gives them.
_TITLES = {
    "decoder": "FragmentDecoder",
    "predictor": "FragmentPredictor",
    "writer": "FragmentWriter",
    "ledger": "ray::Ledger",
}
KINDS = ("driver", *_TITLES)
_MEASURED = ("driver", "predictor", "decoder")
_SAMPLE_S = 10
_STARTING_S = 30  # Younger processes are still growing to their usual size.
_END_TIMEOUT_S = 6  # Workers end within 3 s. Ray's agents, which do nothing any more, would take a minute.


def find_workers(driver: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Return the descendants of a driver by kind; a process that decodes now may write next, and change its kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in _TITLES}
    with suppress(psutil.NoSuchProcess):
        for process in driver.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                title = " ".join(process.cmdline())
                for kind, part in _TITLES.items():
                    if part in title:
                        found[kind].append(process)
    return found


def kill_tree(driver: psutil.Process) -> None:
    """Kill a driver, and wait until its private Ray has ended; what is left of it after 6 s is killed too."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = driver.children(recursive=True)
        driver.kill()
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while (alive := [process for process in family if _is_alive(process)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # A container may have no process that removes zombies.
    except psutil.NoSuchProcess:
        return False


@dataclass
class _Timer:
    """When the next process of a kind is to be killed."""

    due_s: float | None = None
    num_written: int = -1

    def reset(self, num_written: int) -> None:
        self.due_s, self.num_written = None, num_written


class Killer:
    """Kills a process of each kind about every ``interval_s`` seconds.

    The time of a kind starts when a fragment is written after its last kill, so a run makes progress however long a
    process takes to start.

    Args:
        interval_s: Mean time between two kills of a kind. Each is 0.5 to 1.5 times as long.
        log: CSV file to which each kill is appended.
    """

    def __init__(self, interval_s: float, log: Path) -> None:
        self._interval_s = interval_s
        self._log = log
        self._rng = random.Random(0)
        self._timers = {kind: _Timer() for kind in KINDS}
        self.num_killed = Counter(line.split(",")[1] for line in log.read_text().split()) if log.exists() else Counter()

    def restart(self, num_written: int) -> None:
        """Note that a driver has been started, while ``num_written`` fragments are written."""
        for timer in self._timers.values():
            timer.reset(num_written)

    def list_due(self, num_written: int) -> list[str]:
        """Return the kinds of which a process is to be killed now; the driver alone, because its processes end too."""
        now_s = time.monotonic()
        for timer in self._timers.values():
            if timer.due_s is None and num_written > timer.num_written:
                timer.due_s = now_s + self._interval_s * self._rng.uniform(0.5, 1.5)
        due = [kind for kind, timer in self._timers.items() if timer.due_s is not None and timer.due_s <= now_s]
        return ["driver"] if "driver" in due else due

    def kill(self, kind: str, processes: list[psutil.Process], num_written: int) -> None:
        """Kill one of the given processes of a kind, if there is any; if it is the driver, with its private Ray."""
        for process in self._rng.sample(processes, min(1, len(processes))):
            try:
                if kind == "driver":
                    kill_tree(process)
                else:
                    process.kill()
            except psutil.NoSuchProcess:
                continue
            self.num_killed[kind] += 1
            self._timers[kind].reset(num_written)
            with self._log.open("a") as log:
                log.write(f"{time.time():.1f},{kind},{process.pid},{num_written}\n")


class MemoryLog:
    """Writes the memory of the driver, the predictors and the decoders to a CSV file every ten seconds.

    It is resident memory without shared pages: those of Ray's object store are counted in every process that has ever
    read them.
    """

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._file: TextIO = path.open("a", newline="")
        self._writer = csv.writer(self._file)
        if is_new:
            self._writer.writerow(["at_s", "kind", "pid", "started_s", "own_bytes", "num_written"])
        self._next_s = 0.0

    @property
    def is_due(self) -> bool:
        """Whether ten seconds have passed since the last sample."""
        return time.monotonic() >= self._next_s

    def sample(self, processes: Mapping[str, list[psutil.Process]], num_written: int) -> None:
        """Write a line for each process; ``num_written`` is the number of fragments written so far."""
        self._next_s = time.monotonic() + _SAMPLE_S
        for kind in _MEASURED:
            for process in processes[kind]:
                with suppress(psutil.NoSuchProcess):
                    memory, started_s = process.memory_info(), process.create_time()
                    own_bytes = memory.rss - memory.shared
                    self._writer.writerow([f"{time.time():.1f}", kind, process.pid, started_s, own_bytes, num_written])
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def summarize_memory(path: Path) -> list[dict[str, float | str]]:
    """Return how the memory of each kind of process grew: over the whole soak, and over the longest life of one.

    Samples of processes younger than 30 s are left out.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["at_s"]) - float(row["started_s"]) > _STARTING_S]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in _MEASURED}
    return [_summarize(kind, of_kind) for kind, of_kind in by_kind.items() if of_kind]


def _summarize(kind: str, of_kind: list[dict[str, str]]) -> dict[str, float | str]:
    lives: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in of_kind:
        lives.setdefault((row["pid"], row["started_s"]), []).append(row)
    longest = max(lives.values(), key=lambda life: float(life[-1]["at_s"]) - float(life[0]["started_s"]))
    quarter, longest_quarter = -(-len(of_kind) // 4), -(-len(longest) // 4)
    return {
        "kind": kind,
        "samples": len(of_kind),
        "first_quarter_mib": _median_mib(of_kind[:quarter]),
        "last_quarter_mib": _median_mib(of_kind[-quarter:]),
        "most_mib": max(float(row["own_bytes"]) for row in of_kind) / 2**20,
        "longest_life_s": float(longest[-1]["at_s"]) - float(longest[0]["started_s"]),
        "its_first_quarter_mib": _median_mib(longest[:longest_quarter]),
        "its_last_quarter_mib": _median_mib(longest[-longest_quarter:]),
    }


def _median_mib(rows: list[dict[str, str]]) -> float:
    return float(np.median([float(row["own_bytes"]) for row in rows])) / 2**20
