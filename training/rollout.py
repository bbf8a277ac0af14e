"""Free play of the world model on a batch of maps, in PyTorch: what evaluation measures."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from model import KeyValueCache, WorldModel
from sampler import sample_frame


class Player:
    """Plays with bf16 arithmetic on a GPU, float32 on a CPU."""

    def __init__(self, model: WorldModel, device: torch.device, seed: int = 1):
        self.model, self.device = model.to(device), device
        self.sampler = model.config.sampler
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.seed = seed
        # Weights that require gradients are cast once inside an autocast region, others at every use.
        model.requires_grad_(True)

    def autocast(self):
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    @torch.no_grad()
    def play(self, ids: Tensor, camera: Tensor, primed: Tensor | None = None, window: int = 0, sink: int = 0) -> Tensor:
        """ids [B, T], camera [B, F, 2] in tokens, primed latents [B, P, C, h, w] of the first frames, given rather than
        made. Returns latents [B, F, C, h, w]."""
        net = self.model.transformer
        ids, camera = ids.to(self.device), camera.to(self.device)
        batch, frames = camera.shape[:2]
        generator = torch.Generator(self.device).manual_seed(self.seed)
        config = net.config
        shape = (batch, config.latent_channels, config.latent_height, config.latent_width)
        noise = lambda step: torch.randn(shape, device=self.device, generator=generator)
        text_mask = (ids != 0)[:, None, None, :]
        out = []
        with self.autocast():
            text_keys = net.text_keys(self.model.text_encoder(ids))
            cache = KeyValueCache(config, batch, frames, self.device, self.dtype, window, sink)
            for frame in range(frames):
                velocity = lambda z, t, step=None: net.frame(z, t, camera[:, frame], frame, text_keys, text_mask, cache)
                if primed is not None and frame < primed.shape[1]:
                    z = primed[:, frame]
                else:
                    z = sample_frame(velocity, noise, *self.sampler.of_frame(cache.length > 0), self.sampler.type)
                velocity(z, 0.0)
                cache.commit()
                out.append(z)
        return torch.stack(out, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, F, 128, 256, 3] u8 -> latents [B, F, C, h, w]."""
        flat = pixels.flatten(0, 1)
        with self.autocast():
            chunks = [
                self.model.autoencoder.encode(chunk.to(self.device).permute(0, 3, 1, 2) / 127.5 - 1).float()
                for chunk in flat.split(64)
            ]
        return torch.cat(chunks).unflatten(0, pixels.shape[:2])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, F, C, h, w] -> pictures [B, F, 128, 256, 3] u8 on the CPU."""
        with self.autocast():
            chunks = [
                ((self.model.autoencoder.decode(z).float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
                for z in latents.flatten(0, 1).split(64)
            ]
        return torch.cat(chunks).unflatten(0, latents.shape[:2])
