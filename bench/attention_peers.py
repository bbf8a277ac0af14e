"""Times PyTorch's attention on the cases of paged_attention_bench and prints both side by side.

    python bench/attention_peers.py OURS.json [--json FILE]

OURS.json comes from `paged_attention_bench --json`, in the same run on the same GPU. Times are those in a recorded graph. Peers: scaled dot product attention by
cuDNN (without a bias and, where a case has one, with it) and by FlashAttention-2, FlexAttention with block masks for the
cases with lists. Each is checked against plain attention in float32 on a few queries before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import median_ms

PAGE = 128


def median_ms_in_graph(body) -> float:
    """Of one call among 32 (4 where a call is long) in a recorded graph, as paged_attention_bench measures."""
    calls = 4 if median_ms(body, 5, warm_up=3) > 0.5 else 32
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            body()
    return median_ms(graph.replay, 20, warm_up=3) / calls


def check(out: torch.Tensor, q, k, v, bias=None) -> float:
    """Relative L2 of 16 queries of the first head against float32."""
    rows = torch.linspace(0, q.shape[2] - 1, 16, device=q.device).long()
    logits = q[0, 0, rows].float() @ k[0, 0].float().T / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias[0, 0, 0].float()
    want = logits.softmax(-1) @ v[0, 0].float()
    return ((out[0, 0, rows].float() - want).norm() / want.norm()).item()


def peers_of(case: dict, with_flex: bool) -> dict[str, float]:
    torch.manual_seed(0)
    shape = lambda n: (1, case["heads"], n, case["head_dim"])
    q, k, v = (torch.randn(shape(n), device="cuda", dtype=torch.bfloat16) for n in (case["queries"], *[case["keys"]] * 2))
    result = {}

    def time(name: str, backend, bias=None) -> None:
        try:
            with sdpa_kernel(backend):
                body = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
                error = check(body(), q, k, v, bias)
                result[name] = median_ms_in_graph(body) if error < 1e-2 else f"wrong: {error}"
        except RuntimeError as failure:
            result[name] = str(failure).splitlines()[0][:80]

    time("cudnn", SDPBackend.CUDNN_ATTENTION)
    if case["density"] == 1:
        time("flash2", SDPBackend.FLASH_ATTENTION)
        if case["biased"]:
            time("cudnn_bias", SDPBackend.CUDNN_ATTENTION, torch.randn(1, case["heads"], 1, case["keys"], device="cuda", dtype=torch.bfloat16))
    elif case["density"] >= 0.1 and with_flex:
        result["flex"] = flex(q, k, v, case["density"])
    return result


def flex(q, k, v, density: float) -> float:
    """FlexAttention over random blocks of 128 x 128, at 4608 queries: it wants whole blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = q[:, :, : q.shape[2] // PAGE * PAGE], *(x[:, :, : x.shape[2] // PAGE * PAGE] for x in (k, v))
    rows, columns = q.shape[2] // PAGE, k.shape[2] // PAGE
    chosen = torch.rand(1, q.shape[1], rows, columns, device="cuda") < density
    count = chosen.sum(-1).int()
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
    empty = torch.zeros_like(count), torch.zeros_like(order)
    mask = BlockMask.from_kv_blocks(*empty, count, order, BLOCK_SIZE=(PAGE, PAGE))
    run = torch.compile(flex_attention, dynamic=False)
    ms = median_ms(lambda: run(q, k, v, block_mask=mask), 20, warm_up=3)
    return 4 * count.sum().item() * PAGE * PAGE * q.shape[-1] / ms * 1e-9  # TFLOP/s on executed pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours")
    parser.add_argument("--json")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which wants a compiler and its time")
    args = parser.parse_args()
    ours = json.load(open(args.ours))
    known: dict[str, dict] = {}
    print(f"{'case':26} {'ours ms':>9} {'TFLOP/s':>8} | peers: ms (ours is so many times as fast)")
    for case in ours["cases"]:
        if case["kernel"] != "best":
            continue
        peers = known[case["case"]] = peers_of(case, not args.no_flex)
        words = []
        for name, value in peers.items():
            if name == "flex" and isinstance(value, float):
                words.append(f"flex {value:.0f} TFLOP/s (x{case['tflops'] / value:.2f})")
            elif isinstance(value, float):
                words.append(f"{name} {value:.4f} (x{value / case['graph_ms']:.2f})")
            else:
                words.append(f"{name}: {value}")
        print(f"{case['case']:26} {case['graph_ms']:9.4f} {case['tflops']:8.1f} | {', '.join(words)}", flush=True)
    if args.json:
        json.dump({"ours": ours, "peers": known}, open(args.json, "w"), indent=1)


if __name__ == "__main__":
    main()
