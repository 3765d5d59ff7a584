"""Divide what is left of a listing into ranges of keys that can be listed at the same time.

Any division is correct: each range is listed from one key to another, so together they have every key exactly once and
in order. A good one has about one page of keys in each range, which is estimated from the page before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_FILL = 0.9  # Of a page, so that most ranges are one request although keys are not distributed evenly.
_NUM_DIGITS = 2  # Characters after the common beginning of the keys of a page that their distribution is taken from.
_MIN_FOLDER_SIZE = 10  # For smaller subfolders, listing these would take a large share of the requests.


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys after one key (exclusive) up to another (inclusive).

    Attributes:
        after: The key before the first one.
        until: The last key; None is the end of the listing.
        level: Folder, with its slash, whose subfolders follow one after the other in this range; None if unknown.
        is_guess: Whether ``after`` and ``until`` are guesses, so that there may be no keys between them.
        is_rest: Whether only ``after`` is.
    """

    after: str
    until: str | None
    level: str | None = None
    is_guess: bool = False
    is_rest: bool = False


def find_level(prefix: str, keys: Sequence[str], level: str | None) -> str | None:
    """Return the folder whose subfolders are to be listed to divide what follows a page; None if that would not help.

    Args:
        prefix: With which all keys of the listing begin.
        keys: The keys of the page.
        level: Where the page was expected to go from subfolder to subfolder.
    """
    folder = _get_common_folder(prefix, keys)
    if level is not None and folder.startswith(level):
        folder = level
    if not any("/" in key[len(folder) :] for key in (keys[0], keys[-1])):
        return None
    return folder if count_entries(folder, keys) * _MIN_FOLDER_SIZE < len(keys) else None


def count_entries(folder: str, keys: Sequence[str]) -> int:
    """Return the number of files and subfolders of a folder, with its slash, that fill a page, given the last one."""
    # The first and the last subfolder are on the page in parts.
    return max(1, int(_FILL * (len({key[len(folder) :].partition("/")[0] for key in keys}) - 1)))


def divide_by_entries(
    rest: KeyRange, prefix: str, folder: str, entries: Sequence[str], group_size: int, is_last: bool
) -> list[KeyRange]:
    """Divide a range at the files and subfolders of a folder.

    Args:
        rest: The range.
        prefix: With which all keys of the listing begin.
        folder: The folder, with its slash.
        entries: Keys of files and subfolders, with their slash, in order.
        group_size: Number of entries that are likely to fit on a page.
        is_last: Whether these are all entries.
    """
    inside = [entry for entry in entries if rest.after < entry and (rest.until is None or entry < rest.until)]
    ranges = _cut(rest, inside[::group_size])
    above = _get_parent(prefix, folder) if is_last else folder
    return [*ranges[:-1], KeyRange(ranges[-1].after, rest.until, above)]


def divide_by_guess(rest: KeyRange, prefix: str, keys: Sequence[str], num_guesses: int) -> list[KeyRange]:
    """Divide a range at keys that follow those of a page at equal distances, if the keys are evenly distributed.

    Args:
        rest: The range; it begins after the page.
        prefix: With which all keys of the listing begin.
        keys: The keys of the page.
        num_guesses: Number of ranges, besides the rest.
    """
    folder = _get_common_folder(prefix, keys)
    parent = _get_parent(prefix, folder)
    inside, beyond = rest, []
    if parent is not None and not (rest.until or "").startswith(parent):  # Other subfolders may follow.
        end = f"{folder[:-1]}0"  # "0" is the character after the slash.
        inside, beyond = KeyRange(rest.after, end), [KeyRange(end, rest.until, parent)]
    bounds = _extrapolate(prefix, keys, num_guesses)
    ranges = _cut(inside, [bound for bound in bounds if inside.until is None or bound < inside.until])
    last = KeyRange(ranges[-1].after, inside.until, is_rest=True)
    return [*(KeyRange(part.after, part.until, is_guess=True) for part in ranges[:-1]), last, *beyond]


def _cut(whole: KeyRange, bounds: Sequence[str]) -> list[KeyRange]:
    starts = [whole.after, *bounds]
    return [KeyRange(after, until) for after, until in zip(starts, [*bounds, whole.until], strict=True)]


def _get_common_folder(prefix: str, keys: Sequence[str]) -> str:
    """Return the deepest folder, with its slash, that contains all keys of a page, or the prefix of the listing."""
    common = keys[0][: _count_common(keys[0], keys[-1])]
    folder = common[: common.rfind("/") + 1]
    return folder if len(folder) > len(prefix) else prefix


def _get_parent(prefix: str, folder: str) -> str | None:
    if len(folder) <= len(prefix):
        return None
    parent = folder[: folder.rfind("/", 0, -1) + 1]
    return parent if len(parent) > len(prefix) else prefix


def _count_common(first: str, last: str) -> int:
    shorter = min(len(first), len(last))
    return next((index for index in range(shorter) if first[index] != last[index]), shorter)


def _extrapolate(prefix: str, keys: Sequence[str], num_bounds: int) -> list[str]:
    """Return keys after the last one of a page, at distances of ``_FILL`` times the page.

    The characters in which the keys differ are read as the digits of a number.
    """
    last = keys[-1]
    differing = _count_common(keys[0], last)
    seen = [keys[0], last, *keys[::7]]  # Not a stride at which numbers repeat their last digit.
    digits = sorted({char for key in seen for char in key[differing : differing + _NUM_DIGITS]})
    if not digits:  # A page of one key.
        return []
    begin = differing
    while begin > len(prefix) and last[begin - 1] in digits:  # The number may grow into the characters before.
        begin -= 1
    width = differing + _NUM_DIGITS - begin

    def read(key: str) -> int:
        number = 0
        for char in key[begin : begin + width].ljust(width, digits[0]):
            number = number * len(digits) + digits.index(char)
        return number

    def spell(number: int) -> str:
        chars = []
        for _ in range(width):
            number, digit = divmod(number, len(digits))
            chars.append(digits[digit])
        return last[:begin] + "".join(reversed(chars))

    step = max(1, int(_FILL * (read(last) - read(keys[0]))))
    numbers = (read(last) + step * (index + 1) for index in range(num_bounds))
    return [spell(number) for number in numbers if number < len(digits) ** width]
