"""Counter-based normal noise: the same numbers as the engine, whatever the order in which they are drawn.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Key = the seed's low and high word;
counter = (value index / 4, step, frame, 0). The four words w of a block become four values in double:
u = (w + 0.5) / 2^32, then sqrt(-2 ln u0) * (cos, sin)(2 pi u1), and the same for u2, u3; rounded to float at the end.
Step 0 of a frame is its starting noise; step k is the fresh noise that `renoise` adds on the way to level t_k.
"""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counter [..., 4] of 32-bit values -> [..., 4] random words, as uint64 holding 32 bits."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _WORD) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _WORD) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def normal_noise(seed: int, frame: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 values of one frame and step, in row-major order."""
    count = int(np.prod(shape))
    blocks = np.arange((count + 3) // 4)
    counter = np.stack([blocks, np.full_like(blocks, step), np.full_like(blocks, frame), np.zeros_like(blocks)], -1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    u = (words.astype(np.float64) + 0.5) / 2.0**32
    radius = np.sqrt(-2 * np.log(u[:, 0::2]))
    angle = 2 * np.pi * u[:, 1::2]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return values.reshape(-1)[:count].astype(np.float32).reshape(shape)
