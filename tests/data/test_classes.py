"""Raw mask values to class indices, and the remedy suggested for undeclared values."""

import numpy as np
import pytest

from segray.data.classes import ClassMap, build_palette
from segray.errors import ImageFault


def test_values_become_class_indices_or_the_ignore_index() -> None:
    classes = ClassMap(("a", "b"), (10, 300), (7,))
    encoded = classes.encode(np.array([[10, 300], [7, 10]], np.uint16))
    np.testing.assert_array_equal(encoded, [[0, 1], [255, 0]])
    assert encoded.dtype == np.uint8


def test_more_than_255_classes_need_uint16() -> None:
    names = tuple(str(index) for index in range(256))
    classes = ClassMap(names, tuple(range(256)), (999,))
    assert classes.ignore_index == 65_535
    assert classes.mask_dtype == np.uint8  # Predictions have no ignored pixels.
    encoded = classes.encode(np.array([[255, 999]], np.uint16))
    np.testing.assert_array_equal(encoded, np.array([[255, 65_535]], np.uint16))


@pytest.mark.parametrize(
    ("classes", "values", "message"),
    [
        (ClassMap(("a", "b", "c"), (0, 1, 2)), [1, 2, 3], r"class_values: \[1, 2, 3\]"),
        (ClassMap(("a", "b"), (0, 1)), [0, 255], r"class_values: \[0, 255\]"),
        (ClassMap(("a", "b"), (0, 1)), [0, 1, 255], r"255 usually means void: set data.ignore_values: \[255\]"),
        (ClassMap(("a", "b"), (0, 1), (9,)), [9, 1, 255], r"set data.ignore_values: \[9, 255\]"),
        (ClassMap(tuple("abcdefghi"), tuple(range(9))), list(range(1, 10)), r"class_values: \[1, 2, …, 9\]"),
        (ClassMap(tuple(map(str, range(80))), tuple(range(80))), list(range(0, 240, 3)), r"_values: \[0, 3, …, 237\]"),
        (
            ClassMap(("a", "b"), (0, 1)),
            list(range(0, 60, 3)),
            r"values 3, 6, 9, 12, 15, 18, 21, 24, … are not declared",
        ),
        (ClassMap(("a", "b"), (0, 1)), [0, 1, 9], r"mask value 9 is not declared \(1 pixels\).*ignore_values"),
    ],
)
def test_an_undeclared_value_is_reported_with_the_setting_that_declares_it(
    classes: ClassMap, values: list[int], message: str
) -> None:
    with pytest.raises(ImageFault, match=message):
        classes.encode(np.array([values], np.uint8))


def test_the_palette_is_that_of_pascal_voc_without_black() -> None:
    expected = [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    np.testing.assert_array_equal(build_palette(5), expected)
    assert len(np.unique(build_palette(255), axis=0)) == 255
