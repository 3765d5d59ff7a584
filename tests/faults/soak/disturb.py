"""Runs ``segray segment`` until it is complete, while its processes are killed and measured."""

import subprocess
import time

import psutil

from tests.faults.soak.checks import list_fragments
from tests.faults.soak.place import Place
from tests.faults.soak.processes import Killer, MemoryLog, find_workers

_MAX_UNEXPECTED_ENDS = 5
_COUNT_S = 2  # How often the written fragments are counted.


class DisturbedRun:
    """Repeats the command until the run is complete, and disturbs it.

    Args:
        place: Where images and results are.
        settings: Arguments of ``--set``.
        killer: Kills processes.
        num_disturbed: Number of written fragments after which no process is killed any more.
    """

    def __init__(self, place: Place, settings: list[str], killer: Killer, num_disturbed: float) -> None:
        self._place = place
        self._settings = settings
        self._killer = killer
        self._num_disturbed = num_disturbed
        self.num_starts = 0
        self.unexpected: list[str] = []

    def run(self) -> None:
        """Run ``segray segment``, again and again, until it succeeds or has failed too often without being killed."""
        memory = MemoryLog(self._place.folder / "memory.csv")
        while len(self.unexpected) < _MAX_UNEXPECTED_ENDS:
            self.num_starts += 1
            num_kills = self._killer.num_killed["driver"]
            with self._place.start_segment(self._settings, "driver.log") as process:
                self._disturb(process, memory)
                code = process.wait()
            if code == 0:
                break
            if self._killer.num_killed["driver"] == num_kills:
                lines = (self._place.folder / "driver.log").read_text().splitlines()
                self.unexpected.append(f"exit code {code}: {lines[-1] if lines else ''}")
        memory.close()

    def _disturb(self, process: "subprocess.Popen[bytes]", memory: MemoryLog) -> None:
        """Kill and measure processes until the driver ends."""
        driver = psutil.Process(process.pid)
        num_written, counted_s = len(list_fragments(self._place.output_uri)), time.monotonic()
        self._killer.restart(num_written)
        while process.poll() is None:
            if time.monotonic() - counted_s > _COUNT_S:
                num_written, counted_s = len(list_fragments(self._place.output_uri)), time.monotonic()
            due = self._killer.list_due(num_written) if num_written < self._num_disturbed else []
            if due or memory.is_due:
                processes = {"driver": [driver], **find_workers(driver)}
                if memory.is_due:
                    memory.sample(processes, num_written)
                for kind in due:
                    self._killer.kill(kind, processes[kind], num_written)
            time.sleep(0.2)
