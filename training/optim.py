"""Optimisers and the few tensors-at-once helpers around them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for the matrices of the transformer layers.
    Matrices of equal shape and rate go through as one batch; `rates` multiply the learning rate, one per matrix. Updates
    have the root mean square of Adam's, so one learning rate fits both."""

    def __init__(
        self, params: list[torch.nn.Parameter], rates: list[float] | None = None, momentum=0.95, weight_decay=0.01
    ):
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[tuple, list] = {}
        for p, rate in zip(params, rates or [1.0] * len(params), strict=True):
            groups.setdefault((tuple(p.shape), rate), []).append(p)
        self.groups = [
            (ps, torch.zeros(len(ps), *shape, device=ps[0].device), rate) for (shape, rate), ps in groups.items()
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for params, buffer, rate in self.groups:
            gradient = torch.stack([p.grad for p in params])
            buffer.mul_(self.momentum).add_(gradient)
            update = orthogonalised(gradient + self.momentum * buffer)
            scale = -lr * rate * 0.2 * math.sqrt(max(update.shape[-2:]))
            torch._foreach_mul_(params, 1 - lr * rate * self.weight_decay)
            torch._foreach_add_(params, list((update * scale).unbind(0)))

    def state_dict(self) -> list[Tensor]:
        return [buffer for _, buffer, _ in self.groups]

    def load_state_dict(self, state: list[Tensor]) -> None:
        for (_, buffer, _), saved in zip(self.groups, state, strict=True):
            buffer.copy_(saved)


class Optimiser:
    """Muon for the matrices of layers, AdamW for all else. rate(name) multiplies the learning rate of a parameter."""

    def __init__(self, named: dict[str, torch.nn.Parameter], rate=lambda name: 1.0):
        is_layer_matrix = lambda n, p: p.ndim == 2 and ("blocks." in n or "layers." in n) and "modulation" not in n
        matrices = {n: p for n, p in named.items() if is_layer_matrix(n, p)}
        self.params = list(named.values())
        self.muon = Muon(list(matrices.values()), [rate(n) for n in matrices])
        by_rate: dict[float, list] = {}
        for n, p in named.items():
            if n not in matrices:
                by_rate.setdefault(rate(n), []).append(p)
        groups = [{"params": ps, "rate": r} for r, ps in by_rate.items()]
        fused = self.params[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)

    def step(self, lr: float) -> Tensor:
        """Applies the gradients, averaged over all processes, and drops them; returns their norm."""
        average_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.muon.step(lr)
        for group in self.adam.param_groups:
            group["lr"] = lr * group["rate"]
        self.adam.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """x [n, rows, columns] -> about U V^T of each matrix's SVD, by a quintic iteration in bf16."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.bfloat16()
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.mT if tall else y).float()


class Ema:
    """Moving average of a module's parameters; short at first, so that early exports are not the initial weights."""

    def __init__(self, params: list[torch.nn.Parameter], decay: float):
        self.params, self.decay, self.updates = params, decay, 0
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 20))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        torch._foreach_copy_(self.values, self.params)
        self.updates = 0


@torch.no_grad()
def average_gradients(params: list[torch.nn.Parameter]) -> None:
    """Mean of the gradients over all processes, as one flat float32 bucket."""
    if not dist.is_initialized():
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])


def broadcast_parameters(module: torch.nn.Module) -> None:
    """Every process starts from the weights of rank 0."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
