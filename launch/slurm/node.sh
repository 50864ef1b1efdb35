#!/usr/bin/env bash
# One node of a SLURM step with one task per node: start DeepSpeed's launcher for this node's ranks.
#
#   srun --ntasks-per-node=1 launch/slurm/node.sh PROGRAM [its options]
#
# Ranks per node: VERSATUNE_RANKS_PER_NODE, else the node's GPUs in this job, else 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=$1
shift
ranks=${VERSATUNE_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
# On this node's own disk: nothing here needs a shared one.
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
scontrol show hostnames "$SLURM_STEP_NODELIST" | sed "s/\$/ slots=$ranks/" > "$hostfile"
# srun signals every process of the step, the ranks among them. DeepSpeed's launcher would die of USR1 before they have
# saved; of TERM only its inner process may know, which waits for them. The ranks set their own handlers.
trap '' USR1 TERM
"$here/../multinode.sh" --hostfile "$hostfile" --no-ssh --node-rank "$SLURM_NODEID" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --program "$program" -- "$@"
