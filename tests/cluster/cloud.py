"""EC2 and IAM simulated by moto, for `ray up` with provider aws; the instances are the hosts, by their addresses."""

import base64
import json
import os
import re
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

import boto3

from tests.cluster.hosts import CLOUD, OWN_ADDRESS
from tests.faults.object_store import prepare_child

ROOT = Path(__file__).parents[2]
REGION = "us-west-2"
CLUSTER_NAME = "segray"
_START_TIMEOUT_S = 30


def find_moto() -> Path:
    """Return the Python interpreter with moto, in an environment of its own because its dependencies conflict."""
    path = ROOT / ".venv-moto" / "bin" / "python"
    if not path.exists():
        raise FileNotFoundError(f"no EC2 for the tests: {path} does not exist; run make test-cluster to install it")
    return path


class Cloud:
    """moto's server, which runs from ``__enter__`` to ``__exit__``, with the resources that cluster.yaml refers to.

    Attributes:
        ids: Identifiers of the subnet, security group, key pair and AMI, by placeholder of the policy documents.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.ids: dict[str, str] = {}

    def __enter__(self) -> Self:
        server = [find_moto(), Path(__file__).with_name("moto_server.py")]
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                [*server, "-H", OWN_ADDRESS, "-p", CLOUD.rpartition(":")[2]],
                env={**os.environ, "MOTO_RECORDER_FILEPATH": str(self._log.with_name("calls"))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=prepare_child,
            )
        try:
            self._wait_until_ready()
            self._create_resources()
            self._call("recorder/start-recording")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._server.kill()
        self._server.wait()

    def client(self, service: str) -> Any:
        """Return a boto3 client of a service with an administrator's credentials."""
        keys = {"aws_access_key_id": "ADMIN", "aws_secret_access_key": "not-a-secret"}
        return boto3.client(service, region_name=REGION, endpoint_url=CLOUD, **keys)

    def find_instances(self, *states: str) -> list[dict[str, Any]]:
        """Return the cluster's instances in some states, by default pending and running."""
        filters = [{"Name": "instance-state-name", "Values": states or ["pending", "running"]}]
        filters.append({"Name": "tag:ray-cluster-name", "Values": [CLUSTER_NAME]})
        answer = self.client("ec2").describe_instances(Filters=filters)
        return [instance for group in answer["Reservations"] for instance in group["Instances"]]

    def find_workers(self) -> set[str]:
        """Return the private addresses of the workers that are currently charged for."""
        found = set()
        for instance in self.find_instances():
            if {"Key": "ray-node-type", "Value": "worker"} in instance["Tags"]:
                found.add(instance["PrivateIpAddress"])
        return found

    def read_calls(self, access_key: str) -> list[dict[str, list[str]]]:
        """Return the parameters of all EC2 calls that were signed with this key since the server started."""
        calls = []
        for line in self._call("recorder/download-recording").splitlines():
            request = json.loads(line)
            if f"Credential={access_key}/" in request["headers"].get("Authorization", ""):
                calls.append(parse_qs(base64.b64decode(request["body"]).decode()))
        return calls

    def _call(self, path: str) -> str:
        method = "GET" if "download" in path else "POST"
        request = urllib.request.Request(f"{CLOUD}/moto-api/{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while self._server.poll() is None and time.monotonic() < deadline_s:
            with suppress(OSError):
                urllib.request.urlopen(f"{CLOUD}/moto-api/", timeout=5).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"moto did not start: {self._log.read_text()[-2000:]}")

    def _create_resources(self) -> None:
        ec2, iam = self.client("ec2"), self.client("iam")
        vpc = ec2.create_vpc(CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
        self.ids["subnet"] = ec2.create_subnet(VpcId=vpc, CidrBlock="10.77.0.0/24")["Subnet"]["SubnetId"]
        group = ec2.create_security_group(GroupName="segray", Description="segray", VpcId=vpc)["GroupId"]
        self.ids["security group"] = group
        self.ids["key pair"] = ec2.create_key_pair(KeyName="segray")["KeyName"]
        self.ids["ami"] = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for role in ("head", "worker"):
            name = f"segray-{role}"
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=self.fill_in("trust-policy.json"))
            document = self.fill_in(f"{role}-policy.json")
            iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=document)
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)

    def fill_in(self, name: str) -> str:
        """Return a policy document of clusters/aws with its placeholders replaced."""
        values = {"region": REGION, "account": "123456789012", "bucket": "faults", **self.ids}
        text = (ROOT / "clusters" / "aws" / name).read_text()
        return re.sub(r"<([\w ]+)>", lambda match: values[match.group(1)], text)
