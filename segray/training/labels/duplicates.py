"""Images that two splits or folds share, exactly or nearly, so that scores are too high."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from segray.data.sample_list import Sample
from segray.training.labels.heuristics import find_shared_images
from segray.training.labels.near_duplicates import NUM_BITS, find_near_duplicates
from segray.training.labels.split_report import LabelFault, SplitReport, WarningKind

_DUPLICATE_REMEDY = "keep it in one split or fold: scores on training images are too high"
_NEAR_DUPLICATE_REMEDY = (
    "the validation score is too high, because it rewards memorising: keep such images together with data.val.group_by"
)
_INCOMPLETE_REMEDY = "keep images that look alike together with data.val.group_by"
_MAX_DUPLICATES = 10_000  # Warnings of each kind: of a video, nearly all images may be near-duplicates.


@dataclass(frozen=True)
class CheckedImages:
    """Images that were checked, and that others are compared with.

    Attributes:
        samples: The samples.
        digests: As in ``SplitReport``.
        thumbprints: As in ``SplitReport``.
        name_place: Returns where the image at an index is: the name of its split or fold.
    """

    samples: Sequence[Sample]
    digests: bytes | memoryview
    thumbprints: bytes | memoryview
    name_place: Callable[[int], str]


def find_duplicates(samples: Sequence[Sample], report: SplitReport, others: CheckedImages) -> list[LabelFault]:
    """Return warnings about images that are also among the others, and about those that look nearly the same."""
    equal = find_shared_images(report.digests, others.digests)
    near, incomplete = find_near_duplicates(report.thumbprints, others.thumbprints)
    are_equal = {number for number, _ in equal}
    near = [pair for pair in near if pair[0] not in are_equal]

    def name(other: int) -> str:
        return f"{others.samples[other].image_uri} in {others.name_place(other)}"

    warnings = [
        LabelFault(samples[number].image_uri, WarningKind.DUPLICATE, f"same pixels as {name(other)}", _DUPLICATE_REMEDY)
        for number, other in equal[:_MAX_DUPLICATES]
    ] + [
        LabelFault(
            samples[number].image_uri,
            WarningKind.NEAR_DUPLICATE,
            f"looks like {name(other)} ({distance} of {NUM_BITS} bits of the hashes differ)",
            _NEAR_DUPLICATE_REMEDY,
        )
        for number, other, distance in near[:_MAX_DUPLICATES]
    ]
    if num_more := len(equal) + len(near) - len(warnings):
        last = warnings[-1]
        warnings[-1] = replace(last, message=f"{last.message}; {num_more:,} more such images are not listed")
    if len(incomplete):
        message = f"one of {len(incomplete):,} images that look in part like too many others to be compared with all"
        uri = samples[int(incomplete[0])].image_uri
        warnings.append(LabelFault(uri, WarningKind.NOT_COMPARED, message, _INCOMPLETE_REMEDY))
    return warnings
