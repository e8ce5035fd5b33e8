"""Pairwise covering arrays: of a product of factors the few cases in which every two values still meet.

What goes wrong goes wrong for a value, or for two that do not go together; three are rare. `make test-full` runs the
whole products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TypeVar

Case = TypeVar("Case")
Factors = Callable[[Case], Sequence[object]]
WHOLE = "NLA_MEGATRON_WHOLE_PRODUCTS"
"""Set where whole products are wanted; processes that tests start inherit it."""


def covering(product: Iterable[Case], factors: Factors[Case], given: Iterable[Case] = ()) -> list[Case]:
    """Of the cases that there are, as few as a greedy choice needs for each pair of values that occurs in any.

    Combinations that make no sense are left out of `product`. The choice is the same every time, in the product's
    order.

    Args:
        factors: the values of a case, as many for each.
        given: cases of the product that are wanted whatever else is.
    """
    cases = list(product)
    pairs = [set(combinations(enumerate(factors(case)), 2)) for case in cases]
    chosen = {cases.index(case) for case in given}
    missing = set[object]().union(*pairs).difference(*(pairs[index] for index in chosen))
    while missing:
        best = max(range(len(cases)), key=lambda index: len(pairs[index] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [cases[index] for index in sorted(chosen)]


def chosen(product: Iterable[Case], factors: Factors[Case], given: Iterable[Case] = ()) -> list[Case]:
    """`covering`, or everything where whole products are wanted."""
    return list(product) if WHOLE in os.environ else covering(product, factors, given)
