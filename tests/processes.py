"""Find the processes of a Ray that a test has started."""

from contextlib import suppress

import psutil


def find_workers(title: str, pid: int | None = None) -> list[psutil.Process]:
    """Return the descendants of a process (default: this one) whose command line contains a text, oldest first.

    A Ray worker has the class of its actor in its command line.
    """
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # It may end at any time.
            if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)
