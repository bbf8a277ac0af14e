"""First stage: the autoencoder, on single pictures from everywhere in fresh worlds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import overworld
from clips import ClipLoader
from model import Autoencoder, WorldModel
from optim import Ema, average_gradients
from run import Compiled, Progress, Run, cosine, first_step

LEARNING_RATE = 1.5e-3
WARM_UP_STEPS = 200
LATENT_NOISE = 0.15  # most noise added to latents: the decoder must bear the transformer's small errors
LATENT_RANGE = 3.0  # latents beyond this are pulled back
HELD_OUT_SEED = 700_000


def to_unit(pixels: Tensor) -> Tensor:
    """[..., 128, 256, 3] u8 -> [n, 3, 128, 256] in [-1, 1], channels last in memory."""
    return pixels.reshape(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB per picture; a, b [n, 3, H, W] in [-1, 1] (peak to peak 2)."""
    return 10 * torch.log10(4 / (a - b).square().mean((-3, -2, -1)).clamp(min=1e-8))


def reconstruction_loss(autoencoder: Autoencoder, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """L1 + L1 of gradients (edges) + squared error (PSNR is the measure), with noise [n, 1, 1, 1] on the latents.
    Returns (loss, mean squared error)."""
    z = autoencoder.encoder(pixels)
    out = autoencoder.decoder(z + noise * torch.randn_like(z)).float()
    error = out - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    squared = error.square().mean()
    z = z.float()
    reach = (z.abs() - LATENT_RANGE).relu().square().mean() + 1e-4 * z.square().mean()
    return error.abs().mean() + 0.5 * edges + 10 * squared + 0.1 * reach, squared.detach()


def train_autoencoder(run: Run, model: WorldModel, batch: int, progress: Progress, threads: int, save) -> None:
    """save(weights of the model) is called about every minute."""
    net = model.autoencoder
    params = list(net.parameters())
    optimiser = torch.optim.AdamW(params, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3, fused=run.cuda)
    ema = Ema(params, 0.998)
    loss_of = Compiled(run, "autoencoder", lambda pixels, noise: reconstruction_loss(net, pixels, noise))
    loader = ClipLoader({"frames": batch}, threads, 1, run.cuda, run.rank, run.ranks, uses=8, depth=24)

    def step() -> Tensor:
        pixels = to_unit(loader.get("frames").to(run.device).pixels)
        noise = LATENT_NOISE * torch.rand(len(pixels), 1, 1, 1, device=run.device)
        with run.autocast():
            loss, squared = loss_of(pixels, noise)
        loss.backward()
        average_gradients(params)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        return squared

    first_step(step, [loss_of])  # compiles, outside the clock
    optimiser.zero_grad(set_to_none=True)
    run.synchronize()
    run.log(f"autoencoder: first step done, {sum(p.numel() for p in params):,} parameters, {run.peak_memory():.1f} GB")
    progress.restart()
    squared, last_log, last_save = [], (0, 0.0), 0.0
    while (fraction := progress.advance()) < 1:
        lr = LEARNING_RATE * min(1, progress.step / WARM_UP_STEPS) * cosine(fraction, 0.005)
        for group in optimiser.param_groups:
            group["lr"] = lr
        squared.append(step())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update()
        if progress.step % 200 == 0 or progress.steps is not None:
            error = run.mean(torch.stack(squared).mean())
            steps, seconds = progress.step - last_log[0], progress.elapsed - last_log[1]
            rate = steps * batch * run.ranks / max(seconds, 1e-9)
            run.log(
                f"autoencoder step {progress.step} {fraction:.0%} psnr {10 * math.log10(4 / error):.2f} dB "
                f"lr {lr:.1e} {seconds / steps:.3f} s/step {rate:.0f} frames/s"
            )
            squared, last_log = [], (progress.step, progress.elapsed)
        if run.main and progress.elapsed - last_save > 90:
            last_save = progress.elapsed
            save(dict(zip((n for n, _ in net.named_parameters()), ema.values)))
    loader.stop()
    for p, value in zip(params, ema.values):
        p.data.copy_(value)
    measure_latents(run, net, batch)


@torch.no_grad()
def measure_latents(run: Run, net: Autoencoder, batch: int) -> None:
    """Sets the latents' mean and standard deviation, and logs the PSNR on worlds that no training uses. Every process
    computes the same numbers from the same pictures."""
    rng = torch.Generator().manual_seed(1)
    count = min(512, 4 * batch)
    maps = 32
    pool = overworld.Pool(HELD_OUT_SEED, maps, 4)
    idx = torch.arange(count) % maps
    x, y = (4 * torch.randint(0, overworld.TORUS // 4, (count,), generator=rng) for _ in range(2))
    pixels = torch.from_numpy(pool.render(idx.numpy(), x.numpy(), y.numpy(), (x + y).numpy() % 1000, num_threads=4))
    chunks = [to_unit(chunk.to(run.device)) for chunk in pixels.split(64)]
    with run.autocast():
        z = torch.cat([net.encoder(chunk).float() for chunk in chunks])
        net.latent_mean.copy_(z.mean((0, 2, 3)))
        net.latent_std.copy_(z.std((0, 2, 3)))
        quality = torch.cat([psnr(net.decode(net.encode(c)).float(), c) for c in chunks])
    smooth = (z[..., 1:] - z[..., :-1]).square().mean() / (2 * z.var())
    run.log(
        f"autoencoder held-out PSNR {quality.mean():.2f} dB, p10 {quality.quantile(0.1):.2f} dB; latent std "
        f"{net.latent_std.min():.2f}..{net.latent_std.max():.2f}, neighbour difference {smooth:.2f} (1 = white)"
    )
