#!/usr/bin/env bash
# The tables of docs/notes/comparison.md, on maps that nothing was chosen on: on a GPU in minutes, without one on a
# machine of many cores.
#
#   bench/all_tables.sh BINARY OUT [PART...]
#
# PART: long, main, off-phase, steady, or cpu (what a GPU does not have: estimates of LSH and Quant, FlowCache, bounds);
# all but cpu if none is named. BINARY is the built `longtake`, which finds models/world in a folder above it (or name it:
# LONGTAKE_MODEL). Every part prints its table and leaves OUT/PART/report.json and report.html, without videos. DEVICE
# says where (default: cuda if there is a GPU, else cpu); CORES overrides the number of cores, MAPS that of maps. On a CPU
# as many plays run side by side as there are cores, but for `long`, which has the machine for its few plays: times are
# then those of a busy machine.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
binary=$1
out=$2
shift 2
cores=${CORES:-$(nproc)}
device=${DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(long main off-phase steady)

# play PART DEVICE JOBS ARGUMENTS: one comparison on all cores.
play() {
  local part=$1 on=$2 jobs=$3
  shift 3
  [ "$on" = cpu ] || jobs=1
  echo "== $part: longtake compare $*"
  mkdir -p "$out/$part"
  "$binary" compare ${LONGTAKE_MODEL:+--model "$LONGTAKE_MODEL"} --device "$on" --quiet --no-videos \
    --threads "$cores" --jobs "$((jobs < cores ? jobs : cores))" --out "$out/$part" "$@" |
    tee "$out/$part/table.txt"
}

# For all heads of a layer together, keys per head: half of what a window of 36 + 1 frames holds, and as much as the cache
# has grown to by frame 100.
budget=memory-budget=2304:budget-shares=need
flat=memory-budget=1536:budget-shares=need
# On a GPU both engines of AnnSA and AnnCA choose alike, and FlowCache's compression is not there.
main=window:36,tempcache-lsh,tempcache-quant,annsa-lsh,annca-lsh,all-lsh,all-quant,teacache:step-threshold=0.4
[ "$device" != cpu ] || main=$main,annsa-quant,annca-quant,flowcache

for part in "${parts[@]}"; do
  case $part in
    long)
      play long "$device" 4 --mode free --route exact --maps 1 --first-map 700008 --frames 1000 \
        --full-frames "$([ "$device" = cpu ] && echo 320 || echo 1000)" --methods "window:36,all-lsh:$flat,all-quant:$flat"
      ;;
    main)
      play main "$device" 1024 --route exact --maps "${MAPS:-8}" --first-map 700000 --frames 256 --methods "$main"
      ;;
    off-phase)
      play off-phase "$device" 1024 --route off-phase --maps "${MAPS:-8}" --first-map 700000 --frames 256 \
        --methods window:36,tempcache-lsh,tempcache-quant,all-lsh,all-quant
      ;;
    steady)
      play steady "$device" 1024 --route steady --maps "${MAPS:-8}" --first-map 700000 --frames 256 --methods \
        "window:36,tempcache-lsh,tempcache-quant,tempcache-lsh:memory-budget=2304,tempcache-lsh:$budget,window:18,all-lsh,all-lsh:$budget"
      ;;
    cpu)
      play cpu cpu 1024 --mode lockstep --route exact --maps "${MAPS:-8}" --first-map 700000 --frames 256 --methods \
        window:36,tempcache-lsh,tempcache-quant,annsa-lsh,annsa-quant,annca-lsh,annca-quant,all-lsh,all-quant,flowcache
      ;;
    *)
      echo "all_tables: expected long, main, off-phase, steady or cpu, found \"$part\"" >&2
      exit 2
      ;;
  esac
done
