"""What is wrong with labels that decode well: values that were mixed by a resize, masks that lie another way round."""

import numpy as np
import numpy.typing as npt

_MIN_EDGES = 100  # fewer say nothing
_MIN_MIXED_SHARE = 0.2  # of edges; clean masks have a few, where a thin class lies between two others


def compute_mixed_share(raw: npt.NDArray[np.integer]) -> float:
    """Return the share of a mask's edges where a pixel's value lies between those of its two neighbours.

    At the edge of two classes, interpolation and JPEG leave values between theirs; those stand for other classes, or
    for none. Edges are counted along rows and columns, where the neighbours of a pixel differ by more than 1.

    Args:
        raw: (H, W) raw mask values.

    Returns:
        0..1; 0 where there are too few edges to say.
    """
    num_edges = num_mixed = 0
    values = raw.astype(np.int32)
    for rows in (values, values.T):
        before, middle, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        is_edge = np.abs(after - before) > 1
        is_mixed = is_edge & (middle > np.minimum(before, after)) & (middle < np.maximum(before, after))
        num_edges += int(is_edge.sum())
        num_mixed += int(is_mixed.sum())
    return num_mixed / num_edges if num_edges >= _MIN_EDGES else 0.0


def is_mixed(raw: npt.NDArray[np.integer]) -> bool:
    """Say whether a mask looks as if it had been resized with interpolation, or saved as JPEG."""
    return compute_mixed_share(raw) >= _MIN_MIXED_SHARE
