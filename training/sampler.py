"""Few-step sampling of one frame, the same for evaluation, the reference run and the engine (docs/world-model.md)."""

from __future__ import annotations

import argparse
from typing import Callable

from torch import Tensor

from model import SamplerConfig


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


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", choices=("ode", "renoise"))
    parser.add_argument("--steps", type=int, help="sampling steps; default of all these: the model's")
    parser.add_argument("--shift", type=float, help="of the sampler's noise levels")
    parser.add_argument("--first-steps", type=int, help="at least so many for a frame without history")
    parser.add_argument("--first-shift", type=float, help="of the noise levels of such a frame")


def chosen_sampler(own: SamplerConfig, args: argparse.Namespace) -> SamplerConfig:
    """The model's own sampler with what the command line says in its place."""
    return SamplerConfig(
        args.sampler or own.type,
        args.steps or own.num_steps,
        args.shift or own.shift,
        own.first_steps if args.first_steps is None else args.first_steps,
        own.first_shift if args.first_shift is None else args.first_shift,
    )
