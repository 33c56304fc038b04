#!/usr/bin/env bash
# A recipe on many devices: torchrun, with the variables that flame's train.sh knows (S1). All words go to `longfire train`.
#
#   NGPU=8 bash scripts/train.sh recipes/gla-340m-fineweb.toml --training.steps 20480
#   NNODE=2 MASTER_ADDR=node-0 MASTER_PORT=29500 bash scripts/train.sh ...          the same line on both machines
#
# NGPU          processes on this machine (default: its GPUs, else 1)
# NNODE         machines (default 1)
# MASTER_ADDR, MASTER_PORT   where several machines meet: one of the run and a free port there (default localhost, 29500). One
#               machine takes a free port by itself, so that several runs fit on it
# LOG_RANK      whose output is shown, as 0 or 0,1 (default: everybody's; processes other than 0 report errors only)
# SHUTDOWN_SECONDS  how long processes may take to finish a step and save after SIGTERM (default 240)
# MAX_RESTARTS  how often all start again from the newest whole checkpoint when one has died (default 0)
#
# The words of flame's first train.sh (S0) mean the same: gpus=8 nodes=2 ip=node-0 port=29500 rank=0;
# and those of flash-attention: trainer.devices=8 trainer.num_nodes=2.
set -euo pipefail

WORDS=()
for word in "$@"; do
  case "$word" in
    gpus=* | trainer.devices=*) NGPU="${word#*=}" ;;
    nodes=* | trainer.num_nodes=*) NNODE="${word#*=}" ;;
    ip=*) MASTER_ADDR="${word#*=}" ;;
    port=*) MASTER_PORT="${word#*=}" ;;
    rank=* | node=*) ;; # machines number themselves where they meet
    *) WORDS+=("$word") ;;
  esac
done
set -- ${WORDS[@]+"${WORDS[@]}"}

if [ -z "${NGPU:-}" ]; then
  NGPU=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c GPU || true)
  [ "$NGPU" -gt 0 ] || NGPU=1
fi
# torchrun's own default is 1, which leaves most of a machine without GPUs idle
CORES=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
THREADS=$(( CORES / NGPU ))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( THREADS > 0 ? THREADS : 1 ))}"
if [ "${NNODE:-1}" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
  MEET=(--standalone)
else
  MEET=(--rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" --rdzv-id "${JOB_ID:-longfire}")
fi
if [ "${NNODE:-1}" = 1 ] && [ -n "${MASTER_PORT:-}" ] && (exec 3<>"/dev/tcp/${MASTER_ADDR:-localhost}/$MASTER_PORT") 2>/dev/null; then
  echo "scripts/train.sh: port $MASTER_PORT is taken by another program: unset MASTER_PORT, and a free one is found" >&2
  exit 2
fi
exec python -m longfire.cli.torchrun --nnodes "${NNODE:-1}" --nproc-per-node "$NGPU" --max-restarts "${MAX_RESTARTS:-0}" \
  --shutdown-timeout "${SHUTDOWN_SECONDS:-240}" "${MEET[@]}" \
  ${LOG_RANK:+--local-ranks-filter "$LOG_RANK" --tee 3} \
  -m longfire train "$@"
