"""Turns a checkpoint into the shipped model folder, and measures what int8 rows cost.

    python training/export.py training/build/run models/world --steps 4 --sampler ode
    python training/export.py training/build/run models/world --mix models/world --share 0.5

The second form writes the mean of two checkpoints, one of which was trained on from the other: what each gained for what
it lost meets in the middle (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import overworld
from autoencoder_stage import HELD_OUT_SEED, psnr, to_unit
from checkpoint import load_config, load_weights
from clips import torus_tokens
from model import WorldModel, load_model, save_model
from rollout import Player
from sampler import add_sampler_arguments, chosen_sampler


def quantisation_cost(exact: WorldModel, stored: WorldModel, maps: int, frames: int) -> dict[str, float]:
    """PSNR (dB) of the autoencoder with exact and stored weights, and, on the same noise, of the stored model's rollout
    against the exact model's."""
    pool = overworld.Pool(HELD_OUT_SEED, maps, 2)
    xy = pool.paths(3, frames, overworld.EXPLORE, False)
    idx = torch.arange(maps).repeat_interleave(frames).numpy()
    t = torch.arange(frames).repeat(maps).numpy()
    pixels = torch.from_numpy(pool.render(idx, xy[..., 0].ravel(), xy[..., 1].ravel(), t, num_threads=2))
    text_len = exact.config.text_encoder.text_len
    ids = torch.stack([torch.from_numpy(overworld.tokenize(pool.prompt(m, m), text_len)).long() for m in range(maps)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    truth = to_unit(pixels)
    result, rollouts = {}, []
    for name, model in (("float32", exact), ("stored", stored)):
        player = Player(model, device)
        decode = lambda z: to_unit(player.decode(z))
        latents = player.encode(pixels.view(maps, frames, *pixels.shape[1:]))
        result[f"autoencoder_psnr.{name}"] = psnr(decode(latents), truth).mean().item()
        rollouts.append(decode(player.play(ids, torus_tokens(xy), latents[:, : frames // 4])))
    result["rollout_stored_against_float32_psnr"] = psnr(*rollouts).mean().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="training folder or folder of parts")
    parser.add_argument("folder", nargs="?", default="models/world")
    parser.add_argument("--storage", choices=("int8", "bf16", "f32"), default="int8")
    parser.add_argument("--bf16", nargs="*", default=[], metavar="PREFIX", help="tensors kept in bf16")
    parser.add_argument("--mix", metavar="CHECKPOINT", help="a second checkpoint: the mean of both is written")
    parser.add_argument("--share", type=float, default=0.5, help="of the first one in the mean")
    add_sampler_arguments(parser)
    parser.add_argument("--maps", type=int, default=2, help="to measure the cost on; 0 measures nothing")
    parser.add_argument("--frames", type=int, default=16)
    args = parser.parse_args()
    config, state = load_config(args.checkpoint), load_weights(args.checkpoint)
    if args.mix:
        other = load_weights(args.mix)
        state = {name: args.share * value + (1 - args.share) * other[name] for name, value in state.items()}
    config.sampler = chosen_sampler(config.sampler, args)
    save_model(args.folder, config, state, overworld.vocabulary(), args.storage, args.bf16)
    size = sum(path.stat().st_size for path in Path(args.folder).iterdir() if path.name != "README.md")
    parameters = sum(value.numel() for value in state.values())
    print(f"{args.folder}: {parameters:,} parameters, {math.ceil(size / 1e5) / 10} MB as {args.storage}")
    if args.maps:
        exact = WorldModel(config)
        exact.load_state_dict(state)
        for name, value in quantisation_cost(exact.eval(), load_model(args.folder), args.maps, args.frames).items():
            print(f"{name}: {value:.2f} dB")


if __name__ == "__main__":
    main()
