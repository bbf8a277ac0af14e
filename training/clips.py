"""Training clips of the embedded world, made by background threads.

Three kinds, so that the model learns three things: `shots` (8 frames, mostly without or with little context: the text
alone must make the picture), `short` (32 frames: motion, new land) and `memory` (128 frames cut out of walks of 1280:
a place seen long ago comes back). `frames` are single pictures for the autoencoder.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import overworld

TRAINING_SEED = 1 << 40  # first map seed; evaluation uses small ones, so that its maps are never trained on
WALK_FRAMES = {"shots": 256, "short": 400, "memory": 1280}
CLIP_FRAMES = {"frames": 1, "shots": 8, "short": 32, "memory": 128}
SHOTS = (1, 1, 2, 4)  # independent groups within a `shots` clip, as in model.clean_frame_mask
PATH_KINDS = np.array([overworld.EXPLORE, overworld.OFF_PHASE, overworld.RETURNING, overworld.STEADY])
PATH_SHARES = np.array([0.55, 0.2, 0.1, 0.15])
PROPERTIES = {"theme": 8, "sea": 3, "forest": 3, "landmark": 8, "colour": 8}  # of a region, and their values
UNSAID = -100  # a property that the prompt leaves open
STRAYED_SHARE = 0.25  # of batches whose context shows the land under a wrong theme
MOVED_SHARE = 0.6  # of clips that jump a few pixels aside after every piece of so many frames
MOVED_PIECE = {"shots": 1, "short": 8, "memory": 16}
RETURN_SHARE = 0.65  # of context segments that saw a place of the clip's last half


@dataclass
class Batch:
    pixels: Tensor  # [B, F, 128, 256, 3] u8
    camera: Tensor  # [B, F, 2] (x, y) in tokens, wrapped to the torus
    times: Tensor  # [B, F] frames since the first
    ids: Tensor  # [B, T] words, 0 = padding
    properties: Tensor  # [B, 9, 5] PROPERTIES by region, UNSAID where the prompt does not tell
    seen: Tensor | None = None  # pixels of the context [B, F, 128, 256, 3] u8, where it strayed from what is true

    def to(self, device) -> Batch:
        parts = (self.pixels, self.camera, self.times, self.ids, self.properties, self.seen)
        return Batch(*(part if part is None else part.to(device, non_blocking=True) for part in parts))


def shot_times(walk_frames: int, rng: np.random.Generator) -> np.ndarray:
    """8 frame numbers: groups of SHOTS anywhere in the walk; within a group consecutive, or a few frames apart."""
    times = []
    for size in SHOTS:
        gap = 1 if rng.random() < 0.7 else int(rng.integers(2, 24))
        start = rng.integers(0, walk_frames - size * gap)
        times.append(start + gap * np.arange(size))
    return np.concatenate(times)


def memory_times(xy: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """`frames` increasing frame numbers of a walk xy [T, 2]. The last half is consecutive. The first half is a memory of
    four segments, most of which saw a place where the last half goes; what is missing, because segments overlap, is
    filled with the frames just before the last half. One clip in three is consecutive throughout."""
    total, tail, segment = len(xy), frames // 2, frames // 8
    start = int(rng.integers(frames, total - tail + 1))  # of the last half
    if rng.random() < 0.33:
        return np.arange(start + tail - frames, start + tail)
    last = start - segment  # segments begin before this
    memory = set()
    for _ in range(4):
        begin = int(rng.integers(0, last))
        if rng.random() < RETURN_SHARE:
            goal = xy[start + rng.integers(tail)]
            offset = (xy[:last] - goal + overworld.TORUS // 2) % overworld.TORUS - overworld.TORUS // 2
            seen = np.flatnonzero((np.abs(offset[:, 0]) < 176) & (np.abs(offset[:, 1]) < 88))
            if len(seen):
                begin = int(np.clip(rng.choice(seen) - segment // 2, 0, last - 1))
        memory.update(range(begin, begin + segment))
    fill = (t for t in range(start - 1, -1, -1) if t not in memory)
    while len(memory) < frames - tail:
        memory.add(next(fill))
    return np.concatenate([np.sort(np.fromiter(memory, int)), np.arange(start, start + tail)])


def moves_aside(batch: int, frames: int, piece: int, rng: np.random.Generator) -> np.ndarray:
    """By how many pixels (x, y) frames stand beside their walk, [batch, frames, 2] int32. A walk keeps to few of the 16
    phases that a place can have on the lattice of tokens, and goes back over the poses it came by; but what all
    frames so far show in one phase must be known in another."""
    moves = 4 * rng.integers(-2, 3, (batch, frames // piece, 2))
    moves[rng.random(batch) >= MOVED_SHARE] = 0
    return moves.repeat(piece, 1).astype(np.int32)


def torus_tokens(xy: np.ndarray) -> Tensor:
    """Pixels -> tokens on the torus, exact multiples of 1/4."""
    return torch.from_numpy((xy % overworld.TORUS).astype(np.float32) / 16)


def make_batch(
    kind: str, batch: int, pool: overworld.Pool, rng: np.random.Generator, text_len: int, pin: bool
) -> Batch:
    """A batch of clips of `kind` from the maps of a pool. One path kind for the whole pool and batch."""
    frames = CLIP_FRAMES[kind]
    maps = np.arange(batch) % pool.num_maps
    if kind == "frames":
        xy = 4 * rng.integers(0, overworld.TORUS // 4, (batch, 1, 2))
        times = rng.integers(0, 2000, (batch, 1))
        ids = np.zeros((batch, 1), np.int32)
        properties = np.full((batch, 9, len(PROPERTIES)), UNSAID)
    else:
        walk = WALK_FRAMES[kind]
        path_kind = int(rng.choice(PATH_KINDS, p=PATH_SHARES))
        walks = pool.paths(int(rng.integers(1 << 62)), walk, path_kind, True)
        if kind == "shots":
            times = np.stack([shot_times(walk, rng) for _ in maps])
        else:
            times = np.stack([memory_times(walks[m], frames, rng) for m in maps])
        xy = np.take_along_axis(walks[maps], times[:, :, None], 1)
        xy += moves_aside(batch, frames, MOVED_PIECE[kind], rng)
        told = [prompt_and_properties(pool, m, rng, text_len) for m in maps]
        ids, properties = (np.stack(part) for part in zip(*told))

    def picture(maps_shown: overworld.Pool) -> Tensor:
        pixels = torch.empty(batch, frames, overworld.HEIGHT, overworld.WIDTH, 3, dtype=torch.uint8, pin_memory=pin)
        x, y = xy[..., 0].ravel(), xy[..., 1].ravel()
        maps_shown.render(maps.repeat(frames), x, y, times.ravel(), out=pixels.numpy())
        return pixels

    strays = kind != "frames" and rng.random() < STRAYED_SHARE
    seen = picture(strayed(pool, xy[: pool.num_maps], rng)) if strays else None
    relative = torch.from_numpy((times - times[:, :1]).astype(np.float32))
    properties = torch.from_numpy(properties)
    return Batch(picture(pool), torus_tokens(xy), relative, torch.from_numpy(ids).long(), properties, seen)


def strayed(pool: overworld.Pool, xy: np.ndarray, rng: np.random.Generator) -> overworld.Pool:
    """The mistake of a model that does not read on: the theme of one frame of the clip, xy [num_maps, F, 2], has gone on
    into all regions of its map. Those that the prompt leaves open keep theirs: there only the context can tell."""
    themes = np.stack([pool.info(m)["theme"] for m in range(pool.num_maps)])
    for m in range(len(xy)):
        x, y = xy[m, rng.integers(xy.shape[1])]
        here = pool.region_at(m, int(x) + overworld.WIDTH // 2, int(y) + overworld.HEIGHT // 2)
        themes[m, pool.info(m)["mentioned"] != 0] = themes[m, here]
    return pool.with_themes(themes)


def prompt_and_properties(
    pool: overworld.Pool, map_idx: int, rng: np.random.Generator, text_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """The map's prompt in one of its many wordings, or in one clip of twenty none: word ids [T], and what it tells of
    the regions [9, 5]."""
    if rng.random() < 0.05:
        return overworld.tokenize("", text_len), np.full((9, len(PROPERTIES)), UNSAID)
    text = pool.prompt(int(map_idx), int(rng.integers(1 << 62)))
    return overworld.tokenize(text, text_len), told_properties(pool.info(int(map_idx)))


def told_properties(info: dict) -> np.ndarray:
    """[9, 5] properties of the regions that the prompt mentions. A prompt for one land everywhere need not tell more
    than its theme."""
    properties = np.stack([info[name] for name in PROPERTIES], 1).astype(np.int64)
    if (properties == properties[0]).all():
        properties[:, 1:] = UNSAID
    properties[info["mentioned"] == 0] = UNSAID
    return properties


def first_pool(seed: int) -> int:
    """Number of the first pool of maps of a run: a resumed run with another seed meets other worlds."""
    return seed << 24


class ClipLoader:
    """Endless batches by kind. A thread takes a pool of fresh maps, makes `uses` batches of it, and drops it, so that the
    number of worlds is unbounded. About `depth` batches of every kind lie ready. `rank` of `ranks` processes draw
    disjoint seeds, and so do runs of different `seed`."""

    def __init__(
        self, sizes: dict[str, int], threads: int, text_len: int, pin: bool, rank=0, ranks=1, seed=0, uses=4, depth=12
    ):
        self.sizes, self.text_len, self.pin, self.uses, self.depth = sizes, text_len, pin, uses, depth
        self.queues = {kind: queue.SimpleQueue() for kind in sizes}
        self._promised = dict.fromkeys(sizes, 0)  # batches lying ready or being made
        self._lock = threading.Lock()
        self._next_pool, self._stride = first_pool(seed) + rank, ranks
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def get(self, kind: str) -> Batch:
        while True:
            if self._error:
                raise RuntimeError("clip thread failed") from self._error
            try:
                batch = self.queues[kind].get(timeout=5)
            except queue.Empty:
                continue
            with self._lock:
                self._promised[kind] -= 1
            return batch

    def ready(self) -> int:
        """Batches lying ready, of the scarcest kind: 0 means that training waits for pictures."""
        return min(q.qsize() for q in self.queues.values())

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                with self._lock:
                    kind = min(self._promised, key=self._promised.get)
                    busy = self._promised[kind] >= self.depth
                    if not busy:
                        self._promised[kind] += self.uses
                        number, self._next_pool = self._next_pool, self._next_pool + self._stride
                if busy:
                    self._stopping.wait(0.005)
                    continue
                pool = overworld.Pool(TRAINING_SEED + 64 * number, min(self.sizes[kind], 32))
                rng = np.random.default_rng(number)
                for _ in range(self.uses):
                    self.queues[kind].put(make_batch(kind, self.sizes[kind], pool, rng, self.text_len, self.pin))
        except Exception as error:  # handed to the caller of get()
            self._error = error
