"""Model bundle: the folder that training leaves and segmentation takes, and the only thing they share.

    model.safetensors   weights
    bundle.json         everything needed to use them, and their sha256; written last, so a bundle with it is complete
    model_card.md, metrics.csv, *.png   data, settings, scores and limits, for people

Nothing on the load path unpickles.
"""

import hashlib
import json
from dataclasses import dataclass
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

if TYPE_CHECKING:  # 8 s of imports, which those who only read a bundle's description need not wait for
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
        """The classes that the model tells apart."""
        return ClassMap(self.class_names, self.class_values, self.ignore_values)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the model in evaluation mode on the CPU, in float32."""

    manifest: BundleManifest
    model: "SegmentationModel"
    sha256: str


def pack_tensors(tensors: "dict[str, torch.Tensor]") -> bytes:
    """Return tensors as the content of a safetensors file: on the CPU, contiguous, none sharing memory."""
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
    """Say whether a complete bundle is at a URI."""
    return exists(join_uri(uri, _MANIFEST))


def save_bundle(
    uri: str,
    *,
    weights: "dict[str, torch.Tensor]",
    model: ModelConfig,
    classes: ClassMap,
    image_size: tuple[int, int],
    preprocessing: Preprocessing,
    metrics: dict[str, Any],
    config: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    """Write a bundle folder.

    Args:
        uri: The folder.
        weights: State dict of a ``SegmentationModel``.
        model: Architecture and encoder.
        classes: Classes, in the order of the logits' channels.
        image_size: Height and width fed to the model.
        preprocessing: Normalisation before the model.
        metrics: Validation scores of these weights.
        config: The resolved configuration of the run.
        files: Further files by name: pictures, metrics.

    Raises:
        StorageError: The store refused or failed.
    """
    content = pack_tensors(weights)
    manifest = BundleManifest(
        format_version=FORMAT_VERSION,
        model=model,
        class_names=classes.names,
        class_values=classes.values,
        ignore_values=classes.ignore_values,
        ignore_index=classes.ignore_index,
        image_size=image_size,
        preprocessing=preprocessing,
        metrics=metrics,
        config=config,
        versions=get_library_versions(),
        weights_sha256=hashlib.sha256(content).hexdigest(),
    )
    for name, file in files.items():
        write_bytes(join_uri(uri, name), file)
    write_bytes(join_uri(uri, _WEIGHTS), content)
    write_bytes(join_uri(uri, _MANIFEST), json.dumps(manifest.model_dump(mode="json"), indent=2).encode())


def load_manifest(uri: str) -> tuple[BundleManifest, str]:
    """Read ``bundle.json`` alone; return it and its sha256, which stands for the weights too.

    Raises:
        BundleError: There is no bundle, or it is damaged or of another version.
        StorageError: The store refused or failed.
    """
    manifest_uri = join_uri(uri, _MANIFEST)
    try:
        content = read_bytes(manifest_uri)
    except MissingFileError:
        raise BundleError(f"no bundle at {uri}: no {_MANIFEST}; give the folder that segray train made") from None
    try:
        values = json.loads(content)
        found = values.get("format_version")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{manifest_uri}: damaged, not JSON ({error}); copy the bundle again") from error
    if found != FORMAT_VERSION:
        raise BundleError(
            f"{manifest_uri}: bundle format {found}, this segray reads {FORMAT_VERSION}; "
            f"use the segray that made it ({(values.get('versions') or {}).get('segray', 'unknown')}), or train again"
        )
    try:
        return BundleManifest.model_validate(values), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BundleError(f"{manifest_uri}: damaged at {where}: {problem['msg']}; copy the bundle again") from error


def read_weights(uri: str, manifest: BundleManifest) -> bytes:
    """Return the content of a bundle's weights file, checked.

    Raises:
        BundleError: The file is missing, or is not the one that the bundle was written with.
        StorageError: The store refused or failed.
    """
    weights_uri = join_uri(uri, _WEIGHTS)
    try:
        content = read_bytes(weights_uri)
    except MissingFileError:
        raise BundleError(f"{uri}: incomplete, {_WEIGHTS} is missing; copy the bundle again") from None
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.weights_sha256:
        raise BundleError(
            f"{weights_uri}: damaged, sha256 {found[:12]}… instead of {manifest.weights_sha256[:12]}…; "
            "copy the bundle again"
        )
    return content


def load_bundle(uri: str) -> Bundle:
    """Read a bundle and build its model.

    Raises:
        BundleError: There is no bundle, or its weights are not the ones it was written with.
        StorageError: The store refused or failed.
    """
    from safetensors.torch import load as load_safetensors

    from segray.models.build import build_model

    manifest, sha256 = load_manifest(uri)
    content = read_weights(uri, manifest)
    # the weights come from the file: nothing is fetched for the encoder
    model = build_model(manifest.model.model_copy(update={"encoder_weights": None}), len(manifest.class_names))
    try:
        model.load_state_dict(load_safetensors(content))
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(
            f"{join_uri(uri, _WEIGHTS)}: the weights do not fit {manifest.model.arch} on {manifest.model.encoder_name} "
            "as built by "
            f"segmentation-models-pytorch {version('segmentation-models-pytorch')}; the bundle was made with "
            f"{manifest.versions.get('segmentation-models-pytorch')}: install that version"
        ) from error
    return Bundle(manifest, model.eval(), sha256)
