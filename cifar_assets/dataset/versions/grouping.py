"""Which small items share one stored object, so that there are neither very many objects nor much to write again."""

from collections.abc import Callable, Sequence
from typing import TypeVar

GROUP_ROWS = 64
"""Most images of a group: what one more image makes written again, at most, however many there are."""

_DIGEST_BITS = 256
T = TypeVar("T")


def grouped(items: Sequence[T], digest: Callable[[T], str], rows: Callable[[T], int]) -> list[list[T]]:
    """The items in groups of up to GROUP_ROWS rows, in the order of their sha256 digests.

    A group holds the items whose digests begin alike, with as many bits as it takes. So the groups are a function of
    the items, whatever the order in which they came, and an item more or less changes its own group alone.
    """

    def split(part: list[T], bit: int) -> list[list[T]]:
        if len(part) < 2 or bit == _DIGEST_BITS or sum(rows(item) for item in part) <= GROUP_ROWS:
            return [part] if part else []
        halves: tuple[list[T], list[T]] = ([], [])
        for item in part:
            halves[int(digest(item)[bit // 4], 16) >> (3 - bit % 4) & 1].append(item)
        return split(halves[0], bit + 1) + split(halves[1], bit + 1)

    return split(sorted(items, key=digest), 0)
