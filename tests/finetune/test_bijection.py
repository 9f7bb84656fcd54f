"""The order of an epoch: everything once, any place at once, another order for other keys, no order in it."""

from collections import Counter

import numpy as np
import pytest

from finetune.order.bijection import bijection


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 65_537])
def test_everything_once(size: int) -> None:
    assert sorted(bijection(np.arange(size), size, 1, 2).tolist()) == list(range(size))


def test_any_places_at_once() -> None:
    whole = bijection(np.arange(1000), 1000, 3)
    some = np.array([999, 0, 17, 500])
    assert bijection(some, 1000, 3).tolist() == whole[some].tolist()


def test_of_a_billion_only_the_places_asked_for() -> None:
    """A drawn permutation would take eight gigabytes here."""
    places = np.arange(10**9 - 1024, 10**9)
    found = bijection(places, 10**9, 0, 1)
    assert len(set(found.tolist())) == 1024 and found.min() >= 0 and found.max() < 10**9
    assert abs(found.mean() / 10**9 - 0.5) < 0.05


def test_orders_of_three_are_equally_likely() -> None:
    counts = Counter(tuple(bijection(np.arange(3), 3, 7, key).tolist()) for key in range(6000))
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5  # chi-square, 5 degrees, 0.1 %


def test_a_place_goes_anywhere() -> None:
    counts = Counter(int(bijection(np.array([2]), 100, 7, key)[0]) for key in range(20_000))
    assert sum((counts[place] - 200) ** 2 / 200 for place in range(100)) < 148.2  # 99 degrees, 0.1 %


def test_neighbours_part() -> None:
    found = bijection(np.arange(10_000), 10_000, 5)
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.04
    assert (np.diff(found) == 1).sum() < 8  # one is expected
