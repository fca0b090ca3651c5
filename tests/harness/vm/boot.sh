#!/bin/bash
# The machine's init: a node with unified cgroup v2, then the story, then the end. What fails before the story ends the
# machine: the kernel does not live without its init.
set -e
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# Only a cgroup without processes may hand controllers down.
mkdir /sys/fs/cgroup/init
echo 0 > /sys/fs/cgroup/init/cgroup.procs
for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$c" > /sys/fs/cgroup/cgroup.subtree_control; done
ip link set lo up
hostname machine
mkdir -p /opt/rekindle /etc/containerd /var/lib/containerd
mount --bind /run/payload/opt /opt/rekindle
cp /run/payload/containerd.toml /etc/containerd/config.toml
export HOME=/root PATH=/opt/rekindle/shadow:/opt/rekindle/bin:/usr/sbin:/usr/bin:/sbin:/bin
containerd > /var/log/containerd.log 2>&1 &
until ctr version > /dev/null 2>&1; do sleep 0.2; done
bash /run/payload/story.sh || echo "the story ended with $?"
echo o > /proc/sysrq-trigger
sleep 60
