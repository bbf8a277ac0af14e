"""The embedded world's renderer for the trainer: a thin ctypes layer over src/runtime/overworld/c_api.h.

Calls release the interpreter lock, so a few threads fill batches while the GPU works. The library is built on first use
with one compiler command; LONGTAKE_OVERWORLD names another build of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import subprocess
from ctypes import POINTER, c_char_p, c_int, c_int32, c_uint8, c_uint64, c_void_p
from pathlib import Path

import numpy as np

HEIGHT, WIDTH = 128, 256
TORUS = 3072  # pixels round the world, both ways
REGION_NAMES = (
    "north west", "north", "north east", "west", "middle", "east", "south west", "south", "south east",
)  # fmt: skip
EXPLORE, RETURNING, OFF_PHASE, STEADY = range(4)  # kinds of paths
_MAP_INFO = 57
_MAX_PROMPT = 8192  # bytes
_ROOT = Path(__file__).parents[1]


def _build() -> Path:
    """Compiles the library into training/build, once, also when several processes ask at the same time."""
    folder = _ROOT / "training" / "build"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "liboverworld.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = sorted((_ROOT / "src/runtime/overworld").glob("*.cpp"))
        newest = max((p.stat().st_mtime for p in (_ROOT / "src/runtime/overworld").iterdir()), default=0)
        if not library.exists() or library.stat().st_mtime < newest:
            flags = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
            includes = [f"-I{_ROOT}/src/core", f"-I{_ROOT}/src/runtime"]
            partial = library.with_suffix(".partial")
            subprocess.run(["g++", *flags, *includes, *map(str, sources), "-o", str(partial)], check=True)
            partial.replace(library)
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    lib = ctypes.CDLL(os.environ.get("LONGTAKE_OVERWORLD") or str(_build()))
    int32s, bytes_ = POINTER(c_int32), POINTER(c_uint8)
    signatures = {
        "ow_last_error": (c_char_p, []),
        "ow_pool_create": (c_void_p, [c_uint64, c_int, c_int]),
        "ow_pool_from_prompts": (c_void_p, [POINTER(c_char_p), c_int, c_uint64, c_int]),
        "ow_pool_with_themes": (c_void_p, [c_void_p, int32s, c_int]),
        "ow_pool_destroy": (None, [c_void_p]),
        "ow_vocab_size": (c_int, []),
        "ow_vocab_word": (c_char_p, [c_int]),
        "ow_tokenize": (c_int, [c_char_p, int32s, c_int]),
        "ow_prompt": (c_int, [c_void_p, c_int, c_uint64, c_char_p, c_int]),
        "ow_map_info": (c_int, [c_void_p, c_int, int32s]),
        "ow_region_at": (c_int, [c_void_p, c_int, c_int32, c_int32]),
        "ow_paths": (c_int, [c_void_p, c_uint64, c_int, c_int, c_int, int32s, bytes_]),
        "ow_render": (c_int, [c_void_p, c_int, int32s, int32s, int32s, int32s, c_int, bytes_, bytes_]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _int32(array) -> tuple[np.ndarray, object]:
    array = np.ascontiguousarray(array, np.int32)
    return array, array.ctypes.data_as(POINTER(c_int32))


def _check(result: int) -> int:
    if result < 0:
        raise RuntimeError(_library().ow_last_error().decode())
    return result


def vocabulary() -> list[str]:
    lib = _library()
    return [lib.ow_vocab_word(i).decode() for i in range(lib.ow_vocab_size())]


def tokenize(text: str, text_len: int) -> np.ndarray:
    """Word ids [text_len], padded with 0; an empty text is one unknown word."""
    ids = np.zeros(4096, np.int32)
    count = _check(_library().ow_tokenize(text.encode(), ids.ctypes.data_as(POINTER(c_int32)), len(ids)))
    if count == 0:
        ids[0] = 1
    return ids[:text_len].copy()


class Pool:
    """Maps of consecutive seeds. All methods may run in several threads at once."""

    def __init__(self, first_seed: int, num_maps: int, num_threads: int = 1):
        self.num_maps = num_maps
        self._pool = _library().ow_pool_create(first_seed, num_maps, num_threads)
        if not self._pool:
            raise RuntimeError(_library().ow_last_error().decode())

    @staticmethod
    def from_prompts(prompts: list[str], first_seed: int, num_threads: int = 1) -> Pool:
        """Maps built after the prompts' words."""
        pool = Pool.__new__(Pool)
        pool.num_maps = len(prompts)
        texts = (c_char_p * len(prompts))(*(p.encode() for p in prompts))
        pool._pool = _library().ow_pool_from_prompts(texts, len(prompts), first_seed, num_threads)
        if not pool._pool:
            raise RuntimeError(_library().ow_last_error().decode())
        return pool

    def with_themes(self, themes: np.ndarray, num_threads: int = 1) -> Pool:
        """The same maps under other themes [num_maps, 9], by region."""
        assert themes.shape == (self.num_maps, 9)
        pool = Pool.__new__(Pool)
        pool.num_maps = self.num_maps
        array, pointer = _int32(themes)
        pool._pool = _library().ow_pool_with_themes(self._pool, pointer, num_threads)
        if not pool._pool:
            raise RuntimeError(_library().ow_last_error().decode())
        return pool

    def __del__(self):
        if getattr(self, "_pool", None):
            _library().ow_pool_destroy(self._pool)
            self._pool = None

    def prompt(self, map_idx: int, seed: int) -> str:
        buffer = ctypes.create_string_buffer(_MAX_PROMPT)
        _check(_library().ow_prompt(self._pool, map_idx, seed, buffer, _MAX_PROMPT))
        return buffer.value.decode()

    def info(self, map_idx: int) -> dict:
        """theme, sea, forest, landmark, colour, mentioned: [9] each, by region; weather; start (x, y)."""
        raw, pointer = _int32(np.zeros(_MAP_INFO))
        _check(_library().ow_map_info(self._pool, map_idx, pointer))
        names = ("theme", "sea", "forest", "landmark", "colour", "mentioned")
        info = {name: raw[9 * i : 9 * i + 9].copy() for i, name in enumerate(names)}
        return info | {"weather": int(raw[54]), "start": (int(raw[55]), int(raw[56]))}

    def region_at(self, map_idx: int, x: int, y: int) -> int:
        return _check(_library().ow_region_at(self._pool, map_idx, x, y))

    def paths(self, seed: int, frames: int, kind: int, anywhere: bool) -> np.ndarray:
        """Camera corners xy [num_maps, frames, 2] in pixels, int32, not wrapped."""
        xy = np.zeros((self.num_maps, frames, 2), np.int32)
        actions = np.zeros((self.num_maps, frames), np.uint8)
        _check(
            _library().ow_paths(
                self._pool, seed, frames, kind, int(anywhere),
                xy.ctypes.data_as(POINTER(c_int32)), actions.ctypes.data_as(POINTER(c_uint8)),
            )  # fmt: skip
        )
        return xy

    def render(self, map_idx, x, y, t, out: np.ndarray | None = None, num_threads: int = 1) -> np.ndarray:
        """Pictures [n, 128, 256, 3] u8 of cameras (x, y) at times t (frames), all [n]; into `out` if given."""
        n = len(map_idx)
        if out is None:
            out = np.empty((n, HEIGHT, WIDTH, 3), np.uint8)
        assert out.flags.c_contiguous and out.size == n * HEIGHT * WIDTH * 3
        arrays = [_int32(a) for a in (map_idx, x, y, t)]
        pointers = [pointer for _, pointer in arrays]
        _check(_library().ow_render(self._pool, n, *pointers, num_threads, out.ctypes.data_as(POINTER(c_uint8)), None))
        return out

    def classes(self, map_idx, x, y, t, num_threads: int = 1) -> np.ndarray:
        """Terrain class of every pixel, [n, 128, 256] u8."""
        n = len(map_idx)
        rgb = np.empty((n, HEIGHT, WIDTH, 3), np.uint8)
        out = np.empty((n, HEIGHT, WIDTH), np.uint8)
        arrays = [_int32(a) for a in (map_idx, x, y, t)]
        pointers = [pointer for _, pointer in arrays]
        outputs = [a.ctypes.data_as(POINTER(c_uint8)) for a in (rgb, out)]
        _check(_library().ow_render(self._pool, n, *pointers, num_threads, *outputs))
        return out
