"""What the training stages share: processes, clock, log, and compilation that falls back instead of dying."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist


class Run:
    """One training process among `ranks`. Rank 0 logs and saves; its clock decides for all."""

    def __init__(self, rank: int, ranks: int, out: str | Path, device: str, compile: bool):
        self.rank, self.ranks, self.out, self.compile = rank, ranks, Path(out), compile
        self.cuda = device == "cuda"
        self.device = torch.device("cuda:0" if self.cuda else "cpu")
        self.out.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        if ranks > 1:
            device_id = self.device if self.cuda else None
            dist.init_process_group(
                "nccl" if self.cuda else "gloo", rank=rank, world_size=ranks, device_id=device_id
            )
        # A second group on the CPU: the clock is shared without waiting for the GPU.
        self._clock_group = dist.new_group(backend="gloo") if ranks > 1 else None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def log(self, text: str) -> None:
        if self.main:
            line = f"{time.time() - self.started:7.1f} {text}"
            print(line, flush=True)
            with open(self.out / "train.log", "a") as file:
                file.write(line + "\n")

    def autocast(self):
        """bf16 on the GPU. Without the cast cache: a weight first cast under no_grad would stay cut off from its
        gradient."""
        if not self.cuda:
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def barrier(self) -> None:
        if self._clock_group is not None:
            dist.barrier(self._clock_group)

    def shared(self, value: float) -> float:
        """Rank 0's value in every process, so that all take the same turns."""
        if self._clock_group is None:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, 0, group=self._clock_group)
        return box.item()

    def broadcast(self, value: torch.Tensor) -> None:
        """Gives every process the tensor of rank 0."""
        if self.ranks > 1:
            dist.broadcast(value, 0)

    def mean(self, value: torch.Tensor) -> float:
        if self.ranks > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.ranks
        return value.item()

    def peak_memory(self) -> float:
        """GB, since the last call."""
        if not self.cuda:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


class Progress:
    """Fraction of a stage's budget used: of seconds, or of steps where `steps` is given (tests, the smoke run). The
    clock is read and shared every `every` steps only."""

    def __init__(self, run: Run, seconds: float, steps: int | None = None, every: int = 8):
        self.run, self.seconds, self.steps, self.every = run, seconds, steps, every
        self.restart()

    def restart(self) -> None:
        self.start, self.step, self.fraction = time.time(), 0, 0.0

    def advance(self) -> float:
        """Called once before every step; 1 ends the stage."""
        if self.steps is not None:
            self.fraction = self.step / self.steps
        elif self.step % self.every == 0:
            self.fraction = self.run.shared((time.time() - self.start) / max(self.seconds, 1e-9))
        self.step += 1
        return min(self.fraction, 1.0)

    @property
    def elapsed(self) -> float:
        return time.time() - self.start


class Compiled:
    """torch.compile(fast or plain), or `plain` from the first failure on. Backward graphs are compiled when first run,
    outside this call, so the first training step goes through `first_step`."""

    def __init__(self, run: Run, name: str, plain: Callable, fast: Callable | None = None):
        self.run, self.name, self.plain = run, name, plain
        self.fast = torch.compile(fast or plain, dynamic=False) if run.compile and run.cuda else None

    def __call__(self, *args):
        if self.fast is not None:
            try:
                return self.fast(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.give_up(error)
        return self.plain(*args)

    def give_up(self, error: Exception) -> None:
        self.fast = None
        self.run.log(f"compile of {self.name} failed, going on without: {repr(error)[:600]}")


def first_step(step: Callable[[], object], graphs: list[Compiled]) -> None:
    """Runs `step` once; if it fails while graphs are compiled, once more without them."""
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if all(graph.fast is None for graph in graphs):
            raise
        for graph in graphs:
            graph.give_up(error)
        step()


def cosine(fraction: float, floor: float = 0.0) -> float:
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(fraction * torch.pi)).item())


def warm_processes(command: list[str], names: list[str], out: Path) -> list:
    """Starts `command name` in the background for each name: they compile into the caches on disk."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "6"}
    logs = [open(out / f"warm-{name}.log", "w") for name in names]
    return [
        subprocess.Popen([*command, name], stdout=log, stderr=log, env=environment) for name, log in zip(names, logs)
    ]
