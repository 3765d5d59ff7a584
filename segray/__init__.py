"""segray: distributed image segmentation on Ray.

The public API is imported on first use, so ``import segray`` needs neither torch nor Ray:

    train, segment, check, tune, status, export     what the commands of the same name do
    load_bundle                                     a model to try on single images
    open_results                                    rows, masks and summary of a run

See ``segray.api`` for their parameters and ``segray.errors`` for what they raise.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segray.api import TrainResult, check, export, load_bundle, open_results, segment, status, train, tune
    from segray.config import SegmentSettings, TrainConfig
    from segray.errors import SegrayError
    from segray.results.reader import RunResults
    from segray.results.status import RunStatus
    from segray.segmentation.interactive import BundleModel, Prediction
    from segray.segmentation.job import SegmentResult
    from segray.training.labels.report import LabelReport
    from segray.training.tuning.search import TuneResult

_MODULES = {
    "segray.api": (
        "train",
        "segment",
        "check",
        "tune",
        "status",
        "export",
        "load_bundle",
        "open_results",
        "TrainResult",
    ),
    "segray.config": ("SegmentSettings", "TrainConfig"),
    "segray.errors": ("SegrayError",),
    "segray.results.reader": ("RunResults",),
    "segray.results.status": ("RunStatus",),
    "segray.segmentation.interactive": ("BundleModel", "Prediction"),
    "segray.segmentation.job": ("SegmentResult",),
    "segray.training.labels.report": ("LabelReport",),
    "segray.training.tuning.search": ("TuneResult",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__version__ = version("segray")
__all__ = [
    "BundleModel",
    "LabelReport",
    "Prediction",
    "RunResults",
    "RunStatus",
    "SegmentResult",
    "SegmentSettings",
    "SegrayError",
    "TrainConfig",
    "TrainResult",
    "TuneResult",
    "check",
    "export",
    "load_bundle",
    "open_results",
    "segment",
    "status",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'segray' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
