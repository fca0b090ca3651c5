//! The shim under unified cgroup v2 and Debian's own kernel, with and without systemd's cgroups: a virtual machine runs
//! `vm/story.sh`, once for all tests of this program, and each of them is one check of it.

#![cfg(target_arch = "x86_64")]

use anyhow::Result;
use rekindle_harness::images;
use rekindle_harness::vm::{Errand, Machine};

const STORY: &str = include_str!("vm/story.sh");

fn machine() -> Result<&'static Machine> {
    Machine::of_this_program(|| Errand::story(STORY, &images::busybox()?))
}

macro_rules! checks {
    ($($check:ident)*) => {
        $(#[test]
        fn $check() -> Result<()> {
            machine()?.verdict(stringify!($check))
        })*

        #[test]
        fn every_check_of_the_story_is_a_test() {
            let told: Vec<&str> = STORY.lines().filter_map(|line| line.strip_prefix("check ")).collect();
            assert_eq!(told, [$(stringify!($check)),*]);
        }
    };
}

checks! {
    cgroups_are_unified
    an_exit_status_arrives
    the_shim_answers_to_its_own_name
    a_container_runs_in_its_cgroup
    an_exec_runs_in_the_containers_cgroup
    an_exec_reports_its_own_status
    limits_reach_the_cgroup
    metrics_are_those_of_version_2
    a_paused_container_stands_still_and_goes_on
    sigkill_ends_a_paused_container
    a_kill_for_want_of_memory_is_told
    a_plain_checkpoint_continues
    a_named_image_continues_in_a_new_container
    memory_is_stored_before_the_stop_and_is_what_it_was
    a_container_with_its_own_network_continues
    a_restored_container_is_one_like_any_other
    every_process_is_who_it_was
    a_named_image_continues_in_a_scope_of_its_own
    a_killed_shim_leaves_no_scope
    nothing_stays_after_delete
}
