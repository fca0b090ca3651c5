#!/bin/sh
# The first program of the machine: finds the disk, lays over it what the second one carries, and hands over to systemd.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do $b insmod "$module"; done
while ! [ -e /dev/vda ] || ! [ -e /dev/vdb ]; do $b sleep 0.05; done
$b mount -t ext4 /dev/vda /root
$b mount -t tmpfs tmpfs /root/run
# Not a file system: an archive, as it came.
$b tar -x -f /dev/vdb -C /root
for d in proc sys dev; do $b mount --move /$d /root/$d; done
exec $b switch_root /root /lib/systemd/systemd
