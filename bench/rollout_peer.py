"""longtake against PyTorch on the CPU, same weights, same noise, same threads, one run.

    python bench/rollout_peer.py --engine build/release/bench/rollout_bench --model models/world --history 64 --threads 2

The engine plays `history + frames` frames and writes their latents. PyTorch is given the first `history` of them (clean
passes fill its cache), makes the next frame from the same noise, and must agree before anything is timed. Then both times
per frame (denoising steps + clean pass + decoder) are printed: medians over the same frames. PyTorch runs in every mode that
helps it here (bf16, f32, and torch.compile when --compile is given); the best one is the peer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
from model import KeyValueCache, load_model  # noqa: E402
from noise import normal_noise  # noqa: E402
from reference import token_ids  # noqa: E402
from sampler import sample_frame  # noqa: E402

PROMPT = "in the middle there is a green summer land with woods , and a red tower stands there ."


def play_torch(folder, latents, cameras, history, frames, seed, dtype, compile_layers):
    """Seconds of each frame after the history, and the first of those frames' latent."""
    model = load_model(folder)
    config, sampler = model.config, model.config.sampler
    ids = torch.tensor([token_ids(folder, PROMPT)])
    text_mask = (ids != 0)[:, None, None, :]
    for module in model.modules():  # weights of products once in the compute dtype; autocast then converts activations alone
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(dtype)
    model = model.to(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        text_keys = model.transformer.text_keys(model.text_encoder(ids))
    transformer = model.transformer
    if compile_layers:
        for block in transformer.blocks:
            block.qkv = torch.compile(block.qkv, dynamic=False)
            block.after_attention = torch.compile(block.after_attention, dynamic=False)
    cache = KeyValueCache(config.transformer, 1, history + frames, "cpu", dtype)
    shape = tuple(latents.shape[1:])

    def velocity(z, t, frame):
        with autocast:
            return transformer.frame(z, t, cameras[frame : frame + 1], frame, text_keys, text_mask, cache).float()

    seconds, first = [], None
    for frame in range(history + frames):
        if frame < history:
            velocity(latents[frame : frame + 1], 0.0, frame)
            cache.commit()
            continue
        noise = [torch.from_numpy(normal_noise(seed, frame, step, shape))[None] for step in range(sampler.num_steps)]
        start = time.perf_counter()
        z = sample_frame(lambda z, t, _: velocity(z, t, frame), lambda step: noise[step], sampler.num_steps, sampler.shift, sampler.type)
        velocity(z, 0.0, frame)
        cache.commit()
        with autocast:
            model.autoencoder.decode(z.to(memory_format=torch.channels_last))
        seconds.append(time.perf_counter() - start)
        first = z[0] if first is None else first
    return seconds, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--history", type=int, default=64)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also try torch.compile (minutes)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    rows, ours = [], {}
    for name in ("bf16", "f32"):
        with tempfile.TemporaryDirectory() as folder:
            latents = Path(folder, "latents.safetensors")
            command = [args.engine, "--model", args.model, "--prompt", PROMPT, "--history", str(args.history), "--frames", str(args.frames),
                       "--threads", str(args.threads), "--seed", str(args.seed), "--dtype", name, "--latents", str(latents)]  # fmt: skip
            ours[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            played = load_file(latents)
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        for compiled in (False, True) if args.compile else (False,):
            seconds, first = play_torch(args.model, played["latents"], played["cameras"], args.history, args.frames, args.seed, dtype, compiled)
            wanted = played["latents"][args.history]
            error = ((first - wanted).norm() / wanted.norm()).item()
            limit = 2e-2 if name == "bf16" else 1e-3
            if not error <= limit:
                sys.exit(f"{name}: first frame after the history: expected relative L2 <= {limit}, found {error:.2e}; not timed")
            rows.append({"mode": name + (" compiled" if compiled else ""), "ms": 1e3 * statistics.median(seconds[1:]), "error": error})

    print(f"history {args.history} frames, {args.threads} threads, medians of {args.frames - 1} frames")
    for name, result in ours.items():
        print(f"  longtake {name:<14} {result['median_ms']:8.1f} ms/frame  {1e3 / result['median_ms']:6.2f} frames/s")
    for row in rows:
        print(f"  PyTorch  {row['mode']:<14} {row['ms']:8.1f} ms/frame  {1e3 / row['ms']:6.2f} frames/s  (agrees to {row['error']:.1e})")
    best_ours, best_peer = min(r["median_ms"] for r in ours.values()), min(r["ms"] for r in rows)
    print(f"  ratio, best against best: {best_peer / best_ours:.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"longtake": ours, "pytorch": rows, "ratio": best_peer / best_ours}, indent=1) + "\n")


if __name__ == "__main__":
    main()
