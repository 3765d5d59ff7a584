"""Fixtures shared by several test files, and the markers of tests. Heavy libraries are imported by the fixtures.

Markers: a test that needs Ray, an object store, or more than a few seconds is ``integration``. ``make test`` runs
only those of them that are marked ``smoke``; ``make test-all`` runs all of them. ``slow`` tests run in
``make test-faults`` and ``make test-cluster``.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from segray.config import ModelConfig, TrainConfig
from segray.data.classes import ClassMap
from segray.data.preprocessing import Preprocessing
from segray.data.synthetic import save_shapes
from segray.models.bundle import BundleDescription, save_bundle
from segray.runtime.connect import connect_ray, keep_on_loopback

if TYPE_CHECKING:
    import torch

    from tests.faults.object_store import ObjectStore
    from tests.faults.proxy import FaultProxy
    from tests.storage.azurite import Azurite

# Several processes share the cores: threads that wait must not spin. Set before torch is imported; Ray inherits it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves workers beside other test processes.
MEMORY = Path("/dev/shm")
pytest_plugins = ["tests.segmented"]
keep_on_loopback()
PET_CLASSES = ClassMap(("pet", "background", "border"), (1, 2, 3), ignore_values=(0,))
SHAPE_SIZE = 64
NUM_TRAIN, NUM_TEST = 18, 7
TINY_MODEL = ModelConfig(arch="classic_unet", widths=(8, 16))  # for tests in which the network does not matter
# The longest files, first those with a single long test: its process is given the next file already when it starts.
LONGEST_FILES = ["test_soak.py", "test_train.py", "test_tuning.py", "test_kills.py", "test_storage.py", "test_fast.py"]
LONGEST_FILES += ["test_runs.py", "test_onprem.py", "test_aws.py", "test_training.py"]
INTEGRATION_FIXTURES = {"ray_session", "object_store"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use Ray or an object store through a fixture, and run the files with such tests first.

    Tests that use Ray in another way are marked where they are defined. A process runs all tests of a file, so the
    longest files come first: one at the end would leave the other process idle.
    """
    for item in items:
        if INTEGRATION_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("integration")
    long_files = {item.path for item in items if item.get_closest_marker("integration")}
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: (ranks.get(item.path.name, len(ranks)), item.path not in long_files))


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    save_shapes(str(root), NUM_TRAIN, NUM_TEST, SHAPE_SIZE)
    return root


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with connect_ray():
        yield


@pytest.fixture
def console() -> Console:
    return Console(width=500, soft_wrap=True)


@pytest.fixture(scope="session")
def make_train_config(shapes_root: Path) -> Callable[..., TrainConfig]:
    def make(output: Path, **train: object) -> TrainConfig:
        settings = {"num_epochs": 2, "global_batch_size": 6, "num_train_workers": 2, **train}
        return TrainConfig.model_validate(
            {
                "data": {"layout": {"oxford_iiit_pet": {"root": str(shapes_root)}}},
                "model": TINY_MODEL.model_dump(),
                "image_size": [SHAPE_SIZE, SHAPE_SIZE],
                "train": settings,
                "output": str(output),
            }
        )

    return make


def save_pet_bundle(folder: Path, weights: "dict[str, torch.Tensor]", size_px: int = SHAPE_SIZE) -> None:
    """Write a bundle of ``TINY_MODEL`` whose input is a square."""
    description = BundleDescription(TINY_MODEL, PET_CLASSES, (size_px, size_px), Preprocessing())
    save_bundle(str(folder), weights, description)


def save_varied_bundle(folder: Path, size_px: int = SHAPE_SIZE) -> None:
    """Write a bundle of random weights that predicts all classes, most pixels with a clear margin."""
    import torch

    from segray.models.build import build_model

    torch.manual_seed(3)
    model = build_model(TINY_MODEL, PET_CLASSES.num_classes)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, size_px, size_px))
        std, mean = torch.std_mean(model.eval()(torch.randn(4, 3, size_px, size_px)), (0, 2, 3))
        head = model.get_submodule("network.head")
        assert isinstance(head, torch.nn.Conv2d)
        assert head.bias is not None
        head.weight.mul_((5 / std)[:, None, None, None])
        head.bias.sub_(mean).mul_(5 / std)
    save_pet_bundle(folder, model.state_dict(), size_px)


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of ``save_varied_bundle``."""
    folder = tmp_path_factory.mktemp("bundle")
    save_varied_bundle(folder)
    return folder


@pytest.fixture
def make_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Make the model hub unreachable, and return a function that creates a folder in its cache for an encoder."""
    from huggingface_hub import constants
    from segmentation_models_pytorch.encoders import encoders

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(encoder_name: str, weights: str) -> Path:
        settings = encoders[encoder_name]["pretrained_settings"][weights]
        repository = tmp_path / "hub" / f"models--{settings['repo_id'].replace('/', '--')}"
        snapshot: Path = repository / "snapshots" / settings["revision"]
        snapshot.mkdir(parents=True)
        return snapshot

    return make


@pytest.fixture
def labelled_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five images of different sizes and their masks with values 0, 1 and 255, paired by name."""
    rng = np.random.default_rng(0)
    images, masks = tmp_path / "images", tmp_path / "masks"
    for index in range(5):
        size = (40 + 3 * index, 50 + index)
        (images / "sub").mkdir(parents=True, exist_ok=True)
        (masks / "sub").mkdir(parents=True, exist_ok=True)
        name = f"sub/{index}" if index % 2 else str(index)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(images / f"{name}.png")
        Image.fromarray(rng.choice([0, 1, 255], size).astype(np.uint8)).save(masks / f"{name}.png")
    return images, masks


def keeps_attributes(folder: Path) -> bool:
    """Return whether files in a folder can have extended attributes, in which Swift stores the metadata of objects."""
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder) as file:
        os.setxattr(file.name, "user.segray", b"1")
        return True
    return False


@pytest.fixture(scope="session")
def object_store() -> "Iterator[ObjectStore]":
    from tests.faults.object_store import ObjectStore, find_swift

    try:
        find_swift()
    except FileNotFoundError as error:  # A skip would go unnoticed.
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    memory = MEMORY if keeps_attributes(MEMORY) else None
    with (
        tempfile.TemporaryDirectory(prefix="segray-store-", dir=memory, ignore_cleanup_errors=True) as root,
        ObjectStore(Path(root)) as store,
    ):
        yield store


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Azurite]":
    from tests.storage.azurite import Azurite, find_azurite

    try:
        find_azurite()
    except FileNotFoundError as error:  # A skip would go unnoticed.
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    with Azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def proxy(object_store: "ObjectStore") -> "Iterator[FaultProxy]":
    from tests.faults.proxy import FaultProxy

    with FaultProxy(object_store.endpoint) as proxy:
        yield proxy
