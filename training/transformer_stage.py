"""Second stage: transformer and text encoder together, by flow matching with teacher forcing.

Every clip runs as [context frames | noisy frames]; the mask lets noisy frame f see context frames before f. To bear its
own mistakes the model sees context with noise on it and, later, context that it predicted itself. A first phase, of
prompts without pictures, and two probes beside the velocity loss tie the prompt to places (text_probe.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from autoencoder_stage import to_unit
from clips import CLIP_FRAMES, SHOTS, UNSAID, Batch, ClipLoader
from model import Block, Transformer, WorldModel, clean_frame_mask
from optim import Ema, Optimiser
from run import Compiled, Progress, Run, first_step
from sampler import shifted
from text_probe import PromptStore, StreamProbe, TextProbe, property_loss, region_points, token_properties

CONTEXT_NOISE = 0.3
SHIFT = 2.5  # of the noise levels trained at
UNIFORM_SHARE = 0.5  # of frames at uniform levels instead: low noise, where the picture becomes sharp
DRIFTED_SHARE = 0.75  # of clips with own context in which all frames from one on are the model's own, as in play
TEXT_SHIFT = 5.0  # of half of the frames that are made from text alone: high noise, where their theme is decided
WITHOUT_CONTEXT = (np.cumsum(SHOTS) - SHOTS).tolist()  # frames of a `shots` clip that see no other frame
PROBE_WEIGHT = 0.1  # of both probes' cross entropy, falling to 0 at PROBE_UNTIL of the budget
PROBE_UNTIL = 0.8
PHASE_RATE = 2e-3  # learning rate of the phase without pictures
PROMPTS_READY = 16384  # in the store
KINDS = ("shots", "short", "memory")


@dataclass(frozen=True)
class Course:
    """How the stage goes. Moments are fractions of its budget; from `decay_from` the rate falls linearly to the share
    `decay_to` of itself."""

    learning_rate: float = 1e-3
    body_rate: float = 1.0  # of what does not read the text, relative to learning_rate
    warm_up_steps: int = 150
    decay_from: float = 0.55
    decay_to: float = 0.02
    ema_decay: float = 0.998
    text_until: float = 0.0  # until here every other step is on `shots`, later every fourth
    memory_from: float = 0.45  # from here clips of 128 frames
    short_until: float = 0.6  # from here all but `shots` are such clips
    own_context_from: float = 0.4  # from here every other step the context is the model's own

    def rate(self, step: int, fraction: float) -> float:
        decay = 1 - (1 - self.decay_to) * max(0.0, fraction - self.decay_from) / (1 - self.decay_from)
        return self.learning_rate * min(1, (step + 1) / self.warm_up_steps) * decay

    def kind(self, step: int, fraction: float) -> str:
        """Which clips a step trains on: on the text alone, on motion, or on memory."""
        if step % 4 == 0 or step % 4 == 2 and fraction < self.text_until:
            return "shots"
        if fraction < self.memory_from or step % 4 == 1 and fraction < self.short_until:
            return "short"
        return "memory"

    def own_rounds(self, step: int, fraction: float, kind: str) -> int:
        """How often context is replaced by predictions from itself."""
        own = fraction > self.own_context_from and step // 4 % 2 == 0 and kind != "shots"
        return 1 + step // 8 % 3 if own else 0


FROM_NOTHING = Course()
# Pictures and memory are there: they are kept in use from the start at a lower rate, while the text parts learn on.
RESUMED = Course(
    body_rate=0.6, decay_from=0.1, ema_decay=0.996,
    text_until=0.0, memory_from=0.0, short_until=0.5, own_context_from=0.0,
)  # fmt: skip
TEXT_PARTS = ("text_encoder.", "text_embedding.", "cross_attn.", "pose_embedding.", "probe.")


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
    def __init__(self, run: Run, model: WorldModel, sizes: dict[str, int], course: Course, num_prompts: int = 128):
        """sizes: clips a step of every kind, num_prompts: prompts without clips, both in each process."""
        self.run, self.model, self.sizes = run, model, sizes
        self.course, self.num_prompts = course, num_prompts
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

        place_dim = self.net.pose_embedding.in_features
        self.text_probe = TextProbe(place_dim, config.dim, config.num_heads).to(run.device)
        self.stream_probe = StreamProbe(config.dim).to(run.device)
        self.probed_layer = config.num_layers // 2 - 1
        self.weights = {f"transformer.{n}": p for n, p in self.net.named_parameters()}  # what is exported
        self.weights |= {f"text_encoder.{n}": p for n, p in model.text_encoder.named_parameters()}
        self.probes = {f"text_probe.{n}": p for n, p in self.text_probe.named_parameters()}
        self.probes |= {f"stream_probe.{n}": p for n, p in self.stream_probe.named_parameters()}
        for p in self.probes.values():
            self.run.broadcast(p.data)
        is_body = lambda name: not any(part in name for part in TEXT_PARTS)
        self.optimiser = Optimiser(self.weights | self.probes, is_body, course.body_rate)
        self.ema = Ema(list(self.weights.values()), course.ema_decay)

    # ---- one step ----

    def latents(self, pixels: Tensor) -> Tensor:
        """[B, F, C, h, w]. Encoded in chunks of 64 pictures: one graph serves every kind of clip."""
        with torch.no_grad(), self.run.autocast():
            chunks = to_unit(pixels).split(64)
            chunks = [chunk.contiguous(memory_format=torch.channels_last) for chunk in chunks]
            z = torch.cat([self.encoder(chunk).float() for chunk in chunks])
        return z.view(*pixels.shape[:2], *z.shape[1:]).contiguous()

    def velocity(
        self, kind: str, batch: Batch, text: Tensor, context: Tensor, noisy: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity of the noisy frames, and their residual stream [B, F, S, dim] after the probed layer. Context counts
        as clean (level 0) whatever noise is on it: it cannot know its own mistakes in play either."""
        text_mask = (batch.ids != 0)[:, None, None, :]
        layer, block_mask = self.graphs[kind], self.masks[kind].block_mask
        streams = []

        def apply(block: Block, *args) -> Tensor:
            streams.append(layer(block, block_mask, *args))
            return streams[-1]

        layers = [lambda *args, block=block: apply(block, *args) for block in self.net.blocks]
        v = self.net(context, noisy, torch.zeros_like(t), t, batch.camera, batch.times, text, text_mask, layers)
        return v, streams[self.probed_layer].unflatten(1, (2, t.shape[1], self.frame_tokens))[:, 1]

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
        # About 0.05 is bf16 rounding of the residual stream, of which an update is a small part; a wrong mask or graph
        # is off by its whole update.
        if not error < 0.15:
            self.graphs[kind].give_up(AssertionError(f"relative error {error}"))

    def own_prediction(self, kind: str, batch: Batch, text: Tensor, z: Tensor, context: Tensor) -> Tensor:
        """What the model makes of every frame in one step from a high noise level, given `context`."""
        frames = z.shape[:2]
        t = shifted(0.4 + 0.6 * torch.rand(frames, device=z.device), SHIFT)
        noisy = mix(z, torch.randn_like(z), t)
        context = mix(context, torch.randn_like(z), 0.2 * torch.rand(frames, device=z.device))
        return noisy - t[..., None, None, None] * self.velocity(kind, batch, text, context, noisy, t)[0]

    @torch.no_grad()
    def own_context(self, kind: str, batch: Batch, text: Tensor, z: Tensor, seen: Tensor, rounds: int) -> Tensor:
        """The context `seen` with some frames replaced by predictions; in further rounds by predictions from
        predictions, as mistakes add up in a long rollout."""
        context = seen
        replaced = self.own_frames(*z.shape[:2])[..., None, None, None]
        for _ in range(rounds):
            predicted = self.own_prediction(kind, batch, text, z, context)
            context = torch.where(replaced, predicted, seen)
        return context

    def own_frames(self, clips: int, frames: int) -> Tensor:
        """Which frames of the context are the model's own, [B, F] bool. Either all from a random one on: in play every
        frame since the last true one is, so that nothing near can be trusted, and what is right lies far back. Or
        each frame by itself, with a share of the clip's own."""
        rand = lambda *shape: torch.rand(*shape, device=self.run.device)
        alone = rand(clips, frames) < rand(clips, 1)
        drifted = torch.arange(frames, device=self.run.device) >= frames * rand(clips, 1)
        return torch.where(rand(clips, 1) < DRIFTED_SHARE, drifted, alone)

    def noise_levels(self, kind: str, frames: tuple[int, int]) -> Tensor:
        """Levels [B, F] to train at."""
        u, choice = torch.rand(2, *frames, device=self.run.device)
        t = shifted(u, SHIFT).where(choice > UNIFORM_SHARE, u)
        if kind == "shots":
            of_text = torch.zeros(frames[1], dtype=torch.bool, device=t.device)
            of_text[WITHOUT_CONTEXT] = True
            t = shifted(u, TEXT_SHIFT).where(of_text & (choice > 0.5), t)
        return t

    def loss(self, kind: str, batch: Batch, own_rounds: int, probe_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity over all noisy frames, plus probe_weight times what the probes cannot tell;
        and what is logged."""
        z = self.latents(batch.pixels)
        seen = z if batch.seen is None else self.latents(batch.seen)
        frames = z.shape[:2]
        rand = lambda *shape: torch.rand(*shape, device=z.device)
        with self.run.autocast():
            text = self.model.text_encoder(batch.ids)
            context = self.own_context(kind, batch, text.detach(), z, seen, own_rounds) if own_rounds else seen
            # Half of the clips keep clean context; the others get noise up to the clip's own bound, by frame.
            bound = CONTEXT_NOISE * rand(frames[0], 1) * (rand(frames[0], 1) < 0.5)
            context = mix(context, torch.randn_like(z), bound * rand(*frames))
            noise, t = torch.randn_like(z), self.noise_levels(kind, frames)
            v, stream = self.velocity(kind, batch, text, context, mix(z, noise, t), t)
            loss = (v.float() - (noise - z)).square().mean()
            logged = {kind: loss.detach()}
            if probe_weight > 0:
                found, logged["text"] = self.text_loss([(batch.ids, batch.properties, text), self.prompts()])
                loss = loss + probe_weight * found
                # Frames with context too: land of another region must not go on with the theme of the last one.
                name, frames_asked = ("stream", WITHOUT_CONTEXT) if kind == "shots" else ("seen", slice(None))
                found, logged[name] = self.stream_loss(batch, stream, frames_asked)
                loss = loss + probe_weight * found
        return loss, logged

    def prompts(self, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts without clips: ids [P, T], properties [P, 9, 5], encoded text [P, T, text_dim]."""
        parts = self.store.sample(count or self.num_prompts)
        ids, properties = (part.to(self.run.device, non_blocking=True) for part in parts)
        return ids, properties, self.model.text_encoder(ids)

    def text_loss(self, prompts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The text probe's loss on prompts as of `prompts()`, each asked at a random point of every region, and the
        share of themes that it gets right."""
        logits, targets = [], []
        for ids, properties, text in prompts:
            x, y = region_points(len(ids), ids.device)
            text_mask = (ids != 0)[:, None, None, :]
            logits.append(self.text_probe(self.net.place_features(x, y), self.net.text_embedding(text), text_mask))
            targets.append(token_properties(x, y, properties))
        return property_loss(torch.cat(logits), torch.cat(targets))

    def stream_loss(self, batch: Batch, stream: Tensor, frames: list[int] | slice) -> tuple[Tensor, Tensor]:
        """The same of the stream probe, on some frames of every clip: of `shots` those made from text alone."""
        x, y = (v[:, frames].flatten(1) for v in self.net.world_coordinates(batch.camera))
        logits = self.stream_probe(stream[:, frames].flatten(1, 2))
        return property_loss(logits, token_properties(x, y, batch.properties))

    # ---- the run ----

    def warm(self, kind: str, batch: Batch) -> None:
        """Compiles the graphs of one kind: forward and backward, and forward alone."""
        begin = time.time()

        def step() -> None:
            self.loss(kind, batch, 1, 0.0)[0].backward()
            self.optimiser.drop_gradients()

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
            torch.full((shape[0], 9, 5), UNSAID),
        ).to(self.run.device)

    def prepare(self, threads: int, seed: int) -> None:
        """Starts the threads that make clips and prompts, and compiles."""
        run, text_len = self.run, self.model.config.text_encoder.text_len
        self.store = PromptStore(PROMPTS_READY, text_len, max(1, threads // 4), run.rank, run.ranks, seed)
        self.loader = ClipLoader(self.sizes, threads, text_len, run.cuda, run.rank, run.ranks, seed)
        for kind in self.sizes:
            self.warm(kind, self.random_batch(kind))
        run.barrier()

    def stop(self) -> None:
        self.loader.stop()
        self.store.stop()

    def learn_places(self, progress: Progress) -> None:
        """The phase without pictures: text encoder, text embedding and text probe learn which word speaks of where."""
        named = {n: p for n, p in self.weights.items() if n.startswith(("text_encoder.", "transformer.text_embedding."))}
        named |= {n: p for n, p in self.probes.items() if n.startswith("text_probe.")}
        optimiser = Optimiser(named)
        course = Course(learning_rate=PHASE_RATE, warm_up_steps=50, decay_from=0.3, decay_to=0.1)
        right = []
        while (fraction := progress.advance()) < 1:
            with self.run.autocast():
                loss, accuracy = self.text_loss([self.prompts(4 * self.num_prompts)])
            loss.backward()
            optimiser.step(course.rate(progress.step - 1, fraction))
            right.append(accuracy)
            if progress.step % 100 == 0 or progress.steps is not None:
                self.run.log(
                    f"places step {progress.step} {fraction:.0%} loss {loss.item():.3f} "
                    f"themes {self.run.mean(torch.stack(right).mean()):.3f} "
                    f"{progress.elapsed / progress.step:.3f} s/step, {self.store.written} prompts"
                )
                right = []
        self.ema.restart()

    def train(self, progress: Progress, save) -> None:
        """save(averaged weights, state, progress text) is called about every minute and at the end."""
        run = self.run
        frames = 0
        sums: dict[str, list[Tensor]] = {}
        last_time, last_frames, last_step, last_save = 0.0, 0, 0, 0.0
        while (fraction := progress.advance()) < 1:
            step = progress.step - 1
            kind = self.course.kind(step, fraction)
            kind = kind if kind in self.sizes else "short"
            own_rounds = self.course.own_rounds(step, fraction, kind)
            probe_weight = PROBE_WEIGHT * max(0.0, 1 - fraction / PROBE_UNTIL)
            lr = self.course.rate(step, fraction)
            loss, logged = self.loss(kind, self.loader.get(kind).to(run.device), own_rounds, probe_weight)
            loss.backward()
            norm = self.optimiser.step(lr)
            self.ema.update()
            for name, value in logged.items():
                sums.setdefault(name, []).append(value)
            frames += self.sizes[kind] * CLIP_FRAMES[kind] * run.ranks
            if progress.step % 100 == 0 or progress.steps is not None:
                means = " ".join(f"{name} {run.mean(torch.stack(v).mean()):.4f}" for name, v in sums.items())
                seconds, steps = progress.elapsed - last_time, progress.step - last_step
                run.log(
                    f"transformer step {progress.step} {fraction:.0%} {means} norm {norm:.2f} lr {lr:.1e} "
                    f"{seconds / steps:.3f} s/step {(frames - last_frames) / seconds:.0f} frames/s own {own_rounds} "
                    f"ready {self.loader.ready()}"
                )
                last_time, last_frames, last_step = progress.elapsed, frames, progress.step
                sums = {}
            if run.main and progress.elapsed - last_save > 60:
                last_save = progress.elapsed
                self.save(save, progress)
        run.log(f"transformer: {progress.step} steps, {frames:,} frames, {run.peak_memory():.1f} GB")
        if run.main:
            self.save(save, progress)

    def save(self, save, progress: Progress) -> None:
        state = {"raw": self.weights | self.probes, "optimiser": self.optimiser.state_dict()}
        save(dict(zip(self.weights, self.ema.values)), state, {"stage": "transformer", "step": progress.step})

    @torch.no_grad()
    def resume(self, state: dict) -> None:
        """Raw weights and optimisers of an earlier run on this machine; the averages start from the raw weights."""
        for name, parameter in (self.weights | self.probes).items():
            parameter.copy_(state["raw"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.ema.restart()
