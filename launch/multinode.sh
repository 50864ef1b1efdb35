#!/usr/bin/env bash
# Start the ranks of several nodes without a batch system.
#
#   launch/multinode.sh --hostfile hosts -- --config FILE [section.key=value ...]
#       over ssh (pdsh), for all nodes; run it on one of them
#   launch/multinode.sh --hostfile hosts --no-ssh -- --config FILE [section.key=value ...]
#       without ssh, for this node only; run it on every node
#
# A hostfile has a line "NAME slots=RANKS" per node. The first node is the one where the ranks meet.
#
#   --hostfile FILE      the nodes and their ranks (required)
#   --no-ssh             start this node's ranks only
#   --node-rank N        with --no-ssh: this node's place in the hostfile, from 0 (default: where its host name stands)
#   --master-addr NAME   where the ranks meet (default: the first host of the hostfile)
#   --master-port PORT   the port there; runs that share this node need different ones (default: 29500)
#   --interface NAME     network interface of NCCL and gloo, such as ib0 or eth0 (default: they choose)
#   --program FILE       launch/train.py (default) or launch/bench.py
#
# What stands after -- goes to the program. See docs/multinode.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ssh sessions inherit nothing. These reach the other nodes, and never a key or a token: they can be seen in a list of
# processes there.
passed='^(PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR|TRITON_CACHE_DIR|TOKENIZERS_PARALLELISM)$'
passed+='|^(NCCL_|GLOO_|TORCH_NCCL_|HF_HOME$|HF_HUB_OFFLINE$|HF_HUB_CACHE$)'

hostfile=
no_ssh=
node_rank=
master_addr=
master_port=29500
interface=
program=$here/train.py

usage() { sed -n '2,/^set /p' "$here/multinode.sh" | sed '$d; s/^# \{0,1\}//'; }
fail() { echo "multinode.sh: $1" >&2; exit 2; }
while (($#)); do
    case $1 in
        --hostfile) hostfile=$2; shift 2 ;;
        --no-ssh) no_ssh=yes; shift ;;
        --node-rank) node_rank=$2; shift 2 ;;
        --master-addr) master_addr=$2; shift 2 ;;
        --master-port) master_port=$2; shift 2 ;;
        --interface) interface=$2; shift 2 ;;
        --program) program=$2; shift 2 ;;
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "unknown option $1; see --help (the program's own options stand after --)" ;;
    esac
done
[[ -n $hostfile ]] || fail "give the nodes with --hostfile FILE, a line 'NAME slots=RANKS' each"
[[ -f $hostfile ]] || fail "there is no hostfile $hostfile"
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ {print $1}' "$hostfile")
((${#hosts[@]})) || fail "$hostfile names no node; give a line 'NAME slots=RANKS' each"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME="$interface" GLOO_SOCKET_IFNAME="$interface"; fi
options=(--hostfile "$hostfile" --master_addr "${master_addr:-${hosts[0]}}" --master_port "$master_port")

if [[ -n $no_ssh ]]; then
    if [[ -z $node_rank ]]; then
        for i in "${!hosts[@]}"; do
            if [[ ${hosts[i]} == "$(hostname)" || ${hosts[i]} == "$(hostname -s)" ]]; then node_rank=$i; fi
        done
    fi
    [[ -n $node_rank ]] || fail "$(hostname) does not stand in $hostfile (${hosts[*]}); give --node-rank"
    exec deepspeed "${options[@]}" --no_ssh --node_rank "$node_rank" "$program" "$@"
fi

command -v pdsh > /dev/null || fail "pdsh is not installed; install it, or start every node with --no-ssh"
# A node that is gone is noticed after a minute; else pdsh would wait for it for ever. Options given first win.
alive='-o ServerAliveInterval=15 -o ServerAliveCountMax=4'
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $alive"
# DeepSpeed reads lines NAME=VALUE and fails on others; those of the user's own files win.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
    env | grep -E '^[A-Za-z_]+=' | awk -F= -v passed="$passed" '$1 ~ passed'
    for file in ~/.deepspeed_env .deepspeed_env; do
        if [[ -f $file ]]; then grep -E '^[[:space:]]*[A-Za-z_][A-Za-z0-9_]*=' "$file" || true; fi
    done
} > "$DS_ENV_FILE"
# In the background, so that a signal to this script reaches the launcher: it ends the ranks of all nodes (they save).
deepspeed "${options[@]}" "$program" "$@" &
launcher=$!
trap 'kill -TERM "$launcher" 2> /dev/null || true' TERM INT
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2> /dev/null; do
    code=0
    wait "$launcher" || code=$?
done
exit "$code"
