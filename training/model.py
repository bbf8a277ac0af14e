"""The embedded world model in PyTorch: autoencoder, text encoder and block-causal transformer.

docs/world-model.md is the contract: every parameter name here is the name in the weight file. Letters: B batch,
F frames, S = 128 tokens of a frame, L = F * S tokens, T text tokens, N heads, D = 64 head size, C latent channels.
Two ways to run the transformer: `Transformer.forward` trains on whole clips with a block mask (teacher forcing), and
`Transformer.frame` plays one frame against a cache of keys and values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAME_HEIGHT, FRAME_WIDTH = 128, 256
TOKEN_PIXELS = 16  # one token covers 16 x 16 pixels
TIME_SINUSOID = 256  # values that describe a noise level


@dataclass
class AutoencoderConfig:
    latent_channels: int = 16
    widths: tuple[int, int, int] = (64, 128, 192)


@dataclass
class TextEncoderConfig:
    vocab_size: int = 512
    dim: int = 256
    num_layers: int = 3
    num_heads: int = 4
    ffn_dim: int = 1024
    text_len: int = 384


@dataclass
class TransformerConfig:
    dim: int = 384
    num_layers: int = 8
    num_heads: int = 6
    head_dim: int = 64
    ffn_dim: int = 1536
    patch_size: int = 2
    latent_channels: int = 16
    latent_height: int = 16
    latent_width: int = 32
    eps: float = 1e-6
    rope_time_pairs: int = 8
    rope_time_theta: float = 10000.0
    rope_space_harmonics: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 11, 16, 22, 30, 42, 60)
    torus_tokens: int = 192
    pose_harmonics: tuple[int, ...] = (1, 2, 3, 4, 6, 9)

    @property
    def rows(self) -> int:
        return self.latent_height // self.patch_size

    @property
    def columns(self) -> int:
        return self.latent_width // self.patch_size

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns


@dataclass
class SamplerConfig:
    type: str = "ode"  # or "renoise"
    num_steps: int = 4
    shift: float = 2.5
    first_steps: int = 0  # at least so many steps for a frame without history: a whole screen of news
    first_shift: float = 0.0  # of those steps; 0: as `shift`

    def of_frame(self, has_history: bool) -> tuple[int, float]:
        """Number of steps and shift of a frame."""
        if has_history:
            return self.num_steps, self.shift
        return max(self.num_steps, self.first_steps), self.first_shift or self.shift


@dataclass
class WorldConfig:
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def to_json(self) -> str:
        return json.dumps({"model_type": "longtake-world", **dataclasses.asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> WorldConfig:
        fields = json.loads(text)
        parts = {name: fields[name] for name in ("autoencoder", "text_encoder", "transformer", "sampler")}
        for part in parts.values():
            part.update({key: tuple(value) for key, value in part.items() if isinstance(value, list)})
        return WorldConfig(
            AutoencoderConfig(**parts["autoencoder"]),
            TextEncoderConfig(**parts["text_encoder"]),
            TransformerConfig(**parts["transformer"]),
            SamplerConfig(**parts["sampler"]),
        )


def tiny_config(vocab_size: int) -> WorldConfig:
    """Small enough for a CPU test, with the frame geometry of the real model."""
    return WorldConfig(
        AutoencoderConfig(latent_channels=16, widths=(16, 24, 32)),
        TextEncoderConfig(vocab_size=vocab_size, dim=64, num_layers=2, num_heads=1, ffn_dim=96),
        TransformerConfig(dim=64, num_layers=2, num_heads=1, ffn_dim=160),
    )


# ---- autoencoder -----------------------------------------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each pixel: no statistics across pixels, so latents depend on their surroundings
    alone and a place looks the same wherever on the screen it stands."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-4)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)[:, None, None]


class Res(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Autoencoder(nn.Module):
    """Frames [B, 3, 128, 256] in [-1, 1] <-> latents [B, C, 16, 32]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        w0, w1, w2 = config.widths
        channels = config.latent_channels

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)

        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), conv(12, w0), Res(w0),
            conv(w0, w1, stride=2), Res(w1), Res(w1),
            conv(w1, w2, stride=2), Res(w2), Res(w2),
            ChannelNorm(w2), nn.SiLU(), conv(w2, channels),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            conv(channels, w2), Res(w2), Res(w2),
            conv(w2, 4 * w1), nn.PixelShuffle(2), Res(w1), Res(w1),
            conv(w1, 4 * w0), nn.PixelShuffle(2), Res(w0),
            ChannelNorm(w0), nn.SiLU(), conv(w0, 12), nn.PixelShuffle(2),
        )  # fmt: skip
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents, about unit variance in every channel."""
        return (self.encoder(pixels) - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels clamped to [-1, 1]."""
        z = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return self.decoder(z).clamp(-1, 1)


# ---- shared pieces of the two transformers ---------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on adjacent pairs. x [B, L, N, D]; cos, sin [B or 1, L, D / 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class Weight(nn.Module):
    """A norm's scale, so that it is stored as `<name>.weight`."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def projections(dim: int, module: nn.Module) -> None:
    """Gives `module` the four square projections q, k, v, o."""
    for name in "qkvo":
        setattr(module, name, nn.Linear(dim, dim))


def joint_qkv(attention: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of h [B, L, dim] by one matmul: three narrow ones would read h three times."""
    parts = (attention.q, attention.k, attention.v)
    weight = torch.cat([part.weight for part in parts])
    bias = torch.cat([part.bias for part in parts])
    return F.linear(h, weight, bias).chunk(3, -1)


# ---- text encoder ----------------------------------------------------------------------------------------------------


class TextLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = Weight(config.dim)
        self.attn = nn.Module()
        projections(config.dim, self.attn)
        self.norm2 = Weight(config.dim)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = joint_qkv(self.attn, rms_norm(x, self.norm1.weight, 1e-6))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        a = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), attn_mask=mask)
        x = x + self.attn.o(a.transpose(1, 2).flatten(2))
        return x + self.ffn(rms_norm(x, self.norm2.weight, 1e-6))


class TextEncoder(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList([TextLayer(config) for _ in range(config.num_layers)])
        self.final_norm = Weight(config.dim)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, ids: Tensor, record: list[Tensor] | None = None) -> Tensor:
        """ids [B, T], 0 = padding (not attended to) -> [B, T, dim]. `record` receives the output of every layer."""
        mask = (ids != 0)[:, None, None, :]
        pairs = self.config.dim // self.config.num_heads // 2
        frequencies = 10000.0 ** (-torch.arange(pairs, device=ids.device, dtype=torch.float32) / pairs)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * frequencies
        cos, sin = angles.cos()[None], angles.sin()[None]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, mask, cos, sin)
            if record is not None:
                record.append(x)
        return rms_norm(x, self.final_norm.weight, 1e-6)


# ---- transformer -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer: self attention, cross attention to the text, feed-forward; the first and last are modulated by the
    noise level of the frame."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_heads, config.eps
        for name in ("self_attn", "cross_attn"):
            attention = nn.Module()
            projections(dim, attention)
            attention.norm_q, attention.norm_k = Weight(dim), Weight(dim)
            setattr(self, name, attention)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        for last in (self.self_attn.o, self.cross_attn.o, self.ffn[2]):  # small steps on the residual stream at first
            nn.init.normal_(last.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def modulations(self, e0: Tensor) -> tuple[Tensor, ...]:
        """e0 [B, F, 6, dim] -> shift1, scale1, gate1, shift2, scale2, gate2, each [B, F, 1, dim]."""
        return tuple(part for part in (self.modulation.float() + e0.float()).split(1, 2))

    def qkv(self, x, shift, scale, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, dim] -> rotated q and k, and v, each [B, N, L, D]."""
        q, k, v = joint_qkv(self.self_attn, modulate(x, shift, scale, self.eps))
        q = rms_norm(q, self.self_attn.norm_q.weight, self.eps)
        k = rms_norm(k, self.self_attn.norm_k.weight, self.eps)
        q, k = rotate_pairs(self.heads(q), cos, sin), rotate_pairs(self.heads(k), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), self.heads(v).transpose(1, 2)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, T, dim] -> cross keys and values [B, N, T, D], computed once per prompt."""
        k = rms_norm(self.cross_attn.k(text), self.cross_attn.norm_k.weight, self.eps)
        return self.heads(k).transpose(1, 2), self.heads(self.cross_attn.v(text)).transpose(1, 2)

    def after_attention(self, x: Tensor, a: Tensor, modulations, text_kv, text_mask: Tensor) -> Tensor:
        """The rest of the layer, given the attention output a [B, N, L, D]."""
        _, _, gate1, shift2, scale2, gate2 = modulations
        x = add_gated(x, self.self_attn.o(a.transpose(1, 2).flatten(2)), gate1)
        h = self.norm3(x.float()).to(a.dtype)
        q = self.heads(rms_norm(self.cross_attn.q(h), self.cross_attn.norm_q.weight, self.eps)).transpose(1, 2)
        c = F.scaled_dot_product_attention(q, *text_kv, attn_mask=text_mask)
        x = x + self.cross_attn.o(c.transpose(1, 2).flatten(2)).to(x.dtype)
        return add_gated(x, self.ffn(modulate(x, shift2, scale2, self.eps)), gate2)

    def forward(self, x, e0, text, text_mask, cos, sin, attend) -> Tensor:
        """Training on a clip; attend(q, k, v) applies the block mask."""
        modulations = self.modulations(e0)
        q, k, v = self.qkv(x, modulations[0], modulations[1], cos, sin)
        return self.after_attention(x, attend(q, k, v), modulations, self.text_kv(text), text_mask)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift. x [B, F * S, dim]; shift, scale [B, F, 1, dim]."""
    h = F.layer_norm(x.float(), x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (h * (1 + scale) + shift).flatten(1, 2).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate. x, y [B, F * S, dim]; gate [B, F, 1, dim]."""
    return x + (y.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2).to(x.dtype)


class Head(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.latent_channels * config.patch_size**2)
        self.eps = config.eps
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + e[:, :, None].float()).split(1, 2)
        return self.head(modulate(x, shift, scale, self.eps)).float()


class KeyValueCache:
    """Keys and values of finished frames of one rollout: per layer [B, N, capacity * S, D]. With a `window`, attention
    sees the `sink` first frames and the `window` most recent ones (the frame being made comes on top)."""

    def __init__(self, config: TransformerConfig, batch: int, capacity: int, device, dtype, window=0, sink=0):
        shape = (batch, config.num_heads, capacity * config.frame_tokens, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.frame_tokens, self.window, self.sink, self.length = config.frame_tokens, window, sink, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a frame over history and itself; q, k, v [B, N, S, D]. The frame's keys and values are written
        behind the history, to be kept by `commit` or overwritten by the next pass."""
        end = self.length + self.frame_tokens
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        recent, sink = self.window * self.frame_tokens, self.sink * self.frame_tokens
        if self.window and self.length > recent + sink:
            k, v = (torch.cat([x[:, :, :sink], x[:, :, self.length - recent : end]], 2) for x in (keys, values))
        else:
            k, v = keys[:, :, :end], values[:, :, :end]
        return F.scaled_dot_product_attention(q.to(k.dtype), k, v)

    def commit(self) -> None:
        self.length += self.frame_tokens


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig, text_dim: int):
        super().__init__()
        self.config = config
        dim = config.dim
        patch = config.latent_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch, dim)
        self.pose_embedding = nn.Linear(4 * len(config.pose_harmonics), dim)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(TIME_SINUSOID, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head = Head(config)

    def patchify(self, z: Tensor) -> Tensor:
        """z [B, F, C, h, w] -> tokens [B, F * S, C * P * P], values ordered (c, py, px), tokens row by row."""
        b, f, c, h, w = z.shape
        p = self.config.patch_size
        z = z.reshape(b, f, c, h // p, p, w // p, p).permute(0, 1, 3, 5, 2, 4, 6)
        return z.reshape(b, f * (h // p) * (w // p), c * p * p)

    def unpatchify(self, x: Tensor, frames: int) -> Tensor:
        c, p = self.config, self.config.patch_size
        x = x.reshape(x.shape[0], frames, c.rows, c.columns, c.latent_channels, p, p).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(x.shape[0], frames, c.latent_channels, c.latent_height, c.latent_width)

    def world_coordinates(self, camera: Tensor) -> tuple[Tensor, Tensor]:
        """camera [B, F, 2] (x, y) in tokens -> X, Y [B, F, S] of every token, in tokens."""
        c = self.config
        y, x = torch.meshgrid(
            torch.arange(c.rows, device=camera.device, dtype=torch.float32),
            torch.arange(c.columns, device=camera.device, dtype=torch.float32),
            indexing="ij",
        )
        camera = camera.float() % c.torus_tokens  # small angles keep their precision
        return camera[..., 0:1] + x.reshape(-1), camera[..., 1:2] + y.reshape(-1)

    def harmonics(self, coordinate: Tensor, orders: tuple[int, ...]) -> Tensor:
        """coordinate [...] in tokens -> angles [..., len(orders)]: whole harmonics of the torus."""
        orders = torch.tensor(orders, device=coordinate.device, dtype=torch.float32)
        return coordinate[..., None] * (orders * (2 * math.pi / self.config.torus_tokens))

    def rope(self, camera: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """camera [B, F, 2] in tokens, times [B, F] in frames -> cos, sin [B, F * S, D / 2]: pairs of time, y, x."""
        c = self.config
        x, y = self.world_coordinates(camera)
        steps = torch.arange(c.rope_time_pairs, device=times.device, dtype=torch.float32)
        t = times.float()[..., None] * c.rope_time_theta ** (-steps / c.rope_time_pairs)
        t = t[:, :, None].expand(*x.shape, c.rope_time_pairs)
        space = [self.harmonics(coordinate, c.rope_space_harmonics) for coordinate in (y, x)]
        angles = torch.cat([t, *space], -1).flatten(1, 2)
        return angles.cos(), angles.sin()

    def pose_features(self, camera: Tensor) -> Tensor:
        """[B, F * S, 24]: where on the torus each token lies, so that it can find its region's sentence."""
        return self.place_features(*self.world_coordinates(camera)).flatten(1, 2)

    def place_features(self, x: Tensor, y: Tensor) -> Tensor:
        """World coordinates x, y [...] in tokens -> [..., 24]."""
        angles = [self.harmonics(v, self.config.pose_harmonics) for v in (x, y)]
        return torch.cat([f for a in angles for f in (a.sin(), a.cos())], -1)

    def tokens(self, z: Tensor, camera: Tensor) -> Tensor:
        return self.patch_embedding(self.patchify(z)) + self.pose_embedding(self.pose_features(camera))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noise levels t [B, F] -> e [B, F, dim], e0 [B, F, 6, dim]."""
        half = TIME_SINUSOID // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = 1000 * t.float()[..., None] * frequencies
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], -1)).float()
        return e, self.time_projection(e).float().unflatten(-1, (6, -1))

    def forward(self, context, noisy, context_t, noisy_t, camera, times, text, text_mask, layers):
        """Teacher forcing. context, noisy [B, F, C, h, w] run side by side as 2 F frames. Levels [B, F], camera [B, F, 2]
        tokens, times [B, F], text [B, T, text_dim], text_mask [B, 1, 1, T]. `layers`: one call
        (x, e0, text, text_mask, cos, sin) -> x per block, which attends so that a noisy frame sees the context frames
        before it and itself.
        Returns the velocity [B, F, C, h, w] of the noisy frames."""
        frames = noisy.shape[1]
        twice = torch.cat([camera, camera], 1)
        x = self.tokens(torch.cat([context, noisy], 1), twice)
        e, e0 = self.levels(torch.cat([context_t, noisy_t], 1))
        cos, sin = self.rope(twice, torch.cat([times, times], 1))
        text = self.text_embedding(text)
        for layer in layers:
            x = layer(x, e0, text, text_mask, cos, sin)
        half = x.shape[1] // 2
        return self.unpatchify(self.head(x[:, half:], e[:, frames:]), frames)

    def text_keys(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer, the cross keys and values of text [B, T, text_dim]."""
        text = self.text_embedding(text)
        return [block.text_kv(text) for block in self.blocks]

    def frame(self, z, t: float, camera, time: int, text_keys, text_mask, cache: KeyValueCache, record=None):
        """One pass over one frame: z [B, C, h, w] at level t, camera [B, 2] -> velocity [B, C, h, w].
        `record` receives the residual stream after every layer."""
        batch = z.shape[0]
        camera = camera[:, None]
        x = self.tokens(z[:, None], camera)
        e, e0 = self.levels(torch.full((batch, 1), t, device=z.device))
        cos, sin = self.rope(camera, torch.full((batch, 1), float(time), device=z.device))
        for index, block in enumerate(self.blocks):
            modulations = block.modulations(e0)
            q, k, v = block.qkv(x, modulations[0], modulations[1], cos, sin)
            x = block.after_attention(x, cache.attend(index, q, k, v), modulations, text_keys[index], text_mask)
            if record is not None:
                record.append(x)
        return self.unpatchify(self.head(x, e), 1)[:, 0]


class WorldModel(nn.Module):
    def __init__(self, config: WorldConfig):
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(config.autoencoder)
        self.text_encoder = TextEncoder(config.text_encoder)
        self.transformer = Transformer(config.transformer, config.text_encoder.dim)


def clean_frame_mask(query: Tensor, key: Tensor, tokens: int, groups: bool = False) -> Tensor:
    """Teacher-forcing mask of token indices in [clean frames | noisy frames], `tokens` = F * S in each half: clean
    sees clean up to itself; noisy sees earlier clean frames and itself. With `groups` the 8 frames of a clip are
    independent shots of 1, 1, 2 and 4 frames: half of them must be made from little but the text."""
    frame_tokens = 128
    query_noisy, key_noisy = query >= tokens, key >= tokens
    query_frame, key_frame = (query % tokens) // frame_tokens, (key % tokens) // frame_tokens
    see = (
        (~query_noisy & ~key_noisy & (key_frame <= query_frame))
        | (query_noisy & ~key_noisy & (key_frame < query_frame))
        | (query_noisy & key_noisy & (key_frame == query_frame))
    )
    if groups:
        see = see & (shot(query_frame) == shot(key_frame))
    return see


def shot(frame: Tensor) -> Tensor:
    """Shots of frames 0 | 1 | 2 3 | 4 5 6 7."""
    return (frame >= 1).int() + (frame >= 2).int() + (frame >= 4).int()


# ---- weight files ----------------------------------------------------------------------------------------------------


def is_quantised(name: str, tensor: Tensor) -> bool:
    """Matrices and convolutions may be stored as int8 rows; vectors, and modulations that are sums, stay exact."""
    return tensor.ndim in (2, 4) and not name.endswith("modulation")


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their scale [rows]: value = int8 * scale[row]."""
    rows = tensor.float().flatten(1)
    scale = rows.abs().amax(1).clamp(min=1e-12) / 127
    return (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape), scale


def pack(state: dict[str, Tensor], storage: str, bf16: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """state -> tensors of a weight file; storage: `int8` rows, `bf16` or `f32`. Names that start with one of `bf16` are
    kept in bf16 where they would be int8."""
    tensors = {}
    for name, value in state.items():
        value = value.detach().float().cpu().contiguous()
        wide = storage == "bf16" or name.startswith(bf16)
        if storage == "int8" and not wide and is_quantised(name, value):
            tensors[name], tensors[name + ".scale"] = quantise(value)
        elif wide and value.ndim > 1:
            tensors[name] = value.bfloat16()
        else:
            tensors[name] = value
    return tensors


def unpack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a weight file -> float32 state."""
    state = {}
    for name, value in tensors.items():
        if value.dtype == torch.int8:
            scale = tensors[name + ".scale"]
            state[name] = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
        elif not (name.endswith(".scale") and name.removesuffix(".scale") in tensors):
            state[name] = value.float()
    return state


def save_model(
    folder: str | Path, config: WorldConfig, state: dict[str, Tensor], words: list[str], storage="int8", bf16=()
) -> None:
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "vocabulary.txt").write_text("".join(word + "\n" for word in words))
    save_file(pack(state, storage, tuple(bf16)), folder / "model.safetensors")


def load_model(folder: str | Path) -> WorldModel:
    """A model folder of any storage -> float32 model on the CPU, ready to run."""
    from safetensors.torch import load_file

    folder = Path(folder)
    model = WorldModel(WorldConfig.from_json((folder / "config.json").read_text()))
    model.load_state_dict(unpack(load_file(folder / "model.safetensors")))
    return model.eval().requires_grad_(False)
