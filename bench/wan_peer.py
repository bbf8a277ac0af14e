"""Times a chunk of the causal Wan transformer in PyTorch, for `longtake bench wan` to be held against.

    python bench/wan_peer.py [--ours OURS.json] [--history 21,60,120,240] [--json FILE]

The layers of 1.3B with random weights in bf16: modulation, norms, rotations, self attention over history and chunk, cross
attention over 512 prompt tokens, feed-forward; a chunk is 4 steps and a clean pass over 3 latent frames of 480x832. All
layers read one history, since those of 30 layers do not fit a GPU for long ones: it costs what a history each would. Every
backend of scaled dot product attention that runs is tried, as written and through torch.compile, in a recorded graph; the
best one counts. History includes the chunk's own frames, as in OURS.json, which comes from `longtake bench wan --json` in
the same run on the same GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import median_ms

DIM, FFN, HEADS, HEAD, TEXT = 1536, 8960, 12, 128, 512
FRAME, CHUNK, PASSES, VIDEO_FRAMES = 1560, 3, 5, 12
EPS = 1e-6


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Adjacent pairs of [L, N, D], in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = torch.nn.Parameter(torch.randn(6, DIM) / DIM**0.5)
        self.qkv, self.o = torch.nn.Linear(DIM, 3 * DIM), torch.nn.Linear(DIM, DIM)
        self.cross_q, self.cross_o = torch.nn.Linear(DIM, DIM), torch.nn.Linear(DIM, DIM)
        self.norm_q, self.norm_k, self.norm_cross_q = (torch.nn.RMSNorm(DIM, EPS) for _ in range(3))
        self.norm3 = torch.nn.LayerNorm(DIM, EPS)
        self.up, self.down = torch.nn.Linear(DIM, FFN), torch.nn.Linear(FFN, DIM)

    def forward(self, x, level, cos, sin, keys, values, prompt_keys, prompt_values):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + level).unbind(0)
        h = F.layer_norm(x, (DIM,), eps=EPS) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).chunk(3, -1)
        q, k = (rotate(y.unflatten(-1, (HEADS, HEAD)), cos, sin) for y in (self.norm_q(q), self.norm_k(k)))
        keys[-x.shape[0] :] = k
        values[-x.shape[0] :] = v.unflatten(-1, (HEADS, HEAD))
        x = x + self.o(attend(q, keys, values)) * gate1
        q = self.norm_cross_q(self.cross_q(self.norm3(x))).unflatten(-1, (HEADS, HEAD))
        x = x + self.cross_o(attend(q, prompt_keys, prompt_values))
        h = F.layer_norm(x, (DIM,), eps=EPS) * (1 + scale2) + shift2
        return x + self.down(F.gelu(self.up(h), approximate="tanh")) * gate2


def pass_ms(layers, history: int) -> float:
    """One pass over all layers, recorded."""
    tokens = CHUNK * FRAME
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    x, level = random(tokens, DIM), random(6, DIM) / 40
    angles = torch.rand(tokens, 1, HEAD // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    keys, values = random(history * FRAME, HEADS, HEAD), random(history * FRAME, HEADS, HEAD)
    prompt = random(TEXT, HEADS, HEAD), random(TEXT, HEADS, HEAD)

    def run():
        y = x
        for layer in layers:
            y = layer(y, level, cos, sin, keys, values, *prompt)
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            out = run()
    torch.cuda.current_stream().wait_stream(stream)
    if not torch.isfinite(out).all():
        raise RuntimeError("output: expected finite numbers")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return median_ms(graph.replay, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path)
    parser.add_argument("--history", default="21,60,120,240")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    layers = [Layer().to("cuda", torch.bfloat16).eval() for _ in range(args.layers)]
    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}, {args.layers} layers")

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    compiled = None if args.no_compile else [torch.compile(layer, dynamic=False) for layer in layers]
    rows = []
    for history in (int(part) for part in args.history.split(",")):
        times = {}
        for name, backend in backends.items():
            for how, stack in (("", layers), (" compiled", compiled)):
                if stack is None or (how and name == "flash"):
                    continue
                try:
                    with sdpa_kernel(backend):
                        times[name + how] = PASSES * pass_ms(stack, history) * 30 / args.layers
                except Exception as error:  # a backend or a compiler that this machine lacks
                    print(f"  {name}{how} at {history}: {str(error).splitlines()[0][:150]}")
        if not times:
            continue
        best = min(times, key=times.get)
        rows.append({"history": history, "ms": times[best], "best": best, "all": times})
        print(f"  {history:>4} frames: {times[best]:8.1f} ms a chunk, {1e3 * VIDEO_FRAMES / times[best]:6.1f} frames/s by {best}  " + ", ".join(f"{name} {ms:.1f}" for name, ms in times.items()))

    if args.ours:
        peers = {row["history"]: row["ms"] for row in rows}
        for row in json.loads(args.ours.read_text())["rows"]:
            history = min(row.get("history", 0), 21) if row.get("method") == "own" else row.get("history")
            if row.get("method") in ("own", "dense") and history in peers:
                print(f"  {row['method']:<6} at {row['history']:>4}: {row['ms']:8.1f} ms, PyTorch reading {history} frames {peers[history] / row['ms']:.2f} times as long")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
