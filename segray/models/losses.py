"""Loss functions, each computed as a sum and the count that divides it.

A count depends on the ground truth alone. So it can be summed over ranks, and over the parts of an accumulated batch,
before the backward pass. Each pixel or image then has the same weight wherever it is processed: the loss is the same
for one worker, four workers and an accumulated batch.

Cross-entropy and focal loss are means over the scored pixels of the global batch, weighted by class. The other losses
are computed for each image and averaged over the images of the global batch. Ignored pixels do not count, and a batch
in which every pixel is ignored adds 0.

Sources: Lin et al., "Focal Loss for Dense Object Detection", 2017; Milletari et al., "V-Net", 2016, and
Sudre et al., "Generalised Dice overlap as a deep learning loss function", 2017 (Dice); Salehi et
al., "Tversky loss function for image segmentation", 2017; Rahman and Wang, "Optimizing Intersection-Over-Union", 2016
(Jaccard); Berman et al., "The Lovász-Softmax loss", 2018; Shrivastava et al., "Training Region-based Object Detectors
with Online Hard Example Mining", 2016.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from segray.config import LossSettings

_PIXEL_TERMS = ("ce", "focal")


class SegmentationLoss:
    """A weighted sum of loss terms.

    Args:
        settings: The loss terms with their weights, and the settings of each.
        ignore_index: Class index of the pixels that do not count.
        class_weights: (C,) weights of the classes in ``ce``, ``focal`` and ``ohem``; None weights all classes equally.
        device: Device of the logits; weights are copied there once, because a copy in each step would wait for a GPU.
    """

    def __init__(
        self,
        settings: LossSettings,
        ignore_index: int,
        class_weights: npt.NDArray[np.float64] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._settings = settings
        self._ignore_index = ignore_index
        self._class_weights = None if class_weights is None else torch.from_numpy(class_weights).float().to(device)
        tversky = self._sum_tversky
        sums: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "ce": self._sum_cross_entropy,
            "focal": self._sum_focal,
            "ohem": self._sum_hard_examples,
            "lovasz": self._sum_lovasz,
            "dice": partial(tversky, alpha=0.5, beta=0.5),
            "jaccard": partial(tversky, alpha=1.0, beta=1.0),
            "tversky": partial(tversky, alpha=settings.tversky_alpha, beta=settings.tversky_beta),
        }
        self._sums = {name: sums[name] for name in settings.terms}
        self.term_weights = torch.tensor(list(settings.terms.values()), dtype=torch.float64, device=device)

    def count(self, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Return the count that divides the sum of each of the T loss terms, (T,) float64.

        Args:
            truth_nhw: (N, H, W) int64 class indices, ``ignore_index`` where not scored.
        """
        scored = truth_nhw != self._ignore_index
        num_px = self._weigh(scored.double(), truth_nhw).sum()
        num_images = scored.flatten(1).any(1).sum().double()
        return torch.stack([num_px if name in _PIXEL_TERMS else num_images for name in self._sums])

    def sum(self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Return the sum of each of the T loss terms, (T,) float32, differentiable in the logits.

        Args:
            logits_nchw: (N, C, H, W), any float dtype; the loss is computed in float32.
            truth_nhw: (N, H, W) int64 class indices, ``ignore_index`` where not scored.
        """
        logits_nchw = logits_nchw.float()
        return torch.stack([compute(logits_nchw, truth_nhw) for compute in self._sums.values()])

    def combine(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss, the weighted sum of ``sums / counts``; a term whose count is 0 adds 0."""
        weights = self.term_weights / counts.clamp(min=torch.finfo(torch.float32).tiny)
        return (sums * weights.where(counts > 0, 0).to(sums.dtype)).sum()

    def _weigh(self, values_nhw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Multiply pixel values (N, H, W), which are 0 where ignored, by the weights of their classes."""
        if self._class_weights is None:
            return values_nhw
        some_class = truth_nhw.where(truth_nhw != self._ignore_index, 0)
        return values_nhw * self._class_weights[some_class]

    def _compute_entropies(self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each pixel, (N, H, W), 0 where it is ignored."""
        return functional.cross_entropy(logits_nchw, truth_nhw, ignore_index=self._ignore_index, reduction="none")

    def _sum_cross_entropy(self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(
            logits_nchw,
            truth_nhw,
            weight=self._class_weights,
            ignore_index=self._ignore_index,
            label_smoothing=self._settings.label_smoothing,
            reduction="sum",
        )

    def _sum_focal(self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Sum the focal loss of the softmax.

        That of segmentation-models-pytorch scores each class against the rest, and is NaN if all pixels are ignored.
        """
        entropies = self._compute_entropies(logits_nchw, truth_nhw)
        return self._weigh((1 - torch.exp(-entropies)) ** self._settings.focal_gamma * entropies, truth_nhw).sum()

    def _sum_hard_examples(self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Sum over images the mean cross-entropy of each image's hard pixels.

        A pixel is hard if the probability of its true class is below ``ohem_threshold``; in any case at least the share
        ``ohem_min_kept`` of an image's scored pixels is kept, the hardest ones first.
        """
        entropies_nhw = self._compute_entropies(logits_nchw, truth_nhw)
        scored = (truth_nhw != self._ignore_index).flatten(1)
        with torch.no_grad():
            entropies = entropies_nhw.flatten(1)
            num_kept = (scored.sum(1) * self._settings.ohem_min_kept).ceil().long().clamp(min=1)
            last_kept = entropies.sort(1, descending=True).values.gather(1, num_kept[:, None] - 1)
            hard = scored & (entropies >= last_kept.clamp(max=-math.log(self._settings.ohem_threshold)))
        weighted = self._weigh(entropies_nhw, truth_nhw).flatten(1)
        return ((weighted * hard).sum(1) / hard.sum(1).clamp(min=1)).sum()

    def _sum_tversky(
        self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor, alpha: float, beta: float
    ) -> torch.Tensor:
        """Sum over images 1 minus the mean Tversky index of the classes in each image's truth.

        ``alpha`` weights false positives, ``beta`` false negatives: (0.5, 0.5) is Dice, (1, 1) is Jaccard. So Dice is
        2 sum(p t) / (sum(p) + sum(t)), with the sum of the probabilities in the denominator, as in Sudre et al., 2017,
        and in segmentation-models-pytorch; V-Net's has the sum of their squares. A class that is absent from an image's
        truth is left out of that image's mean, so probability given to it costs only through the classes that are
        present. The loss classes of segmentation-models-pytorch pool the images of a batch, so that an image's loss
        depends on the other images; there an absent class adds 0 but counts in the mean.
        """
        scored = (truth_nhw != self._ignore_index).flatten(1)[:, None]
        classes = torch.arange(logits_nchw.shape[1], device=truth_nhw.device)[:, None]
        is_class = (truth_nhw.flatten(1)[:, None] == classes) & scored  # (N, C, pixels)
        probability = logits_nchw.softmax(1).flatten(2) * scored
        tp, truth_px = (probability * is_class).sum(2), is_class.sum(2)
        fp, fn = probability.sum(2) - tp, truth_px - tp
        index = tp / (tp + alpha * fp + beta * fn).clamp(min=1e-7)
        present = truth_px > 0
        return (((1 - index) * present).sum(1) / present.sum(1).clamp(min=1)).sum()

    def _sum_lovasz(self, logits_nchw: torch.Tensor, truth_nhw: torch.Tensor) -> torch.Tensor:
        """Sum over images the mean Lovász-Softmax loss of the classes in each image's truth.

        That of segmentation-models-pytorch makes the host wait for a GPU once for each class of each image.
        """
        # One image at a time, and again in the backward pass: otherwise about 20 bytes per pixel and class of the batch
        # would be kept until then.
        losses = [
            checkpoint(self._compute_lovasz, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(logits_nchw, truth_nhw, strict=True)
        ]
        return torch.stack(losses).sum()

    def _compute_lovasz(self, logits_chw: torch.Tensor, truth_hw: torch.Tensor) -> torch.Tensor:
        """Return the mean Lovász-Softmax loss of the classes in an image's truth."""
        truth = truth_hw.flatten()
        classes = torch.arange(len(logits_chw), device=truth.device)[:, None]
        is_class = (truth == classes) & (truth != self._ignore_index)  # (C, pixels)
        errors = (is_class.float() - logits_chw.softmax(0).flatten(1)).abs() * (truth != self._ignore_index)
        errors, order = errors.sort(1, descending=True)
        with torch.no_grad():
            num_px = is_class.sum(1, keepdim=True, dtype=torch.int32)
            num_seen = is_class.gather(1, order).cumsum(1, dtype=torch.int32)
            num_others = torch.arange(1, len(truth) + 1, device=truth.device, dtype=torch.int32) - num_seen
            jaccard_loss = 1 - (num_px - num_seen) / (num_px + num_others)
            gradient = jaccard_loss.diff(prepend=jaccard_loss.new_zeros(len(classes), 1))
            present = num_px[:, 0] > 0
        return ((errors * gradient).sum(1) * present).sum() / present.sum().clamp(min=1)


def compute_median_frequency_weights(
    pixel_count: npt.NDArray[np.int64], image_px: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return class weights, (C,): the median class frequency divided by the class's own; 1 for an absent class.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels", 2015.

    Args:
        pixel_count: (C,) labelled pixels of each class.
        image_px: (C,) labelled pixels of all images in which the class appears.
    """
    frequency = pixel_count / np.maximum(image_px, 1)
    present = pixel_count > 0
    weights = np.ones(len(pixel_count))
    weights[present] = np.median(frequency[present]) / frequency[present]
    return weights
