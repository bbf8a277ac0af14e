"""Checkpoints: averaged weights in parts small enough to travel, and the whole training state beside them.

    <out>/ema/part0.safetensors ...   averaged weights, bf16, parts of at most 15 MiB   (resume, export)
    <out>/export/part0.safetensors... the same as int8 rows: the shipped precision
    <out>/state.pt                    raw weights and optimiser state, float32          (resume on the same machine)
    <out>/progress.json               where training stood

Each set is replaced as a whole, so that a reader never finds half of one.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import WorldConfig, load_model, pack, unpack

PART_BYTES = 15 * 1024 * 1024


def split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in parts of at most PART_BYTES, in order."""
    parts: list[dict[str, Tensor]] = [{}]
    room = PART_BYTES - 64 * 1024  # for the header
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used + size > room and parts[-1]:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += size
    return parts


def save_parts(folder: Path, config: WorldConfig, words: list[str], state: dict[str, Tensor], storage: str) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, part in enumerate(split(pack(state, storage))):
        save_file(part, partial / f"part{index}.safetensors")
    (partial / "config.json").write_text(config.to_json())
    (partial / "vocabulary.txt").write_text("".join(word + "\n" for word in words))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """float32 state from a folder of parts, from a model folder, or from a training folder that holds `ema/`."""
    folder = Path(folder)
    for inside in (folder / "ema", folder / "export"):
        if inside.is_dir():
            return load_weights(inside)
    if (folder / "model.safetensors").exists():
        return load_model(folder).state_dict()
    paths = sorted(folder.glob("part*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected model.safetensors or part*.safetensors")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= load_file(path)
    return unpack(tensors)


def load_config(folder: str | Path) -> WorldConfig:
    folder = Path(folder)
    for candidate in (folder, folder / "ema", folder / "export"):
        if (candidate / "config.json").exists():
            return WorldConfig.from_json((candidate / "config.json").read_text())
    raise FileNotFoundError(f"{folder}: expected config.json")


class Saver:
    """Writes checkpoints in a thread of its own; training stops only to copy the tensors to the CPU."""

    def __init__(self, out: Path, config: WorldConfig, words: list[str]):
        self.out, self.config, self.words = out, config, words
        self._thread: threading.Thread | None = None

    def save(self, weights: dict[str, Tensor], progress: dict, state: dict | None = None) -> bool:
        """weights = averaged; state = what a resumed run needs besides. Refuses weights that are not finite, so that
        the last good checkpoint stays."""
        self.wait()
        weights = {name: value.detach().float().cpu().clone() for name, value in weights.items()}
        if not all(value.isfinite().all() for value in weights.values()):
            return False
        state = _to_cpu(state) if state is not None else None
        self._thread = threading.Thread(target=self._write, args=(weights, progress, state))
        self._thread.start()
        return True

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, weights: dict[str, Tensor], progress: dict, state: dict | None) -> None:
        save_parts(self.out / "ema", self.config, self.words, weights, "bf16")
        save_parts(self.out / "export", self.config, self.words, weights, "int8")
        if state is not None:
            torch.save(state, self.out / "state.partial")
            os.replace(self.out / "state.partial", self.out / "state.pt")
        (self.out / "progress.partial").write_text(json.dumps(progress) + "\n")
        os.replace(self.out / "progress.partial", self.out / "progress.json")


def _to_cpu(value):
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_cpu(item) for item in value]
    return value
