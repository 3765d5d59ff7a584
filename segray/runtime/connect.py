"""One way to Ray: the cluster that ``RAY_ADDRESS`` names (a submitted job has it set), or a private one."""

import ctypes
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from tempfile import TemporaryFile
from typing import Any

from segray.errors import ClusterError, ConfigError, SegrayError, StorageError

# Ray Data and Ray Train can deadlock on fewer logical CPUs, where each stage waits for the other's.
MIN_LOCAL_CPUS = 4
# Where a store is, not who we are: workers need these as the driver has them. Credentials never travel this way.
_FORWARDED_VARIABLES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "SEGRAY_S3_CHECK_MD5",
)
# A C library gives a large tensor back to the kernel when it is freed, and gets the next one page by page: up to half
# of a forward pass on a CPU. With these, glibc's keeps what a worker has once used, in one arena for all its threads.
MEMORY_VARIABLES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
# Of a private Ray. Its metrics and lists of tasks have no reader, and cost a fiftieth of a core; of its health checks,
# every 2 s by default, fit() waits for several.
_PRIVATE_VARIABLES = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    **MEMORY_VARIABLES,  # not by a runtime_env, which a private Ray would have to set up
}
_LOG_LEVEL_LINE = "Set ray log level from environment variable"
_JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`, for its driver


def release_memory() -> None:
    """Give the system back what this process has freed; with ``MEMORY_VARIABLES`` the C library keeps it."""
    with suppress(OSError, AttributeError):  # glibc alone has it, and alone needs it
        ctypes.CDLL(None).malloc_trim(0)


def skip_exit_handlers() -> None:
    """Let this process end without the exit handlers that C and C++ libraries have registered by now, Ray's among them.

    In Ray 2.60 that one takes its event loop apart, and can wait for ever for a lock that lies in memory already freed.
    Ray holds the process for dead by then; but it keeps its memory, and a GPU's, until somebody kills it. Of fifty
    predictors two did so. When this acts, Python has been shut down, and so has the process's connection to Ray.
    """
    with suppress(OSError, AttributeError):  # glibc alone has it
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)  # what is registered last is called first, and with the exit status


def is_submitted_job() -> bool:
    """Say whether this process is the driver of a ``ray job submit``."""
    return _JOB_CONFIG_VARIABLE in os.environ


def keep_on_loopback() -> None:
    """Let a private Ray listen on loopback alone; of use only before Ray is imported.

    Without it Ray opens its ports to the network, with nothing but its token before them. The switch was made for
    desktops whose firewalls ask about open ports; Ray has no other.
    """
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def count_cores() -> int:
    """Return the cores that this process may use; Ray gives every worker one thread, whatever the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connect_ray(num_cpus: float = 0, num_gpus: float = 0) -> Iterator[None]:
    """Connect to Ray for the duration of a block.

    A bare ``ray.init()`` would attach to any cluster that happens to run on this machine, so a private one is started
    unless ``RAY_ADDRESS`` names one. A connection that the caller has made already is used and left open.

    Args:
        num_cpus: CPUs that the work will ask for; a private Ray is given as many, for to Ray they are only a number.
        num_gpus: GPUs that the work will ask for.

    Raises:
        ConfigError: This machine, with no cluster around it, has fewer GPUs than that.
        ClusterError: Ray cannot be started or reached.
    """
    import ray  # 1 s: not before the input has been looked at

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # the future behaviour; unset, Ray warns each time
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # workers' own output goes to Ray's log folder; what a user has to know comes through segray's display and errors
    with_logs = bool(os.environ.get("SEGRAY_WORKER_LOGS"))
    if not with_logs:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray's C++ writes to the driver's terminal
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": with_logs}
    if address:
        options |= {"address": address, "runtime_env": {"env_vars": _collect_forwarded_variables()}}
    else:
        # a cluster of its own asks for a token, Ray's default where RAY_AUTH_MODE is not set; it need not announce that
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        logical_cpus = max(MIN_LOCAL_CPUS, count_cores(), math.ceil(num_cpus))
        options |= {"address": "local", "num_cpus": logical_cpus, "include_dashboard": False}
        for name, value in _PRIVATE_VARIABLES.items():
            os.environ.setdefault(name, value)
    try:
        with nullcontext() if with_logs or "RAY_LOG_TO_STDERR" in os.environ else _without_log_level_line():
            ray.init(**options)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        where = f"Ray at RAY_ADDRESS={address} cannot be reached" if address else "a private Ray cannot be started"
        raise ClusterError(f"{where}: {get_last_line(error)}; check the address and RAY_AUTH_MODE") from error
    try:
        found = ray.cluster_resources().get("GPU", 0)
        if not address and found < num_gpus:  # a cluster may scale up; this machine will not
            raise ConfigError(
                f"{num_gpus:g} GPUs asked for, this machine has {found:g}; set train.use_gpu: false and "
                "segment.num_gpus_per_predictor: 0, or RAY_ADDRESS to a cluster"
            )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Keep the line off the terminal with which Ray's C++ says that it was told to be quiet.

    It goes around Python's ``sys.stderr``; so what is written there while the block runs is held back, and all but that
    line is written after it.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            sys.stderr.write(
                "".join(
                    line
                    for line in held.read().decode(errors="replace").splitlines(keepends=True)
                    if _LOG_LEVEL_LINE not in line
                )
            )


def _collect_forwarded_variables() -> dict[str, str]:
    """Return the variables that workers need, without those that the job gives them already: Ray refuses both."""
    job = json.loads(os.environ.get(_JOB_CONFIG_VARIABLE, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    here = {name: os.environ[name] for name in (*_FORWARDED_VARIABLES, *MEMORY_VARIABLES) if name in os.environ}
    return {name: value for name, value in {**MEMORY_VARIABLES, **here}.items() if name not in given}


@contextmanager
def translated_ray_errors(what: str) -> Iterator[None]:
    """Turn what Ray raises into the segray error inside it, or into a ``ClusterError`` with Ray's last line."""
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

    try:
        yield
    except (OutOfDiskError, ObjectStoreFullError) as error:
        raise StorageError(
            f"{what}: a node's disk or object store is full: {get_last_line(error)}; free some space, then the same "
            "call goes on"
        ) from error
    except RayError as error:
        raise find_segray_error(error) or ClusterError(
            f"{what} failed: {get_last_line(error)}; run with SEGRAY_WORKER_LOGS=1 to see what led to it"
        ) from error


def find_segray_error(error: BaseException) -> SegrayError | None:
    """Return the segray error that a worker raised, out of whatever Ray has wrapped it in."""
    if isinstance(error, SegrayError) and not hasattr(error, "cause"):  # Ray's copies have a cause, and a long text
        return error
    inner = [getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values(), error.__cause__]
    for candidate in inner:
        if isinstance(candidate, BaseException) and (found := find_segray_error(candidate)):
            return found
    return None


def get_last_line(error: BaseException) -> str:
    """Return the last line of a long error text, where Ray puts what went wrong."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
