"""The device under test, and a trained bundle small enough for a CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.bundles import save_square_bundle
from tests.gpu.one_rank import IMAGE_SIDE, MODEL, train

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _keep_torch_settings() -> Iterator[None]:
    """Restore the torch settings that training and prediction change for the whole process."""
    num_threads, is_benchmarking = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.benchmark = is_benchmarking


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was trained on drawn shapes on the CPU, so that most of its pixels have a clear class."""
    folder = tmp_path_factory.mktemp("gpu")
    trained = train(torch.device("cpu"), folder / "run", num_steps=40, precision="fp32")
    weights = {name: torch.from_numpy(value) for name, value in trained.weights.items()}
    save_square_bundle(folder / "bundle", weights, MODEL, IMAGE_SIDE)
    return folder / "bundle"
