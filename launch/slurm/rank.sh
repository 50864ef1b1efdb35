#!/usr/bin/env bash
# One rank of a SLURM step with one task per GPU: SLURM's numbering as torch and DeepSpeed read it, then the program.
#
#   srun --ntasks-per-node=8 launch/slurm/rank.sh python -u launch/train.py --config FILE
#
# Needs MASTER_ADDR and MASTER_PORT, which the batch scripts set.
set -euo pipefail
: "${MASTER_ADDR:?name the node where the ranks meet}" "${MASTER_PORT:?name the port where the ranks meet}"
if ((SLURM_STEP_NUM_TASKS % SLURM_STEP_NUM_NODES)); then
    echo "rank.sh: $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes; use as many on each" >&2
    exit 2
fi
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_STEP_NUM_TASKS"
export LOCAL_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
export CROSS_RANK="$SLURM_NODEID" CROSS_SIZE="$SLURM_STEP_NUM_NODES"
# A rank that is still importing would die of USR1; later it has its own handler.
trap '' USR1
exec "$@"
