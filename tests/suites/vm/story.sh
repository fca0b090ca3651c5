#!/bin/bash
# What the machine is asked, check by check, in this order; later ones use the containers of earlier ones. Each is a
# function that ends well or says on stderr what it found.
# The cgroups are runc's own making, but for the checks of scopes, which are systemd's.
image=localhost/busybox:test
group=/sys/fs/cgroup/default
scopes=/sys/fs/cgroup/system.slice

# Far beyond what the slowest check takes on a busy host.
limit=150

check() { # NAME: runs the function and tells the console how it went
  local log=/tmp/$1.log from running watchdog
  from=$(wc -l < /var/log/containerd.log)
  # Not as a condition: in one, set -e means nothing.
  (set -eEuo pipefail; trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR; "$1") > "$log" 2>&1 &
  running=$!
  (sleep $limit; { ps -ef; echo "line ?: it hangs for $limit s"; } >> "$log"; kill $running) &
  watchdog=$!
  if wait $running; then
    echo "PASS $1"
  else
    sed 's/^/  | /' "$log"
    tail -n +$((from + 1)) /var/log/containerd.log | tail -n 25 | sed 's/^/  containerd | /'
    # The first trap names the command, what comes after it the functions around it.
    echo "FAIL $1 $(grep -m 1 -B 1 '^line ' "$log" | tr '\n' ' ')"
  fi
  kill $watchdog
}

fail() { echo "$*" >&2; return 1; }

within() { # SECONDS COMMAND…: until it succeeds
  local end=$((SECONDS + $1)); shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || fail "waited in vain for: $*"
    sleep 0.1
  done
}

start() { # ID ARGUMENT…: a counter in the background; what it says is in /run/said/ID
  local id=$1; shift
  ctr run --detach --log-uri "file:///run/said/$id" "$@" $image "$id" /counter
}

said() { # ID: the counter's last whole line
  sed -n '$!p' "/run/said/$1" 2>/dev/null | tail -n 1
}

counts_on() { # ID NUMBER: whether it is beyond the number
  local line; line=$(said "$1")
  [ -n "$line" ] && [ "${line#* }" -gt "$2" ]
}

status_is() { ctr task ls | awk -v id="$1" '$1 == id {print $3}' | grep -qx "$2"; }

# Each counter starts 20 processes a second, which is a lot here.
done_with() { ctr task delete --force "$1"; } # ID

continues() { # ID NONCE NUMBER: it is the counter of the nonce, dumped at the number or soon after, and goes on
  within 20 counts_on "$1" "$3"
  local nonce first; read -r nonce first < "/run/said/$1"
  [ "$nonce" = "$2" ] || fail "the nonce of $1 is $nonce, the dumped one's was $2"
  [ "$first" -ge "$3" ] && [ "$first" -le $(($3 + 200)) ] || fail "$1 begins with $first, dumped soon after $3"
  within 20 counts_on "$1" $((first + 5))
}

cgroups_are_unified() {
  [ -e /sys/fs/cgroup/cgroup.controllers ]
  for c in cpu io memory pids; do grep -qw $c /sys/fs/cgroup/cgroup.subtree_control; done
}

an_exit_status_arrives() {
  local status=0
  ctr run --rm $image status sh -c 'exit 7' || status=$?
  [ $status -eq 7 ] || fail "the status is $status"
  [ "$(ctr run --rm $image words echo warm)" = warm ]
}

the_shim_answers_to_its_own_name() {
  [ "$(ctr run --rm --runtime io.containerd.rekindle.v1 $image own echo warm)" = warm ]
}

in_its_cgroup() { # ID
  grep -qx "$(ctr task ls | awk -v id="$1" '$1 == id {print $2}')" "$group/$1/cgroup.procs" ||
    fail "$1 is not in $group/$1"
}

a_container_runs_in_its_cgroup() {
  start one --net-host --memory-limit 67108864
  within 20 counts_on one 3
  readlink /proc/"$(pgrep -f -- '-id one( |$)')"/exe | grep -q containerd-shim-rekindle-v1
  in_its_cgroup one
}

an_exec_runs_in_the_containers_cgroup() {
  ctr task exec --exec-id sleep one sleep 1000 &
  within 20 pgrep -xf 'sleep 1000'
  local exec; exec=$(pgrep -xf 'sleep 1000')
  grep -qx "$exec" $group/one/cgroup.procs || fail "$exec is in $(cat /proc/$exec/cgroup)"
  ctr task kill --exec-id sleep --signal SIGKILL one
  wait $! || [ $? -eq 137 ]
  status_is one RUNNING
}

an_exec_reports_its_own_status() {
  local status=0
  ctr task exec --exec-id five one sh -c 'exit 5' || status=$?
  [ $status -eq 5 ] || fail "the status is $status"
}

limits_reach_the_cgroup() {
  [ "$(cat $group/one/memory.max)" = 67108864 ]
}

metrics_are_those_of_version_2() {
  local told; told=$(ctr task metrics --format json one | tr -d ' \n')
  echo "$told"
  # Version 1 has memory.usage.usage, cpu.usage.total and no memory_events.
  grep -q '"usage_usec":[1-9]' <<< "$told"
  grep -Eq '"usage":[1-9]' <<< "$told"
  grep -Eq '"usage_limit":"?67108864' <<< "$told"
  grep -Eq '"current":[1-9]' <<< "$told"
}

a_paused_container_stands_still_and_goes_on() {
  ctr task pause one
  status_is one PAUSED
  grep -qx 'frozen 1' $group/one/cgroup.events
  local before; before=$(said one)
  sleep 1
  [ "$(said one)" = "$before" ] || fail "it counted on from $before to $(said one)"
  ctr task resume one
  status_is one RUNNING
  within 20 counts_on one "${before#* }"
}

sigkill_ends_a_paused_container() {
  start frozen --net-host
  ctr task pause frozen
  ctr task kill --signal SIGKILL frozen
  within 20 status_is frozen STOPPED
  # ctr tells the status in a warning and ends with 0.
  ctr task delete frozen 2>&1 | grep 'exit code 137'
  ctr container delete frozen
}

a_kill_for_want_of_memory_is_told() {
  ctr events > /tmp/events &
  local events=$! status=0
  sleep 1
  ctr run --rm --memory-limit 16777216 $image oom dd if=/dev/zero of=/dev/null bs=64M count=1 || status=$?
  [ $status -eq 137 ] || fail "the status is $status"
  within 20 grep -q '/tasks/delete' /tmp/events
  kill $events
  cat /tmp/events
  [ "$(grep -Eo '/tasks/(oom|exit)' /tmp/events | tr '\n' ' ')" = '/tasks/oom /tasks/exit ' ]
}

a_plain_checkpoint_continues() {
  start plain --net-host --env COUNTER_FILE=/count
  within 20 counts_on plain 5
  local nonce n; read -r nonce n <<< "$(said plain)"
  # ctr pauses it first, wherever it stands: between vfork and exec that is refused, and to be tried again.
  within 60 ctr container checkpoint --task plain localhost/plain:image
  ctr task kill --signal SIGKILL plain
  within 20 status_is plain STOPPED
  ctr task delete plain
  ctr container restore --live plain-2 localhost/plain:image
  local file=/run/containerd/io.containerd.runtime.v2.task/default/plain-2/rootfs/count
  within 20 test -s $file
  sleep 2
  local after; after=$(cat $file)
  [ "${after% *}" = "$nonce" ] || fail "it was $nonce $n, and is $after"
  [ "${after#* }" -gt "$n" ] || fail "it was $n, and is $after"
  # Its cgroup is the dumped one's, as all of its specification: so ctr restores.
  done_with plain-2
}

a_named_image_continues_in_a_new_container() {
  local nonce n; read -r nonce n <<< "$(said one)"
  rekindle checkpoint one --name warm
  rekindle image verify warm
  status_is one RUNNING
  within 20 counts_on one $((n + 5))
  start two --net-host --annotation rekindle.dev/restore-from=warm
  continues two "$nonce" "$n"
  # And not in that of the dumped one, which still runs.
  in_its_cgroup two
  done_with one
}

# 272 MiB, of which one string after the other is compared with what it should be and then gets another pattern.
changing='function fill(i,  s) { s = sprintf("%08d:%08d:", i, v[i]); while (length(s) < 4194304) s = s s; return s }
BEGIN { for (i = 0; i < 68; i++) a[i] = fill(i)
  while (1) { j = n % 68; if (n % 7 == 0 && a[j] != fill(j)) { print "corrupt " j; fflush() }
    v[j]++; a[j] = fill(j); print "x " ++n; fflush(); system("sleep 0.01") } }'

# On a kernel whose moved mappings keep marks that they should not (until 6.13).
memory_is_stored_before_the_stop_and_is_what_it_was() {
  ctr run --detach --net-host --log-uri file:///run/said/heap $image heap awk "$changing"
  within 60 counts_on heap 3
  rekindle checkpoint heap --name heap
  local precopied; precopied=$(grep 'image sealed.*default/heap@1' /var/log/containerd.log | grep -o 'precopied=[0-9]*')
  [ "${precopied#*=}" -gt 209715200 ] || fail "of 272 MiB: $precopied"
  local n; n=$(said heap)
  # As long as all of it takes.
  within 60 counts_on heap $((${n#* } + 70))
  ctr task delete --force heap
  ctr run --detach --net-host --log-uri file:///run/said/heap-2 --annotation rekindle.dev/restore-from=heap $image heap-2 awk "$changing"
  within 60 counts_on heap-2 $((${n#* } + 70))
  ctr task delete --force heap-2
  ! grep corrupt /run/said/heap /run/said/heap-2
}

a_container_with_its_own_network_continues() {
  start netns
  within 20 counts_on netns 5
  local nonce n; read -r nonce n <<< "$(said netns)"
  rekindle checkpoint netns --name netns --exit
  start netns-2 --annotation rekindle.dev/restore-from=netns
  continues netns-2 "$nonce" "$n"
  done_with netns-2
}

a_restored_container_is_one_like_any_other() {
  [ "$(ctr task exec --exec-id x two echo here)" = here ]
  ctr task metrics --format json two | grep -q '"usage_usec": [1-9]'
  ctr task pause two
  grep -qx 'frozen 1' $group/two/cgroup.events
  ctr task resume two
  local nonce n; read -r nonce n <<< "$(said two)"
  rekindle checkpoint two --name warmer --exit
  start three --net-host --annotation rekindle.dev/restore-from=warmer
  continues three "$nonce" "$n"
}

who_runs() { # ID: what the kernel says of its first process, and of what another user may run in it
  local pid; pid=$(ctr task ls | awk -v id="$1" '$1 == id {print $2}')
  for pid in $pid $(pgrep -xf 'tail -f /dev/null' || :); do
    grep -E '^(Name|Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):' "/proc/$pid/status"
  done
}

every_process_is_who_it_was() {
  local user who nonce n
  for user in 0 65534; do
    start user-$user --net-host --seccomp --user $user:$user
    within 20 counts_on user-$user 5
    # Of nobody in root's container: what a server is that gave up root. No sleep, which would end with its restore.
    [ $user -ne 0 ] || ctr task exec --exec-id su user-0 su -s /bin/sh nobody -c 'setsid tail -f /dev/null > /dev/null 2>&1 &'
    [ $user -ne 0 ] || within 20 pgrep -xf 'tail -f /dev/null'
    who=$(who_runs user-$user)
    echo "$who"
    grep -q '^Uid:.65534.65534.65534.65534$' <<< "$who"
    grep -q '^Seccomp:.2$' <<< "$who"
    read -r nonce n <<< "$(said user-$user)"
    rekindle checkpoint user-$user --name user-$user --exit
    done_with user-$user
    start user-$user-2 --net-host --seccomp --user $user:$user --annotation rekindle.dev/restore-from=user-$user
    continues user-$user-2 "$nonce" "$n"
    [ "$(who_runs user-$user-2)" = "$who" ] || fail "they are $(who_runs user-$user-2)"
    done_with user-$user-2
  done
}

start_in_scope() { # ID ARGUMENT…
  local id=$1; shift
  start "$id" --net-host --runc-systemd-cgroup --cgroup "system.slice:default:$id" "$@"
}

in_its_scope() { # ID
  local group=$scopes/default-$1.scope
  grep -qx "$(ctr task ls | awk -v id="$1" '$1 == id {print $2}')" "$group/cgroup.procs" || fail "$1 is not in $group"
  systemctl is-active "default-$1.scope"
}

no_scope_is_left() { # ID
  [ -z "$(systemctl list-units --all --no-legend "default-$1.scope")" ] && [ ! -e "$scopes/default-$1.scope" ]
}

a_named_image_continues_in_a_scope_of_its_own() {
  start_in_scope scope
  within 20 counts_on scope 5
  in_its_scope scope
  local nonce n; read -r nonce n <<< "$(said scope)"
  rekindle checkpoint scope --name scope
  start_in_scope scope-2 --annotation rekindle.dev/restore-from=scope
  continues scope-2 "$nonce" "$n"
  in_its_scope scope
  in_its_scope scope-2
  ctr task pause scope-2
  grep -qx 'frozen 1' $scopes/default-scope-2.scope/cgroup.events
  grep -qx 'frozen 0' $scopes/default-scope.scope/cgroup.events
  ctr task resume scope-2
  done_with scope
  within 20 no_scope_is_left scope
  in_its_scope scope-2
}

a_killed_shim_leaves_no_scope() {
  kill -KILL "$(pgrep -f -- '-id scope-2( |$)')"
  within 20 no_scope_is_left scope-2
  within 20 no_task scope-2
}

no_task() { ! ctr task ls -q | grep -qx "$1"; } # ID

no_shim_runs() { ! pgrep containerd-shim; }

nothing_stays_after_delete() {
  status_is three RUNNING
  # shellcheck disable=SC2046 # one word per container
  ctr task delete --force $(ctr task ls -q)
  # shellcheck disable=SC2046
  ctr container delete $(ctr container ls -q)
  within 20 no_shim_runs
  ! pgrep -f /counter || fail "counters still run"
  ! pgrep criu || fail "CRIU still runs"
  local left
  left=$(find $group /run/containerd/io.containerd.runtime.v2.task/default /run/containerd/runc/default \
    -mindepth 1 -maxdepth 1 -type d 2>/dev/null || :)
  [ -z "$left" ] || fail "left: $left"
  ! grep /run/containerd/io.containerd.runtime /proc/self/mountinfo || fail "mounts are left"
}

mkdir -p /run/said
systemctl start containerd
ctr images import /run/errand/image.tar > /dev/null
check cgroups_are_unified
check an_exit_status_arrives
check the_shim_answers_to_its_own_name
check a_container_runs_in_its_cgroup
check an_exec_runs_in_the_containers_cgroup
check an_exec_reports_its_own_status
check limits_reach_the_cgroup
check metrics_are_those_of_version_2
check a_paused_container_stands_still_and_goes_on
check sigkill_ends_a_paused_container
check a_kill_for_want_of_memory_is_told
check a_plain_checkpoint_continues
check a_named_image_continues_in_a_new_container
check memory_is_stored_before_the_stop_and_is_what_it_was
check a_container_with_its_own_network_continues
check a_restored_container_is_one_like_any_other
check every_process_is_who_it_was
check a_named_image_continues_in_a_scope_of_its_own
check a_killed_shim_leaves_no_scope
check nothing_stays_after_delete
