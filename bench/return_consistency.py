"""Does memory remember? The camera walks away over land that the model invents, and comes back.

    python bench/return_consistency.py --engine build/release/apps/longtake/longtake --out out/return

For each theme one rollout per memory policy: 64 fast steps out, 64 back (exact) or back along a way that lies 4 px beside (off phase). Pictures of nearly one
pose more than 100 frames apart are cropped to what both show and compared: PSNR in dB, over all pairs. Water, critters and cloud shadows move in
this world; nothing is masked. Prints one row per route and policy, writes return.json and a contact sheet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

THEMES = ("green summer", "red autumn", "white winter", "yellow desert", "purple alien", "pink candy", "black volcanic", "dark night")
STEPS = 64
ROUTES = {"exact": (f"D*{STEPS} A*{STEPS}", 0), "off_phase": (f"D*{STEPS} sd A*{STEPS}", 4)}
LAG = 100


def poses(route: str) -> list[tuple[int, int]]:
    """Camera positions in pixels, relative to the start."""
    moves = {"D": (8, 0), "A": (-8, 0), "sd": (4, 4)}
    out = [(0, 0)]
    for part in route.split():
        key, _, count = part.partition("*")
        for _ in range(int(count or 1)):
            out.append((out[-1][0] + moves[key][0], out[-1][1] + moves[key][1]))
    return out


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2), 1e-6)))


def pair_psnr(frames: list[np.ndarray], where: list[tuple[int, int]]) -> list[float]:
    """Of every frame and the earlier one that lies nearest to it, at most 8 px away and more than LAG frames older."""
    values = []
    for now in range(LAG + 1, len(frames)):
        earlier = range(now - LAG)
        distance = [abs(where[now][0] - where[t][0]) + abs(where[now][1] - where[t][1]) for t in earlier]
        then = int(np.argmin(distance))
        if distance[then] > 8:
            continue
        dx, dy = where[now][0] - where[then][0], where[now][1] - where[then][1]
        a, b = frames[now], frames[then]
        height, width = a.shape[:2]
        a = a[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        b = b[max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
        values.append(psnr(a, b))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--memory", nargs="+", default=["full", "window"])
    parser.add_argument("--themes", type=int, default=len(THEMES))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of `longtake generate`")
    args = parser.parse_args()
    results, sheet = {}, []
    for route, (actions, _) in ROUTES.items():
        where = poses(actions)
        for memory in args.memory:
            values = []
            for number, theme in enumerate(THEMES[: args.themes]):
                folder = args.out / f"{route}-{memory}-{number}"
                prompt = f"a {theme} land with woods and some lakes , and a red tower stands there ."
                subprocess.run([args.engine, "generate", "--prompt", prompt, "--actions", actions, "--seed", str(number), "--memory", memory,
                                "--out", str(folder), "--quiet", *args.flags], check=True)  # fmt: skip
                frames = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
                if len(frames) != len(where):
                    raise SystemExit(f"{folder}: expected {len(where)} frames, found {len(frames)}")
                values.append(np.mean(pair_psnr(frames, where)))
                if route == "exact" and number < 4:
                    sheet.append(np.concatenate([frames[t] for t in (0, 4, 32, 64, 96, len(frames) - 5, len(frames) - 1)], 1))
            results[f"{route}.{memory}"] = {"mean_db": float(np.mean(values)), "worst_db": float(np.min(values)), "rollouts": len(values)}
            print(f"{route:<10} {memory:<10} {np.mean(values):6.2f} dB  worst {np.min(values):6.2f} dB  ({len(values)} rollouts)", flush=True)
            args.out.joinpath("return.json").write_text(json.dumps(results, indent=1) + "\n")
    Image.fromarray(np.concatenate(sheet)).save(args.out / "return.png")


if __name__ == "__main__":
    main()
