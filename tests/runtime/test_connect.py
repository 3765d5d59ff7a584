"""One way to Ray: what a private one shows to the network, and what becomes of Ray's errors."""

import json
import resource
import signal
import subprocess
import sys

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ObjectStoreFullError, RayTaskError, WorkerCrashedError

from segray.errors import ClusterError, FaultKind, ImageFault, StorageError
from segray.runtime import connect as cluster
from segray.runtime.connect import translated_ray_errors


def work() -> int:
    return 1


def fail() -> None:
    raise ImageFault(FaultKind.CHANGED, "one line")


@pytest.mark.usefixtures("ray_session")
def test_a_private_ray_listens_on_loopback_alone() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    assert ray.get(ray.remote(work).remote()) == 1
    servers = [child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")]
    pids = {process.pid for server in servers for process in [server, *server.children(recursive=True)]}
    assert len(pids) > 3
    listening = {
        connection.laddr[0].removeprefix("::ffff:")
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.pid in pids
    }
    assert listening == {"127.0.0.1"}


def test_a_private_ray_leaves_the_terminal_to_what_has_something_to_say() -> None:
    script = """
import sys, ray
from segray.runtime.connect import connect_ray
begin = ray.init
ray.init = lambda **options: (begin(**options), print("a warning", file=sys.stderr))
with connect_ray():
    print("connected")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("connected\n", "a warning\n")


def count_page_faults() -> int:
    import numpy as np  # in the worker

    def use_64_mib() -> None:
        np.ones(2**23)

    use_64_mib()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use_64_mib()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.usefixtures("ray_session")
def test_a_worker_keeps_the_memory_that_it_has_once_used() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pages = 5 * 2**26 // resource.getpagesize()
    assert ray.get(ray.remote(count_page_faults).remote()) < pages / 100


def test_a_cluster_is_told_what_workers_need_but_not_what_the_job_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    job = {"runtime_env": {"env_vars": {"AWS_REGION": "us-east-1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    forwarded = cluster._collect_forwarded_variables()
    assert "AWS_REGION" not in forwarded
    assert forwarded["MALLOC_ARENA_MAX"] == "4"
    assert forwarded["MALLOC_MMAP_MAX_"] == "0"


@pytest.mark.usefixtures("ray_session")
def test_a_workers_error_arrives_as_it_was_raised() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(ImageFault) as caught, translated_ray_errors("trying"):
        ray.get(ray.remote(fail).remote())
    assert (str(caught.value), caught.value.kind) == ("one line", FaultKind.CHANGED)


def test_what_ray_data_adds_to_an_error_is_not_shown() -> None:
    error = StorageError("cannot read s3://b/k: permission denied")
    error.args = (f"{error.args[0]}\nFailed to apply UDF transform after 1/1 attempts",)
    assert str(error) == "cannot read s3://b/k: permission denied"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ObjectStoreFullError("full"), StorageError, "trying: a node's disk or object store is full"),
        (WorkerCrashedError(), ClusterError, "trying failed: .*SEGRAY_WORKER_LOGS=1"),
        (
            RayTaskError("f", "trace\nValueError: odd", ValueError("odd")),
            ClusterError,
            "trying failed: ValueError: odd",
        ),
    ],
    ids=["full", "crashed", "foreign"],
)
def test_rays_own_errors_are_one_line(error: Exception, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message) as caught, translated_ray_errors("trying"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("is_skipped", "expected"), [(False, -signal.SIGABRT), (True, 5)])
def test_exit_handlers_of_libraries_are_skipped_and_the_status_is_kept(is_skipped: bool, expected: int) -> None:
    script = """
import atexit, ctypes, sys
from segray.runtime.connect import skip_exit_handlers
libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)  # as Ray's handler goes wrong
if sys.argv[1] == "True":
    skip_exit_handlers()
atexit.register(print, "Python's own are called")
sys.exit(5)
"""
    command = [sys.executable, "-c", script, str(is_skipped)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert ended.returncode == expected
    assert ended.stdout == "Python's own are called\n"
