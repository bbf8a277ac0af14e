"""Training only: makes what the prompt says findable by place. Nothing of this file is exported.

The velocity loss alone is slow to tie "in the north there is a winter land" to the north: until the text encoder has put
place and property into one vector, cross attention has nothing to look up, and until it looks, the encoder has no reason
to. Two probes give both sides dense targets, the properties of the regions that the prompt mentions:

- `TextProbe` asks the text as the transformer sees it (after text_embedding), by one cross attention whose queries are
  points of the nine regions in the transformer's own place features;
- `StreamProbe` reads the properties of each token's region from the residual stream, halfway up the transformer.

`PromptStore` keeps thousands of prompts ready, so that the text learns from far more worlds than are rendered.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overworld
from clips import PROPERTIES, TRAINING_SEED, UNSAID, first_pool, prompt_and_properties
from model import rms_norm

REGION_TOKENS = 64  # a region is 64 x 64 tokens before its border is warped
INTERIOR_MARGIN = 12  # tokens this far inside belong to it in 99.4 % of places
PROMPT_SEED = TRAINING_SEED << 8  # first map seed, far from those of clips


def region_points(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random inner point of each of the nine regions: X, Y [B, 9] in tokens."""
    region = torch.arange(9, device=device)
    inner = lambda: INTERIOR_MARGIN + (REGION_TOKENS - 2 * INTERIOR_MARGIN) * torch.rand(batch, 9, device=device)
    return REGION_TOKENS * (region % 3) + inner(), REGION_TOKENS * (region // 3) + inner()


def token_properties(x: Tensor, y: Tensor, properties: Tensor) -> Tensor:
    """Targets [B, L, 5] of tokens at world coordinates x, y [B, L], from properties [B, 9, 5] by region. Near a border,
    where the region is uncertain, UNSAID."""
    side = 3 * REGION_TOKENS
    x, y = x % side, y % side
    region = (y // REGION_TOKENS * 3 + x // REGION_TOKENS).long().clamp(0, 8)
    targets = properties.gather(1, region[..., None].expand(-1, -1, properties.shape[2]))
    inside = [(v % REGION_TOKENS - REGION_TOKENS / 2).abs() < REGION_TOKENS / 2 - INTERIOR_MARGIN for v in (x, y)]
    return targets.where((inside[0] & inside[1])[..., None], UNSAID)


def property_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., sum(PROPERTIES)], targets [..., 5] -> mean cross entropy over properties, and the share of right
    themes. What is UNSAID does not count."""
    losses = []
    for part, target in zip(logits.float().split(list(PROPERTIES.values()), -1), targets.unbind(-1)):
        part, target = part.flatten(0, -2), target.flatten()
        said = target != UNSAID
        total = F.cross_entropy(part, target, ignore_index=UNSAID, reduction="sum")
        losses.append(total / said.sum().clamp(min=1))
        if len(losses) == 1:
            accuracy = ((part.argmax(-1) == target) & said).sum() / said.sum().clamp(min=1)
    return torch.stack(losses).mean(), accuracy


class TextProbe(nn.Module):
    """Place features [B, Q, P] and text [B, T, dim] -> logits of the properties there [B, Q, 30]. Queries and keys are
    normalised as in the transformer's cross attention, so what it can look up, a layer can too."""

    def __init__(self, place_dim: int, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Sequential(nn.Linear(place_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_query, self.norm_key = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.readout = nn.Sequential(nn.Linear(dim, dim), nn.GELU("tanh"), nn.Linear(dim, sum(PROPERTIES.values())))

    def forward(self, places: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        heads = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q = heads(rms_norm(self.query(places), self.norm_query, 1e-6))
        k = heads(rms_norm(self.key(text), self.norm_key, 1e-6))
        found = F.scaled_dot_product_attention(q, k, heads(self.value(text)), attn_mask=text_mask)
        return self.readout(found.transpose(1, 2).flatten(2))


class StreamProbe(nn.Module):
    """Residual stream [B, L, dim] -> logits of the properties of each token's region [B, L, 30]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(dim))
        self.readout = nn.Linear(dim, sum(PROPERTIES.values()))

    def forward(self, stream: Tensor) -> Tensor:
        return self.readout(rms_norm(stream, self.norm, 1e-6))


class PromptStore:
    """A ring of prompts with the properties of their worlds, renewed by threads. Each pool of maps is described
    `wordings` times; making the maps is what costs."""

    def __init__(self, capacity: int, text_len: int, threads: int, rank=0, ranks=1, seed=0, pool_maps=32, wordings=8):
        self.pool_maps, self.wordings, self.text_len = pool_maps, wordings, text_len
        self.chunk = pool_maps * wordings
        self.capacity = max(1, capacity // self.chunk) * self.chunk
        self.ids = np.zeros((self.capacity, text_len), np.int16)
        self.properties = np.zeros((self.capacity, 9, len(PROPERTIES)), np.int8)
        self.written = 0  # prompts so far
        self._rng = np.random.default_rng(rank)
        self._next_pool, self._stride = first_pool(seed) + rank, ranks
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """ids [count, T'], T' the longest of them in steps of 64 (few shapes, aligned masks), and properties
        [count, 9, 5], both int64 on the CPU."""
        while self.written < min(4 * count, self.capacity):
            if self._error:
                raise RuntimeError("prompt thread failed") from self._error
            time.sleep(0.01)
        with self._lock:
            rows = self._rng.integers(0, min(self.written, self.capacity), count)
            ids, properties = self.ids[rows], self.properties[rows]
        longest = min(self.text_len, -(-int((ids != 0).sum(1).max()) // 64) * 64)
        return torch.from_numpy(ids[:, :longest]).long(), torch.from_numpy(properties).long()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                with self._lock:
                    number, self._next_pool = self._next_pool, self._next_pool + self._stride
                pool = overworld.Pool(PROMPT_SEED + self.pool_maps * number, self.pool_maps)
                rng = np.random.default_rng(number)
                pairs = [
                    prompt_and_properties(pool, k % self.pool_maps, rng, self.text_len) for k in range(self.chunk)
                ]
                with self._lock:
                    rows = slice(self.written % self.capacity, self.written % self.capacity + self.chunk)
                    self.ids[rows] = [ids for ids, _ in pairs]
                    self.properties[rows] = [properties for _, properties in pairs]
                    self.written += self.chunk
                if self.written >= self.capacity:
                    self._stopping.wait(0.1)  # the ring is full: leave the processor to the clips
        except Exception as error:  # handed to the caller of sample()
            self._error = error
