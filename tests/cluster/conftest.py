"""A bucket, and hosts around it: the world in which clusters are launched for real."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.calls import build_training_config
from tests.cluster.hosts import CLOUD, OWN_ADDRESS, Hosts, find_missing, find_obstacle
from tests.cluster.launcher import ROOT
from tests.conftest import MEMORY, keeps_attributes
from tests.faults.object_store import ACCOUNT, REGION, SECRET_KEY, USER, ObjectStore
from tests.faults.scene import BUCKET, fill_bucket

NUM_HOSTS = 4
ENVIRONMENT = ROOT / ".venv"  # of which every host has a link: 5 GB are not installed four times
# of a machine that stands for several: one CPU each to Ray, and little memory
SMALL_NODE = " --num-cpus=1 --object-store-memory=200000000 --memory=4000000000"

OBSTACLE = find_obstacle()
LAUNCHED_FOR_REAL = [pytest.mark.slow, pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)]


@pytest.fixture(scope="module")
def world(bundle_dir: Path) -> Iterator[tuple[Hosts, ObjectStore]]:
    if missing := find_missing():
        raise pytest.fail.Exception(missing, pytrace=False)
    memory = MEMORY if keeps_attributes(MEMORY) else None
    with (
        tempfile.TemporaryDirectory(prefix="segray-hosts-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="segray-store-", dir=memory, ignore_cleanup_errors=True) as root,
    ):
        store = ObjectStore(Path(root), OWN_ADDRESS)
        with Hosts(Path(folder), NUM_HOSTS, build_home_files(store)) as hosts, store:
            fill_bucket(store, bundle_dir)
            yield hosts, store


@pytest.fixture(scope="module")
def hosts(world: tuple[Hosts, ObjectStore]) -> Hosts:
    return world[0]


@pytest.fixture(scope="module")
def store(world: tuple[Hosts, ObjectStore]) -> ObjectStore:
    return world[1]


@pytest.fixture(scope="module")
def training_data(store: ObjectStore, shapes_root: Path) -> str:
    """Put labelled images into the bucket, and a configuration that trains on two nodes; return its URI."""
    client = store.client()
    for path in shapes_root.rglob("*"):
        if path.is_file():
            key = f"shapes/{path.relative_to(shapes_root)}"
            client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    client.put_object(Bucket=BUCKET, Key="train.yaml", Body=build_training_config())
    return f"s3://{BUCKET}/train.yaml"


def build_home_files(store: ObjectStore) -> dict[str, str]:
    """Return what every host has in its home: its own credentials for the bucket, and where the bucket is."""
    return {
        ".aws/credentials": f"[default]\naws_access_key_id = {ACCOUNT}:{USER}\naws_secret_access_key = {SECRET_KEY}\n",
        ".aws/config": f"[default]\nregion = {REGION}\nservices = here\n"
        f"[services here]\ns3 =\n  endpoint_url = {store.endpoint}\nec2 =\n  endpoint_url = {CLOUD}\n",
        # the project as `ray up` has copied it, instead of an installation; a job's working directory comes before it
        ".bashrc": "export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$HOME/segray\n",
    }


def shrink_nodes(commands: list[str]) -> list[str]:
    """Return the commands that start Ray, for nodes which are parts of one machine."""
    return [command + SMALL_NODE if "ray start" in command else command for command in commands]
