"""L-BFGS: the least value of a smooth function of many numbers, from its gradients of the last few steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MEMORY = 10  # pairs of steps and changes of gradient that are kept; more hardly help (Liu and Nocedal 1989)
MAX_STEPS = 200
TOLERANCE = 1e-6  # done when a step gains less than this part of the value
SUFFICIENT = 1e-4  # of the gain that the gradient promises (Armijo 1966)


def minimise(function: Callable[[Floats], tuple[float, Floats]], x: Floats) -> Floats:
    """The argument of least value, from a start. `function` gives value and gradient."""
    value, gradient = function(x)
    pairs: list[tuple[Floats, Floats]] = []
    for _ in range(MAX_STEPS):
        direction = -_newton(gradient, pairs)
        slope = float(gradient @ direction)
        if slope >= 0:
            return x
        step = 1.0 if pairs else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        while True:
            moved = step * direction
            new_value, new_gradient = function(x + moved)
            if new_value <= value + SUFFICIENT * step * slope:
                break
            step /= 2
            if step < 1e-12:
                return x
        change = new_gradient - gradient
        if float(change @ moved) > 0:
            pairs = [*pairs, (moved, change)][-MEMORY:]
        gained = value - new_value
        x, value, gradient = x + moved, new_value, new_gradient
        if gained <= TOLERANCE * abs(value):
            return x
    return x


def _newton(gradient: Floats, pairs: list[tuple[Floats, Floats]]) -> Floats:
    """The gradient times an estimate of the inverse of the second derivatives (Nocedal 1980, the two-loop recursion)."""
    q = gradient.copy()
    weights = []
    for moved, change in reversed(pairs):
        weight = float(moved @ q) / float(change @ moved)
        weights.append(weight)
        q -= weight * change
    if pairs:
        moved, change = pairs[-1]
        q *= float(moved @ change) / float(change @ change)
    for (moved, change), weight in zip(pairs, reversed(weights), strict=True):
        q += (weight - float(change @ q) / float(change @ moved)) * moved
    return q
