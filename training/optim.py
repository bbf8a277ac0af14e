"""Optimisers and the few tensors-at-once helpers around them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for the matrices of the transformer layers.
    Matrices of equal shape go through as one batch. Updates have the root mean square of Adam's, so one learning rate
    fits both."""

    def __init__(self, params: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01):
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[tuple, list] = {}
        for p in params:
            groups.setdefault(tuple(p.shape), []).append(p)
        self.groups = [(ps, torch.zeros(len(ps), *shape, device=ps[0].device)) for shape, ps in groups.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for params, buffer in self.groups:
            gradient = torch.stack([p.grad for p in params])
            buffer.mul_(self.momentum).add_(gradient)
            update = orthogonalised(gradient + self.momentum * buffer)
            scale = -lr * 0.2 * math.sqrt(max(update.shape[-2:]))
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            torch._foreach_add_(params, list((update * scale).unbind(0)))

    def state_dict(self) -> list[Tensor]:
        return [buffer for _, buffer in self.groups]

    def load_state_dict(self, state: list[Tensor]) -> None:
        for (_, buffer), saved in zip(self.groups, state, strict=True):
            buffer.copy_(saved)


class Optimiser:
    """Muon for the matrices of layers, AdamW for all else. Where is_body(name), the learning rate is multiplied by
    `body_rate`."""

    def __init__(self, named: dict[str, torch.nn.Parameter], is_body=lambda name: False, body_rate: float = 1.0):
        is_layer_matrix = lambda n, p: p.ndim == 2 and ("blocks." in n or "layers." in n) and "modulation" not in n
        self.params = list(named.values())
        self.parts = []  # (rate, Muon, AdamW)
        for body, rate in ((False, 1.0), (True, body_rate)):
            part = {n: p for n, p in named.items() if is_body(n) == body}
            if part:
                rest = [p for n, p in part.items() if not is_layer_matrix(n, p)]
                adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.01, fused=rest[0].is_cuda)
                self.parts.append((rate, Muon([p for n, p in part.items() if is_layer_matrix(n, p)]), adam))

    def step(self, lr: float) -> Tensor:
        """Applies the gradients, averaged over all processes, and drops them; returns their norm."""
        average_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for rate, muon, adam in self.parts:
            muon.step(lr * rate)
            adam.param_groups[0]["lr"] = lr * rate
            adam.step()
        self.drop_gradients()
        return norm

    def state_dict(self) -> list[dict]:
        return [{"muon": muon.state_dict(), "adam": adam.state_dict()} for _, muon, adam in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for (_, muon, adam), saved in zip(self.parts, state, strict=True):
            muon.load_state_dict(saved["muon"])
            adam.load_state_dict(saved["adam"])

    def drop_gradients(self) -> None:
        for p in self.params:
            p.grad = None


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
