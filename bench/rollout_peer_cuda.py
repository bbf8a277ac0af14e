"""longtake against PyTorch on the GPU: the embedded world model, dense attention, same weights, same noise, one run.

    python bench/rollout_peer_cuda.py --engine build/cuda/apps/longtake/longtake --model models/world --history 256

The engine plays `history` frames and nine more and writes their latents. PyTorch is given the first `history` of them
(clean passes fill its cache) and makes the next frame from the same noise; it must agree before anything is timed. A
frame is the denoising steps, the clean pass and the decoder. PyTorch runs as one CUDA graph a frame: eager kernels, and
with --compile also what torch.compile makes of each pass, by every backend of scaled_dot_product_attention that takes
these shapes; projections of q, k and v are one product, rotations, noise levels and prompt keys are computed
beforehand. The best mode is the peer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import median_ms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
import model as world  # noqa: E402
from noise import normal_noise  # noqa: E402
from reference import token_ids  # noqa: E402
from sampler import noise_levels  # noqa: E402

PROMPT = "a green summer land with woods ."  # of `longtake bench rollout`, like the seed
SEED = 7
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def one_product(attention: torch.nn.Module, h: torch.Tensor):
    return F.linear(h, attention.qkv_weight, attention.qkv_bias).chunk(3, -1)


class Peer:
    """One frame behind `history` frames, in static memory."""

    def __init__(self, folder: str, latents: torch.Tensor, cameras: torch.Tensor, history: int, dtype: torch.dtype):
        self.history, self.dtype = history, dtype
        self.model = world.load_model(folder)
        self.config = self.model.config
        ids = torch.tensor([token_ids(folder, PROMPT)])
        for module in self.model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(dtype)
        self.model = self.model.to("cuda").to(memory_format=torch.channels_last)
        transformer = self.transformer = self.model.transformer
        self.mask = (ids != 0)[:, None, None, :].cuda()
        with self.autocast():
            self.text = [tuple(x.contiguous() for x in pair) for pair in transformer.text_keys(self.model.text_encoder(ids.cuda()))]
        real = int(self.mask.sum())  # the engine too computes only real tokens
        self.text = [tuple(x[:, :, :real].contiguous() for x in pair) for pair in self.text]
        for block in transformer.blocks:
            parts = (block.self_attn.q, block.self_attn.k, block.self_attn.v)
            block.self_attn.qkv_weight = torch.nn.Parameter(torch.cat([p.weight for p in parts]), False)
            block.self_attn.qkv_bias = torch.nn.Parameter(torch.cat([p.bias for p in parts]), False)
        world.joint_qkv = one_product
        sampler = self.config.sampler
        self.levels = noise_levels(sampler.num_steps, sampler.shift)
        with self.autocast():
            self.modulations = {t: self.level(t) for t in [*self.levels[:-1], 0.0]}
        c = self.config.transformer
        shape = (1, c.num_heads, (history + 1) * c.frame_tokens, c.head_dim)
        self.keys = [torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(c.num_layers)]
        self.values = [torch.zeros_like(x) for x in self.keys]
        self.noise = torch.empty(1, *latents.shape[1:], device="cuda")
        self.camera = torch.zeros(1, 1, 2, device="cuda")
        self.time = torch.zeros(1, 1, device="cuda")
        self.velocity = self.run_pass
        for frame in range(history):
            self.place(cameras[frame], frame)
            self.velocity(latents[frame : frame + 1].cuda(), *self.modulations[0.0], *self.pose(), frame)
        self.place(cameras[history], history)
        self.at_pose = self.pose()  # it makes host tensors, which no graph may read
        self.noise.copy_(torch.from_numpy(normal_noise(SEED, history, 0, tuple(latents.shape[1:]))))

    def autocast(self):
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def level(self, t: float):
        """Head's and all layers' modulations of a noise level."""
        e, e0 = self.transformer.levels(torch.full((1, 1), t, device="cuda"))
        return e, [tuple(m.contiguous() for m in block.modulations(e0)) for block in self.transformer.blocks]

    def place(self, camera: torch.Tensor, frame: int) -> None:
        self.camera.copy_(camera.view(1, 1, 2))
        self.time.fill_(float(frame))

    def pose(self):
        cos, sin = self.transformer.rope(self.camera, self.time)
        return cos, sin, self.transformer.pose_features(self.camera)

    def run_pass(self, z, e, modulations, cos, sin, features, slot: int):
        """Velocity [1, C, h, w]; the frame's keys and values are written to `slot` of the history."""
        with self.autocast():
            t, tokens = self.transformer, self.config.transformer.frame_tokens
            begin, end = slot * tokens, (slot + 1) * tokens
            x = t.patch_embedding(t.patchify(z[:, None])) + t.pose_embedding(features)
            for n, block in enumerate(t.blocks):
                q, k, v = block.qkv(x, modulations[n][0], modulations[n][1], cos, sin)
                self.keys[n][:, :, begin:end] = k
                self.values[n][:, :, begin:end] = v
                a = F.scaled_dot_product_attention(q.to(self.dtype), self.keys[n][:, :, :end], self.values[n][:, :, :end])
                x = block.after_attention(x, a, modulations[n], self.text[n], None)
            return t.unpatchify(t.head(x, e), 1)[:, 0].float()

    def decode(self, z):
        with self.autocast():
            return self.model.autoencoder.decode(z.contiguous(memory_format=torch.channels_last))

    def frame(self):
        pose, z = self.at_pose, self.noise
        for t, following in zip(self.levels, self.levels[1:]):
            z = z + (following - t) * self.velocity(z, *self.modulations[t], *pose, self.history)
        self.velocity(z, *self.modulations[0.0], *pose, self.history)
        return z, self.decode(z)

    def compile(self, mode: str) -> None:
        self.velocity = torch.compile(self.run_pass, mode=mode, fullgraph=True, dynamic=False)
        self.decode = torch.compile(self.decode, mode=mode, dynamic=False)

    def time_frames(self, rounds: int = 30):
        """Median milliseconds of a frame, and its latent."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.frame()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z, _ = self.frame()
        return median_ms(graph.replay, rounds), z[0].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="the program longtake, built with CUDA")
    parser.add_argument("--model", required=True)
    parser.add_argument("--history", type=int, default=256)
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--compile", choices=("none", "default", "max-autotune-no-cudagraphs"), default="default", help="of torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    with tempfile.TemporaryDirectory() as folder:
        latents, report = Path(folder, "latents.safetensors"), Path(folder, "report.json")
        command = [args.engine, "bench", "rollout", "--device", "cuda", "--model", args.model, "--methods", "dense", "--history", str(args.history),
                   "--dtype", args.dtype, "--latents", str(latents), "--json", str(report)]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours = json.loads(report.read_text())["rows"][0]
        played = load_file(latents)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    limit = 2e-2 if args.dtype == "bf16" else 1e-3
    wanted = played["latents"][args.history].cuda()
    with sdpa_kernel(list(BACKENDS.values())):
        peer = Peer(args.model, played["latents"], played["cameras"], args.history, dtype)
    rows = []
    for mode in ["eager"] + [args.compile] * (args.compile != "none"):
        for name, backend in BACKENDS.items():
            label = f"{mode}, {name}"
            try:
                with sdpa_kernel([backend]):
                    if mode != "eager":
                        torch.compiler.reset()
                        peer.velocity, peer.decode = peer.run_pass, Peer.decode.__get__(peer)
                        peer.compile(mode)
                    ms, first = peer.time_frames()
            except RuntimeError as error:
                print(f"  PyTorch  {label:<40} does not run: {str(error).splitlines()[0]}")
                continue
            error = ((first - wanted).norm() / wanted.norm()).item()
            if not error <= limit:
                sys.exit(f"{label}: first frame after the history: expected relative L2 <= {limit}, found {error:.2e}")
            rows.append({"mode": label, "ms": ms, "error": error})
    if not rows:
        sys.exit("PyTorch: expected a backend of scaled_dot_product_attention that runs, found none")

    print(f"{torch.cuda.get_device_name()}, {args.dtype}, dense attention, history {args.history} frames")
    print(f"  longtake {'':<40} {ours['ms']:8.3f} ms/frame  {1e3 / ours['ms']:6.0f} frames/s")
    for row in rows:
        print(f"  PyTorch  {row['mode']:<40} {row['ms']:8.3f} ms/frame  {1e3 / row['ms']:6.0f} frames/s  (agrees to {row['error']:.1e})")
    ratio = min(row["ms"] for row in rows) / ours["ms"]
    print(f"  ratio against the best: {ratio:.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "longtake": ours, "pytorch": rows, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
