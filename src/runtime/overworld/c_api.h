#pragma once

#include <stdint.h>

// The embedded world for other languages (the trainer reads it by ctypes). Functions return a
// negative number or NULL on failure; ow_last_error() then says why, per thread. Pools are read by
// any number of threads at once.

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ow_pool ow_pool;

// Never NULL; empty if nothing failed yet in this thread.
const char* ow_last_error(void);

// Maps of the seeds first_seed, first_seed + 1, ...
ow_pool* ow_pool_create(uint64_t first_seed, int num_maps, int num_threads);
// Maps that the prompts describe; what they leave open comes from the seed.
ow_pool* ow_pool_from_prompts(const char* const* prompts, int num, uint64_t first_seed,
                              int num_threads);
// The same maps under other themes, [num_maps, 9] by map and region.
ow_pool* ow_pool_with_themes(const ow_pool* pool, const int32_t* themes, int num_threads);
void ow_pool_destroy(ow_pool* pool);

int ow_vocab_size(void);
const char* ow_vocab_word(int id);
// -> number of tokens, -1 if `cap` is too small.
int ow_tokenize(const char* text, int32_t* ids, int cap);
// A prompt that describes the map, with a closing NUL; -> bytes written without it.
int ow_prompt(ow_pool* pool, int map, uint64_t seed, char* buf, int cap);

// out: [9] theme, [9] sea, [9] forest, [9] landmark, [9] landmark colour, [9] mentioned (0 or 1),
// weather, start x, start y.
int ow_map_info(ow_pool* pool, int map, int32_t out[57]);
// Region 0..8 of a world pixel.
int ow_region_at(ow_pool* pool, int map, int32_t x, int32_t y);

// kind: 0 explore, 1 returning, 2 off_phase, 3 steady; anywhere: 1 starts at a random place, 0 at
// the map's start. xy [num_maps, T, 2] px; actions [num_maps, T]: the action that leads into the
// frame, 0 for the first.
int ow_paths(ow_pool* pool, uint64_t seed, int T, int kind, int anywhere, int32_t* xy,
             uint8_t* actions);

// rgb [n, 128, 256, 3]; classes [n, 128, 256] or NULL. Frames are shared out among the threads.
int ow_render(ow_pool* pool, int n, const int32_t* map_idx, const int32_t* x, const int32_t* y,
              const int32_t* t, int num_threads, uint8_t* rgb, uint8_t* classes);

#ifdef __cplusplus
}
#endif
