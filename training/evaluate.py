"""Measures a world model on maps that no training uses, row by row of the go / no-go table.

    python training/evaluate.py models/world --out out/evaluation            # GPUs: the parts are shared out
    python training/evaluate.py build/tiny-run --quick --out build/eval      # CPU: few maps, few frames

Every row is in results.json as soon as it is known; the decisive parts come first.
Measures (pictures in 0..255, all maps weigh the same):
- PSNR to truth on seen land: over the pixels whose place in the world was in view in the 32 primed frames, for
  generated frames of which at least a quarter is such land. Nothing that moves (critters, waves, clouds) is masked.
- Return consistency: PSNR between the model's own frames of nearly one pose (at most 8 px apart, cropped to the part
  common to both), more than 100 frames apart, on land that was not primed. `truth` is the same measure of the renderer:
  what moves sets a limit below infinity.
- Sharpness: mean absolute difference of neighbouring pixels, divided by the renderer's at the same poses.
- Theme: a softmax classifier of 6 x 6 x 6 colour histograms, fitted on rendered pictures; its own accuracy is reported.
- New land: terrain classes by a table from 5-bit colours, made of rendered pictures; total variation between the
  shares of classes in generated and rendered pictures; the intersection of their 8 x 8 x 8 colour histograms.
Routes: `exact` comes back over the very poses it went out by, `off_phase` 4 px beside them, both ways.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import overworld
from checkpoint import load_config, load_weights
from model import WorldModel
from rollout import Player
from sampler import add_sampler_arguments, chosen_sampler

PRIMED = 32
WINDOW, SINK = 36, 1
MAP_SEED = 500_000  # training uses seeds from 1 << 40
THEMES = 8
SHIFTS = (1.0, 1.5, 2.5)
PARTS = ("text", "full", "long", "window", "samplers")


def log(text: str) -> None:
    print(f"{time.time() - _START:6.1f} {text}", flush=True)


_START = time.time()


# ---- routes ----


def there_and_back(map_idx: int, start: tuple[int, int], frames: int, off_phase: bool) -> np.ndarray:
    """Camera xy [frames, 2]: 31 fast steps one way (primed), back, then far out at right angles into new land and back,
    and out again. `off_phase`: every turn moves the route by 4 px both ways."""
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
    along = np.array(turns[map_idx % 4])
    aside = np.array(turns[(map_idx + (1 if map_idx // 4 % 2 else 3)) % 4])
    far = max(8, (frames - 2 * PRIMED) * 3 // 8)
    legs = [(along, PRIMED - 1), (-along, PRIMED - 1), (aside, far), (-aside, far), (aside, frames)]
    xy, here = [np.array(start)], np.array(start)
    for number, (direction, count) in enumerate(legs):
        for step in range(count):
            turn = off_phase and number > 0 and step == 0
            here = here + (4 * (direction + direction[::-1]) if turn else 8 * direction)
            xy.append(here)
    return np.stack(xy[:frames]).astype(np.int32)


def straight(map_idx: int, start: tuple[int, int], frames: int) -> np.ndarray:
    """Fast steps in one of eight directions, into other regions."""
    directions = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
    return (np.array(start) + 8 * np.arange(frames)[:, None] * np.array(directions[map_idx % 8])).astype(np.int32)


# ---- pictures and measures ----


class Maps:
    """Unseen maps with their prompts, words, and truth."""

    def __init__(self, first_seed: int, count: int, text_len: int, threads: int):
        self.count, self.threads = count, threads
        self.pool = overworld.Pool(first_seed, count, threads)
        self.info = [self.pool.info(m) for m in range(count)]
        self.prompts = [self.pool.prompt(m, 17 * m + 1) for m in range(count)]
        self.ids = torch.from_numpy(np.stack([overworld.tokenize(p, text_len) for p in self.prompts])).long()

    def truth(self, xy: np.ndarray) -> Tensor:
        """xy [maps, F, 2] -> pictures [maps, F, 128, 256, 3] u8, frame f at world time f."""
        maps, frames = xy.shape[:2]
        idx, t = np.arange(maps).repeat(frames), np.tile(np.arange(frames), maps)
        x, y = xy.reshape(-1, 2).T
        return torch.from_numpy(self.pool.render(idx, x, y, t, num_threads=self.threads)).unflatten(0, (maps, frames))

    def classes(self, xy: np.ndarray) -> np.ndarray:
        maps, frames = xy.shape[:2]
        idx, t = np.arange(maps).repeat(frames), np.tile(np.arange(frames), maps)
        x, y = xy.reshape(-1, 2).T
        return self.pool.classes(idx, x, y, t, self.threads).reshape(maps, frames, 128, 256)

    def region(self, map_idx: int, xy: np.ndarray) -> tuple[int, float]:
        """The region that fills most of a camera picture, and its share of 15 sample points."""
        points = [(x, y) for x in range(16, 256, 56) for y in (16, 64, 112)]
        found = [self.pool.region_at(map_idx, int(xy[0]) + x, int(xy[1]) + y) for x, y in points]
        region = max(set(found), key=found.count)
        return region, found.count(region) / len(found)

    def theme(self, map_idx: int, xy: np.ndarray) -> int | None:
        """Theme of a camera picture, or None where regions mix or the prompt does not speak of it."""
        region, share = self.region(map_idx, xy)
        info = self.info[map_idx]
        return int(info["theme"][region]) if share > 0.85 and info["mentioned"][region] else None


def tokens(xy: np.ndarray) -> Tensor:
    return torch.from_numpy((xy % overworld.TORUS).astype(np.float32) / 16)


def gradient(pictures: Tensor) -> float:
    p = pictures.float()
    dx = (p[..., 1:, :] - p[..., :-1, :]).abs().mean()
    dy = (p[..., 1:, :, :] - p[..., :-1, :, :]).abs().mean()
    return (dx + dy).item()


def seen_masks(xy: np.ndarray, primed: int) -> Tensor:
    """xy [F, 2] -> [F, 128, 256]: whether a pixel's place in the world was in view in the first `primed` frames."""
    world = np.zeros((overworld.TORUS, overworld.TORUS), bool)
    rows = (xy[:, 1, None] + np.arange(overworld.HEIGHT)) % overworld.TORUS
    columns = (xy[:, 0, None] + np.arange(overworld.WIDTH)) % overworld.TORUS
    for f in range(primed):
        world[np.ix_(rows[f], columns[f])] = True
    return torch.from_numpy(np.stack([world[np.ix_(r, c)] for r, c in zip(rows, columns)]))


def frame_psnr(a: Tensor, b: Tensor, masks: Tensor | None = None) -> Tensor:
    """dB of every picture of [n, H, W, 3] u8, over masks [n, H, W] if given."""
    error = (a.float() - b.float()).square().mean(-1)
    masks = torch.ones_like(error) if masks is None else masks.float()
    value = (error * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
    return 10 * torch.log10(255**2 / value.clamp(min=1e-3))


def seen_land_psnr(made: Tensor, truth: Tensor, xy: np.ndarray, device="cpu") -> tuple[float, dict[int, float]]:
    """Mean over generated frames and maps, and the course over time; pictures [maps, F, ...]."""
    by_frame: dict[int, list[float]] = {}
    for m in range(len(made)):
        masks = seen_masks(xy[m], PRIMED)
        frames = PRIMED + torch.nonzero(masks[PRIMED:].float().mean((1, 2)) >= 0.25)[:, 0]
        values = frame_psnr(*(part[frames].to(device) for part in (made[m], truth[m], masks)))
        for f, value in zip(frames.tolist(), values.tolist()):
            by_frame.setdefault(f - PRIMED + 1, []).append(value)
    every = [value for values in by_frame.values() for value in values]
    course = {f: float(np.mean(by_frame[f])) for f in (1, 16, 64, 128, 160, 180, 240) if f in by_frame}
    return float(np.mean(every)) if every else float("nan"), course


def return_psnr(pictures: Tensor, xy: np.ndarray, lag: int = 100) -> tuple[float, int]:
    """Return consistency, and the number of pairs; pictures [maps, F, 128, 256, 3]."""
    values = []
    for m in range(len(pictures)):
        new_land = 1 - seen_masks(xy[m], PRIMED).float().mean((1, 2))
        for late in range(PRIMED + lag + 1, pictures.shape[1], 3):
            early = np.arange(PRIMED, late - lag)
            apart = np.abs(xy[m, early] - xy[m, late]).max(1)
            if new_land[late] < 0.75 or apart.min() > 8:
                continue
            first = early[apart.argmin()]
            dx, dy = (xy[m, late] - xy[m, first]).tolist()  # world pixel p is p - xy on the screen
            a, b = pictures[m, late], pictures[m, first]
            h, w = overworld.HEIGHT - abs(dy), overworld.WIDTH - abs(dx)
            a = a[max(0, -dy) : max(0, -dy) + h, max(0, -dx) : max(0, -dx) + w]
            b = b[max(0, dy) : max(0, dy) + h, max(0, dx) : max(0, dx) + w]
            values.append(frame_psnr(a[None], b[None]).item())
    return (float(np.mean(values)) if values else float("nan")), len(values)


def histogram(pictures: Tensor, bins: int, device="cpu") -> Tensor:
    """Colour shares [n, bins^3], on the CPU, of pictures [n, H, W, 3] u8."""
    shares = []
    for part in pictures.split(64):
        q = (part.to(device).long() * bins // 256).flatten(1, 2)
        index = (q[..., 0] * bins + q[..., 1]) * bins + q[..., 2]
        out = torch.zeros(len(part), bins**3, device=device)
        shares.append(out.scatter_add_(1, index, torch.ones_like(index, dtype=out.dtype)) / index.shape[1])
    return torch.cat(shares).cpu()


class ThemeClassifier:
    """Softmax regression on the square roots of colour shares; fitted on rendered pictures of single regions."""

    BINS = 6

    def __init__(self, text_len: int, maps: int, per_map: int, threads: int, device):
        self.device = device
        chosen, labels = [], []
        rng = np.random.default_rng(0)
        worlds = Maps(MAP_SEED + 50_000, maps, text_len, threads)
        xy = 4 * rng.integers(0, overworld.TORUS // 4, (maps, per_map, 2)).astype(np.int32)
        pictures = worlds.truth(xy)
        for m in range(maps):
            for f in range(per_map):
                region, share = worlds.region(m, xy[m, f])
                if share > 0.85:
                    chosen.append(m * per_map + f)
                    labels.append(int(worlds.info[m]["theme"][region]))
        x, y = self.features(pictures.flatten(0, 1))[chosen], torch.tensor(labels)
        split = len(x) * 3 // 4
        self.weight = torch.zeros(THEMES, x.shape[1], requires_grad=True)
        optimiser = torch.optim.Adam([self.weight], lr=0.05)
        for _ in range(300):
            loss = F.cross_entropy(x[:split] @ self.weight.T, y[:split]) + 1e-4 * self.weight.square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.weight.requires_grad_(False)
        self.accuracy = ((x[split:] @ self.weight.T).argmax(1) == y[split:]).float().mean().item()

    def features(self, pictures: Tensor) -> Tensor:
        return histogram(pictures, self.BINS, self.device).sqrt()

    def __call__(self, pictures: Tensor) -> Tensor:
        return (self.features(pictures) @ self.weight.T).argmax(1)


def share_correct(guesses: Tensor, labels: list[int | None]) -> tuple[float, int]:
    pairs = [(int(g), label) for g, label in zip(guesses, labels) if label is not None]
    return sum(g == label for g, label in pairs) / max(1, len(pairs)), len(pairs)


def terrain_shares(table: np.ndarray, pictures: Tensor) -> np.ndarray:
    q = (pictures.numpy() >> 3).astype(np.int64)
    classes = table[(q[..., 0] << 10) + (q[..., 1] << 5) + q[..., 2]]
    shares = np.bincount(classes[classes >= 0], minlength=10).astype(float)
    return shares / max(1, shares.sum())


def terrain_table(pictures: Tensor, classes: np.ndarray) -> np.ndarray:
    """Most frequent terrain class of every 5-bit colour, -1 where the colour was not seen."""
    q = (pictures.numpy() >> 3).astype(np.int64)
    index = (q[..., 0] << 10) + (q[..., 1] << 5) + q[..., 2]
    counts = np.bincount(index.ravel() * 10 + classes.ravel(), minlength=32768 * 10).reshape(32768, 10)
    return np.where(counts.sum(1) > 0, counts.argmax(1), -1)


def contact_sheet(path: Path, rows: list[Tensor], columns: list[int], scale: float) -> None:
    """rows of pictures [F, 128, 256, 3]; columns = frame numbers."""
    grid = torch.cat([torch.cat([row[c] for c in columns], 1) for row in rows], 0).numpy()
    image = Image.fromarray(grid)
    image.resize((int(image.width * scale), int(image.height * scale)), Image.LANCZOS).save(path, optimize=True)


# ---- the table ----


@dataclass
class Routes:
    """Walks there and back: the first half of the maps `exact`, the others `off_phase`."""

    maps: Maps
    xy: np.ndarray  # [maps, F, 2]
    truth: Tensor  # [maps, F, 128, 256, 3]
    latents: Tensor  # [maps, F, C, h, w]

    @property
    def parts(self) -> dict[str, slice]:
        half = self.maps.count // 2
        return {"exact": slice(0, half), "off_phase": slice(half, None)}


class Evaluation:
    def __init__(self, args: argparse.Namespace, model: WorldModel, device: torch.device):
        self.args, self.device = args, device
        self.text_len = model.config.text_encoder.text_len
        self.player = Player(model, device)
        self.out = Path(args.out)

    def put(self, name: str, value) -> None:
        rounded = json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 4))
        log(f"{name}: {json.dumps(rounded)}")
        with open(self.out / "results.json", "a+") as file:  # other processes write theirs
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            results = json.loads(file.read() or "{}")
            file.truncate(0)
            file.write(json.dumps(results | {name: rounded}, indent=1) + "\n")

    def maps(self, offset: int, count: int) -> Maps:
        return Maps(MAP_SEED + offset, count, self.text_len, self.args.threads)

    @functools.cached_property
    def routes(self) -> Routes:
        count, frames = self.args.maps, PRIMED + self.args.frames
        maps = self.maps(0, 2 * count)
        xy = np.stack([there_and_back(m, maps.info[m]["start"], frames, m >= count) for m in range(2 * count)])
        truth = maps.truth(xy)
        return Routes(maps, xy, truth, self.player.encode(truth))

    def full(self) -> None:
        """Rollouts from primed frames with the full history: seen land, returns, and what limits both."""
        routes = self.routes
        self.rollouts("full", 0, 0)
        rebuilt = self.player.decode(routes.latents[:, ::4])
        for name, part in routes.parts.items():
            pairs = [(rebuilt[m], routes.truth[m, ::4]) for m in range(routes.maps.count)[part]]
            quality = torch.cat([frame_psnr(a.to(self.device), b.to(self.device)) for a, b in pairs]).cpu()
            self.put(f"autoencoder_psnr.{name}", {"mean": quality.mean().item(), "p10": quality.quantile(0.1).item()})
            value, pairs = return_psnr(routes.truth[part], routes.xy[part], self.args.lag)
            self.put(f"return_psnr.{name}.truth", {"mean": value, "pairs": pairs})

    def window(self) -> None:
        """The same with a window in place of the history: what memory is worth."""
        self.rollouts("window", WINDOW, SINK)

    def rollouts(self, history: str, window: int, sink: int) -> None:
        """Both kinds of routes as one batch."""
        routes = self.routes
        z = self.player.play(routes.maps.ids, tokens(routes.xy), routes.latents[:, :PRIMED], window, sink)
        made = self.player.decode(z)
        for name, part in routes.parts.items():
            mean, course = seen_land_psnr(made[part], routes.truth[part], routes.xy[part], self.device)
            self.put(f"seen_land_psnr.{name}.{history}", {"mean": mean, "course": course})
        for name, part in routes.parts.items():
            value, pairs = return_psnr(made[part], routes.xy[part], self.args.lag)
            self.put(f"return_psnr.{name}.{history}", {"mean": value, "pairs": pairs})
        columns = np.linspace(PRIMED - 1, len(routes.xy[0]) - 1, 9).astype(int).tolist()
        half = routes.maps.count // 2
        shown = (0, half - 1, half, 2 * half - 1)
        rows = [pictures[m] for m in shown for pictures in (routes.truth, made)]
        contact_sheet(self.out / f"sheet_{history}.png", rows, columns, 0.5)

    def long(self) -> None:
        """Sharpness over a long exploring walk, full history."""
        maps = self.maps(2000, self.args.long_maps)
        frames = PRIMED + self.args.long
        xy = maps.pool.paths(5, frames, overworld.EXPLORE, False)
        truth = maps.truth(xy)
        z = self.player.play(maps.ids, tokens(xy), self.player.encode(truth[:, :PRIMED]))
        made = self.player.decode(z)
        marks = [f for f in (32, 128, 250, 500, 750, 1000) if PRIMED + f <= frames] or [frames - PRIMED]
        near = {f: slice(PRIMED + f - 16, PRIMED + f) for f in marks}
        self.put("sharpness", {f: gradient(made[:, s]) / gradient(truth[:, s]) for f, s in near.items()})
        worst = {f: [gradient(made[m, s]) / gradient(truth[m, s]) for m in range(maps.count)] for f, s in near.items()}
        self.put("sharpness_range", {f: [min(v), max(v)] for f, v in worst.items()})
        columns = [PRIMED - 1, *(PRIMED + f - 1 for f in marks)]
        shown = range(min(4, maps.count))
        contact_sheet(self.out / "sheet_long.png", [p[m] for m in shown for p in (truth, made)], columns, 0.5)

    def text(self) -> None:
        """Themes from text alone: the first frame, with the prompt, without, and with another map's; then a straight
        walk into another region, whose last part is also what new land is judged by."""
        args = self.args
        maps, per_map = (12, 12) if args.quick else (96, 24)
        classifier = ThemeClassifier(self.text_len, maps, per_map, args.threads, self.device)
        self.put("theme_classifier_accuracy_on_renderings", classifier.accuracy)
        maps = self.maps(3000, args.text_maps)
        xy = np.stack([straight(m, maps.info[m]["start"], args.walk) for m in range(maps.count)])
        labels = [maps.theme(m, xy[m, 0]) for m in range(maps.count)]
        first = lambda ids: self.player.decode(self.player.play(ids, tokens(xy[:, :1])))[:, 0]
        empty = torch.zeros_like(maps.ids)
        empty[:, 0] = 1
        pictures = {"prompt": first(maps.ids), "removed": first(empty), "shuffled": first(maps.ids.roll(1, 0))}
        truth = maps.truth(xy)
        pictures["truth"] = truth[:, 0]
        for name, made in pictures.items():
            correct, judged = share_correct(classifier(made), labels)
            self.put(f"first_frame_theme.{name}", {"accuracy": correct, "judged": judged})

        made = self.player.decode(self.player.play(maps.ids, tokens(xy)))
        entered, truth_entered = [], []
        for frame in range(args.walk // 2, args.walk, 8):
            new = [maps.region(m, xy[m, frame])[0] != maps.region(m, xy[m, 0])[0] for m in range(maps.count)]
            labels = [maps.theme(m, xy[m, frame]) if new[m] else None for m in range(maps.count)]
            entered.append(share_correct(classifier(made[:, frame]), labels))
            truth_entered.append(share_correct(classifier(truth[:, frame]), labels))
        for name, pairs in (("made", entered), ("truth", truth_entered)):
            judged = sum(n for _, n in pairs)
            self.put(
                f"entered_region_theme.{name}",
                {"accuracy": sum(a * n for a, n in pairs) / max(1, judged), "judged": judged},
            )

        late = slice(args.walk // 3, None, 4)  # nothing of the first frame is in view any more
        classes = maps.classes(xy[:, late])
        table = terrain_table(truth[:, late], classes)
        own, real = terrain_shares(table, made[:, late]), terrain_shares(table, truth[:, late])
        colours = lambda pictures: histogram(pictures[:, late].flatten(0, 1), 8, self.device).mean(0)
        h_own, h_real = colours(made), colours(truth)
        self.put(
            "new_land",
            {
                "sharpness": gradient(made[:, late]) / gradient(truth[:, late]),
                "terrain_total_variation": 0.5 * float(np.abs(own - real).sum()),
                "terrain_shares": own.tolist(),
                "terrain_shares_truth": real.tolist(),
                "colour_histogram_intersection": torch.minimum(h_own, h_real).sum().item(),
            },
        )
        columns = np.linspace(0, args.walk - 1, 8).astype(int).tolist()
        shown = range(min(8, maps.count))
        contact_sheet(self.out / "sheet_text.png", [p[m] for m in shown for p in (truth, made)], columns, 0.5)
        (self.out / "prompts.txt").write_text("\n".join(maps.prompts[m] for m in shown) + "\n")

    def samplers(self) -> None:
        """Few steps: PSNR over 24 frames on the way back over primed land, and sharpness over 24 frames of new land made
        from text alone, by sampler, number of steps and shift of their noise levels."""
        maps = self.maps(4000, self.args.maps)
        frames = min(24, self.args.frames)
        starts = [info["start"] for info in maps.info]
        back = np.stack([there_and_back(m, s, PRIMED + frames, True) for m, s in enumerate(starts)])
        ahead = np.stack([straight(m, s, frames) for m, s in enumerate(starts)])
        truth_back, truth_ahead = maps.truth(back), maps.truth(ahead)
        primed = self.player.encode(truth_back[:, :PRIMED])
        player = self.player
        before = player.sampler
        kinds = [("ode", n) for n in (4, 3, 2, 1)] + [("renoise", n) for n in (4, 2)]
        for shift in SHIFTS:
            for kind, steps in kinds:
                player.sampler = dataclasses.replace(before, type=kind, num_steps=steps, shift=shift)
                made = player.decode(player.play(maps.ids, tokens(back), primed))
                mean, _ = seen_land_psnr(made, truth_back, back, self.device)
                made = player.decode(player.play(maps.ids, tokens(ahead)))
                sharpness = gradient(made) / gradient(truth_ahead)
                self.put(f"sampler.{kind}.{steps}.shift{shift}", {"seen_land_psnr": mean, "sharpness": sharpness})
        player.sampler = before

def table(r: dict) -> str:
    """The go / no-go table from the rows that are known."""
    both = lambda row, key, pick: pick(r[f"{row}.{route}{key}"]["mean"] for route in ("exact", "off_phase"))
    rows = []

    def row(name, value, must, aim, at_most=False):
        good = lambda bound: value <= bound if at_most else value >= bound
        verdict = "aim" if aim is not None and good(aim) else "must" if good(must) else "SHORT"
        rows.append(f"| {name} | {value:.3f} | {must} | {'' if aim is None else aim} | {verdict} |")

    if "autoencoder_psnr.off_phase" in r:
        row("autoencoder PSNR, dB (worse route)", both("autoencoder_psnr", "", min), 33.5, 37)
    if "return_psnr.off_phase.full" in r:
        row("seen land PSNR, full, dB (worse route)", both("seen_land_psnr", ".full", min), 28, 31)
        row("return consistency, full, dB (worse route)", both("return_psnr", ".full", min), 30, 33)
    if "return_psnr.off_phase.window" in r:
        row("return consistency, window, dB (better route)", both("return_psnr", ".window", max), 20, None, True)
    for frame, value in r.get("sharpness", {}).items():
        if int(frame) >= 250:
            verdict = "aim" if 0.9 <= value <= 1.1 else "must" if 0.8 <= value <= 1.15 else "SHORT"
            rows.append(f"| sharpness at frame {frame} | {value:.3f} | 0.8 - 1.15 | 0.9 - 1.1 | {verdict} |")
    if "new_land" in r:
        theme = lambda name: 100 * r[f"first_frame_theme.{name}"]["accuracy"]
        row("first frame theme, %", theme("prompt"), 90, 99)
        row("entered region theme, %", 100 * r["entered_region_theme.made"]["accuracy"], 80, 95)
        row("prompt removed costs, points", theme("prompt") - theme("removed"), 50, None)
        row("prompt shuffled costs, points", theme("prompt") - theme("shuffled"), 50, None)
        sharpness = r["new_land"]["sharpness"]
        row("new land: sharpness (or its inverse)", min(sharpness, 1 / sharpness), 0.8, 0.95)
        row("new land: 1 - terrain total variation", 1 - r["new_land"]["terrain_total_variation"], 0.8, 0.95)
        row("new land: colour intersection", r["new_land"]["colour_histogram_intersection"], 0.8, 0.95)
    return "\n".join(["| row | measured | must | aim | verdict |", "|---|---|---|---|---|", *rows]) + "\n"


def worker(rank: int, args: argparse.Namespace, taken) -> None:
    """One process: takes the next part that no other has taken, until all are. `taken`: shared counter."""
    device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    config = load_config(args.model)
    config.sampler = chosen_sampler(config.sampler, args)
    model = WorldModel(config)
    model.load_state_dict(load_weights(args.model))
    evaluation = Evaluation(args, model.eval(), device)
    parts = args.parts.split(",")
    while True:
        with taken.get_lock():
            index, taken.value = taken.value, taken.value + 1
        if index >= len(parts):
            return
        getattr(evaluation, parts[index])()
        if device.type == "cuda":
            log(f"{parts[index]}: done on GPU {rank}, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, training folder, or folder of parts")
    parser.add_argument("--out", default="training/build/evaluation")
    parser.add_argument("--maps", type=int, default=16)
    parser.add_argument("--frames", type=int, default=240, help="generated after the primed ones")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long walk")
    parser.add_argument("--long-maps", type=int, default=16)
    parser.add_argument("--text-maps", type=int, default=48)
    parser.add_argument("--walk", type=int, default=136, help="frames of the straight walk")
    parser.add_argument("--lag", type=int, default=100)
    add_sampler_arguments(parser)
    parser.add_argument("--threads", type=int, default=16, help="of the renderer, per process")
    parser.add_argument("--processes", type=int, help="default: one per GPU")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few maps and frames")
    args = parser.parse_args()
    if args.quick:
        args.maps, args.frames, args.long, args.long_maps, args.text_maps = 2, 24, 24, 2, 4
        args.walk, args.lag, args.threads = 6, 4, 2
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    overworld.vocabulary()  # builds the library before the processes start
    taken = torch.multiprocessing.get_context("spawn").Value("i", 0)
    processes = min(args.processes or torch.cuda.device_count(), len(args.parts.split(",")))
    if processes > 1:
        torch.multiprocessing.spawn(worker, (args, taken), processes)
    else:
        worker(0, args, taken)
    rows = table(json.loads((out / "results.json").read_text()))
    (out / "table.md").write_text(rows)
    print(rows)


if __name__ == "__main__":
    main()
