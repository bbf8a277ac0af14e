#!/usr/bin/env bash
# The tables of docs/notes/comparison.md on a machine of many cores, on maps that nothing was chosen on.
#
#   bench/all_tables.sh BINARY OUT [PART...]
#
# PART: long, main, off-phase, steady; all of them if none is named. BINARY is the built `longtake`,
# which finds models/world in a folder above it (or name it: LONGTAKE_MODEL). Every part prints its
# table and leaves OUT/PART/report.json and report.html, without videos. Times are those of as many
# plays side by side as there are cores, but for `long`, which has the machine for its few plays.
# CORES overrides the number of cores.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
binary=$1
out=$2
shift 2
cores=${CORES:-$(nproc)}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(long main off-phase steady)

# play PART JOBS ARGUMENTS: one comparison on all cores.
play() {
  local part=$1 jobs=$2
  shift 2
  local start=$SECONDS
  echo "== $part: longtake compare $*"
  mkdir -p "$out/$part"
  "$binary" compare ${LONGTAKE_MODEL:+--model "$LONGTAKE_MODEL"} --quiet --no-videos \
    --threads "$cores" --jobs "$((jobs < cores ? jobs : cores))" --out "$out/$part" "$@" |
    tee "$out/$part/table.txt"
  echo "== $part took $((SECONDS - start)) s"
}

# For all heads of a layer together, keys per head: half of what a window of 36 + 1 frames holds, and
# as much as the cache has grown to by frame 100.
budget=memory-budget=2304:budget-shares=need
flat=memory-budget=1536:budget-shares=need

for part in "${parts[@]}"; do
  case $part in
    long)
      play long 4 --mode free --route exact --maps 1 --first-map 700008 --frames 1000 \
        --full-frames 320 --methods "window:36,all-lsh:$flat,all-quant:$flat"
      ;;
    main)
      play main 1024 --route exact --maps 8 --first-map 700000 --frames 256 \
        --methods window:36,tempcache-lsh,tempcache-quant,annsa-lsh,annsa-quant,annca-lsh,annca-quant,all-lsh,all-quant,teacache:step-threshold=0.4,flowcache
      ;;
    off-phase)
      play off-phase 1024 --route off-phase --maps 4 --first-map 700000 --frames 192 \
        --methods window:36,tempcache-lsh,tempcache-quant,all-lsh,all-quant
      ;;
    steady)
      play steady 1024 --route steady --maps 4 --first-map 700000 --frames 192 \
        --methods "window:36,tempcache-lsh,tempcache-quant,tempcache-lsh:memory-budget=2304,tempcache-lsh:$budget,window:18,all-lsh,all-lsh:$budget"
      ;;
    *)
      echo "all_tables: expected long, main, off-phase or steady, found \"$part\"" >&2
      exit 2
      ;;
  esac
done
