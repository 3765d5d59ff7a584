"""Fixtures of the fault tests: a shared bucket and cluster, a proxy per test, and a fault-free run to compare with."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.buckets import BUCKET, AzureBucket, Bucket, GoogleStubBucket, S3Bucket
from tests.faults.object_store import ObjectStore
from tests.faults.proxy import FaultProxy
from tests.faults.scene import NO_COUNTS, Clean, Cluster, Scene, fill_bucket
from tests.storage.azurite import Azurite
from tests.storage.google_stub import GoogleBucket
from tests.storage.stub_server import StubServer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run all tests on S3, and those marked `every_store` on the other stores too."""
    if "filled_bucket" in metafunc.fixturenames:
        others = ["azure", "google"] if metafunc.definition.get_closest_marker("every_store") else []
        # S3 first: the other files use it too, and its bucket can be made only once.
        marked = [pytest.param("s3", marks=pytest.mark.integration)]
        marked += [pytest.param(name, marks=pytest.mark.slow) for name in others]
        metafunc.parametrize("filled_bucket", marked, indirect=True, scope="session")


@pytest.fixture(scope="session")
def filled_bucket(request: pytest.FixtureRequest, bundle_dir: Path) -> Iterator[Bucket]:
    with ExitStack() as stack:
        bucket: Bucket
        if request.param == "s3":
            store: ObjectStore = request.getfixturevalue("object_store")
            store.make_bucket(BUCKET)
            bucket = S3Bucket(store)
        elif request.param == "azure":
            azurite: Azurite = request.getfixturevalue("azurite")
            azurite.make_container(BUCKET)
            bucket = AzureBucket(azurite)
        else:
            google = GoogleBucket(BUCKET)
            bucket = GoogleStubBucket(stack.enter_context(StubServer(google.answer)), google)
        fill_bucket(bucket, bundle_dir)
        yield bucket


@pytest.fixture(scope="session")
def cluster(filled_bucket: Bucket) -> Iterator[Cluster]:
    with Cluster(filled_bucket.build_environment(filled_bucket.endpoint), num_nodes=0) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def clean(filled_bucket: Bucket, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    with FaultProxy(filled_bucket.endpoint) as proxy:
        scene = Scene(filled_bucket, proxy, cluster, tmp_path_factory.mktemp("clean"))
        run = scene.run("clean")
        assert run.process.returncode == 0, run.text
    return Clean(
        scene.read_files("clean"),
        num_image_reads=proxy.count("GET", r"^(images|masks)/"),
        num_writes=proxy.count("PUT", NO_COUNTS),
    )


@pytest.fixture
def scene(filled_bucket: Bucket, cluster: Cluster, tmp_path: Path) -> Iterator[Scene]:
    with FaultProxy(filled_bucket.endpoint) as proxy, Scene(filled_bucket, proxy, cluster, tmp_path) as scene:
        yield scene


@pytest.fixture
def output(request: pytest.FixtureRequest) -> str:
    """Return a run folder for this test, as a key in the bucket."""
    return "runs/" + re.sub(r"\W+", "-", request.node.name)
