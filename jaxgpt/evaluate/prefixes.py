"""Which rows begin with the same tokens, and where it pays to compute those once.

Rows are the leaves of a trie. A group of rows at a node of depth P costs P tokens for the prefix,
and of each row what comes after it; the alternative is what its branches cost on their own. The
cheaper one is taken, from the root down: five worked examples of a subject are shared by all of its
questions, or a long question by its choices, whichever saves more.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

MIN_PREFIX = 32  # tokens; a shorter prefix costs more programs than it saves time
MIN_SAVING = 0.25  # of the tokens of a group, or its rows stay whole
MAX_NESTING = 3  # nodes of at least MIN_PREFIX tokens below each other that are looked at


class Plan(NamedTuple):
    """How rows are computed: groups of (tokens of the prefix, numbers of the rows), and tokens."""

    cost: int
    groups: list[tuple[int, list[int]]]


def find_shared_prefixes(
    rows: Sequence[tuple[int, ...]], limits: Sequence[int], cost: int = 0
) -> list[tuple[int, list[int]]]:
    """Divide rows into groups that share a prefix.

    Args:
        rows: the tokens of each.
        limits: the longest prefix that each may give away.
        cost: of a group with a prefix beside its tokens, in tokens.

    Returns:
        (tokens of the prefix, numbers of the rows) of every group. The first has the prefix 0, and
        all the rows that stay whole; it is left out if it is empty.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number])
    whole: list[int] = []
    shared = []
    for prefix, numbers in _plan(rows, limits, order, cost, MAX_NESTING).groups if rows else []:
        if prefix:
            shared.append((prefix, numbers))
        else:
            whole += numbers
    return ([(0, sorted(whole))] if whole else []) + shared


def _plan(rows, limits, order: list[int], cost: int, nesting: int) -> Plan:
    """Plan the rows of a node, sorted by their tokens."""
    total = sum(len(rows[number]) for number in order)
    separate = Plan(total, [(0, order)])
    if len(order) == 1 or not nesting:
        return separate
    depth = count_common(rows[order[0]], rows[order[-1]])
    if depth == len(rows[order[-1]]):
        return separate  # the rows are equal
    is_long = depth >= MIN_PREFIX
    branches = groupby(order, key=lambda number: rows[number][depth : depth + 1])
    plans = [_plan(rows, limits, list(part), cost, nesting - is_long) for _, part in branches]
    below = Plan(sum(plan.cost for plan in plans), [x for plan in plans for x in plan.groups])
    prefix = min(depth, *(limits[number] for number in order))
    here = total - prefix * (len(order) - 1)
    if prefix >= MIN_PREFIX and here + cost < below.cost and here <= (1 - MIN_SAVING) * total:
        return Plan(here + cost, [(prefix, order)])
    return below


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
