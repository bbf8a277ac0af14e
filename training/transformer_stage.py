"""Second stage: transformer and text encoder together, by flow matching with teacher forcing.

Every clip runs as [context frames | noisy frames]; the mask lets noisy frame f see context frames before f. To bear its
own mistakes the model sees context with noise on it and, in the second half, context that it predicted itself.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder_stage import to_unit
from clips import CLIP_FRAMES, Batch, ClipLoader
from model import Transformer, WorldModel, clean_frame_mask
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


class Attend:
    """Attention under the teacher-forcing mask of one kind of clip: FlexAttention where it compiles, else chunks of
    queries under a dense mask."""

    def __init__(self, kind: str, frame_tokens: int, device: torch.device, flex: bool):
        self.groups = kind == "shots"
        self.tokens = CLIP_FRAMES[kind] * frame_tokens
        self.block_mask = None
        if flex:
            from torch.nn.attention.flex_attention import create_block_mask

            def see(batch, head, query, key):
                return clean_frame_mask(query, key, self.tokens, self.groups)

            length = 2 * self.tokens
            self.block_mask = create_block_mask(see, None, None, length, length, device=str(device), BLOCK_SIZE=128)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.block_mask is not None:
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(q, k, v, block_mask=self.block_mask)
        keys = torch.arange(k.shape[2], device=k.device)
        outputs = []
        for rows in keys.split(1024):
            mask = clean_frame_mask(rows[:, None], keys[None], self.tokens, self.groups)
            outputs.append(F.scaled_dot_product_attention(q[:, :, rows[0] : rows[-1] + 1], k, v, attn_mask=mask))
        return torch.cat(outputs, 2)


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
        self.frame_tokens = self.net.config.frame_tokens
        self.encoder = Compiled(run, "encoder", lambda pixels: model.autoencoder.encode(pixels))
        self.flex = run.cuda and run.compile
        self.attend = {k: Attend(k, self.frame_tokens, run.device, self.flex) for k in sizes}
        # One graph per kind of clip, used by all layers; a failed kind goes on without compilation alone.
        self.graphs = {k: Compiled(run, f"layer of {k}", lambda block, *args: block(*args)) for k in sizes}
        if self.flex:
            torch._dynamo.config.cache_size_limit = 256

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
            z = torch.cat([self.encoder(chunk.contiguous(memory_format=torch.channels_last)).float() for chunk in chunks])
        return z.view(*batch.pixels.shape[:2], *z.shape[1:]).contiguous()

    def velocity(self, kind: str, batch: Batch, text: Tensor, context: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Context counts as clean (level 0) whatever noise is on it: it cannot know its own mistakes in play either."""
        mask = (batch.ids != 0)[:, None, None, :]
        graph, attend = self.graphs[kind], self.attend[kind]
        if graph.fast is None and self.flex:  # uncompiled FlexAttention would build the whole score matrix
            attend.block_mask = None
        layers = [lambda *args, block=block: graph(block, *args) for block in self.net.blocks]
        return self.net(
            context, noisy, torch.zeros_like(t), t, batch.camera, batch.times, text, mask, attend, layers
        )

    def own_prediction(self, kind: str, batch: Batch, text: Tensor, z: Tensor, context: Tensor) -> Tensor:
        """What the model makes of every frame in one step from a high noise level, given `context`."""
        frames = z.shape[:2]
        t = shifted(0.4 + 0.6 * torch.rand(frames, device=z.device), SHIFT)
        noisy = mix(z, torch.randn_like(z), t)
        context = mix(context, torch.randn_like(z), 0.2 * torch.rand(frames, device=z.device))
        return noisy - t[..., None, None, None] * self.velocity(kind, batch, text, context, noisy, t)

    @torch.no_grad()
    def own_context(self, kind: str, batch: Batch, text: Tensor, z: Tensor, rounds: int) -> Tensor:
        """Context with some frames replaced by predictions; in a second round by predictions from predictions, as mistakes
        add up in a long rollout. Each clip has its own share of replaced frames."""
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
