#!/usr/bin/env bash
# What the batch scripts share; they source it from the repository root. See docs/slurm.md.
set -euo pipefail

ASK_AGAIN_S=15

fail() { echo "versatune: $1" >&2; exit 2; }

if ! command -v deepspeed > /dev/null && [[ -x .venv/bin/deepspeed ]]; then
    PATH=$PWD/.venv/bin:$PATH
fi
command -v deepspeed > /dev/null || fail "deepspeed is not in PATH; activate the environment, then submit"

mapfile -t job_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${job_nodes[0]}"
# Jobs that share a node must not meet at one port.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# run_and_requeue SRUN...: run a step; when SLURM warns of the time limit (USR1), have it save and requeue this job.
#
# srun passes USR1 on to its tasks. The ranks agree, save, write VERSATUNE_STOP_FILE and leave with 0. Without that
# file the step finished, or failed, or was cancelled, and nothing is requeued. USR1 is sent again and again: ranks that
# are still starting ignore it.
run_and_requeue() {
    local step code=0 warned='' next=0
    export VERSATUNE_STOP_FILE="${TMPDIR:-/tmp}/versatune-stopped-$SLURM_JOB_ID"
    rm -f "$VERSATUNE_STOP_FILE"
    trap 'warned=yes; echo "versatune: the time limit is near; asking the ranks to save"' USR1
    trap 'echo "versatune: asked to end; waiting for the ranks to save"' TERM
    echo "versatune: job $SLURM_JOB_ID on ${job_nodes[*]}, start $((${SLURM_RESTART_COUNT:-0} + 1))"
    "$@" &
    step=$!
    while kill -0 "$step" 2> /dev/null; do
        if [[ -n $warned ]] && ((SECONDS >= next)); then
            kill -USR1 "$step" 2> /dev/null || true
            next=$((SECONDS + ASK_AGAIN_S))
        fi
        sleep 1 || true # a signal to the whole job ends it early
    done
    wait "$step" || code=$?
    if [[ -n $warned && -f $VERSATUNE_STOP_FILE ]]; then
        rm -f "$VERSATUNE_STOP_FILE"
        echo "versatune: saved; requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    rm -f "$VERSATUNE_STOP_FILE"
    exit "$code"
}
