#!/usr/bin/env bash
# A real SLURM over the hosts that hosts.sh made: slurmctld and munge on ctl, a slurmd with two make-believe GPUs on
# each nN. It ends with the hosts. Needs root and the packages slurmctld, slurmd, slurm-client and munge.
#
#   slurm.sh up FOLDER        # FOLDER is that of hosts.sh; afterwards SLURM_CONF=FOLDER/slurm/slurm.conf
set -euo pipefail
hosts=$(readlink -f "$(dirname "${BASH_SOURCE[0]}")")/hosts.sh

wait_until() { # SECONDS CMD...
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        if ((SECONDS > deadline)); then return 1; fi
        sleep 0.1
    done
}

all_idle() { [[ $("$hosts" on "$folder" ctl sinfo -h -t idle -o %D 2> /dev/null) == "${#nodes[@]}" ]]; }

[[ $1 == up ]] || { echo "slurm.sh: unknown verb $1" >&2; exit 2; }
folder=$(readlink -f "$2")
nodes=()
for file in "$folder"/n*.pid; do nodes+=("$(basename "$file" .pid)"); done
last=${#nodes[@]}
own=$folder/slurm
mkdir -p "$own"/{munge,state,log,spool,devices}
chmod 700 "$own/munge"
head -c 1024 /dev/urandom > "$own/munge/key"
chmod 400 "$own/munge/key"
touch "$own/devices/gpu0" "$own/devices/gpu1" # SLURM only counts them

# cred_expire: a requeued job would wait for the old credential to expire, two minutes by default.
cat > "$own/slurm.conf" << END
ClusterName=test
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$own/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$own/state
SlurmctldPidFile=$own/slurmctld.pid
SlurmctldLogFile=$own/log/slurmctld.log
SlurmdPidFile=$own/slurmd-%n.pid
SlurmdLogFile=$own/log/slurmd-%n.log
SlurmdSpoolDir=$own/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=20
SlurmdTimeout=15
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-$last] NodeAddr=10.77.0.[1-$last] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
echo "NodeName=n[1-$last] Name=gpu File=$own/devices/gpu[0-1]" > "$own/gres.conf"
export SLURM_CONF=$own/slurm.conf
"$hosts" on "$folder" ctl munged --force --key-file="$own/munge/key" --socket="$own/munge.socket" \
    --pid-file="$own/munge/pid" --log-file="$own/munge/log" --seed-file="$own/munge/seed"
"$hosts" on "$folder" ctl slurmctld
for node in "${nodes[@]}"; do
    mkdir -p "$own/spool/$node"
    "$hosts" on "$folder" "$node" slurmd -N "$node"
done
if ! wait_until 20 all_idle; then
    tail -n 20 "$own"/log/* >&2
    echo "slurm.sh: the nodes did not become idle" >&2
    exit 1
fi
