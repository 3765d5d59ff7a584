"""Fixtures of the cluster tests: hosts on which clusters are launched, and a bucket that they can reach."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.calls import build_training_config
from tests.cluster.hosts import CLOUD, OWN_ADDRESS, Hosts, find_missing_programs, find_skip_reason
from tests.cluster.launcher import ROOT
from tests.conftest import MEMORY, keeps_attributes
from tests.faults.buckets import BUCKET, S3Bucket
from tests.faults.object_store import ACCOUNT, REGION, SECRET_KEY, USER, ObjectStore
from tests.faults.scene import fill_bucket

NUM_HOSTS = 4
ENVIRONMENT = ROOT / ".venv"  # Every host has a link to it, which avoids installing 5 GB four times.
# The hosts share one machine, so each gives Ray one CPU and little memory.
LITTLE_MEMORY = " --object-store-memory=200000000 --memory=4000000000"
ONE_CPU = " --num-cpus=1"
FAIL_NEXT_START = "~/fail-next-start"  # If a host has this file, its next `ray start` removes it and fails.

SKIP_REASON = find_skip_reason()
NEEDS_HOSTS = [pytest.mark.slow, pytest.mark.skipif(bool(SKIP_REASON), reason=SKIP_REASON)]


@pytest.fixture(scope="module")
def hosts_and_store(bundle_dir: Path) -> Iterator[tuple[Hosts, ObjectStore]]:
    if missing := find_missing_programs():
        raise pytest.fail.Exception(missing, pytrace=False)
    memory = MEMORY if keeps_attributes(MEMORY) else None
    with (
        tempfile.TemporaryDirectory(prefix="segray-hosts-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="segray-store-", dir=memory, ignore_cleanup_errors=True) as root,
    ):
        store = ObjectStore(Path(root), OWN_ADDRESS)
        with Hosts(Path(folder), NUM_HOSTS, build_home_files(store)) as hosts, store:
            store.make_bucket(BUCKET)
            fill_bucket(S3Bucket(store), bundle_dir)
            yield hosts, store


@pytest.fixture(scope="module")
def hosts(hosts_and_store: tuple[Hosts, ObjectStore]) -> Hosts:
    return hosts_and_store[0]


@pytest.fixture(scope="module")
def store(hosts_and_store: tuple[Hosts, ObjectStore]) -> ObjectStore:
    return hosts_and_store[1]


@pytest.fixture(scope="module")
def training_data(store: ObjectStore, shapes_root: Path) -> str:
    """Upload labelled images and a configuration that trains on two nodes to the bucket; return the latter's URI."""
    client = store.client()
    for path in shapes_root.rglob("*"):
        if path.is_file():
            key = f"shapes/{path.relative_to(shapes_root)}"
            client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    client.put_object(Bucket=BUCKET, Key="train.yaml", Body=build_training_config())
    return f"s3://{BUCKET}/train.yaml"


def build_home_files(store: ObjectStore) -> dict[str, str]:
    """Return the files of every host's home folder, by path: credentials and endpoint of the bucket."""
    return {
        ".aws/credentials": f"[default]\naws_access_key_id = {ACCOUNT}:{USER}\naws_secret_access_key = {SECRET_KEY}\n",
        ".aws/config": f"[default]\nregion = {REGION}\nservices = here\n"
        f"[services here]\ns3 =\n  endpoint_url = {store.endpoint}\nec2 =\n  endpoint_url = {CLOUD}\n",
        # Replaces the installation by the tree that `ray up` has copied; a job's working directory takes precedence.
        ".bashrc": "export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$HOME/segray\n"
        "export RAY_worker_niceness=0\n"  # As in tests/conftest.py.
        f"ray() {{ test $1 = start && rm {FAIL_NEXT_START} 2> /dev/null && return 1; command ray $*; }}\n",
    }


def shrink_nodes(commands: list[str], options: str = ONE_CPU + LITTLE_MEMORY) -> list[str]:
    """Return the commands with the limits of a small node added to those that start Ray."""
    return [command.replace("ray start", "ray start" + options) for command in commands]
