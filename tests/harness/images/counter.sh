#!/bin/sh
# Counts aloud. The nonce is this process's own, so a continued process can be told from a new one that counts as well.
nonce=$(cat /proc/sys/kernel/random/uuid)
n=0
while :; do
  n=$((n + 1))
  echo "$nonce $n"
  # On request into a file too: it lies in the container's upper layer, which a plain CRIU image does not carry.
  [ -z "$COUNTER_FILE" ] || echo "$nonce $n" > "$COUNTER_FILE"
  sleep 0.05
done
