"""One bucket and one cluster for all faults, a proxy for each, and the fault-free run that they are held to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.object_store import ObjectStore
from tests.faults.proxy import FaultProxy
from tests.faults.scene import Cluster, Scene, fill_bucket


@pytest.fixture(scope="session")
def store(object_store: ObjectStore, bundle_dir: Path) -> ObjectStore:
    fill_bucket(object_store, bundle_dir)
    return object_store


@pytest.fixture(scope="session")
def cluster(object_store: ObjectStore) -> Iterator[Cluster]:
    with Cluster(object_store.environment) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def clean(store: ObjectStore, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the fault-free run."""
    with FaultProxy(store.endpoint) as proxy:
        scene = Scene(store, proxy, cluster, tmp_path_factory.mktemp("clean"))
        run = scene.run("clean")
        assert run.process.returncode == 0, run.text
    return scene.read_files("clean")


@pytest.fixture
def scene(store: ObjectStore, proxy: FaultProxy, cluster: Cluster, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(store, proxy, cluster, tmp_path)
    try:
        yield scene
    finally:
        scene.end()


@pytest.fixture
def output(request: pytest.FixtureRequest) -> str:
    """A run folder of the test's own."""
    return f"runs/{''.join(c if c.isalnum() else '-' for c in request.node.name)}"
