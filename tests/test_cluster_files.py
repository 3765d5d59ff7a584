"""Tests of the cluster files: valid for Ray and Kubernetes, closed to the internet, Ray pinned, without secrets."""

import copy
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

ROOT = Path(__file__).parent.parent
LAUNCHED = ["cluster.yaml", "clusters/gcp.yaml", "clusters/onprem.yaml"]
CLOUDS = LAUNCHED[:2]
APPLIED = ["clusters/kuberay.yaml", "clusters/kuberay-job.yaml"]
POLICIES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "clusters" / "aws").iterdir())
NETWORK = "clusters/kuberay-network.yaml"
ALL = [*LAUNCHED, *APPLIED, NETWORK, *POLICIES, "Containerfile"]
(PINNED,) = re.findall(r"ray\[[a-z,]+\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())


def load(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return values


def get_cluster_spec(ray_object: dict[str, Any]) -> dict[str, Any]:
    return dict(ray_object["spec"].get("rayClusterSpec") or ray_object["spec"])


def list_pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def test_all_cluster_files_are_tested() -> None:
    existing = {str(path.relative_to(ROOT)) for path in (ROOT / "clusters").rglob("*") if path.is_file()}
    assert existing | {"cluster.yaml", "Containerfile"} == set(ALL)


# Files for Ray's launcher


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_accepts_the_file(name: str) -> None:
    prepared = prepare_config(load(name))
    validate_config(prepared)


@pytest.mark.parametrize("name", CLOUDS)
def test_rays_validation_detects_a_mistake(name: str) -> None:
    with pytest.raises(Exception, match="head_node_type"):
        validate_config(prepare_config({**load(name), "head_node_type": "nothing"}))


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_scale_from_zero_and_the_head_runs_no_tasks(name: str) -> None:
    types = dict(prepare_config(load(name))["available_node_types"])
    head = types.pop("head")
    assert (head["max_workers"], head["resources"]) == (0, {"CPU": 0})
    assert {(node["min_workers"], node["max_workers"]) for node in types.values()} == {(0, 8)}
    is_spot = [
        "InstanceMarketOptions" in node["node_config"]
        or "provisioningModel" in node["node_config"].get("scheduling", ())
        for node in types.values()
    ]
    assert sorted(is_spot) == [False, True]


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_instances_are_preferred_while_available(name: str) -> None:
    def choose(**availability: float) -> str:
        config = prepare_config({**load(name), "auth": {"ssh_user": "nobody"}})
        for node_type in config["available_node_types"].values():
            node_type["resources"] = node_type["resources"] or {"CPU": 8, "GPU": 1}  # On AWS, Ray queries them.
        scaling = AutoscalingConfig(config, skip_content_hash=True)
        demand = ResourceRequestByCount(request=ResourceRequestUtil.make({"GPU": 1}), count=1)
        reply = ResourceDemandScheduler(None).schedule(
            SchedulingRequest(
                node_type_configs=scaling.get_node_type_configs(),
                max_num_nodes=scaling.get_max_num_nodes(),
                disable_launch_config_check=True,
                resource_requests=[demand],
                recoverable_resource_availabilities=availability,
            )
        )
        (launch,) = reply.to_launch
        return re.sub("[-_]", " ", launch.instance_type)

    assert choose() == "gpu spot"
    name_of_spot = next(key for key in load(name)["available_node_types"] if key.endswith("spot"))
    assert choose(**{name_of_spot: 0.5}) == "gpu on demand"


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_requires_a_token_and_the_dashboard_listens_on_loopback(name: str) -> None:
    config = load(name)
    options = config.get("docker", {}).get("run_options", [])
    for kind in ("head", "worker"):
        (start,) = [command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command]
        for variable in (
            "RAY_AUTH_MODE=token",
            "RAY_grpc_client_keepalive_time_ms=20000",
            "RAY_grpc_client_keepalive_timeout_ms=30000",
        ):
            assert variable in start.partition("ray start")[0].split() or f"--env {variable}" in options
        # `ray up` enables usage statistics on the head, regardless of the container's environment.
        for option in ("--dashboard-host=127.0.0.1", "--disable-usage-stats"):
            assert (option in start) == (kind == "head")
    assert "~/.ray/auth_token" in config["file_mounts"].values()


@pytest.mark.integration
@pytest.mark.parametrize("name", LAUNCHED)
def test_the_mounted_files_can_be_installed(name: str, tmp_path: Path) -> None:
    """Install what a node receives as its set-up does, but without dependencies."""
    tree, target = tmp_path / "segray", tmp_path / "installed"
    tree.mkdir()
    for remote, local in load(name)["file_mounts"].items():
        _, found, path = remote.partition("/segray/")
        if found:
            (shutil.copytree if (ROOT / local).is_dir() else shutil.copyfile)(ROOT / local, tree / path)
    assert (tree / "requirements.txt").read_bytes() == (ROOT / "requirements.txt").read_bytes()
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", f"--target={target}", tree], check=True)
    for path in ("cli.py", "py.typed", "training/model_card.md.j2"):
        assert (target / "segray" / path).exists()
    (metadata,) = target.glob("segray-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").exists()
    assert (ROOT / "README.md").read_text() in (metadata / "METADATA").read_text()


# Access


def check_addresses(name: str, text: str) -> None:
    assert "0.0.0.0" not in text, f"{name}: open to the internet"
    assert "::/0" not in text, f"{name}: open to the internet"


def check_pins(name: str, text: str) -> None:
    images = re.findall(r"[\w./-]*rayproject/ray:(\S+)|(?<![\w/])image: \S*segray:\S*ray(\S+)", text)
    versions = {tag or ray for tag, ray in images}
    declared = re.findall(r"(?:rayVersion: |RAY_VERSION=)(\S+)", text)
    for version in [*versions, *declared]:
        assert version.replace("${RAY_VERSION}", PINNED).startswith(PINNED), f"{name}: Ray {version}, not {PINNED}"
    assert not re.search(r"pip install[^&\n]*(?<![\w/.-])ray(?![\w/.-])", text), f"{name}: installs another Ray"


def check_secrets(name: str, text: str) -> None:
    for what, pattern in {
        "an AWS access key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
        "a private key": r"BEGIN [A-Z ]*PRIVATE KEY",
        "a key of a service account": r"\"private_key(_id)?\"",
        "a long random string": r"\b[0-9a-fA-F]{32,}\b|\b(?=\w*\d)(?=\w*[a-z])(?=\w*[A-Z])\w{40,}\b",
        "the value of a secret": r"(?i)(secret_access_key|password|auth_token|api_key)\s*[=:]\s*[^\s~<$/]",
    }.items():
        assert not re.search(pattern, text), f"{name}: {what}"


CHECKS = [check_addresses, check_pins, check_secrets]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("check", CHECKS)
def test_each_file_is_not_public_pins_ray_and_contains_no_secrets(check: Callable[[str, str], None], name: str) -> None:
    check(name, (ROOT / name).read_text())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("cluster.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("cluster.yaml", f"ray:{PINNED}-py311-gpu", "ray:latest-gpu"),
        ("cluster.yaml", "pip install uv", "pip install -U ray && pip install uv"),
        ("clusters/gcp.yaml", f"ray:{PINNED}-py311-cpu", "ray:2.59.0-py311-cpu"),
        ("clusters/kuberay.yaml", f"rayVersion: {PINNED}", "rayVersion: 2.59.0"),
        ("clusters/kuberay.yaml", f"-ray{PINNED}", "-ray2.59.0"),
        ("clusters/kuberay-job.yaml", 'value: "20000"', "value: " + "3f" * 32),
        ("cluster.yaml", "~/.ray/auth_token  #", "x  # auth_token: 3f3f3f"),
        ("Containerfile", "RAY_AUTH_MODE=token", "AWS_ACCESS_KEY_ID=AKIA" + "ABCDEFGH12345678"),
        ("Containerfile", f"RAY_VERSION={PINNED}", "RAY_VERSION=2.59.0"),
    ],
)
def test_the_checks_detect_mistakes(name: str, before: str, after: str) -> None:
    text = (ROOT / name).read_text()
    assert before in text
    broken = text.replace(before, after)

    def check_all() -> None:
        for check in CHECKS:
            check(name, broken)

    with pytest.raises(AssertionError, match=name):
        check_all()


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_have_no_external_addresses(name: str) -> None:
    config = load(name)
    assert config["provider"]["use_internal_ips"] is True
    assert config["provider"]["cache_stopped_nodes"] is False  # A stopped node keeps its disk.
    assert config["auth"]["ssh_private_key"].startswith("<")  # Without it Ray creates a key.
    for node_type in config["available_node_types"].values():
        for interface in node_type["node_config"].get("networkInterfaces", ()):
            assert not interface.get("accessConfigs"), "an external address"


def test_aws_instances_use_imdsv2_encrypted_disks_and_dedicated_groups_and_roles() -> None:
    types = load("cluster.yaml")["available_node_types"]
    for node_type in types.values():
        node = node_type["node_config"]
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert node["SecurityGroupIds"]  # Without it Ray creates a group that admits SSH from everywhere.
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    profiles = {name: node_type["node_config"]["IamInstanceProfile"]["Name"] for name, node_type in types.items()}
    assert profiles == {"head": "segray-head", "gpu_spot": "segray-worker", "gpu_on_demand": "segray-worker"}


def test_google_machines_have_dedicated_accounts_and_no_project_keys() -> None:
    types = load("clusters/gcp.yaml")["available_node_types"]
    accounts = {name: node_type["node_config"]["serviceAccounts"][0]["email"] for name, node_type in types.items()}
    assert accounts["head"] != accounts["gpu-spot"] == accounts["gpu-on-demand"]
    for node_type in types.values():
        node = node_type["node_config"]
        assert {"key": "block-project-ssh-keys", "value": "true"} in node["metadata"]["items"]
        assert node["disks"][0]["initializeParams"]["diskType"].endswith("pd-balanced")


@pytest.mark.parametrize("name", POLICIES)
def test_policies_contain_no_wildcard_actions(name: str) -> None:
    document = json.loads((ROOT / name).read_text())
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        if statement.get("Resource") == "*":
            # Describe calls cannot be limited to resources.
            assert all(action.startswith("ec2:Describe") for action in actions)


def test_workers_have_access_only_to_the_bucket() -> None:
    document = json.loads((ROOT / "clusters/aws/worker-policy.json").read_text())
    resources = {statement["Resource"].partition("/")[0] for statement in document["Statement"]}
    assert resources == {"arn:aws:s3:::<bucket>"}


# Files for Kubernetes

# Fields of KubeRay versions later than the schema: 1.3 (autoscaler's version, backoffLimit), 1.5.1 (authOptions).
_LATER: dict[str, Any] = {
    "authOptions": {
        "type": "object",
        "properties": {"mode": {"enum": ["token", "disabled"]}, "secretName": {"type": "string"}},
    },
    "autoscalerOptions.version": {"enum": ["v1", "v2"]},
}


def build_schema(kind: str) -> dict[str, Any]:
    """Return the published schema of a kind with the fields of later versions, which rejects unknown fields."""
    schemas = json.loads(gzip.decompress((ROOT / "tests" / "schemas" / "kuberay.json.gz").read_bytes()))
    schema: dict[str, Any] = schemas[kind]
    spec = schema["properties"]["spec"]
    if kind == "RayJob":
        spec["properties"]["backoffLimit"] = {"type": "integer"}
        spec = spec["properties"]["rayClusterSpec"]
    spec["properties"]["authOptions"] = _LATER["authOptions"]
    spec["properties"]["autoscalerOptions"]["properties"]["version"] = _LATER["autoscalerOptions.version"]
    for part in walk(schema):
        if "properties" in part:
            part["additionalProperties"] = False
    return schema


def walk(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for value in schema.values():
            yield from walk(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from walk(value)


@pytest.mark.parametrize("name", APPLIED)
def test_the_manifest_matches_the_schema(name: str) -> None:
    ray_object = load(name)
    jsonschema.Draft7Validator(build_schema(ray_object["kind"])).validate(ray_object)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("headGroupSpec.rayStartParams.num-cpus", 0),
        ("workerGroupSpecs.0.minReplicas", "0"),
        ("workerGroupSpecs.0.minReplica", 0),
        ("authOptions.mode", "tokens"),
        ("enableInTreeAutoscaling", "yes"),
    ],
)
def test_the_schema_detects_mistakes(path: str, value: object) -> None:
    broken: Any = copy.deepcopy(load("clusters/kuberay.yaml"))
    *parents, last = ["spec", *path.split(".")]
    target = broken
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(build_schema("RayCluster")).validate(broken)


@pytest.mark.parametrize("name", APPLIED)
def test_rays_autoscaler_accepts_the_manifest(name: str) -> None:
    ray_object = load(name)
    metadata = {**ray_object["metadata"], "namespace": "segray"}
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": get_cluster_spec(ray_object)})
    groups = derived["available_node_types"]
    assert groups["headgroup"]["resources"]["CPU"] == 0
    gpu = groups["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (8, 1)


@pytest.mark.parametrize("name", APPLIED)
def test_pods_require_a_token_and_have_few_privileges(name: str) -> None:
    spec = get_cluster_spec(load(name))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in list_pods(spec):
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert (context["runAsNonRoot"], context["allowPrivilegeEscalation"]) == (True, False)
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "RAY_grpc_client_keepalive_time_ms", "value": "20000"} in container["env"]
    head, worker = list_pods(spec)
    assert head["serviceAccountName"] != worker["serviceAccountName"]
    assert worker["automountServiceAccountToken"] is False  # Only the head's autoscaler needs one.


def test_the_network_policy_admits_only_the_clusters_pods_and_the_operator() -> None:
    policy = load(NETWORK)
    selected = policy["spec"]["podSelector"]["matchLabels"]
    (rule,) = policy["spec"]["ingress"]
    own, operator = rule["from"]
    assert own == {"podSelector": {"matchLabels": selected}}
    assert operator["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert list(operator["namespaceSelector"]["matchLabels"]) == ["kubernetes.io/metadata.name"], (
        "only the operator's namespace is admitted"
    )
    for name in APPLIED:
        spec = load(name)["spec"]
        cluster = get_cluster_spec(load(name))
        templates = [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
        templates += [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
        assert all(template["metadata"]["labels"] == selected for template in templates)


def test_the_cluster_of_a_kubernetes_job_is_removed_afterwards() -> None:
    spec = load("clusters/kuberay-job.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in spec
    assert spec["entrypoint"].startswith("segray segment ")


# The container image


def test_the_container_file_copies_existing_files_of_the_build_context() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(copied) == sent
    assert all((ROOT / path).exists() for path in copied)
    assert [line for line in lines if line.startswith("USER")][-1] == "USER ray"
