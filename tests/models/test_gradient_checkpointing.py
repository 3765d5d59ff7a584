"""Gradient checkpointing: the same gradients, BatchNorm statistics updated once, less memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.autograd.graph import saved_tensors_hooks

from segray.config import ModelConfig
from segray.errors import ConfigError
from segray.models.build import SegmentationModel, build_model
from segray.models.gradient_checkpointing import find_blocks, recompute_encoder
from segray.models.sync_batchnorm import synchronise_norms

CONFIGS = [
    ModelConfig(encoder_name="resnet18"),
    ModelConfig(encoder_name="resnet18", freeze_encoder=True),
    pytest.param(ModelConfig(encoder_name="densenet121"), marks=pytest.mark.integration),
    pytest.param(ModelConfig(encoder_name="efficientnet-b0"), marks=pytest.mark.integration),  # Drops blocks at random.
    pytest.param(ModelConfig(encoder_name="mobilenet_v2"), marks=pytest.mark.integration),
    ModelConfig(arch="fpn", encoder_name="mit_b0"),  # Its blocks also take sizes.
    ModelConfig(encoder_name="tu-resnet10t"),
    pytest.param(ModelConfig(arch="dpt", encoder_name="tu-test_vit"), marks=pytest.mark.integration),
    ModelConfig(arch="classic_unet", widths=(8, 16, 32)),
]


def build_pair(config: ModelConfig) -> tuple[SegmentationModel, SegmentationModel]:
    """Return a model and a copy that recomputes its encoder."""
    torch.manual_seed(0)
    plain = build_model(config, 3).train()
    again = copy.deepcopy(plain)
    recompute_encoder(again)
    return plain, again


def learn(model: SegmentationModel) -> tuple[torch.Tensor, int]:
    """Run a forward and a backward pass; return the logits and the bytes saved for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits: torch.Tensor = model(torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)))
    torch.autograd.backward(logits.square().mean())
    return logits.detach(), sum(kept.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.arch}-{config.encoder_name}")
def test_gradients_and_statistics_equal_those_without_checkpointing(config: ModelConfig) -> None:
    plain, again = build_pair(config)
    for _ in range(2):
        logits, _ = learn(plain)
        torch.testing.assert_close(learn(again)[0], logits)
    for (name, expected), got in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    torch.testing.assert_close(again.state_dict(), plain.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(image), plain.eval()(image))


def test_less_memory_is_saved_for_the_backward_pass() -> None:
    plain, again = build_pair(ModelConfig(encoder_name="resnet34"))
    assert learn(again)[1] < 0.75 * learn(plain)[1]


def test_only_the_residual_blocks_of_a_resnet_are_computed_twice() -> None:
    model = build_model(ModelConfig(encoder_name="resnet18"), 3).train()
    num_calls: dict[nn.Module, int] = {}
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: num_calls.update({module: num_calls.get(module, 0) + 1}))
    recompute_encoder(model)
    learn(model)
    blocks = set(find_blocks(model.encoder))
    assert [type(block).__name__ for block in blocks] == ["BasicBlock"] * 8
    inside = {module for block in blocks for module in block.modules()} - blocks
    convolutions = {module: number for module, number in num_calls.items() if isinstance(module, nn.Conv2d)}
    assert {module for module, number in convolutions.items() if number == 2} == {
        module for module in inside if isinstance(module, nn.Conv2d)
    }
    assert set(convolutions.values()) == {1, 2}


def test_synchronised_statistics_are_also_updated_once(tmp_path: Path) -> None:
    plain = build_model(ModelConfig(encoder_name="resnet18"), 3).train()
    again = copy.deepcopy(plain)
    synchronise_norms(again, torch.device("cpu"))
    recompute_encoder(again)
    learn(plain)
    distributed.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        learn(again)
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(again.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)


def test_a_compiled_model_gives_the_same_gradients() -> None:
    plain, again = build_pair(ModelConfig(arch="classic_unet", widths=(4, 8, 16)))
    again.network.compile(backend="aot_eager")  # This is torch.compile without generated code.
    torch.testing.assert_close(learn(again)[0], learn(plain)[0])
    for got, expected in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    torch.testing.assert_close(again.state_dict(), plain.state_dict())


class BlockWithOption(nn.Module):
    """A block called with a keyword argument, like those of timm's transformers with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, features: torch.Tensor, *, factor: float) -> torch.Tensor:
        result: torch.Tensor = self.last((self.first(features) * factor).relu())
        return result


class NetworkOfBlocks(nn.Module):
    """A network of two blocks that are called with a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([BlockWithOption(), BlockWithOption()])

    def forward(self, image_nchw: torch.Tensor) -> torch.Tensor:
        for block in self.encoder:
            image_nchw = block(image_nchw, factor=0.5)
        return image_nchw


def test_blocks_can_be_called_with_keyword_arguments() -> None:
    torch.manual_seed(0)
    plain = SegmentationModel(NetworkOfBlocks())
    again = copy.deepcopy(plain)
    recompute_encoder(again)
    torch.testing.assert_close(learn(again)[0], learn(plain)[0])
    for got, expected in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_weights_keep_their_names_and_a_copy_is_independent() -> None:
    plain, again = build_pair(ModelConfig())
    assert list(again.state_dict()) == list(plain.state_dict())
    independent = copy.deepcopy(again)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    torch.testing.assert_close(learn(independent)[0], learn(plain)[0])


@pytest.mark.parametrize(
    "config", [ModelConfig(arch="fcn8s", encoder_name="vgg11"), ModelConfig(encoder_name="vgg16_bn")]
)
def test_an_encoder_without_blocks_raises(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = build_model(config, 3)
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: this encoder has no blocks .*set false"):
        recompute_encoder(model)
