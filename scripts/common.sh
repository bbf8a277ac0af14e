# Shared by scripts/demo and scripts/test: installs what is missing and builds. Sourced, not run.
# Safe to run twice: a package that is there is not touched, a build that is current takes a second.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# need PACKAGE... -- WHY: remembers the packages that are not installed, and says what they are for.
MISSING=()
need() {
  local packages=() absent=()
  while [ "$1" != -- ]; do packages+=("$1"); shift; done
  shift
  for package in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || absent+=("$package")
  done
  if [ ${#absent[@]} -gt 0 ]; then
    printf '  %-60s %s\n' "${absent[*]}" "$*"
    MISSING+=("${absent[@]}")
  fi
}

install_missing() {
  [ ${#MISSING[@]} -gt 0 ] || return 0
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "packages ${MISSING[*]}: expected root or sudo to install them, found neither"
    sudo=(sudo)
  fi
  say "installing ${#MISSING[@]} packages"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${MISSING[@]}" </dev/null >/dev/null
  MISSING=()
}

need_for_build() {
  command -v apt-get >/dev/null || die "system: expected Debian 12 or Ubuntu 24.04 (apt-get), found another; README lists the packages to install by hand"
  say "what is missing and why"
  need g++ cmake ninja-build pkg-config -- "to compile (C++20, CMake >= 3.25)"
  need libdnnl-dev -- "oneDNN: matrix products and convolutions on the CPU"
  need ocl-icd-opencl-dev -- "oneDNN's CMake package asks for OpenCL; nothing of it runs here"
  need libhwy-dev -- "Highway: our own SIMD kernels, one source for every CPU"
  need libavformat-dev libavcodec-dev libavutil-dev libswscale-dev -- "FFmpeg: mp4 in and out"
  need libpng-dev -- "PNG frames in and out"
  need libsentencepiece-dev -- "SentencePiece: tokens of the umT5 text encoder"
  need nlohmann-json3-dev libcli11-dev libspdlog-dev libfmt-dev -- "configuration, command line, messages"
}

# build DIR [CMAKE OPTION...]: configures once and builds what changed.
build() {
  local dir=$1
  shift
  say "building in $dir"
  cmake -S . -B "$dir" -G Ninja "$@" >"$dir.configure.log" 2>&1 || { cat "$dir.configure.log" >&2; die "configuring failed"; }
  cmake --build "$dir"
}
