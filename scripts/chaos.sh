#!/usr/bin/env bash
# Installs what is missing, then runs the chaos shards: kills, signals, hangs, full disks, damage, in hundreds of cases.
#
#   scripts/chaos.sh                    all shards: hours on two cores, hence nightly
#   scripts/chaos.sh kill signal        these shards (tests/chaos/shard_<name>.py)
#   scripts/chaos.sh --seconds 1800     no new case after half an hour
#   scripts/chaos.sh --summary          the table alone
#
# Results go to chaos.jsonl, one line a case, or where --results says.  A case that passed is not run again, so the
# same command goes on after any interruption; remove the file to begin anew.  Ends with the table of all shards;
# exit code 0 when nothing of this sitting failed.
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_alignlab test
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python tests/chaos/run.py "$@"
