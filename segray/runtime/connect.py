"""Connect to Ray: the cluster that ``RAY_ADDRESS`` names (submitted jobs have it set), or a private one."""

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

from segray.errors import ClusterError, ConfigError
from segray.runtime.failures import get_last_line

# With fewer logical CPUs, Ray Data and Ray Train can deadlock: their stages wait for each other's CPUs.
MIN_LOCAL_CPUS = 4
# Workers need these with the driver's values, because they say where a store is. Credentials are never forwarded.
_FORWARDED_VARIABLES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"),
    "SEGRAY_S3_CHECK_MD5",
)
# By default a C library returns a large freed tensor to the kernel and faults the next one in page by page, which costs
# up to half of a forward pass on a CPU. With these variables glibc keeps the memory, in one arena for all threads.
MEMORY_VARIABLES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
# For a private Ray. Nobody reads its metrics and task lists, which cost 2% of a core. fit() waits for several health
# checks, which run every 2 s by default. The preemption watcher, one more process per run, is for cloud nodes.
_PRIVATE_VARIABLES = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    **MEMORY_VARIABLES,  # Not through a runtime_env, which a private Ray would have to set up.
}
_LOG_LEVEL_LINE = "Set ray log level from environment variable"
_JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # `ray job submit` sets it for the driver.
_CLUSTER_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def release_memory() -> None:
    """Return freed memory of this process to the system; with ``MEMORY_VARIABLES`` the C library keeps it."""
    with suppress(OSError, AttributeError):  # Only glibc has malloc_trim, and only glibc needs it.
        ctypes.CDLL(None).malloc_trim(0)


def skip_exit_handlers() -> None:
    """End this process without the exit handlers that C and C++ libraries, including Ray, have registered so far.

    Ray 2.60's handler destroys its event loop and can wait forever for a lock in memory that is already freed; 2 of 50
    predictors hung this way. Ray considers such a process dead, but it holds its memory, and a GPU's, until it is
    killed. The handlers run after Python has shut down, when the connection to Ray is already closed.
    """
    with suppress(OSError, AttributeError):  # Only glibc has on_exit.
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)  # The last registered handler runs first, and receives the exit status.


def is_submitted_job() -> bool:
    """Return whether this process is the driver of a ``ray job submit``."""
    return _JOB_CONFIG_VARIABLE in os.environ


def keep_on_loopback() -> None:
    """Make a private Ray that this process starts listen on 127.0.0.1 only; do nothing if ``RAY_ADDRESS`` is set.

    By default Ray opens its ports to the network, protected only by its token. The switch was made for desktops
    whose firewalls ask about open ports; Ray has no other. Ray reads it from the environment when it is imported. If
    this process has imported Ray already, Ray's copy of the switch is updated too; ``_node_ip_address="127.0.0.1"`` as
    an argument of ``ray.init`` has no effect, because Ray replaces a loopback address with the machine's own address.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    os.environ.setdefault(_CLUSTER_SWITCH, "0")
    if constants := sys.modules.get("ray._private.ray_constants"):
        constants.ENABLE_RAY_CLUSTER = constants.env_bool(_CLUSTER_SWITCH, False)  # type: ignore[attr-defined]


def count_cores() -> int:
    """Return the number of cores that this process may use; Ray gives every worker one thread regardless."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connect_ray(num_cpus: float = 0, num_gpus: float = 0) -> Iterator[None]:
    """Connect to Ray for the duration of a block.

    Connects to the cluster that ``RAY_ADDRESS`` names. Otherwise starts a private Ray that listens on 127.0.0.1 only; a
    bare ``ray.init()`` would attach to any cluster that happens to run on this machine. A connection that the caller
    has already made is used and left open.

    Args:
        num_cpus: CPUs that the work requests. A private Ray gets at least as many logical CPUs, whatever the machine
            has.
        num_gpus: GPUs that the work requests.

    Raises:
        ConfigError: Ray is private, and this machine has fewer than ``num_gpus`` GPUs.
        ClusterError: Ray cannot be started or reached.
    """
    keep_on_loopback()
    import ray  # This takes 1 s, so it happens only after the input has been checked.

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Opt in to Ray's future behaviour: Ray warns at each start if the variable is unset.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers' output goes to Ray's log folder. What users need to know comes from segray's display and errors.
    with_logs = bool(os.environ.get("SEGRAY_WORKER_LOGS"))
    if not with_logs:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Otherwise Ray's C++ writes to the driver's terminal.
    options = {**_build_init_options(address, num_cpus), "logging_level": logging.WARNING, "log_to_driver": with_logs}
    try:
        with nullcontext() if with_logs or "RAY_LOG_TO_STDERR" in os.environ else _without_log_level_line():
            ray.init(**options)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        what = f"cannot connect to Ray at RAY_ADDRESS={address}" if address else "cannot start a private Ray"
        raise ClusterError(f"{what}: {get_last_line(error)}; check the address and RAY_AUTH_MODE") from error
    try:
        if not address:  # A cluster may add nodes, this machine cannot.
            _require_gpus(num_gpus)
        yield
    finally:
        ray.shutdown()


def _require_gpus(num_gpus: float) -> None:
    import ray

    num_found = ray.cluster_resources().get("GPU", 0)
    if num_found < num_gpus:
        raise ConfigError(
            f"{num_gpus:g} GPUs requested, but this machine has {num_found:g}; set train.use_gpu: false and "
            "segment.num_gpus_per_predictor: 0, or set RAY_ADDRESS to a cluster"
        )


def _build_init_options(address: str | None, num_cpus: float) -> dict[str, Any]:
    """Return the arguments of ``ray.init``; for a private Ray, set its environment variables too."""
    if address:
        return {"address": address, "runtime_env": {"env_vars": _collect_forwarded_variables()}}
    # A private Ray requires a token, Ray's default where RAY_AUTH_MODE is unset. Its announcement is suppressed.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    for name, value in _PRIVATE_VARIABLES.items():
        os.environ.setdefault(name, value)
    logical_cpus = max(MIN_LOCAL_CPUS, count_cores(), math.ceil(num_cpus))
    return {"address": "local", "num_cpus": logical_cpus, "include_dashboard": False}


@contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Remove the line in which Ray's C++ reports its log level from standard error while the block runs.

    Ray writes it to the file descriptor, not to ``sys.stderr``. Everything written to the descriptor is held back, and
    all but that line is written when the block ends.
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
    """Return the variables that workers need, except those that the job already sets: Ray refuses duplicates."""
    job = json.loads(os.environ.get(_JOB_CONFIG_VARIABLE, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    here = {name: os.environ[name] for name in (*_FORWARDED_VARIABLES, *MEMORY_VARIABLES) if name in os.environ}
    return {name: value for name, value in {**MEMORY_VARIABLES, **here}.items() if name not in given}
