#!/bin/bash
# init.sh DIR: the first process of a node. Enters the root that the keeper has mounted, tells its pid as the host sees it
# on stdout, then keeps containerd running as an init system would: what ends is started again.
set -e
dir=$1
# /proc is still the host's here, so this is the number by which the host knows us.
read -r pid _ < /proc/self/stat
cd "$dir/root"
mkdir -p .old images opt/rekindle var/lib/containerd var/lib/rekindle var/log
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs cgroup sys/fs/cgroup
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  mount -t cgroup2 cgroup2 sys/fs/cgroup
  # Only a cgroup without processes may hand controllers down.
  mkdir sys/fs/cgroup/init
  echo 0 > sys/fs/cgroup/init/cgroup.procs
  for c in $(cat sys/fs/cgroup/cgroup.controllers); do echo "+$c" > sys/fs/cgroup/cgroup.subtree_control; done
else
  while IFS=: read -r _ controllers _; do
    if [ -z "$controllers" ]; then
      mkdir -p sys/fs/cgroup/unified
      mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
      continue
    fi
    at=sys/fs/cgroup/${controllers#name=}
    mkdir -p "$at"
    mount -t cgroup -o "$controllers" cgroup "$at" 2>/dev/null || mount -t cgroup -o "none,$controllers" cgroup "$at"
  done < /proc/self/cgroup
fi
mount --rbind /dev dev
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
# The overlay snapshotter cannot stack on an overlay's upper layer: plain folders.
# What it sees of the cache is mounted here, in the node's own namespace: who removes the folder does not come by.
while IFS=$'\t' read -r from to; do
  mount --bind "$from" "$dir/containerd/$to"
  mount -o remount,bind,ro "$dir/containerd/$to"
done < "$dir/binds"
mount --rbind "$dir/containerd" var/lib/containerd
mount --bind "$dir/rekindle" var/lib/rekindle
mount --bind "$dir/opt" opt/rekindle
mount --bind "$dir/images" images
# pivot_root, not chroot: in a chroot runc shows containers the host's root, and CRIU cannot dump.
pivot_root . .old
cd /
umount --lazy /.old
hostname "${dir##*/}"
export HOME=/root PATH="$NODE_PATH"
echo "$pid"
exec >>/var/log/node.log 2>&1
while :; do
  # A group that no container has, and that none may get from here.
  setpriv --groups 4242 containerd >>/var/log/containerd.log 2>&1 &
  echo $! > /run/containerd.pid
  wait $! || :
  while [ -e /run/containerd.hold ]; do sleep 0.05; done
done
