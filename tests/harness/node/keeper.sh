#!/bin/bash
# keeper.sh DIR ROOT: makes one node out of the files in DIR over the folder ROOT, and removes it when stdin ends.
#
# It runs in a mount and a network namespace of its own, so that neither a mount nor a device is ever seen on the host:
# all a node leaves there is DIR and one cgroup per hierarchy, called as DIR is. Whoever started the keeper holds the other
# end of stdin; the pipe ends with that process however it dies, and then the keeper cleans up. A keeper that is killed
# itself takes the node along (pdeathsig), and the next start of any node sweeps what it left.
set -u
dir=$1 root=$2 name=${1##*/} node=
# A container that inherits a descriptor from outside the node cannot be dumped. 255 is bash's own.
for fd in /proc/self/fd/*; do
  fd=${fd##*/}
  [ "$fd" -gt 2 ] && [ "$fd" -ne 255 ] && eval "exec $fd>&-"
done 2>/dev/null
# Handlers, not SIG_IGN, which every program of the node would inherit.
trap : INT TERM HUP

hierarchies() { # the mount points of all cgroup hierarchies, v1 and v2
  awk '$0 ~ / - cgroup2? / {print $5}' /proc/self/mountinfo
}

gone() { # whether no hierarchy holds our cgroup any more
  local h
  for h in $(hierarchies); do [ ! -d "$h/$name" ] || return 1; done
}

cleanup() {
  local h try
  [ -z "$node" ] || kill -KILL "$node" 2>/dev/null
  for try in $(seq 100); do
    # A task that a v1 freezer holds does not die before it is thawed.
    for h in $(hierarchies); do
      [ -d "$h/$name" ] || continue
      find "$h/$name" -name freezer.state -exec sh -c 'echo THAWED > "$1"' sh {} \;
      find "$h/$name" -depth -type d -exec rmdir {} \;
    done 2>/dev/null
    gone && break
    sleep 0.05
  done
  umount --recursive --lazy "$dir/root" 2>/dev/null
  rm -rf --one-file-system "$dir"
}
trap cleanup EXIT

ip link set lo up || exit 1
mount -t overlay overlay -o "lowerdir=$root,upperdir=$dir/upper,workdir=$dir/work" "$dir/root" || exit 1

(
  set -e
  # A cgroup of its own, seen as the root from within: on one kernel two nodes would otherwise share /default/ID
  # and freeze each other's containers.
  for h in $(hierarchies); do
    if [ -e "$h/cgroup.controllers" ]; then
      for c in $(cat "$h/cgroup.controllers"); do echo "+$c" > "$h/cgroup.subtree_control" || :; done 2>/dev/null
    fi
    mkdir "$h/$name"
    # A v1 cpuset takes nobody in before it has processors and memory.
    if [ -e "$h/$name/cpuset.cpus" ] && [ ! -e "$h/cgroup.controllers" ]; then
      cat "$h/cpuset.cpus" > "$h/$name/cpuset.cpus"
      cat "$h/cpuset.mems" > "$h/$name/cpuset.mems"
    fi
    echo "$BASHPID" > "$h/$name/cgroup.procs"
  done
  exec setpriv --pdeathsig KILL \
    unshare --mount --uts --ipc --pid --cgroup --fork --kill-child --propagation private \
    bash "$dir/init.sh" "$dir" </dev/null
) &
node=$!
# Nobody but the node's first process may keep the reader of our stdout waiting.
exec >/dev/null
# A signal interrupts the read with a status above 128; 1 is the end of the pipe.
while :; do
  read -r _
  [ $? -eq 1 ] && exit 0
done
