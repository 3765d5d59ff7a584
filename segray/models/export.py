"""Export a bundle to one file that runs without segray: ONNX, or a ``torch.export`` program.

The file maps ``image``, (N, H, W, 3) uint8 RGB at the bundle's image size and for any N, to ``logits``, (N, C, H, W)
float32. It includes the normalisation but not the resizing: the caller resizes an image to the bundle's size as
``segray.data.images.resize_image`` does, resizes the logits (bilinear) to the image's own size, and takes their argmax
as the mask. ``docs/guides/export.md`` shows the code.

``model.onnx`` is for ONNX Runtime and other ONNX software, ``model.pt2`` for ``torch.export.load(…).module()``. Every
architecture of ``segray.models.build`` can be exported to both. Before the file is written, its content is run on the
CPU and compared with the original model in float32 (``TOLERANCE``).

The exception is SegNet in ONNX, which may differ at a few pixels: if two of the four values in a pooling window differ
only in the last bit, the rounding of another runtime selects the other one, and the decoder places it one pixel away.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from segray.config import ExportFormat
from segray.data.images import resize_image
from segray.data.preprocessing import Preprocessing, normalize
from segray.data.synthetic import draw_shape
from segray.errors import BundleError, ConfigError, flatten_message
from segray.models.build import SegmentationModel
from segray.models.bundle import Bundle, load_bundle
from segray.storage import join_uri, write_bytes

Program = Callable[[torch.Tensor], torch.Tensor]  # It maps images (N, H, W, 3) uint8 to logits (N, C, H, W).

# An exported logit may differ by this share of the batch's largest logit. Masks are then equal wherever the two highest
# logits differ by more than twice that. Rounding errors were measured at less than a hundredth of it.
TOLERANCE = 1e-3
# Share of pixels that may exceed the tolerance; 0 for other architectures. Measured: 0.3%; 1.5% on half-white images.
_MAX_SHARE_OFF = {"segnet": 0.05}
_BATCH_SIZES = [1, 3]
_EXAMPLE_BATCH_SIZE = 2  # The exporters would treat a batch size of 1 as a constant.
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MAX_ONNX_BYTES = 2**31 - 2**24  # The limit of one protobuf message, minus some space for the graph.
_MAX_REASON_LENGTH = 300


class Agreement(NamedTuple):
    """How closely an exported program's logits match the original model's, at the model's size.

    Attributes:
        num_pixels: Pixels that were compared.
        num_off: Pixels where a logit differs by more than ``TOLERANCE`` times the largest logit, or is NaN.
        num_other_class: Pixels where the masks differ.
        max_difference: Largest absolute difference of two logits.
    """

    num_pixels: int
    num_off: int
    num_other_class: int
    max_difference: float


@dataclass(frozen=True)
class ExportedFile:
    """The file that ``export_bundle`` wrote.

    Attributes:
        uri: The file.
        size_bytes: Its size.
        description: Its format and version, such as ``ONNX opset 20``.
        agreement: Comparison with the original model.
    """

    uri: str
    size_bytes: int
    description: str
    agreement: Agreement

    def __str__(self) -> str:
        found = self.agreement
        masks = f"masks differ at {found.num_other_class}" if found.num_other_class else "masks equal"
        return (
            f"{self.uri} ({self.size_bytes / 1e6:.1f} MB, {self.description}), compared with the original model "
            f"at {found.num_pixels} pixels: {masks}, logits differ by at most {found.max_difference:.1e}"
        )


class DeployableModel(nn.Module):
    """A model with its normalisation in one module, in evaluation mode and without gradients.

    Mean and standard deviation are buffers, so that they move to a device together with the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: SegmentationModel, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean))
        self.register_buffer("std", torch.tensor(preprocessing.std))
        self.requires_grad_(False).eval()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map RGB images (N, H, W, 3) uint8 to logits (N, C, H, W) float32."""
        logits_nchw: torch.Tensor = self.model(normalize(image, self.mean, self.std))
        return logits_nchw


def export_bundle(bundle_uri: str, export_format: ExportFormat, output_uri: str | None = None) -> ExportedFile:
    """Write a bundle's model, including its normalisation, as one file; an existing file is replaced.

    Args:
        bundle_uri: The bundle.
        export_format: File format.
        output_uri: The file; None writes ``model.onnx`` or ``model.pt2`` into the bundle.

    Raises:
        ConfigError: A package that the format needs is missing.
        BundleError: There is no bundle, its architecture cannot be exported, or the exported program does not match the
            original model; nothing is written.
        StorageError: Permissions, network or disk error.
    """
    if export_format is ExportFormat.ONNX:
        _require_onnx_packages()
    bundle = load_bundle(bundle_uri)
    subject = f"{bundle_uri}: {bundle.manifest.model.title}"
    alternative = _suggest_other(export_format)
    try:
        with _silenced():
            content, description = _convert(bundle, export_format)
    except BundleError as error:
        raise BundleError(f"{bundle_uri}: {error}") from error
    except Exception as error:  # Exporters raise many kinds of error.
        raise BundleError(
            f"{subject} cannot be exported to {export_format}: {_find_reason(error)}; {alternative}"
        ) from error
    try:
        with _silenced():
            agreement = _compare(bundle, _open_program(content, export_format))
    except Exception as error:
        raise BundleError(
            f"{subject} was exported to {export_format}, but the result cannot be run: {_find_reason(error)}; "
            f"nothing was written; {alternative}"
        ) from error
    if agreement.num_off > _MAX_SHARE_OFF.get(bundle.manifest.model.arch.lower(), 0) * agreement.num_pixels:
        raise BundleError(
            f"{subject} exported to {export_format} does not match the original model: logits differ too much at "
            f"{agreement.num_off} of {agreement.num_pixels} pixels, by at most {agreement.max_difference:.1e}, and "
            f"masks differ at {agreement.num_other_class}; nothing was written; {alternative}"
        )
    uri = output_uri or join_uri(bundle_uri, export_format.file_name)
    write_bytes(uri, content)
    return ExportedFile(uri, len(content), description, agreement)


def _require_onnx_packages() -> None:
    for name in _ONNX_PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"--format onnx needs {name}, which cannot be imported ({flatten_message(error)}): "
                "pip install 'segray[export]'"
            ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress what the exporters print, warn and log; their errors are still raised."""
    sink, disabled = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _find_reason(error: BaseException) -> str:
    """Return the message of an error's root cause; exporters wrap it in advice on how to report bugs."""
    while error.__cause__ is not None:
        error = error.__cause__
    return flatten_message(error)[:_MAX_REASON_LENGTH]


def _suggest_other(export_format: ExportFormat) -> str:
    other = next(candidate for candidate in ExportFormat if candidate is not export_format)
    return f"try --format {other}, or another architecture"


def _convert(bundle: Bundle, export_format: ExportFormat) -> tuple[bytes, str]:
    """Return the file's content, and its format and version."""
    model = DeployableModel(bundle.model, bundle.manifest.preprocessing)
    example_nhwc = torch.zeros(_EXAMPLE_BATCH_SIZE, *bundle.manifest.image_size, 3, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    if export_format is ExportFormat.ONNX:
        return _convert_to_onnx(model, example_nhwc, shapes)
    program = torch.export.export(model, (example_nhwc,), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue(), f"torch.export of torch {torch.__version__}"


def _convert_to_onnx(
    model: nn.Module, example_nhwc: torch.Tensor, shapes: tuple[dict[int, torch.export.Dim]]
) -> tuple[bytes, str]:
    program = torch.onnx.export(
        model,
        (example_nhwc,),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=shapes,
        dynamo=True,  # The other exporter is no longer maintained.
        verbose=False,
    )
    assert program is not None  # Only the other exporter returns None.
    weights = [value.const_value for value in program.model.graph.initializers.values()]
    size_bytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
    if size_bytes > _MAX_ONNX_BYTES:
        raise BundleError(
            f"{size_bytes / 1e9:.1f} GB of weights exceed the 2 GB that one ONNX file can hold; "
            f"{_suggest_other(ExportFormat.ONNX)}"
        )
    return program.model_proto.SerializeToString(), f"ONNX opset {program.model.opset_imports['']}"


def _open_program(content: bytes, export_format: ExportFormat) -> Program:
    """Load an exported file's content on the CPU, as its user would."""
    if export_format is ExportFormat.TORCH_EXPORT:
        return torch.export.load(io.BytesIO(content)).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors only: its warnings bypass Python and reach the terminal.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image_nhwc: torch.Tensor) -> torch.Tensor:
        (logits_nchw,) = session.run(["logits"], {"image": image_nhwc.numpy()})
        return torch.from_numpy(logits_nchw)

    return run


def _compare(bundle: Bundle, program: Program) -> Agreement:
    """Compare a program with the original model on generated images, in a batch of one and a batch of several."""
    image_nhwc = torch.from_numpy(_draw_images(sum(_BATCH_SIZES), bundle.manifest.image_size))
    batches = torch.split(image_nhwc, _BATCH_SIZES)
    with torch.inference_mode():
        found = torch.cat([program(batch) for batch in batches])
        expected = torch.cat([bundle.model(bundle.manifest.preprocessing.apply(batch)) for batch in batches])
    return compute_agreement(found, expected)


def _draw_images(num_images: int, size: tuple[int, int]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    drawings = [np.asarray(draw_shape(seed, max(size))[0]) for seed in range(num_images)]
    return np.stack([resize_image(drawing, size) for drawing in drawings])


def compute_agreement(logits_nchw: torch.Tensor, expected_nchw: torch.Tensor) -> Agreement:
    """Compare logits (N, C, H, W) with the expected ones.

    Raises:
        ValueError: Their shapes differ.
    """
    if logits_nchw.shape != expected_nchw.shape:
        raise ValueError(f"logits have shape {tuple(logits_nchw.shape)}, expected {tuple(expected_nchw.shape)}")
    difference = (logits_nchw - expected_nchw).abs().amax(1)
    is_off = ~(difference <= TOLERANCE * expected_nchw.abs().max())  # Written so that NaN counts as off.
    is_other_class = logits_nchw.argmax(1) != expected_nchw.argmax(1)
    return Agreement(difference.numel(), int(is_off.sum()), int(is_other_class.sum()), difference.max().item())
