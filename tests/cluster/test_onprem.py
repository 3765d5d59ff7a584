"""Tests of clusters/onprem.yaml on three hosts: `ray up`, both jobs, the token, killed and disconnected nodes."""

import io
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
import yaml
from pyarrow import csv

from tests.cluster.calls import NUM_EPOCHS, build_segment_call, list_keys
from tests.cluster.conftest import ENVIRONMENT, FAIL_NEXT_START, NEEDS_HOSTS, shrink_nodes
from tests.cluster.hosts import Hosts
from tests.cluster.launcher import ROOT, Launcher, wait_until
from tests.faults.buckets import BUCKET, S3Bucket
from tests.faults.object_store import ObjectStore
from tests.faults.scene import read_files, require_invariant

pytestmark = NEEDS_HOSTS

HEAD, *WORKERS = NAMES = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    config = yaml.safe_load((ROOT / "clusters" / "onprem.yaml").read_text())
    config["cluster_name"] += "-onprem"  # Ray's SSH connections are shared by all clusters of a name.
    config["provider"] |= {
        "head_ip": hosts.get_address(HEAD),
        "worker_ips": [hosts.get_address(name) for name in WORKERS],
    }
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.client_key)}
    *_, path_command = config["setup_commands"]
    config["setup_commands"] = [f"ln -sfn {ENVIRONMENT} ~/segray-env", path_command]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[name] = shrink_nodes(config[name])
    launcher = Launcher(tmp_path_factory.mktemp("onprem"), config, {"RAY_UP_enable_autoscaler_v2": "0"})
    try:
        launcher.up()
        wait_for_raylets(hosts)
        yield launcher
    finally:
        launcher.end()
        for name in NAMES:
            hosts.end_processes(name)


def wait_for_raylets(hosts: Hosts) -> None:
    try:
        wait_until(lambda: all(hosts.find_processes(name, "raylet/raylet") for name in NAMES), "Ray on all hosts")
    except AssertionError as error:
        logs = hosts.run(HEAD, "bash", "-c", "tail -n 60 /tmp/ray/session_latest/logs/monitor.*", check=False)
        raise AssertionError(f"{error}\n{logs.stdout}") from error


def find_worker_with(hosts: Hosts, title: str) -> str:
    """Return a host other than the head, preferably one with a process whose command line contains a text."""
    return next((name for name in WORKERS if hosts.find_processes(name, title)), WORKERS[0])


@pytest.fixture(scope="module")
def clean(cluster: Launcher, store: ObjectStore) -> dict[str, bytes]:
    """Files of a run in which nothing fails. Its one predictor shows that their bytes do not depend on the number."""
    job = cluster.run(*build_segment_call("segmented/clean", num_predictors=1))
    assert job.process.returncode == 0, job.text
    return read_files(S3Bucket(store), "segmented/clean")


def test_training_on_two_nodes_continues_when_one_of_them_dies(
    cluster: Launcher, hosts: Hosts, store: ObjectStore, training_data: str
) -> None:
    job = cluster.submit("jobs/train.py", training_data)
    wait_until(lambda: "epoch  2/" in job.text, "two epochs", job=job)
    ranks = {name for name in NAMES if hosts.find_processes(name, "RayTrainWorker")}
    assert len(ranks) == 2, "the two workers are on two nodes"
    hosts.kill_raylet(max(ranks))  # n1 is the head.
    assert job.wait() == 0, job.text
    begun = [int(epoch) for epoch in re.findall(r"resuming after epoch (\d+)", job.text)]
    assert len(begun) == 1, job.text
    assert begun[0] >= 2, "it continued from its newest checkpoint, not from the first step"
    body = store.client().get_object(Bucket=BUCKET, Key="trained/metrics.csv")["Body"].read()
    epochs: pa.Table = csv.read_csv(io.BytesIO(body))
    assert epochs["epoch"].to_pylist() == list(range(1, NUM_EPOCHS + 1))
    assert len(list_keys(store, "trained/bundle/model.safetensors")) == 1
    wait_for_raylets(hosts)  # Ray's autoscaler restarts the node.


def test_segmentation_loses_and_duplicates_no_rows_when_a_node_dies(
    cluster: Launcher, hosts: Hosts, store: ObjectStore, clean: dict[str, bytes]
) -> None:
    job = cluster.submit(*build_segment_call("segmented/killed"))
    wait_until(lambda: list_keys(store, "segmented/killed/images/"), "the first fragment", job=job)
    name = find_worker_with(hosts, "FragmentPredictor")
    hosts.run(name, "bash", "-c", f"touch {FAIL_NEXT_START}")
    hosts.kill_raylet(name)
    assert len(list_keys(store, "segmented/killed/images/")) < len(clean) - 2, (
        "the node was killed before the run was nearly complete"
    )
    assert job.wait() == 0, job.text
    require_invariant(read_files(S3Bucket(store), "segmented/killed"), clean)
    wait_for_raylets(hosts)  # Started by the second attempt.
    assert hosts.run(name, "bash", "-c", f"test -e {FAIL_NEXT_START}", check=False).returncode == 1


def test_segmentation_loses_and_duplicates_no_rows_when_a_node_is_disconnected(
    cluster: Launcher, hosts: Hosts, store: ObjectStore, clean: dict[str, bytes]
) -> None:
    job = cluster.submit(*build_segment_call("segmented/cut"))
    wait_until(lambda: list_keys(store, "segmented/cut/images/"), "the first fragment", job=job)
    name = find_worker_with(hosts, "FragmentPredictor")
    hosts.disconnect(name)
    try:
        assert job.wait() == 0, job.text
        require_invariant(read_files(S3Bucket(store), "segmented/cut"), clean)
        raylets = hosts.find_processes(name, "raylet/raylet")
    finally:
        hosts.reconnect(name)
    # The node's workers are connected again and may write until its raylet learns that it is considered dead and exits.
    wait_until(lambda: not any(process.is_running() for process in raylets), "the end of the disconnected raylet")
    wait_for_raylets(hosts)
    require_invariant(read_files(S3Bucket(store), "segmented/cut"), clean)


@pytest.mark.parametrize(
    ("environment", "refusal"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
    ],
    ids=["without", "wrong"],
)
def test_without_the_token_a_job_is_refused(
    cluster: Launcher, tmp_path: Path, environment: dict[str, str], refusal: str
) -> None:
    job = cluster.run("jobs/train.py", "--help", HOME=str(tmp_path), **environment)
    assert job.process.returncode != 0
    assert refusal in job.text
    assert "submitted successfully" not in job.text


# One method of each gRPC service of Ray's processes. Without a token, calls fail before their arguments are parsed.
_METHODS = [
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
    "JobInfoGcsService/GetAllJobInfo",
    "ReporterService/GetTraceback",
    "LogService/ListLogs",
    "RayletDataStreamer/Datapath",
]


def probe(address: str) -> str:
    """Call a port without a token, over HTTP and then over gRPC, and return a word for how it responds."""
    try:
        with urllib.request.urlopen(f"http://{address}/", timeout=3) as answer:
            kind = urllib.request.urlopen(f"http://{address}/metrics", timeout=3).headers["Content-Type"]
            return "metrics" if kind.startswith("text/plain; version=") else f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        return "refused" if error.code == 401 else f"HTTP {error.code}"
    except Exception:  # Not an HTTP port; the errors vary.
        pass
    answers: set[Any] = set()
    with grpc.insecure_channel(address) as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=5)
                answers.add(method)
            except grpc.RpcError as error:
                answers.add(error.code())
    answers.discard(grpc.StatusCode.UNIMPLEMENTED)
    if answers == {grpc.StatusCode.UNAVAILABLE}:  # For example, metrics that hang after a node was disconnected.
        return "silent"
    return "refused" if answers == {grpc.StatusCode.UNAUTHENTICATED} else str(answers)


@pytest.mark.usefixtures("cluster")
def test_only_ssh_and_metrics_respond_without_the_token(hosts: Hosts) -> None:
    answers: dict[str, set[str]] = {}
    for name in NAMES:
        asked = {port: probe(f"{hosts.get_address(name)}:{port}") for port in hosts.find_open_ports(name)}
        for port, listener in hosts.find_open_ports(name).items():
            if port in asked:  # It was not closed in the meantime.
                answers.setdefault(asked[port], set()).add(f"{name}:{port} {listener}")
    assert answers.keys() - {"silent"} == {"refused", "metrics"}, answers
    assert len(answers["refused"]) >= 5 * len(NAMES)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{hosts.get_address(HEAD)}:8265/", timeout=3)


def test_ray_down_and_ray_stop_leave_nothing_running(cluster: Launcher, hosts: Hosts) -> None:
    """Both steps are needed: `ray down` stops only the head, and leaves helper processes running on the workers."""

    def find_ray(name: str) -> set[int]:
        return {process.pid for title in ("/ray/", "ray::") for process in hosts.find_processes(name, title)}

    assert all(len(find_ray(name)) >= 4 for name in NAMES)
    cluster.down()
    assert not find_ray(HEAD)
    for name in WORKERS:
        hosts.run(name, "bash", "-c", "~/segray-env/bin/ray stop")
    assert not any(find_ray(name) for name in NAMES)
