//! What named images promise: `rekindle checkpoint ID --name NAME`, then `rekindle.dev/restore-from: NAME`.
//!
//! Four nodes serve all tests of this program. One restores lazily, one eagerly, on the third one there is one test at a
//! time, and so on the fourth, which has images in memory. A container, a pod and an image are called as their test is.
#![allow(clippy::print_stdout, reason = "tables tell how many cases they had")]

mod ahead;
mod api;
mod archives;
mod command;
mod damaged;
mod full;
mod heap;
mod imaging;
mod incoming;
mod interrupted;
mod like;
mod memory;
mod pods;
mod refused;
mod sealed;
mod stage;
mod tasks;
mod tier;
mod unmade;
mod warming;

macro_rules! tests {
    ($($name:ident $nodes:ident { $($module:ident { $($test:ident)* })* })*) => {
        $(mod $name {
            $(mod $module {
                $(#[tokio::test]
                async fn $test() -> anyhow::Result<()> {
                    let stage = crate::stage::stage(crate::stage::Nodes::$nodes).await?;
                    let _turn = stage.turn().await;
                    let outcome = crate::$module::$test(stage).await;
                    outcome.map_err(|e| e.context(format!("containerd's log ends with\n{}", stage.node.log_tail(12))))
                })*
            })*
        })*
    };
}

macro_rules! images {
    (both { $($both:tt)* } once { $($once:tt)* } alone { $($alone:tt)* } fast { $($fast:tt)* }) => {
        tests! {
            eager Eager { $($both)* }
            lazy Lazy { $($both)* }
            once Eager { $($once)* }
            alone Alone { $($alone)* }
            fast Memory { $($fast)* }
        }
    };
}

images! {
    both {
        tasks {
            a_new_container_continues_exactly
            files_deleted_but_open_are_there
            a_paused_container_stays_paused
            exit_ends_it_and_the_image_continues
            the_newest_generation_is_meant
            a_restored_container_is_checkpointed_again
            two_containers_start_from_one_image
        }
        pods {
            a_new_pod_continues_exactly
            one_container_of_the_pod_is_chosen
            a_live_connection_is_closed
            a_live_connection_to_the_pods_address_is_closed
            a_file_deleted_but_open_in_the_pods_shm_is_there
            two_containers_of_a_pod_start_from_two_images
            a_restored_pod_is_checkpointed_again
        }
        heap {
            memory_is_what_it_was
            memory_that_changes_is_what_it_was
            forked_processes_keep_theirs
        }
        sealed {
            it_continues_and_nothing_is_in_clear
        }
        warming {
            the_second_of_a_kind_goes_on_where_the_first_was_warm
            it_is_told_after_its_restore
        }
        tier {
            a_miss_is_fetched_and_stays
        }
    }
    once {
        archives {
            the_kubelets_becomes_an_image
            a_file_of_the_pods_shm_that_nobody_kept_is_told
            what_ctr_exports_becomes_an_image
            an_exported_one_is_restored_by_containerd
            a_namespace_with_a_key_has_it_encrypted
        }
        tier {
            many_pods_fetch_once
            a_tier_that_fails_is_a_miss
            what_a_tier_does_not_have_is_a_miss
            another_namespaces_image_under_its_name_is_refused
        }
        tasks {
            a_connection_that_nobody_has_taken_yet_is_no_hindrance
            every_process_is_who_it_was
            programs_that_start_others_all_the_time
        }
        pods {
            an_exported_image_serves_another_namespace
            another_namespaces_image_is_refused_at_the_sandbox
            a_refused_image_fails_the_start_with_its_reason
            more_than_the_pod_allows_is_refused
            a_cold_start_finds_the_shm_of_its_pod_and_nothing_of_the_image
        }
        refused {
            what_does_not_exist
            another_namespaces_image
            another_architectures_image
            a_more_privileged_image
            another_user
            a_manifest_that_lies
            another_kind_of_stdio
            a_shared_pid_namespace
            a_user_namespace
            the_nodes_ipc_namespace
            other_mounts
            opportunistic_starts_cold
            criu_refuses_and_nothing_stays
            criu_refuses_and_opportunistic_starts_cold_from_a_clean_root
            a_layer_that_was_written_is_refused_and_kept
        }
        damaged {
            one_of_each_kind_is_refused
        }
        imaging {
            on_a_timer
            before_it_hears_of_sigterm
            a_sigkill_ends_it_without_an_image
        }
        warming {
            a_damaged_image_goes_into_quarantine
            an_image_whose_containers_end_early_goes_into_quarantine
            of_many_at_once_one_makes_it
            pods_of_one_deployment_share_it
            a_pod_that_is_ready_is_imaged
        }
        command {
            an_image_is_shown
            an_image_is_removed
            a_damaged_image_is_told
            no_image_is_made_of_a_container_that_is_missing
            a_container_is_suspended_and_resumed
            one_with_gpu_devices_is_not_suspended
        }
        like {
            a_container_like_another_one_goes_on_from_its_image
            what_cannot_be_made_leaves_nothing
            another_host_is_named_and_may_be_forced
        }
        sealed {
            without_a_key_it_is_in_clear
        }
        unmade {
            of_a_shared_pid_namespace
            of_a_user_namespace
            of_a_stopped_process
            of_gpu_devices
            of_gpu_devices_that_a_hook_made
            of_the_nodes_ipc_namespace
            none_of_its_own_ipc_namespace_is_no_reason
        }
    }
    alone {
        api {
            a_checkpoint_is_made_by_a_call
            a_container_is_suspended_resumed_and_restored_by_calls
        }
        sealed {
            another_key_or_none_is_refused
        }
        warming {
            without_a_kubeconfig_no_image_is_made
        }
        refused {
            under_a_configuration_that_is_wrong
        }
        full {
            the_disk_is_full_in_each_step_of_a_checkpoint
            the_disk_is_full_while_memory_is_stored
            there_is_no_room_for_an_image_that_is_fetched
            there_is_no_room_for_what_is_staged
        }
        interrupted {
            the_shim_is_killed_during_a_checkpoint
            the_shim_is_killed_in_each_step_of_a_checkpoint
            the_command_is_killed_in_each_step_of_a_checkpoint
            the_command_is_killed_during_a_checkpoint
            calls_are_answered_while_a_restore_runs
            a_long_restore_delays_nobody_else
            a_restore_is_killed
            an_image_is_removed_in_each_step_of_a_start_from_it
        }
        heap {
            a_checkpoint_while_still_loading_drains_first
            whatever_becomes_of_its_pack_a_page_is_what_was_sealed
            a_pager_is_killed_in_each_phase
            a_container_that_ends_while_loading_leaves_nothing
            a_shim_that_is_killed_while_loading_leaves_nothing
            what_is_small_is_read_before_it_runs
        }
        incoming {
            it_runs_before_its_memory_is_on_the_node
            who_fetches_it_is_killed
            its_pager_is_killed
            other_bytes_in_the_bucket_end_it
            whatever_happens_it_is_sound_or_ends_with_the_reason
        }
        ahead {
            the_next_restore_brings_in_first_what_this_one_was_asked_for
            a_note_that_lies_or_is_none_changes_nothing
        }
    }
    fast {
        memory {
            it_is_made_in_memory_settles_and_outlives_a_restart
            one_that_never_settled_is_gone_and_its_number_too
            what_does_not_fit_is_made_on_the_disk
            what_turns_out_not_to_fit_is_made_once_more_on_the_disk
            the_shim_is_killed_in_each_step
            damage_in_memory_is_made_up_for_by_the_disk
        }
    }
}
