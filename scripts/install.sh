#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv and installs the package; a second run installs nothing.
#   install_alignlab [EXTRA]     EXTRA: e.g. test
# Without an NVIDIA GPU the CPU build of torch is taken: gigabytes of CUDA packages must not come along.

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
cpu_torch="torch==2.13.0"
cpu_index="https://download.pytorch.org/whl/cpu"

say() { printf '[install] %s\n' "$*"; }
fail() { printf '[install] %s\n' "$*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

has_torch() { "$1" -c 'import torch' >/dev/null 2>&1; }

# Whether installing $1 from the index that pip is set up with brings CUDA packages.
brings_cuda() {
  local report
  report="$(mktemp)"
  "$venv/bin/pip" install --quiet --dry-run --ignore-installed --report "$report" "$1" >/dev/null || { rm -f "$report"; return 2; }
  local cuda=1
  grep -Eq '"name": *"(nvidia-|triton|cuda-)' "$report" && cuda=0
  rm -f "$report"
  return "$cuda"
}

# uv installs in seconds what takes pip minutes.  It does not read pip's configuration, so we hand it over.
find_uv() {
  "$venv/bin/pip" install --quiet "uv>=0.5" >/dev/null 2>&1 || say "uv cannot be had; pip is slower and does as well"
}

pip_setting() { "$venv/bin/pip" config get "$1" 2>/dev/null || "$venv/bin/pip" config get ":env:.${1#*.}" 2>/dev/null || true; }

# Install into the environment: install_packages ARGUMENTS OF PIP INSTALL
install_packages() {
  if [ ! -x "$venv/bin/uv" ]; then
    "$venv/bin/pip" install --quiet "$@"
    return
  fi
  local word options=(--quiet --python "$venv/bin/python")
  for word in $(pip_setting global.find-links); do options+=(--find-links "$word"); done
  if [[ " $* " != *" --index-url "* ]]; then
    for word in $(pip_setting global.index-url); do options+=(--default-index "$word"); done
    for word in $(pip_setting global.extra-index-url); do options+=(--index "$word"); done
  fi
  # As pip does: the best version of all indexes.
  "$venv/bin/uv" pip install "${options[@]}" --index-strategy unsafe-best-match "$@" ||
    { say "uv could not install $*; trying pip"; "$venv/bin/pip" install --quiet "$@"; }
}

install_torch() {
  if has_torch "$venv/bin/python"; then
    say "torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)') is there already"
  elif has_gpu; then
    say "NVIDIA GPU seen: torch's default build"
    install_packages torch
  elif curl --silent --fail --head --max-time 5 "$cpu_index/torch/" >/dev/null 2>&1; then
    say "no NVIDIA GPU: $cpu_torch from PyTorch's CPU wheel index"
    install_packages "$cpu_torch" --index-url "$cpu_index"
  else
    say "no NVIDIA GPU: $cpu_torch from the package index"
    local status=0
    brings_cuda "$cpu_torch" || status=$?
    case "$status" in
      0) fail "the package index's $cpu_torch brings CUDA packages, and $cpu_index does not answer; install a CPU build of torch into $venv and run this again" ;;
      1) install_packages "$cpu_torch" ;;
      *) fail "pip cannot resolve $cpu_torch; is a package index reachable?" ;;
    esac
  fi
}

install_alignlab() {
  local extra="${1:-}" stamp="$venv/.alignlab-install" want have python
  want="$(cat pyproject.toml scripts/install.sh | cksum | tr ' ' -)"
  have="$(cat "$stamp" 2>/dev/null || true)"  # hash, then the extras that are installed
  if [ -x "$venv/bin/python" ] && [[ "$have " == "$want "* && " $have " == *" ${extra:-$want} "* ]]; then
    say "nothing to do: $venv is up to date"
  else
    if [ ! -x "$venv/bin/python" ]; then
      python="$(find_python)"
      say "making .venv with $("$python" --version)"
      # A GPU machine's own torch fits its driver: it is kept, seen through system site packages.
      if has_gpu && has_torch "$python"; then
        "$python" -m venv --system-site-packages "$venv"
      else
        "$python" -m venv "$venv"
      fi
    fi
    find_uv
    install_torch
    say "installing alignlab${extra:+ with the extra '$extra'}"
    install_packages --editable ".${extra:+[$extra]}"
    # DeepSpeed would compile an op at its first start on a CPU; our engine says what is left to build and does it here.
    "$venv/bin/python" -c 'from alignlab.engine.deepspeed import prebuild; prebuild(lambda line: print("[install]", line))'
    [[ "$have " == "$want "* ]] || have="$want"
    echo "$have${extra:+ $extra}" >"$stamp"
    say "done"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
}
