"""One budget, many layers: which choice for each.

- ``"uniform"``: every layer keeps the same fraction of its own cost;
- ``"energy"``: every layer keeps the same share of its energy, 1 - error, where the error is the dropped share;
- ``"global"``: the sum of the errors is minimised, by Lagrangian relaxation on the lower convex hulls of the layers'
  (cost, error) curves (Shoham & Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METHODS = ("uniform", "energy", "global")


@dataclass(frozen=True)
class Choice:
    """One way to store a layer: ``cost`` is what the budget counts, ``error`` what is to be small, ``dropped`` the
    share of ``Σσ²`` that is lost."""

    cost: int
    error: float
    scheme: str
    rank: int
    parameters: int
    macs: int
    dropped: float = 0.0


def allocate(choices: Mapping[str, list[Choice]], budget: int, method: str) -> dict[str, int]:
    """Pick one of each layer's choices.

    Args:
        choices: per layer, by rising cost and falling error; the last one is the dense layer.
        budget: the sum of the picked costs is at most this; it must cover every layer's first choice.
        method: one of `METHODS`.

    Returns:
        The index of each layer's choice.
    """
    if method == "global":
        picked = _hull_greedy(choices, budget)
    else:
        picked = _bisect(choices, budget, method)
    left = budget - sum(options[picked[name]].cost for name, options in choices.items())

    def urgency(name: str) -> float:
        """Smallest first: the layer furthest behind, or where a step gains most."""
        now, after = choices[name][picked[name]], choices[name][picked[name] + 1]
        if method == "uniform":
            return after.cost / choices[name][-1].cost
        if method == "energy":
            return -now.error
        return -(now.error - after.error) / (after.cost - now.cost)

    # What the rule leaves over is less than one step of it: fill up with single steps, the most urgent that fits first.
    queue = [(urgency(name), name) for name in choices if picked[name] + 1 < len(choices[name])]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        options, now = choices[name], picked[name]
        price = options[now + 1].cost - options[now].cost
        if price > left or options[now + 1].error == options[now].error:
            continue  # no later step of this layer either: they come after this one
        left -= price
        picked[name] += 1
        if picked[name] + 1 < len(options):
            heapq.heappush(queue, (urgency(name), name))
    return picked


def _hull_greedy(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, int]:
    """Walk all layers' lower convex hulls from the steepest edge down, as far as ``budget`` goes."""
    picked = dict.fromkeys(choices, 0)
    left = budget - sum(options[0].cost for options in choices.values())
    edges = []
    for name, options in choices.items():
        hull = _lower_hull(options)
        for start, end in zip(hull, hull[1:], strict=False):
            gain = options[start].error - options[end].error
            edges.append((-gain / max(options[end].cost - options[start].cost, 1), name, start, end))
    for slope, name, start, end in sorted(edges):
        price = choices[name][end].cost - choices[name][start].cost
        if picked[name] == start and price <= left and slope < 0:
            picked[name] = end
            left -= price
    return picked


def _lower_hull(options: Sequence[Choice]) -> list[int]:
    """Indices of the lower convex hull of (cost, error), by rising cost (Andrew's monotone chain)."""
    hull: list[int] = []
    for i, c in enumerate(options):
        while len(hull) > 1:
            a, b = options[hull[-2]], options[hull[-1]]
            if (b.error - a.error) * (c.cost - a.cost) < (c.error - a.error) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(i)
    return hull


def _bisect(choices: Mapping[str, list[Choice]], budget: int, method: str) -> dict[str, int]:
    """The largest common level (fraction of cost, or of energy) that the budget allows."""

    def at(level: float) -> dict[str, int]:
        picked = {}
        for name, options in choices.items():
            if method == "uniform":
                affordable = bisect_right([c.cost for c in options], level * options[-1].cost)
                picked[name] = max(affordable - 1, 0)
            else:
                picked[name] = next(i for i, c in enumerate(options) if c.error <= 1 - level)
        return picked

    def price(picked: dict[str, int]) -> int:
        return sum(options[picked[name]].cost for name, options in choices.items())

    low, high = 0.0, 1.0
    if price(at(high)) <= budget:
        return at(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if price(at(middle)) <= budget else (low, middle)
    return at(low)
