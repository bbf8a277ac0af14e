"""Plays a model folder in float32 on the CPU and writes every layer's output, for the engine's parity test.

    python training/reference.py build/tiny build/tiny/reference.safetensors --frames 3 --prompt "a winter land"

Tensors (S = 128 tokens, row-major; the step behind a frame's last is the clean pass that fills the cache):
    prompt.ids [T] i32, cameras [F, 2] f32 in tokens, frameF.stepK.noise [C, h, w] (the noise drawn at that step)
    text.layers.N, text.output [T, text dim]
    frameF.stepK.blocks.N [S, dim], frameF.stepK.head [C, h, w] (the velocity), frameF.latent [C, h, w],
    frameF.pixels [3, 128, 256] in [-1, 1]; encoded.latent [C, h, w]: frame 0's pixels through the encoder again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import KeyValueCache, load_model
from noise import normal_noise
from sampler import sample_frame


def token_ids(folder: str | Path, prompt: str) -> list[int]:
    """Words of the vocabulary file: lower case, points and commas apart; unknown words and an empty prompt are 1."""
    words = {word: index for index, word in enumerate(Path(folder, "vocabulary.txt").read_text().split("\n"))}
    spaced = prompt.lower().replace(".", " . ").replace(",", " , ")
    return [words.get(word, 1) for word in spaced.split()] or [1]


def run(
    folder: str | Path, prompt: str, frames: int, seed: int, start: tuple[int, int], move: tuple[int, int]
) -> dict[str, Tensor]:
    """Camera at `start` world pixels, moved by `move` pixels every frame. Returns the named tensors above."""
    model = load_model(folder)
    config = model.config
    sampler = config.sampler
    shape = (config.transformer.latent_channels, config.transformer.latent_height, config.transformer.latent_width)
    ids = torch.tensor([token_ids(folder, prompt)[: config.text_encoder.text_len]])
    out: dict[str, Tensor] = {"prompt.ids": ids[0].int()}

    layers: list[Tensor] = []
    text = model.text_encoder(ids, layers)
    out |= {f"text.layers.{n}": x[0] for n, x in enumerate(layers)} | {"text.output": text[0]}
    text_keys = model.transformer.text_keys(text)
    text_mask = (ids != 0)[:, None, None, :]

    cameras = torch.tensor([[(s + f * m) / 16 for s, m in zip(start, move)] for f in range(frames)])
    out["cameras"] = cameras
    cache = KeyValueCache(config.transformer, 1, frames, "cpu", torch.float32)
    for frame in range(frames):

        def velocity(z: Tensor, t: float, step: int) -> Tensor:
            record: list[Tensor] = []
            v = model.transformer.frame(z, t, cameras[frame : frame + 1], frame, text_keys, text_mask, cache, record)
            out.update({f"frame{frame}.step{step}.blocks.{n}": x[0] for n, x in enumerate(record)})
            out[f"frame{frame}.step{step}.head"] = v[0]
            return v

        def noise(step: int) -> Tensor:
            values = torch.from_numpy(normal_noise(seed, frame, step, shape))
            out[f"frame{frame}.step{step}.noise"] = values
            return values[None]

        num_steps, shift = sampler.of_frame(frame > 0)
        z = sample_frame(velocity, noise, num_steps, shift, sampler.type)
        velocity(z, 0.0, num_steps)
        cache.commit()
        out[f"frame{frame}.latent"] = z[0]
        out[f"frame{frame}.pixels"] = model.autoencoder.decode(z)[0]
    out["encoded.latent"] = model.autoencoder.encode(out["frame0.pixels"][None])[0]
    return {name: value.contiguous().clone() for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("output")
    prompt = "in the north there is a winter land with forest , and a red tower stands there ."
    parser.add_argument("--prompt", default=prompt)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start", type=int, nargs=2, default=(1400, 1480), metavar=("X", "Y"), help="world pixels")
    parser.add_argument("--move", type=int, nargs=2, default=(8, 4), metavar=("DX", "DY"), help="pixels a frame")
    args = parser.parse_args()
    with torch.inference_mode():
        tensors = run(args.folder, args.prompt, args.frames, args.seed, tuple(args.start), tuple(args.move))
    save_file(tensors, args.output, metadata={"seed": str(args.seed), "prompt": args.prompt})
    print(f"{args.output}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
