"""BatchNorm over two and three processes with unequal shares, compared with BatchNorm over the whole batch."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from segray.errors import ConfigError
from segray.models.sync_batchnorm import GlobalBatchNorm2d, synchronise_norms

CPU, NUM_CHANNELS, NUM_STEPS = torch.device("cpu"), 5, 3
SHARES = {2: [1, 4], 3: [2, 1, 3]}  # Number of images of each rank, by world size.


class NormWithActivation(nn.BatchNorm2d):
    """Replaces timm's BatchNormAct2d, whose import would slow down every rank."""


def draw_batch(num_images: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, C, 6, 7) whose mean is far from 0, and factors of the logits in the loss."""
    generator = torch.Generator().manual_seed(step)
    # Images differ, so no share has the batch's statistics.
    scale = torch.arange(1, num_images + 1)[:, None, None, None]
    images = torch.randn(num_images, NUM_CHANNELS, 6, 7, generator=generator) * scale + 3 * scale
    return images, torch.randn(num_images, NUM_CHANNELS, 6, 7, generator=generator)


def build_network() -> nn.Module:
    torch.manual_seed(0)
    first, last = nn.Conv2d(NUM_CHANNELS, 8, 3, padding=1), nn.Conv2d(8, NUM_CHANNELS, 1)
    network = nn.Sequential(nn.BatchNorm2d(NUM_CHANNELS, eps=1e-3, momentum=0.3), first, nn.BatchNorm2d(8), last)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def learn(network: nn.Module, shares: list[int], rank: int | None) -> dict[str, Any]:
    """Train on a rank's shares, or on whole batches if ``rank`` is None; return outputs, gradients and state."""
    outputs, gradients = [], []
    for step in range(NUM_STEPS):
        images, direction = draw_batch(sum(shares), step)
        if rank is not None:
            images, direction = (torch.split(tensor, shares)[rank].clone() for tensor in (images, direction))
        logits = network(images.requires_grad_())
        (logits * direction).sum().backward()
        outputs.append(logits.detach())
        gradients.append(images.grad)
    weight_gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    evaluated = network.eval()(draw_batch(2, NUM_STEPS)[0]).detach()
    plain = network.module if isinstance(network, DistributedDataParallel) else network
    return {
        "outputs": outputs,
        "gradients": gradients,
        "weight_gradients": weight_gradients,
        "evaluated": evaluated,
        "state": plain.state_dict(),
    }


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world_size, shares in SHARES.items():
        if rank < world_size:
            distributed.init_process_group("gloo", f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
            plain, parallel = build_network(), build_network()
            synchronise_norms(plain, CPU)
            synchronise_norms(parallel, CPU)
            result = {
                "plain": learn(plain, shares, rank),
                "parallel": learn(DistributedDataParallel(parallel), shares, rank),
            }
            torch.save(result, f"{folder}/{world_size}-{rank}.pt")
            distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, (str(folder),), nprocs=max(SHARES))  # type: ignore[no-untyped-call, attr-defined]
    return folder


@pytest.fixture(params=SHARES)
def ranks(request: pytest.FixtureRequest, folder_of_ranks: Path) -> list[dict[str, Any]]:
    world_size = request.param
    files = [folder_of_ranks / f"{world_size}-{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.integration  # Starting the ranks takes 20 s.
def test_ranks_together_equal_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = learn(build_network(), SHARES[len(ranks)], None)
    results = [rank["plain"] for rank in ranks]
    for step in range(NUM_STEPS):
        assert_equal(torch.cat([result["outputs"][step] for result in results]), expected["outputs"][step])
        assert_equal(torch.cat([result["gradients"][step] for result in results]), expected["gradients"][step])
    for name, gradient in expected["weight_gradients"].items():
        assert_equal(torch.stack([result["weight_gradients"][name] for result in results]).sum(0), gradient)
    for result in results:
        assert_equal(result["state"], expected["state"])
        assert_equal(result["evaluated"], expected["evaluated"])


@pytest.mark.integration
def test_distributed_data_parallel_averages_the_same_gradients(ranks: list[dict[str, Any]]) -> None:
    expected = learn(build_network(), SHARES[len(ranks)], None)
    for rank in ranks:
        assert_equal(rank["parallel"]["state"], expected["state"])
        for name, gradient in expected["weight_gradients"].items():
            assert_equal(rank["parallel"]["weight_gradients"][f"module.{name}"] * len(ranks), gradient)


def test_a_single_process_computes_plain_batchnorm() -> None:
    synchronised = build_network()
    synchronise_norms(synchronised, CPU)
    assert_equal(learn(synchronised, [4], None), learn(build_network(), [4], None))


def test_one_value_per_channel_raises_in_training() -> None:
    norm = GlobalBatchNorm2d(3)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))
    assert not norm.state_dict()["running_mean"].any()
    assert norm.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_layout_are_kept(dtype: torch.dtype) -> None:
    images = draw_batch(4, 0)[0].to(dtype, memory_format=torch.channels_last)
    normalised = GlobalBatchNorm2d(NUM_CHANNELS)(images)
    assert normalised.dtype == dtype
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    expected = nn.BatchNorm2d(NUM_CHANNELS)(images.float()).to(dtype)
    torch.testing.assert_close(normalised, expected)


@pytest.mark.parametrize(
    ("device", "kind"), [(CPU, GlobalBatchNorm2d), (torch.device("cuda"), nn.SyncBatchNorm)], ids=["cpu", "cuda"]
)
def test_replaced_norms_keep_names_values_and_frozen_parameters(device: torch.device, kind: type[nn.Module]) -> None:
    network = nn.Sequential(build_network(), nn.ModuleDict({"inner": nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())}))
    network[0](draw_batch(3, 0)[0])
    network.get_parameter("0.2.weight").requires_grad_(False)
    network[1].eval()
    before = copy.deepcopy(network)
    synchronise_norms(network, device)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [type(norm) for norm in norms] == [kind] * 3
    assert [(norm.eps, norm.momentum, norm.training) for norm in norms] == [
        (1e-3, 0.3, True),
        (1e-5, 0.1, True),
        (1e-5, 0.1, False),
    ]
    torch.testing.assert_close(network.state_dict(), before.state_dict(), rtol=0, atol=0)
    frozen = [(name, parameter.requires_grad) for name, parameter in network.named_parameters()]
    assert frozen == [(name, parameter.requires_grad) for name, parameter in before.named_parameters()]
    synchronise_norms(network, device)
    assert norms == [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    "norm",
    [
        NormWithActivation(4),
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
    ],
)
def test_a_norm_that_cannot_be_replaced_exactly_raises(norm: nn.Module) -> None:
    message = (
        rf"train\.sync_batchnorm: this network uses a {type(norm).__name__} that cannot be synchronised; set false"
    )
    with pytest.raises(ConfigError, match=message):
        synchronise_norms(nn.Sequential(nn.Sequential(norm)), CPU)
