"""Tests of cluster.yaml on EC2 simulated by moto: workers start when there is work and are terminated when idle."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.calls import build_segment_call, list_image_uris
from tests.cluster.cloud import Cloud
from tests.cluster.conftest import ENVIRONMENT, LITTLE_MEMORY, NEEDS_HOSTS, shrink_nodes
from tests.cluster.hosts import CLOUD, Hosts
from tests.cluster.launcher import ROOT, Job, Launcher, wait_until
from tests.faults.buckets import BUCKET, S3Bucket
from tests.faults.object_store import ACCOUNT, USER, ObjectStore
from tests.faults.scene import read_files, read_table

pytestmark = NEEDS_HOSTS

HEAD, *WORKERS = ("n1", "n2", "n3", "n4")
IDLE_S = 20


@pytest.fixture(scope="module")
def cloud(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:  # Depends on the hosts' network.
    with Cloud(tmp_path_factory.mktemp("cloud") / "log") as cloud:
        yield cloud


def fit_to_hosts(config: dict[str, Any], hosts: Hosts, cloud: Cloud) -> dict[str, Any]:
    """Return cluster.yaml adapted to the hosts: instances have their addresses, and Ray runs without containers."""
    text = json.dumps(config)
    for place, value in (
        ("AMI with Docker and NVIDIA driver 580 or later, such as a deep-learning base image", cloud.ids["ami"]),
        ("name of your EC2 key pair", cloud.ids["key pair"]),
        ("private subnet", cloud.ids["subnet"]),
        ("security group that admits itself and SSH from where you run ray up", cloud.ids["security group"]),
        ("path of the private key of that key pair", str(hosts.client_key)),
    ):
        assert f"<{place}>" in text
        text = text.replace(f"<{place}>", value)
    config = json.loads(text.replace("/home/ray/", "~/"))
    options = config.pop("docker")["run_options"]
    variables = [option.removeprefix("--env ") for option in options if option.startswith("--env ")]
    config["auth"]["ssh_user"] = "root"
    config["idle_timeout_minutes"] = IDLE_S / 60
    config["max_workers"] = len(WORKERS)
    # An instance must have the address of its host, so each worker is a separate node type.
    types = config["available_node_types"]
    spot = types.pop("gpu_spot")
    del types["gpu_on_demand"]
    types["head"]["node_config"]["PrivateIpAddress"] = hosts.get_address(HEAD)
    for name in WORKERS:
        node_config = {**spot["node_config"], "PrivateIpAddress": hosts.get_address(name)}
        types[f"worker-{name}"] = {
            **spot,
            "node_config": node_config,
            "max_workers": 1,
            "resources": {"CPU": 1, "GPU": 0},
        }
    exported = f"export PATH={ENVIRONMENT}/bin:$PATH {' '.join(variables)}"
    config["setup_commands"] = [f"grep -qs RAY_AUTH_MODE ~/.bashrc || echo '{exported}' >> ~/.bashrc"]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[name] = shrink_nodes(config[name], LITTLE_MEMORY)
    return config


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    config = fit_to_hosts(yaml.safe_load((ROOT / "cluster.yaml").read_text()), hosts, cloud)
    keys = {"AWS_ACCESS_KEY_ID": "ADMIN", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_ENDPOINT_URL": CLOUD}
    launcher = Launcher(tmp_path_factory.mktemp("aws"), config, keys)
    try:
        launcher.up()
        yield launcher
    finally:
        launcher.end()
        for name in (HEAD, *WORKERS):
            hosts.end_processes(name)


def test_ray_up_starts_only_the_head(cluster: Launcher, cloud: Cloud) -> None:
    (head,) = cloud.find_instances()
    assert head["PrivateIpAddress"] == "10.77.0.1"
    assert head["IamInstanceProfile"]["Arn"].endswith("/segray-head")
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    assert "1 head" in cluster.run_on_head("ray status")


def watch_workers(cloud: Cloud, job: Job) -> set[frozenset[str]]:
    """Return every set of workers that existed at the same time until the job ended."""
    seen: set[frozenset[str]] = set()

    def look() -> bool:
        seen.add(frozenset(cloud.find_workers()))
        return job.process.poll() is not None

    wait_until(look, "the end of the job", timeout_s=600)
    return seen


def test_a_segmentation_starts_workers_from_none_and_they_are_terminated_afterwards(
    cluster: Launcher, cloud: Cloud, store: ObjectStore
) -> None:
    call = build_segment_call("segmented/from-zero", num_predictors=2)
    job = cluster.submit(*call)
    seen = watch_workers(cloud, job)
    assert job.process.returncode == 0, job.text
    assert "waiting for nodes for 2 predictors with 0.89 CPU each: the cluster has 0 CPU, 0 GPU on 1 node" in job.text
    assert len(max(seen, key=len)) >= 2
    rows = read_table(read_files(S3Bucket(store), "segmented/from-zero"))["uri"].to_pylist()
    assert sorted(rows) == sorted(list_image_uris(store))
    wait_until(lambda: not cloud.find_workers(), "the end of all workers", timeout_s=IDLE_S + 90)
    assert len(cloud.find_instances()) == 1, "only the head is still running"


def test_a_training_run_starts_exactly_its_workers(cluster: Launcher, cloud: Cloud, training_data: str) -> None:
    output = f"output=s3://{BUCKET}/trained-on-aws"
    job = cluster.submit("jobs/train.py", training_data, "--set", output, "--set", "train.num_epochs=3")
    seen = watch_workers(cloud, job)
    assert job.process.returncode == 0, job.text
    assert max(map(len, seen)) == 2, seen


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["jobs/train.py", "{training}", "--set", "train.num_train_workers=5", "--set", "train.global_batch_size=5"],
            "error: train.num_train_workers: requested 5 training workers with 1 CPU each, but at most 3 can be ",
        ),
        (
            build_segment_call("never", num_gpus_per_predictor=1),
            "error: segment.num_gpus_per_predictor: requested 1 predictor with 1 CPU and 1 GPU, but at most 0 can be ",
        ),
    ],
    ids=["train", "segment"],
)
def test_a_job_that_can_never_be_placed_fails_within_a_minute(
    cluster: Launcher, cloud: Cloud, training_data: str, arguments: list[str], line: str
) -> None:
    wait_until(lambda: not cloud.find_workers(), "the end of all workers", timeout_s=IDLE_S + 90)
    began_s = time.monotonic()
    job = cluster.run(*(argument.format(training=training_data) for argument in arguments))
    assert time.monotonic() - began_s < 60
    assert job.process.returncode != 0
    assert line in job.text
    assert "the cluster has 0 CPU, 0 GPU on 1 node and may add 1 worker-n2 (1 CPU, 0 GPU)" in job.text
    assert not cloud.find_workers()


def test_a_job_without_the_cluster_configuration_prints_the_autoscalers_report(cluster: Launcher) -> None:
    """As on Kubernetes: this job has another home folder, so it does not find the configuration of `ray up`."""
    files = {
        "AWS_CONFIG_FILE": ".aws/config",
        "AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials",
        "RAY_AUTH_TOKEN_PATH": ".ray/auth_token",
    }
    variables = {"HOME": "/nonexistent", **{name: str(Path.home() / path) for name, path in files.items()}}
    began_s = time.monotonic()
    call = build_segment_call("never", num_predictors=1, num_gpus_per_predictor=1)
    job = cluster.submit(*call, variables=variables)
    line = "the autoscaler has no nodes for 1 process with 1 CPU and 1 GPU: the cluster has "

    wait_until(lambda: line in job.text, "the autoscaler's report", timeout_s=90, job=job)
    assert time.monotonic() - began_s < 60
    cluster.stop(job)
    job.wait()


def test_the_head_used_only_permissions_of_its_policy(cluster: Launcher, cloud: Cloud) -> None:
    policy = json.loads(cloud.fill_in("head-policy.json"))["Statement"]
    allowed = {statement["Action"] for statement in policy}
    calls = cloud.read_calls(f"{ACCOUNT}:{USER}")
    assert {f"ec2:{call['Action'][0]}" for call in calls} | {"iam:PassRole"} == allowed
    (start,) = (statement for statement in policy if statement["Sid"] == "StartWorkersOfThisCluster")
    (update,) = (statement for statement in policy if statement["Sid"] == "UpdateStateTagsOfInstances")
    for call in calls:
        values = {name: value[0] for name, value in call.items()}
        if values["Action"] == "RunInstances":
            tags = read_tags(values, "TagSpecification.1.")
            assert {
                "aws:RequestTag/ray-cluster-name": tags["ray-cluster-name"],
                "aws:RequestTag/ray-node-type": tags["ray-node-type"],
                "ec2:InstanceType": values["InstanceType"],
                "ec2:MetadataHttpTokens": values["MetadataOptions.HttpTokens"],
            } == start["Condition"]["StringEquals"]
            profile = start["Condition"]["ArnEquals"]["ec2:InstanceProfile"]
            assert profile.endswith(f":instance-profile/{values['IamInstanceProfile.Name']}")
        if values["Action"] == "CreateTags":
            keys = update["Condition"]["ForAllValues:StringEquals"]["aws:TagKeys"]
            assert read_tags(values, "").keys() <= set(keys)


def read_tags(values: dict[str, str], prefix: str) -> dict[str, str]:
    """Return the tags in the parameters of an EC2 call."""
    numbers = {match.group(1) for name in values if (match := re.match(rf"{re.escape(prefix)}Tag\.(\d+)\.Key", name))}
    return {values[f"{prefix}Tag.{number}.Key"]: values[f"{prefix}Tag.{number}.Value"] for number in numbers}


def test_ray_down_terminates_all_instances(cluster: Launcher, cloud: Cloud) -> None:
    cluster.down()
    assert not cloud.find_instances("pending", "running", "stopping", "stopped")
    assert cloud.find_instances("terminated")
