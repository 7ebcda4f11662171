"""The combinations that run by default cover every value, or every pair of values."""

import itertools

from products import covering


def kept(parameters):
    return [p.values for p in parameters if not p.marks]


def test_of_two_axes_every_value_runs():
    found = covering("abcdefg", "xyz")
    assert len(found) == 21
    assert len(kept(found)) == 7
    assert {row[0] for row in kept(found)} == set("abcdefg")
    assert {row[1] for row in kept(found)} == set("xyz")


def test_of_three_axes_every_pair_runs():
    axes = ("abcd", "xyz", (True, False))
    found = covering(*axes)
    assert [p.values for p in found] == list(itertools.product(*axes))
    for one, other in itertools.combinations(range(3), 2):
        assert {(row[one], row[other]) for row in kept(found)} == set(itertools.product(axes[one], axes[other]))
    assert len(kept(found)) == 12
    assert kept(covering(*axes)) == kept(found)
    assert len(kept(covering(*axes, strength=1))) == 4
