"""Few-step sampling of one frame, the same for evaluation, the reference run and the engine (docs/world-model.md)."""

from __future__ import annotations

from typing import Callable

from torch import Tensor


def shifted(u, shift: float):
    """Noise level of a uniform position u in [0, 1] (number or tensor): more of the steps go to high noise."""
    return shift * u / (1 + (shift - 1) * u)


def noise_levels(num_steps: int, shift: float) -> list[float]:
    """t_0 = 1 ... t_num_steps = 0."""
    return [shifted(1 - k / num_steps, shift) for k in range(num_steps + 1)]


def sample_frame(
    velocity: Callable[[Tensor, float, int], Tensor],
    noise: Callable[[int], Tensor],
    num_steps: int,
    shift: float,
    kind: str,
) -> Tensor:
    """velocity(z, t, step) -> v; noise(step) -> fresh N(0, 1), step 0 being the start. Returns the clean latent."""
    levels = noise_levels(num_steps, shift)
    z = noise(0)
    for step, (t, following) in enumerate(zip(levels, levels[1:])):
        v = velocity(z, t, step)
        if kind == "ode" or following == 0:
            z = z + (following - t) * v
        else:
            z = (1 - following) * (z - t * v) + following * noise(step + 1)
    return z
