"""One way to Ray: the cluster that ``RAY_ADDRESS`` names (a submitted job has it set), or a private one on loopback."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from segray.errors import ConfigError, SegrayError

# Ray Data and Ray Train can deadlock on fewer logical CPUs, where each stage waits for the other's.
MIN_LOCAL_CPUS = 4
# Where a store is, not who we are: workers need these as the driver has them. Credentials never travel this way.
_FORWARDED_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


def is_submitted_job() -> bool:
    """Say whether this process is the driver of a ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def connect_ray(num_gpus: float = 0) -> Iterator[None]:
    """Connect to Ray for the duration of a block.

    A bare ``ray.init()`` would attach to any cluster that happens to run on this machine, so a private one is started
    unless ``RAY_ADDRESS`` names one. A connection that the caller has made already is used and left open.

    Args:
        num_gpus: GPUs that the work will ask for.

    Raises:
        ConfigError: This machine, with no cluster around it, has fewer GPUs than that.
    """
    import ray  # 1 s: not before the input has been looked at

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # workers' own output goes to Ray's log folder; what a user has to know comes through segray's display and errors
    with_logs = bool(os.environ.get("SEGRAY_WORKER_LOGS"))
    # the future behaviour; unset, Ray warns each time
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not with_logs:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray's C++ writes to the driver's terminal
    options = {"logging_level": logging.WARNING, "log_to_driver": with_logs}
    if address:
        forwarded = {name: os.environ[name] for name in _FORWARDED_VARIABLES if name in os.environ}
        ray.init(address=address, runtime_env={"env_vars": forwarded}, **options)
    else:
        # default 2 s, and fit() waits for several of these
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        # a cluster of its own asks for a token, Ray's default where RAY_AUTH_MODE is not set; it need not announce that
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        ray.init(
            address="local",
            num_cpus=max(MIN_LOCAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            **options,
        )
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
