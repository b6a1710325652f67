import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slimkit.graph.disjoint import DisjointSets

JOINS = st.lists(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 19), min_size=n, max_size=n),
            st.lists(st.integers(0, 19), min_size=n, max_size=n),
        )
    ),
    max_size=12,
)


def _smallest_by_hand(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    label = list(range(count))
    for first, second in pairs:
        low, high = sorted((label[first], label[second]))
        label = [low if known == high else known for known in label]
    return label


@given(JOINS)
def test_labels_are_those_of_joining_pair_by_pair(joins: list[tuple[list[int], list[int]]]) -> None:
    sets = DisjointSets()
    sets.grow(20)
    pairs = []
    for first, second in joins:
        sets.join(np.asarray(first), np.asarray(second))
        pairs += list(zip(first, second, strict=True))
    assert sets.labels().tolist() == _smallest_by_hand(20, pairs)
    assert sets.labels().tolist() == _smallest_by_hand(20, pairs)  # asking changes nothing


def test_sets_grow_after_joins() -> None:
    sets = DisjointSets()
    sets.grow(4)
    sets.join(np.asarray([0, 1]), np.asarray([2, 3]))
    sets.grow(3000)  # beyond what was laid out at first
    sets.join(np.asarray([3, 2]), np.asarray([2002, 2003]))
    labels = sets.labels()
    assert labels[[0, 1, 2, 3, 2002, 2003, 2004]].tolist() == [0, 1, 0, 1, 1, 0, 2004]
