"""Fixtures of the fault tests: a shared bucket and cluster, a proxy per test, and a fault-free run to compare with."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.object_store import ObjectStore
from tests.faults.proxy import FaultProxy
from tests.faults.scene import NO_COUNTS, Clean, Cluster, Scene, fill_bucket


@pytest.fixture(scope="session")
def store(object_store: ObjectStore, bundle_dir: Path) -> ObjectStore:
    fill_bucket(object_store, bundle_dir)
    return object_store


@pytest.fixture(scope="session")
def cluster(object_store: ObjectStore) -> Iterator[Cluster]:
    with Cluster(object_store.environment) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def clean(store: ObjectStore, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    with FaultProxy(store.endpoint) as proxy:
        scene = Scene(store, proxy, cluster, tmp_path_factory.mktemp("clean"))
        run = scene.run("clean")
        assert run.process.returncode == 0, run.text
    return Clean(
        scene.read_files("clean"),
        num_requests=len(proxy.requests),
        num_image_reads=proxy.count("GET", r"^(images|masks)/"),
        num_writes=proxy.count("PUT", NO_COUNTS),
    )


@pytest.fixture
def scene(store: ObjectStore, proxy: FaultProxy, cluster: Cluster, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(store, proxy, cluster, tmp_path)
    try:
        yield scene
    finally:
        scene.end()


@pytest.fixture
def output(request: pytest.FixtureRequest) -> str:
    """Return a run folder for this test, as a key in the bucket."""
    return "runs/" + re.sub(r"\W+", "-", request.node.name)
