"""Second stage: transformer and text encoder together, by flow matching with teacher forcing.

Every clip runs as [context frames | noisy frames]; the mask lets noisy frame f see context frames before f. To bear its
own mistakes the model sees context with noise on it and, in the second half, context that it predicted itself.
"""

from __future__ import annotations

import time

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from autoencoder_stage import to_unit
from clips import CLIP_FRAMES, Batch, ClipLoader
from model import Block, Transformer, WorldModel, clean_frame_mask
from optim import Ema, Muon, average_gradients
from run import Compiled, Progress, Run, first_step
from sampler import shifted

LEARNING_RATE = 1e-3
WARM_UP_STEPS = 150
DECAY_FROM = 0.55  # of the budget; falls linearly to DECAY_TO of the rate
DECAY_TO = 0.02
EMA_DECAY = 0.998
MEMORY_FROM = 0.45  # of the budget: from here clips of 128 frames
OWN_CONTEXT_FROM = 0.4  # from here every other step the context is the model's own
CONTEXT_NOISE = 0.3
SHIFT = 2.5
KINDS = ("shots", "short", "memory")


def clip_kind(step: int, fraction: float) -> str:
    """Which clips a step trains on: every fourth step on the text alone, the others on motion, then on memory."""
    if step % 4 == 0:
        return "shots"
    if fraction < MEMORY_FROM or step % 4 == 1 and fraction < 0.6:
        return "short"
    return "memory"


class Mask:
    """The teacher-forcing mask of one kind of clip: `block_mask` for FlexAttention, or dense, a chunk of queries at a
    time, where that is not to be had."""

    def __init__(self, kind: str, frame_tokens: int, device: torch.device, flex: bool):
        self.groups = kind == "shots"
        self.tokens = CLIP_FRAMES[kind] * frame_tokens
        self.block_mask = None
        if flex:
            length = 2 * self.tokens
            see = lambda batch, head, query, key: clean_frame_mask(query, key, self.tokens, self.groups)
            self.block_mask = create_block_mask(see, None, None, length, length, device=str(device), BLOCK_SIZE=128)

    def dense_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.arange(k.shape[2], device=k.device)
        outputs = []
        for begin in range(0, k.shape[2], 1024):
            rows = slice(begin, begin + 1024)
            mask = clean_frame_mask(keys[rows, None], keys[None], self.tokens, self.groups)
            outputs.append(F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask))
        return torch.cat(outputs, 2)


def flex_layer(block: Block, block_mask, *args) -> Tensor:
    """What is compiled: one layer, whose weights are inputs of the graph, so that all layers share it."""
    return block(*args, lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask))


def mix(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The straight path of flow matching: (1 - t) clean + t noise, t [B, F] or broadcastable."""
    t = t[..., None, None, None]
    return (1 - t) * clean + t * noise


class TransformerTrainer:
    def __init__(self, run: Run, model: WorldModel, sizes: dict[str, int]):
        """sizes: clips a step of every kind, in each process."""
        self.run, self.model, self.sizes = run, model, sizes
        self.net: Transformer = model.transformer
        model.autoencoder.requires_grad_(False)
        config = self.net.config
        self.frame_tokens = config.frame_tokens
        self.latent_shape = (config.latent_channels, config.latent_height, config.latent_width)
        self.encoder = Compiled(run, "encoder", lambda pixels: model.autoencoder.encode(pixels))
        self.flex = run.cuda and run.compile
        self.masks = {k: Mask(k, self.frame_tokens, run.device, self.flex) for k in sizes}
        # One graph per kind of clip; where one fails, that kind goes on alone without it.
        self.graphs = {k: Compiled(run, f"layer of {k}", self.plain_layer(k), flex_layer) for k in sizes}
        if self.flex:
            torch._dynamo.config.recompile_limit = 64

        trained = [*model.transformer.named_parameters(), *model.text_encoder.named_parameters()]
        is_layer_matrix = lambda n, p: p.ndim == 2 and ("blocks." in n or "layers." in n) and "modulation" not in n
        self.params = [p for _, p in trained]
        self.muon = Muon([p for n, p in trained if is_layer_matrix(n, p)])
        rest = [p for n, p in trained if not is_layer_matrix(n, p)]
        self.adam = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=run.cuda)
        self.ema = Ema(self.params, EMA_DECAY)

    # ---- one step ----

    def latents(self, batch: Batch) -> Tensor:
        """[B, F, C, h, w]. Encoded in chunks of 64 pictures: one graph serves every kind of clip."""
        with torch.no_grad(), self.run.autocast():
            chunks = to_unit(batch.pixels).split(64)
            chunks = [chunk.contiguous(memory_format=torch.channels_last) for chunk in chunks]
            z = torch.cat([self.encoder(chunk).float() for chunk in chunks])
        return z.view(*batch.pixels.shape[:2], *z.shape[1:]).contiguous()

    def velocity(self, kind: str, batch: Batch, text: Tensor, context: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Context counts as clean (level 0) whatever noise is on it: it cannot know its own mistakes in play either."""
        text_mask = (batch.ids != 0)[:, None, None, :]
        layer, block_mask = self.graphs[kind], self.masks[kind].block_mask
        layers = [lambda *args, block=block: layer(block, block_mask, *args) for block in self.net.blocks]
        return self.net(
            context, noisy, torch.zeros_like(t), t, batch.camera, batch.times, text, text_mask, layers
        )

    def plain_layer(self, kind: str):
        """flex_layer with only its attention compiled: uncompiled FlexAttention would build the whole score matrix. If
        that fails too, attention is dense."""
        mask = self.masks[kind]
        flex = lambda q, k, v: flex_attention(q, k, v, block_mask=mask.block_mask)
        attend = Compiled(self.run, f"attention of {kind}", mask.dense_attention, flex)
        return lambda block, block_mask, *args: block(*args, attend)

    @torch.no_grad()
    def check_layer(self, kind: str, batch: Batch) -> None:
        """A compiled layer must agree with dense attention: a wrong graph would cost the whole run silently."""
        if self.graphs[kind].fast is None:
            return
        net, mask = self.net, self.masks[kind]
        with self.run.autocast():
            camera, times = torch.cat([batch.camera] * 2, 1)[:1], torch.cat([batch.times] * 2, 1)[:1]
            z = torch.randn(1, camera.shape[1], *self.latent_shape, device=self.run.device)
            text = net.text_embedding(self.model.text_encoder(batch.ids[:1]))
            text_mask = (batch.ids[:1] != 0)[:, None, None, :]
            _, e0 = net.levels(torch.rand(camera.shape[:2], device=z.device))
            args = (net.tokens(z, camera), e0, text, text_mask, *net.rope(camera, times))
            expected = net.blocks[0](*args, mask.dense_attention).float()
            args = tuple(x.expand(len(batch.ids), *x.shape[1:]).contiguous() for x in args)
            found = self.graphs[kind](net.blocks[0], mask.block_mask, *args)[:1].float()
        change = (expected - args[0][:1].float()).norm()  # what the layer adds to the residual stream
        rounding = expected.norm() * 2**-8 if self.run.cuda else 0  # the stream itself is bf16
        error = ((found - expected).norm() / (change + rounding)).item()
        self.run.log(f"{kind}: compiled layer off by {error:.4f} of its update")
        if not error < 0.15:
            self.graphs[kind].give_up(AssertionError(f"relative error {error}"))

    def own_prediction(self, kind: str, batch: Batch, text: Tensor, z: Tensor, context: Tensor) -> Tensor:
        """What the model makes of every frame in one step from a high noise level, given `context`."""
        frames = z.shape[:2]
        t = shifted(0.4 + 0.6 * torch.rand(frames, device=z.device), SHIFT)
        noisy = mix(z, torch.randn_like(z), t)
        context = mix(context, torch.randn_like(z), 0.2 * torch.rand(frames, device=z.device))
        return noisy - t[..., None, None, None] * self.velocity(kind, batch, text, context, noisy, t)

    @torch.no_grad()
    def own_context(self, kind: str, batch: Batch, text: Tensor, z: Tensor, rounds: int) -> Tensor:
        """Context with some frames replaced by predictions; in a second round by predictions from predictions, as
        mistakes add up in a long rollout. Each clip has its own share of replaced frames."""
        context = z
        for _ in range(rounds):
            predicted = self.own_prediction(kind, batch, text, z, context)
            share = torch.rand(z.shape[0], 1, device=z.device)
            replaced = torch.rand(z.shape[:2], device=z.device) < share
            context = torch.where(replaced[..., None, None, None], predicted, z)
        return context

    def loss(self, kind: str, batch: Batch, own_rounds: int) -> Tensor:
        """Mean squared error of the velocity, over all noisy frames."""
        z = self.latents(batch)
        frames = z.shape[:2]
        rand = lambda *shape: torch.rand(*shape, device=z.device)
        with self.run.autocast():
            text = self.model.text_encoder(batch.ids)
            context = self.own_context(kind, batch, text.detach(), z, own_rounds) if own_rounds else z
            # Half of the clips keep clean context; the others get noise up to the clip's own bound, by frame.
            bound = CONTEXT_NOISE * rand(frames[0], 1) * (rand(frames[0], 1) < 0.5)
            context = mix(context, torch.randn_like(z), bound * rand(*frames))
            noise, t = torch.randn_like(z), shifted(rand(*frames), SHIFT)
            v = self.velocity(kind, batch, text, context, mix(z, noise, t), t)
        return (v.float() - (noise - z)).square().mean()

    def update(self, lr: float) -> Tensor:
        """Applies the gradients; returns their norm."""
        average_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.muon.step(lr)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for p in self.params:
            p.grad = None
        self.ema.update()
        return norm

    # ---- the run ----

    def warm(self, kind: str, batch: Batch) -> None:
        """Compiles the graphs of one kind: forward and backward, and forward alone."""
        begin = time.time()

        def step() -> None:
            self.loss(kind, batch, 1).backward()
            for p in self.params:
                p.grad = None

        first_step(step, [self.graphs[kind]])
        self.check_layer(kind, batch)
        self.run.synchronize()
        self.run.log(f"{kind}: graphs ready after {time.time() - begin:.1f} s, {self.run.peak_memory():.1f} GB")

    def warm_only(self, kind: str) -> None:
        self.warm(kind, self.random_batch(kind))

    def random_batch(self, kind: str) -> Batch:
        """Noise in the shape of a batch, for compiling."""
        shape = (self.sizes[kind], CLIP_FRAMES[kind])
        text_len = self.model.config.text_encoder.text_len
        return Batch(
            torch.randint(0, 256, (*shape, 128, 256, 3), dtype=torch.uint8),
            192 * torch.rand(*shape, 2),
            torch.arange(shape[1]).float().expand(shape).contiguous(),
            torch.randint(1, self.model.config.text_encoder.vocab_size, (shape[0], text_len)),
        ).to(self.run.device)

    def train(self, progress: Progress, threads: int, save) -> None:
        """save(averaged weights, state, progress text) is called about every minute and at the end."""
        run = self.run
        loader = ClipLoader(
            self.sizes, threads, self.model.config.text_encoder.text_len, run.cuda, run.rank, run.ranks
        )
        for kind in self.sizes:
            self.warm(kind, self.random_batch(kind))
        run.barrier()
        progress.restart()
        frames = 0
        sums = {kind: [] for kind in self.sizes}
        last_time, last_frames, last_step, last_save = 0.0, 0, 0, 0.0
        while (fraction := progress.advance()) < 1:
            step = progress.step - 1
            kind = clip_kind(step, fraction)
            kind = kind if kind in self.sizes else "short"
            own = fraction > OWN_CONTEXT_FROM and step // 4 % 2 == 0 and kind != "shots"
            decay = 1 - (1 - DECAY_TO) * max(0.0, fraction - DECAY_FROM) / (1 - DECAY_FROM)
            lr = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS) * decay
            loss = self.loss(kind, loader.get(kind).to(run.device), (1 + step // 8 % 2) if own else 0)
            loss.backward()
            norm = self.update(lr)
            sums[kind].append(loss.detach())
            frames += self.sizes[kind] * CLIP_FRAMES[kind] * run.ranks
            if progress.step % 100 == 0 or progress.steps is not None:
                losses = " ".join(f"{k} {run.mean(torch.stack(v).mean()):.4f}" for k, v in sums.items() if v)
                seconds, steps = progress.elapsed - last_time, progress.step - last_step
                run.log(
                    f"transformer step {progress.step} {fraction:.0%} loss {losses} norm {norm:.2f} lr {lr:.1e} "
                    f"{seconds / steps:.3f} s/step {(frames - last_frames) / seconds:.0f} frames/s own {own} "
                    f"ready {loader.ready()}"
                )
                last_time, last_frames, last_step = progress.elapsed, frames, progress.step
                sums = {k: [] for k in self.sizes}
            if run.main and progress.elapsed - last_save > 60:
                last_save = progress.elapsed
                self.save(save, progress)
        loader.stop()
        run.log(f"transformer: {progress.step} steps, {frames:,} frames, {run.peak_memory():.1f} GB")
        if run.main:
            self.save(save, progress)

    def save(self, save, progress: Progress) -> None:
        names = [f"transformer.{n}" for n, _ in self.net.named_parameters()]
        names += [f"text_encoder.{n}" for n, _ in self.model.text_encoder.named_parameters()]
        state = {"raw": dict(zip(names, self.params)), "muon": self.muon.state_dict(), "adam": self.adam.state_dict()}
        save(dict(zip(names, self.ema.values)), state, {"stage": "transformer", "step": progress.step})

    def resume(self, state: dict) -> None:
        """Raw weights and optimisers of an earlier run on this machine; the averages start from the raw weights."""
        by_name = {f"transformer.{n}": p for n, p in self.net.named_parameters()}
        by_name |= {f"text_encoder.{n}": p for n, p in self.model.text_encoder.named_parameters()}
        with torch.no_grad():
            for name, value in state["raw"].items():
                by_name[name].copy_(value)
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.ema.restart()
