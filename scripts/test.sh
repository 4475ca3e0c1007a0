#!/usr/bin/env bash
# Installs what is missing, then checks style, types and import floors, and runs the tests.  Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_alignlab test
failed=()
step() {
  printf '\n[test] %s\n' "$*"
  "$@" || failed+=("$1 ${2:-}")
}
# Types take a minute of one processor, while the tests do not always need all: told at the end.
types="$(mktemp)"
mypy >"$types" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types"' EXIT
step ruff check .
step ruff format --check .
step lint-imports
# A file's tests stay together: they share launches, which cost seconds.  One thread a process: many run at once.
export OMP_NUM_THREADS=1
step python -m pytest -m "not nightly and not gpu" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
told() { local code=0; wait "$checker" || code=$?; cat "$types"; return "$code"; }
printf '\n[test] mypy\n'
told || failed+=("mypy")
if [ "${#failed[@]}" -gt 0 ]; then
  printf '\n[test] failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
  exit 1
fi
printf '\n[test] all passed\n'
