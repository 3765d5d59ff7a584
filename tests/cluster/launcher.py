"""Run Ray's commands as a user does: `ray up`, the tunnel of `ray dashboard`, `ray job submit`, `ray down`."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = "http://127.0.0.1:8265"
_BIN = Path(sys.executable).parent
_UP_TIMEOUT_S = 300
_JOB_TIMEOUT_S = 420


@dataclass
class Job:
    """One process of `ray job submit`, which ends when the job does."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def text(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text()

    def wait(self) -> int:
        """Wait for its end and return the exit code, which only distinguishes success from failure."""
        return self.process.wait(_JOB_TIMEOUT_S)


class Launcher:
    """A home folder with a token, and a cluster that is launched from it.

    Args:
        folder: An empty folder, which becomes the home folder.
        config: Cluster configuration for `ray up`.
        environment: Additional environment variables for Ray's commands.
    """

    def __init__(self, folder: Path, config: dict[str, Any], environment: dict[str, str]) -> None:
        self.folder = folder
        self._config = folder / "cluster.yaml"
        self._config.write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        kept = {name: os.environ[name] for name in ("LANG",) if name in os.environ}
        self.environment = {
            **kept,
            "HOME": str(folder),
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": DASHBOARD,
            "PYTHONUNBUFFERED": "1",  # Prints a job's lines without delay.
            **environment,
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def up(self) -> None:
        """Launch the cluster and open the tunnel to its dashboard."""
        self._run("up", "--yes", "--no-config-cache", str(self._config), timeout_s=_UP_TIMEOUT_S)
        self._start("dashboard", [str(_BIN / "ray"), "dashboard", str(self._config)], self.environment)
        wait_until(_is_dashboard_open, "the tunnel to the dashboard")

    def run_on_head(self, command: str) -> str:
        """Run a command on the head with `ray exec` and return what it printed."""
        return self._run("exec", str(self._config), command, timeout_s=60)

    def submit(self, *arguments: str, variables: dict[str, str] | None = None, **environment: str) -> Job:
        """Start `ray job submit -- python ARGUMENTS` in the project's root.

        Args:
            arguments: Arguments of Python.
            variables: Environment variables of the job.
            environment: Environment variables of the command itself.
        """
        merged = {**self.environment, **environment}
        command = [str(_BIN / "ray"), "job", "submit", "--working-dir", str(ROOT)]
        if variables:
            command += ["--runtime-env-json", json.dumps({"env_vars": variables})]
        command += ["--", "python", *arguments]
        log = self.folder / f"job-{len(self._started)}.log"
        return Job(self._start(log.stem, command, merged), log)

    def run(self, *arguments: str, **options: Any) -> Job:
        """Submit a job and wait for its end; see `submit`."""
        job = self.submit(*arguments, **options)
        job.wait()
        return job

    def stop(self, job: Job) -> None:
        """Stop a job with `ray job stop`."""
        (name,) = set(re.findall(r"raysubmit_\w+", job.text))
        self._run("job", "stop", name, timeout_s=60)

    def down(self) -> None:
        """Stop the cluster with `ray down`."""
        self._run("down", "--yes", str(self._config), timeout_s=_UP_TIMEOUT_S)

    def end(self) -> None:
        """Kill the processes that this object has started and that still run."""
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _run(self, *arguments: str, timeout_s: float) -> str:
        done = subprocess.run(
            [_BIN / "ray", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"ray {' '.join(arguments)}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
        return done.stdout

    def _start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 300, job: Job | None = None) -> None:
    """Wait until a condition is true; fail if it takes too long, or if the job that should cause it has ended."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        text = job.text if job else ""
        assert job is None or job.process.poll() is None, f"the job ended before this happened: {what}\n{text}"
        assert time.monotonic() < deadline_s, f"timed out while waiting for: {what}\n{text}"
        time.sleep(0.2)


def _is_dashboard_open() -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", 8265), timeout=1):
        return True
    return False
