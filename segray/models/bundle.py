"""Save and load model bundles: a bundle is the folder that training writes and segmentation reads.

    model.safetensors   weights
    bundle.json         everything needed to use the weights, and their sha256; written last, so it marks completeness
    model_card.md, metrics.csv, *.png   data, settings, scores and limits, for people

Loading a bundle never unpickles anything.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from segray.config import ModelConfig
from segray.data.classes import ClassMap
from segray.data.preprocessing import Preprocessing
from segray.errors import BundleError, MissingFileError
from segray.schema import get_library_versions
from segray.storage import exists, join_uri, read_bytes, write_bytes

if TYPE_CHECKING:  # These imports take seconds, and reading bundle.json alone does not need them.
    import torch

    from segray.models.build import SegmentationModel

FORMAT_VERSION = 1
_WEIGHTS, _MANIFEST = "model.safetensors", "bundle.json"


class BundleManifest(BaseModel):
    """Content of ``bundle.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format_version: int
    model: ModelConfig
    class_names: tuple[str, ...]
    class_values: tuple[int, ...]
    ignore_values: tuple[int, ...]
    ignore_index: int
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    metrics: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    weights_sha256: str

    @property
    def classes(self) -> ClassMap:
        """The classes that the model predicts."""
        return ClassMap(self.class_names, self.class_values, self.ignore_values)


@dataclass(frozen=True)
class BundleDescription:
    """What a bundle says about its model; ``save_bundle`` adds versions and the sha256 of the weights.

    Attributes:
        model: Architecture and encoder.
        classes: Classes, in the order of the logits' channels.
        image_size: Height and width of the model input, in pixels.
        preprocessing: Normalisation applied before the model.
        metrics: Validation scores of these weights.
        config: The resolved configuration of the training run.
    """

    model: ModelConfig
    classes: ClassMap
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        manifest: Content of ``bundle.json``.
        model: The network, in evaluation mode, on the CPU, in float32.
        sha256: sha256 of ``bundle.json``; it also identifies the weights, since the manifest holds their sha256.
    """

    manifest: BundleManifest
    model: "SegmentationModel"
    sha256: str


def pack_tensors(tensors: "dict[str, torch.Tensor]") -> bytes:
    """Return the content of a safetensors file with these tensors; tensors that share memory are stored separately."""
    from safetensors.torch import save as save_safetensors

    packed: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return save_safetensors(packed)


def has_bundle(uri: str) -> bool:
    """Return whether there is a complete bundle at a URI."""
    return exists(join_uri(uri, _MANIFEST))


def save_bundle(
    uri: str,
    weights: "dict[str, torch.Tensor]",
    description: BundleDescription,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a bundle folder.

    Args:
        uri: The folder.
        weights: State dict of a ``SegmentationModel``.
        description: The model's settings, classes, preprocessing and scores.
        files: Further files by name, such as pictures and metrics.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    content = pack_tensors(weights)
    classes = description.classes
    manifest = BundleManifest(
        format_version=FORMAT_VERSION,
        model=description.model,
        class_names=classes.names,
        class_values=classes.values,
        ignore_values=classes.ignore_values,
        ignore_index=classes.ignore_index,
        image_size=description.image_size,
        preprocessing=description.preprocessing,
        metrics=description.metrics,
        config=description.config,
        versions=get_library_versions(),
        weights_sha256=hashlib.sha256(content).hexdigest(),
    )
    for name, file in (files or {}).items():
        write_bytes(join_uri(uri, name), file)
    write_bytes(join_uri(uri, _WEIGHTS), content)
    write_bytes(join_uri(uri, _MANIFEST), json.dumps(manifest.model_dump(mode="json"), indent=2).encode())


def load_manifest(uri: str) -> tuple[BundleManifest, str]:
    """Read ``bundle.json`` alone; return it and its sha256, which also identifies the weights.

    Raises:
        BundleError: There is no bundle, it is damaged, or it has another format version.
        StorageError: Permissions, network or disk error.
    """
    manifest_uri = join_uri(uri, _MANIFEST)
    try:
        content = read_bytes(manifest_uri)
    except MissingFileError:
        raise BundleError(
            f"no bundle at {uri}: {_MANIFEST} not found; pass the bundle folder that segray train wrote"
        ) from None
    try:
        values = json.loads(content)
        found = values.get("format_version")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{manifest_uri}: damaged: not valid JSON ({error}); copy the bundle again") from error
    if found != FORMAT_VERSION:
        raise BundleError(
            f"{manifest_uri}: bundle format {found}, but this segray reads format {FORMAT_VERSION}; use the segray "
            f"version that wrote it ({(values.get('versions') or {}).get('segray', 'unknown')}), or train again"
        )
    try:
        return BundleManifest.model_validate(values), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BundleError(f"{manifest_uri}: damaged at {where}: {problem['msg']}; copy the bundle again") from error


def read_weights(uri: str, manifest: BundleManifest) -> bytes:
    """Return the content of a bundle's weights file after comparing its sha256 with the manifest's.

    Raises:
        BundleError: The file is missing, or differs from the one that the bundle was written with.
        StorageError: Permissions, network or disk error.
    """
    weights_uri = join_uri(uri, _WEIGHTS)
    try:
        content = read_bytes(weights_uri)
    except MissingFileError:
        raise BundleError(f"{uri}: incomplete: {_WEIGHTS} is missing; copy the bundle again") from None
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.weights_sha256:
        raise BundleError(
            f"{weights_uri}: damaged: sha256 is {found[:12]}…, expected {manifest.weights_sha256[:12]}…; "
            "copy the bundle again"
        )
    return content


def load_bundle(uri: str) -> Bundle:
    """Read a bundle and build its model.

    Raises:
        BundleError: There is no bundle, it is damaged, it has another format version, or its weights do not fit the
            network that the installed libraries build.
        StorageError: Permissions, network or disk error.
    """
    from safetensors.torch import load as load_safetensors

    from segray.models.build import build_model

    manifest, sha256 = load_manifest(uri)
    content = read_weights(uri, manifest)
    # The weights come from the bundle, so no pretrained encoder is downloaded.
    without_weights = manifest.model.model_copy(update={"encoder_weights": None})
    model = build_model(without_weights, len(manifest.class_names), manifest.image_size)
    try:
        model.load_state_dict(load_safetensors(content))
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(
            f"{join_uri(uri, _WEIGHTS)}: the weights do not fit {manifest.model.title} "
            f"as built by segmentation-models-pytorch {version('segmentation-models-pytorch')}; the bundle was made "
            f"with {manifest.versions.get('segmentation-models-pytorch')}; install that version"
        ) from error
    return Bundle(manifest, model.eval(), sha256)
