"""Tests of segray.runtime.connect: addresses and output of a private Ray, and its processes."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle

from segray.runtime import connect

ROOT = Path(__file__).parents[2]


def find_listening_addresses() -> set[str]:
    """Return the addresses at which this process and the Ray processes that it has started listen for TCP."""
    pids = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    assert len(pids) > 4
    return {
        connection.laddr[0].removeprefix("::ffff:")
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.pid in pids
    }


@pytest.mark.integration
@pytest.mark.parametrize("first_import", ["import ray", "import segray"])
def test_a_private_ray_listens_on_loopback_only_and_prints_nothing_but_warnings(first_import: str) -> None:
    script = f"""
{first_import}
import ray, sys
from segray.runtime.connect import connect_ray
begin = ray.init
ray.init = lambda **options: (begin(**options), print("a warning", file=sys.stderr))
with connect_ray():
    from tests.runtime.test_connect import find_listening_addresses
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print(*find_listening_addresses())
"""
    unset = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "127.0.0.1\n", "a warning\n")


def count_page_faults() -> int:
    import numpy as np  # Imported in the worker.

    def use_64_mib() -> None:
        np.ones(2**23)

    use_64_mib()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use_64_mib()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.usefixtures("ray_session")
def test_a_worker_keeps_freed_memory() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Workers cannot import tests.
    pages = 5 * 2**26 // resource.getpagesize()
    assert ray.get(ray.remote(count_page_faults).remote()) < pages / 100


def test_variables_are_forwarded_to_a_cluster_unless_the_job_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    job = {"runtime_env": {"env_vars": {"AWS_REGION": "us-east-1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    forwarded = connect._collect_forwarded_variables()
    assert "AWS_REGION" not in forwarded
    assert forwarded["MALLOC_ARENA_MAX"] == "4"
    assert forwarded["MALLOC_MMAP_MAX_"] == "0"


@pytest.mark.parametrize(("is_skipped", "expected"), [(False, -signal.SIGABRT), (True, 5)])
def test_exit_handlers_of_libraries_are_skipped_and_the_exit_status_is_kept(is_skipped: bool, expected: int) -> None:
    script = """
import atexit, ctypes, sys
from segray.runtime.connect import skip_exit_handlers
libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)  # Stands for Ray's handler, which can fail.
if sys.argv[1] == "True":
    skip_exit_handlers()
atexit.register(print, "Python's exit handlers run")
sys.exit(5)
"""
    command = [sys.executable, "-c", script, str(is_skipped)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert ended.returncode == expected
    assert ended.stdout == "Python's exit handlers run\n"
