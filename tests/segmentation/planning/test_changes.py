"""Comparison of the frozen listing of a run with the present one."""

from segray.runs.plan import ListedImage
from segray.segmentation.planning.changes import Changes, merge_listings

IMAGES = [ListedImage(name, 1, f"tag {name}", f"mask {name}", None) for name in "abcdefgh"]


def merge(present: list[ListedImage], retryable: set[str]) -> tuple[list[tuple[ListedImage, int]], Changes]:
    frozen = [(image, index // 3) for index, image in enumerate(IMAGES)]
    changes = Changes()
    return list(merge_listings(frozen, [(image, 99) for image in present], retryable, changes)), changes


def test_changes_of_the_listing_are_counted_and_the_first_one_is_named() -> None:
    new = [ListedImage("0"), ListedImage("bb"), ListedImage("z")]
    present = sorted([*IMAGES[:2], *IMAGES[3:6], IMAGES[6]._replace(etag="other"), *new])
    merged, changes = merge(present, set())
    assert dict(changes.counts) == {"added": 3, "removed": 2, "changed": 1}
    assert str(changes) == "different listing: 3 added, 2 removed, 1 changed; 0 was added"
    assert [(image.uri, fragment) for image, fragment in merged] == [
        (name, index // 3) for index, name in enumerate("abcdefgh")
    ]


def test_only_retryable_images_take_their_present_state_and_none_is_dropped() -> None:
    present = [IMAGES[0]._replace(etag="new", size_bytes=10**6), *IMAGES[2:]]
    merged, changes = merge(present, {"a", "b"})
    assert changes.first is None
    assert [image for image, _ in merged] == [present[0], IMAGES[1], *IMAGES[2:]]
    assert [fragment for _, fragment in merged] == [0, 0, 0, 1, 1, 1, 2, 2]
    _, changes = merge(present, {"a"})
    assert changes.first == "b was removed"
