#!/usr/bin/env bash
# Several "hosts" on one Linux machine: each has its own network, host name, processes, /dev/shm, /etc/hosts and sshd,
# on the machine's own file system. Needs root, iproute2, util-linux and openssh.
#
#   hosts.sh up FOLDER N            # hosts n1..nN (10.77.0.1 ...) and ctl (10.77.0.254), joined by a bridge
#   hosts.sh on FOLDER HOST CMD...  # run a command on one of them, in the present directory
#   hosts.sh down FOLDER            # all of it away, with every process in it
#
# All hosts live inside ctl's namespaces, so nothing shows on the machine's own network, several sets can be up at
# once, and the end of one process (FOLDER/keeper.pid) ends everything.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
sshd=/usr/sbin/sshd

up() {
    local folder=$1 count=$2
    mkdir -p "$folder/ssh" /run/sshd
    chmod 700 "$folder/ssh"
    ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/host_key"
    ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/user_key"
    cat > "$folder/ssh/sshd_config" << END
HostKey $folder/ssh/host_key
AuthorizedKeysFile $folder/ssh/user_key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
END
    cat > "$folder/ssh/ssh_config" << END
Host *
  IdentityFile $folder/ssh/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
END
    {
        echo "127.0.0.1 localhost"
        echo "10.77.0.254 ctl"
        for ((i = 1; i <= count; i++)); do echo "10.77.0.$i n$i"; done
    } > "$folder/hosts"
    setsid "$self" keep "$folder" "$count" > "$folder/keeper.log" 2>&1 < /dev/null &
    echo $! > "$folder/keeper.pid"
    for ((t = 0; t < 100; t++)); do
        if [[ -e $folder/ready ]]; then return; fi
        if ! kill -0 "$(cat "$folder/keeper.pid")" 2> /dev/null; then break; fi
        sleep 0.1
    done
    cat "$folder/keeper.log" >&2
    down "$folder"
    echo "hosts.sh: the hosts did not come up" >&2
    return 1
}

down() { # unshare ignores SIGTERM; the end of it is the end of ctl, and that of every process in it
    local pid
    pid=$(cat "$1/keeper.pid")
    kill -9 "$pid" 2> /dev/null || true
    while kill -0 "$pid" 2> /dev/null; do sleep 0.05; done
}

isolated() { # CMD...: as the first process of new namespaces; ends with this process
    exec unshare --net --uts --mount --pid --ipc --fork --kill-child --mount-proc "$@"
}

dress() { # FOLDER NAME ADDRESS: what every host has
    hostname "$2"
    ip link set lo up
    mount -t tmpfs tmpfs /dev/shm
    mount --bind "$1/hosts" /etc/hosts
    mount --bind "$1/ssh/ssh_config" /etc/ssh/ssh_config
    "$sshd" -D -e -f "$1/ssh/sshd_config" 2> "$1/sshd-$2.log" &
}

live() { # as the first process of a host: adopt and reap orphans for ever
    while true; do sleep 3600 & wait $!; done
}

init_ctl() { # FOLDER COUNT
    local folder=$1 count=$2 i pid
    ip link add br0 type bridge
    ip addr add 10.77.0.254/24 dev br0
    ip link set br0 up
    dress "$folder" ctl
    for ((i = 1; i <= count; i++)); do
        (isolated "$self" init_host "$folder" "$i") &
        pid=$!
        until [[ -e $folder/n$i.up ]]; do sleep 0.02; done
        pgrep -P "$pid" > "$folder/n$i.pid" # as ctl numbers it
        ip link add "v$i" type veth peer name eth0 netns "$pid"
        ip link set "v$i" master br0 up
    done
    for ((i = 1; i <= count; i++)); do
        until grep -q listening "$folder/sshd-n$i.log" 2> /dev/null; do sleep 0.02; done
    done
    touch "$folder/ready"
    live
}

init_host() { # FOLDER NUMBER
    touch "$1/n$2.up"
    until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
    ip addr add "10.77.0.$2/24" dev eth0
    ip link set eth0 up
    dress "$1" "n$2"
    live
}

enter() { # PID CMD...
    local pid=$1
    shift
    nsenter --target "$pid" --net --uts --mount --pid --ipc "$@"
}

on() { # FOLDER HOST CMD...
    local folder=$1 host=$2 ctl
    shift 2
    # the directory is entered inside: one opened outside would not show what is mounted there
    # shellcheck disable=SC2016
    local there=(bash -c 'cd "$1" && shift && exec "$@"' on "$PWD" "$@")
    ctl=$(pgrep -P "$(cat "$folder/keeper.pid")")
    if [[ $host == ctl ]]; then
        enter "$ctl" "${there[@]}"
    else
        enter "$ctl" nsenter --target "$(cat "$folder/$host.pid")" --net --uts --mount --pid --ipc "${there[@]}"
    fi
}

verb=$1
shift
case $verb in
    up) up "$(readlink -f "$1")" "$2" ;;
    down | on) folder=$(readlink -f "$1"); shift; "$verb" "$folder" "$@" ;;
    keep) isolated "$self" init_ctl "$@" ;;
    init_ctl | init_host) "$verb" "$@" ;;
    *) echo "hosts.sh: unknown verb $verb" >&2; exit 2 ;;
esac
