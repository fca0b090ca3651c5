//! What containerd may expect of a runtime, sentence by sentence, asked of the shim it ships and of ours.
//!
//! One node per runtime serves all tests of this program, at the same time: a container's id is its test's name.
//! `REKINDLE_RUNTIMES=go` (or `rekindle`) leaves the other one out.

mod alike;
mod broken;
mod checkpoint;
mod crowd;
mod exec;
mod exits;
mod given_up;
mod io;
mod loggers;
mod metrics;
mod oom;
mod options;
mod pause;
mod process;
mod recovery;
mod refusals;
mod runtimes;
mod server;
mod users;
mod wrong;

use anyhow::{Result, anyhow};
use containerd_client::tonic::{Code, Status};
use rekindle_harness::{Image, Node, NodeConfig, Runtime, container::Builder, images};
use tokio::sync::OnceCell;

struct Stage {
    node: Node,
    busybox: Image,
}

impl Stage {
    /// A container of the busybox image.
    fn container(&self, id: &str) -> Builder<'_> {
        self.node.container(id).image(&self.busybox)
    }
}

/// The node of a runtime, made by the first test that asks. It is never dropped: its keeper ends it after this program.
async fn stage(runtime: Runtime) -> Result<Option<&'static Stage>> {
    static GO: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    static REKINDLE: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    let (cell, name) = match runtime {
        Runtime::Go => (&GO, "go"),
        Runtime::Rekindle => (&REKINDLE, "rekindle"),
    };
    let wanted = std::env::var("REKINDLE_RUNTIMES").unwrap_or_else(|_| "go,rekindle".into());
    if !wanted.split(',').any(|one| one.trim() == name) {
        return Ok(None);
    }
    let make = async || -> Result<Stage> {
        let busybox = images::busybox()?;
        let node = Node::start(NodeConfig::new(runtime)?).await?;
        node.import(&busybox).await?;
        Ok(Stage { node, busybox })
    };
    // The error is kept: making the node again for each test would fail as often, only slower.
    let made = cell
        .get_or_init(async || make().await.map_err(|e| format!("{e:#}")))
        .await;
    made.as_ref().map(Some).map_err(|e| anyhow!("{e}"))
}

/// The code of a refusal; what was not refused is a failure.
fn code<T>(answer: Result<T, Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

macro_rules! both {
    ($($module:ident { $($test:ident)* })*) => {
        both!(@one go Go $($module { $($test)* })*);
        both!(@one rekindle Rekindle $($module { $($test)* })*);
    };
    (@one $name:ident $runtime:ident $($module:ident { $($test:ident)* })*) => {
        mod $name {
            $(mod $module {
                $(#[tokio::test]
                async fn $test() -> anyhow::Result<()> {
                    let name = concat!(stringify!($name), "::", stringify!($module), "::", stringify!($test));
                    if let Some(outcome) = rekindle_harness::vm::instead(name) { return outcome; }
                    let Some(stage) = crate::stage(rekindle_harness::Runtime::$runtime).await? else { return Ok(()) };
                    let outcome = crate::$module::$test(stage).await;
                    outcome.map_err(|e| e.context(format!("containerd's log ends with\n{}", stage.node.log_tail(12))))
                })*
            })*
        }
    };
}

both! {
    process {
        a_created_task_has_a_pid_and_is_not_running
        a_created_task_can_be_deleted
        start_runs_it_once
        exit_statuses_arrive
        a_signal_counts_from_128
        wait_answers_after_the_end_too
        what_does_not_exist_is_not_found
        a_second_task_of_the_same_id_is_refused
        a_missing_program_fails_the_creation_and_leaves_nothing
        kill_reaches_one_process
        kill_all_ends_every_process
        kill_after_the_exit_is_not_found
        a_running_task_is_not_deleted
        pids_are_those_of_the_cgroup
        resources_can_be_updated
        events_come_in_order
        the_shim_tells_about_itself
        the_shim_is_the_one_under_test
        our_shim_answers_to_its_own_name
        nothing_stays_after_delete
    }
    given_up {
        a_create_past_its_deadline_is_taken_back
        a_create_whose_caller_went_away_is_taken_back
    }
    io {
        stdout_and_stderr_stay_apart
        large_output_arrives_whole
        closing_stdin_ends_it
        a_terminal_echoes_and_is_resized
        no_stdio_is_fine
    }
    loggers {
        a_logging_program_gets_both_outputs
        a_terminal_goes_to_a_logging_program
        an_exec_has_a_logging_program_of_its_own
        a_dead_logging_program_breaks_the_pipes
        one_that_does_not_end_is_killed
        one_that_is_missing_fails_the_creation
        one_that_is_never_ready_fails_the_creation
        a_failed_creation_ends_its_logging_program
        a_killed_shim_leaves_no_logging_program
        what_has_a_logging_program_continues_from_an_image
        output_goes_to_a_file
        an_unknown_scheme_is_refused_by_name
        ctr_names_a_logging_program
    }
    exec {
        exec_has_its_own_environment_folder_and_user
        exec_has_its_own_limits
        exec_reports_its_own_status
        exec_on_a_terminal
        exec_stdin_can_be_closed
        exec_is_killed_alone
        a_second_exec_of_the_same_id_is_refused
        a_missing_program_fails_the_exec_alone
        exec_in_a_stopped_task_is_refused
        the_inits_end_is_told_last
    }
    crowd {
        fifty_execs_at_once_end_each_with_its_own_status
        thirty_containers_of_a_pod_come_and_go_at_once
    }
    metrics {
        metrics_tell_what_the_kubelet_asks_for
    }
    runtimes {
        crun_runs_a_container
        crun_refuses_a_missing_program
        crun_is_paused_and_killed
        crun_runs_execs
        our_own_type_has_its_options_in_a_file
    }
    users {
        a_container_has_users_of_its_own
        a_read_only_root_is_shown_with_them_too
    }
    wrong {
        a_missing_runtime_is_named
        a_missing_criu_is_named
        an_exec_that_is_no_process_is_refused
        output_that_nobody_reads_holds_nobody_up
        a_fifo_that_is_not_there_is_refused
        ten_thousand_mounts_are_refused_by_the_first_that_fails
    }
    oom {
        a_kill_for_want_of_memory_is_told_while_the_task_runs
        an_end_for_want_of_memory_is_told_with_its_reason
    }
    pause {
        a_paused_task_stands_still_and_goes_on
        wait_on_a_paused_task_waits
        sigkill_ends_a_paused_task
        what_a_state_does_not_allow_is_refused
    }
    recovery {
        containers_are_found_again_after_a_restart_of_containerd
        an_exit_during_the_restart_leaves_nothing
        events_wait_for_containerd_in_their_order
        the_exit_of_a_container_waits_for_containerd
        a_killed_shim_leaves_nothing
    }
    checkpoint {
        leave_running_goes_on_and_the_image_continues
        exit_ends_the_task_and_the_image_continues
        a_task_with_a_terminal_and_a_lock_continues
        an_image_in_the_content_store_continues
        a_paused_task_stays_paused_over_a_checkpoint
        a_restored_task_can_be_checkpointed_again
        a_created_task_is_not_checkpointed
        a_broken_image_fails_the_start_and_leaves_nothing
    }    refusals {
        an_unknown_container_is_not_found_by_the_shim
        an_unknown_process_is_not_found_by_the_shim
        a_second_create_changes_nothing
        a_root_that_cannot_be_mounted_leaves_nothing
        checkpoint_options_of_another_kind_are_refused
        an_exec_that_was_not_started_waits_or_goes
        what_never_ran_ends_when_it_is_deleted
        a_running_exec_is_neither_started_again_nor_deleted
        an_ended_exec_is_only_deleted
        an_exec_that_could_not_start_is_only_deleted
        of_two_execs_of_one_id_one_is_added
        an_exec_that_is_no_json_is_refused
        a_created_task_takes_an_exec_and_a_kill
        a_stopped_task_is_only_looked_at_and_deleted
        a_paused_tasks_execs_are_paused
        a_task_from_an_image_has_no_process_yet
    }    exits {
        an_exit_is_kept_until_somebody_asks
        with_an_init_in_anothers_pid_namespace_all_end
        an_orphan_is_adopted_and_reaped
    }
    options {
        runc_is_called_as_the_options_say
        a_killed_shims_container_is_found_where_the_options_say
        stdio_belongs_to_whom_the_options_say
        criu_works_where_the_options_say
    }
    server {
        connect_tells_the_pids_of_shim_and_task
        a_shutdown_is_ignored_while_there_is_a_container
        a_signal_to_the_shim_ends_no_container
        the_shim_dies_of_no_memory_before_containerd
        the_shim_lives_in_the_cgroup_of_the_options
        a_shim_cgroup_that_is_missing_fails_the_creation
        containers_of_a_group_share_a_shim
        a_binary_that_is_replaced_changes_no_running_container
        the_delete_command_answers_for_what_never_was
        start_fails_where_the_spec_is_no_json
        the_shim_tells_about_itself_without_runc
    }    broken {
        what_runc_fails_at_has_not_happened
        a_start_that_runc_fails_at_can_be_tried_again
        without_a_pid_there_is_no_container
        a_stream_that_is_gone_fails_the_creation
        a_stream_that_is_gone_fails_the_exec_alone
        a_stream_that_is_gone_is_none_to_a_restore
        a_restore_that_failed_is_not_tried_again
        a_busy_root_is_let_go
        delete_goes_on_without_the_notes_of_the_create
    }
}
