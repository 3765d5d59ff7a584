"""Keep the pretrained weights of the encoder in the output folder, so that only the driver needs the model hub.

The driver downloads the weights once. Workers read them from the output, on any node and after any restart. A run that
resumes from a checkpoint needs neither: the checkpoint has all weights, and ``pretrained/*.json`` the normalisation.
"""

import hashlib
import json

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load as load_safetensors

from segray.config import TrainConfig
from segray.data.preprocessing import Preprocessing
from segray.errors import MissingFileError, TrainingError
from segray.models.build import SegmentationModel, build_model
from segray.models.bundle import pack_tensors
from segray.storage import join_uri, normalize_uri, read_bytes, write_bytes
from segray.training.checkpoint import RUN_NAME, rank_checkpoints

_FOLDER = "pretrained"


class WeightsError(TrainingError):
    """Raised if the pretrained weights in the output are missing or damaged; restarting the workers does not help."""


class PretrainedIndex(BaseModel):
    """Content of ``pretrained/NAME.json``; it is written after the weights, so it marks them as complete.

    Attributes:
        weights_sha256: sha256 of ``pretrained/NAME.safetensors``.
        preprocessing: Normalisation that the weights expect.
    """

    model_config = ConfigDict(frozen=True)

    weights_sha256: str
    preprocessing: Preprocessing


def find_preprocessing(config: TrainConfig) -> Preprocessing:
    """Return the normalisation that the encoder expects, from the output folder or else from the model hub.

    Raises:
        ConfigError: The input that the weights expect is not supported, or cannot be looked up.
        StorageError: Permissions, network or disk error.
    """
    index = _read_index(config) if config.model.encoder_weights else None
    return index.preprocessing if index else Preprocessing.of_encoder(config.model)


def save_pretrained(config: TrainConfig) -> None:
    """Download the pretrained weights of a configuration and write them to its output, unless they are there.

    Nothing is downloaded if the output has a checkpoint, which has all weights.

    Raises:
        ConfigError: The weights cannot be loaded.
        StorageError: Permissions, network or disk error.
    """
    run_uri = join_uri(normalize_uri(config.output), RUN_NAME)
    if config.model.encoder_weights is None or _read_index(config) or rank_checkpoints(run_uri, lambda _: None):
        return
    preprocessing = Preprocessing.of_encoder(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)  # A VGG without fully connected layers leaves those of FCN random.
        model = build_model(config.model, len(config.data.class_names), config.image_size)
    content = pack_tensors(model.get_pretrained())
    index = PretrainedIndex(weights_sha256=hashlib.sha256(content).hexdigest(), preprocessing=preprocessing)
    write_bytes(_name_file(config, "safetensors"), content)
    write_bytes(_name_file(config, "json"), index.model_dump_json(indent=2).encode())


def copy_pretrained(source_output: str, config: TrainConfig) -> None:
    """Copy the pretrained weights of a configuration from another output to its own, if they are there.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    source = config.model_copy(update={"output": source_output})
    if config.model.encoder_weights is not None and not _read_index(config) and _read_index(source):
        for extension in ("safetensors", "json"):
            write_bytes(_name_file(config, extension), read_bytes(_name_file(source, extension)))


def load_pretrained(config: TrainConfig, model: SegmentationModel) -> None:
    """Load the pretrained weights, if the configuration has any, from its output into a model, in place.

    Raises:
        WeightsError: The weights are missing or damaged.
        StorageError: Permissions, network or disk error.
    """
    if config.model.encoder_weights is None:
        return
    uri = _name_file(config, "safetensors")
    remedy = f"remove the folder {uri.rpartition('/')[0]} and rerun the same command"
    index = _read_index(config)
    try:
        content = read_bytes(uri)
    except MissingFileError:
        index = None
    if index is None:
        raise WeightsError(f"{uri}: the pretrained weights are missing; {remedy}")
    found = hashlib.sha256(content).hexdigest()
    if found != index.weights_sha256:
        raise WeightsError(f"{uri}: sha256 is {found[:12]}…, expected {index.weights_sha256[:12]}…; {remedy}")
    other_version = WeightsError(f"{uri}: the weights are of another version of {config.model.encoder_name}; {remedy}")
    try:
        missing, unexpected = model.load_state_dict(load_safetensors(content), strict=False)
    except RuntimeError as error:  # Other shapes.
        raise other_version from error
    if unexpected or set(missing) & model.get_pretrained().keys():
        raise other_version


def _read_index(config: TrainConfig) -> PretrainedIndex | None:
    """Return the index, or None if there is none or it is damaged."""
    try:
        return PretrainedIndex.model_validate_json(read_bytes(_name_file(config, "json")))
    except (MissingFileError, ValidationError):
        return None


def _name_file(config: TrainConfig, extension: str) -> str:
    """Return the URI of the file of a configuration; an output may also hold those of an attempt with another model."""
    identity = json.dumps([config.model.model_dump(mode="json", exclude={"freeze_encoder"}), config.image_size])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    name = f"{config.model.encoder_name.replace('/', '_')}-{digest}.{extension}"
    return join_uri(normalize_uri(config.output), _FOLDER, name)
