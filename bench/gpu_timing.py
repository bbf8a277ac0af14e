"""How the PyTorch peers on a GPU are timed."""

from __future__ import annotations

import statistics

import torch


def median_ms(body, runs: int, warm_up: int = 0) -> float:
    """Median milliseconds of `runs` calls, each between two events on the current stream."""
    for _ in range(warm_up):
        body()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        body()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
