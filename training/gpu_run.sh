#!/bin/bash
# Drives a training on a GPU machine that is only reached by single commands and keeps nothing: start it in the
# background, poll it, and carry the results out under $OUT (at most 8 files of 16 MiB a call).
#
#   training/gpu_run.sh smoke [train.py options]  all stages for a few steps at full size, then the evaluation's shape
#   training/gpu_run.sh start [train.py options]  training in the background, log in training/build/run/train.log
#   training/gpu_run.sh poll [SECONDS [ema|export]]
#                                                 waits that long (less if training ends), prints the log's end, copies
#                                                 the log, and the checkpoint if one is named
#   training/gpu_run.sh collect ema|export        the same at once, without waiting; for the tail of another command
#   training/gpu_run.sh stop                      ends the training that `start` began, with its processes
#   training/gpu_run.sh evaluate [evaluate.py options]
#                                                 in the foreground, of the newest checkpoint; tables and sheets
set -u
cd "$(dirname "$0")/.."
out=${OUT:-training/build/out}
run=training/build/run
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=8
mkdir -p "$out" "$run"

copy_checkpoint() { # ema: bf16, four parts; export: int8, two parts
  cp "$run/$1"/part*.safetensors "$run/$1/config.json" "$out/" && cp "$run/progress.json" "$out/"
}

show_log() {
  tail -n "$1" "$run/train.log"
  tail -qn 3 "$run"/warm-*.log 2>/dev/null
  echo "--- stdout"
  grep -v -i warn "$run/stdout.log" | tail -n 5
  cp "$run/train.log" "$out/"
}

case ${1:-} in
smoke)
  shift
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
  timeout 300 python3 training/train.py --smoke --out training/build/smoke "$@" 2>&1 | grep -v Warning | tail -n 80
  timeout 90 python3 training/evaluate.py training/build/smoke --quick --out "$out" | cut -c 1-200
  ;;
start)
  shift
  if kill -0 "$(cat "$run/pid" 2>/dev/null)" 2>/dev/null; then
    echo "start: expected no training under way, found process group $(cat "$run/pid")"
    exit 1
  fi
  # setsid: a process group of its own, whose number is the process id, so that `stop` ends it and nothing else.
  setsid nohup python3 training/train.py --out "$run" "$@" >"$run/stdout.log" 2>&1 </dev/null &
  echo $! >"$run/pid"
  echo "started process group $!"
  ;;
poll)
  seconds=${2:-60}
  for ((i = 0; i < seconds; i += 5)); do
    kill -0 "$(cat "$run/pid")" 2>/dev/null || { echo "training has ended"; break; }
    sleep 5
  done
  show_log 25
  nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader
  uptime
  [ $# -ge 3 ] && copy_checkpoint "$3"
  ls -la "$run" "$out"
  ;;
collect)
  show_log 8
  copy_checkpoint "$2"
  ;;
stop)
  kill -- "-$(cat "$run/pid")"
  ;;
evaluate)
  shift
  python3 training/evaluate.py "$run" --out "$out" "$@"
  ;;
*)
  sed -n '2,16p' "$0"
  exit 2
  ;;
esac
