"""Following a learnt flow from noise (time 0) to data (time 1) in equal steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nar_speech.errors import ConfigError

# (values of any shape, number of the evaluation) -> velocity of that shape; times are those of ``flow_times``
Velocity = Callable[[Tensor, int], Tensor]

EVALUATIONS = {"euler": 1, "midpoint": 2}  # of the network in a step


def flow_times(steps: int, solver: str) -> tuple[float, ...]:
    """The times at which a solver asks for the velocity, in order.

    Raises:
        ConfigError: an unknown solver, or no steps.
    """
    if solver not in EVALUATIONS:
        raise ConfigError(f"solver '{solver}': unknown; use {' or '.join(EVALUATIONS)}")
    if steps < 1:
        raise ConfigError(f"steps: got {steps}; must be at least 1")
    if solver == "euler":
        return tuple(i / steps for i in range(steps))
    return tuple(i / (2 * steps) for i in range(2 * steps))


def integrate(velocity: Velocity, x: Tensor, steps: int, solver: str = "midpoint") -> Tensor:
    """What ``x`` at time 0 becomes at time 1.

    ``euler``: x += h v(x, t). ``midpoint``: x += h v(x + h/2 v(x, t), t + h/2); two evaluations a step, of
    second order.

    Args:
        velocity: called with evaluation number n, for the time ``flow_times(steps, solver)[n]``.
    """
    h = 1 / steps
    count = len(flow_times(steps, solver))
    for n in range(0, count, EVALUATIONS[solver]):
        slope = velocity(x, n)
        if solver == "midpoint":
            slope = velocity(x + h / 2 * slope, n + 1)
        x = x + h * slope
    return x
