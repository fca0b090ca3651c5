//! What a kubelet may expect of a pod's runtime, asked through CRI of the shim that containerd ships and of ours.
//!
//! One node per runtime serves all tests of this program, at the same time: a pod is called as its test is.
//! `REKINDLE_RUNTIMES=go` (or `rekindle`) leaves the other one out.

mod checkpoint;
mod container;
mod pod;
mod refusals;

use anyhow::{Result, anyhow};
use rekindle_harness::{Node, NodeConfig, Runtime, images};
use tokio::sync::OnceCell;

/// The node of a runtime, made by the first test that asks. It is never dropped: its keeper ends it after this program.
async fn stage(runtime: Runtime) -> Result<Option<&'static Node>> {
    static GO: OnceCell<Result<Node, String>> = OnceCell::const_new();
    static REKINDLE: OnceCell<Result<Node, String>> = OnceCell::const_new();
    let (cell, name) = match runtime {
        Runtime::Go => (&GO, "go"),
        Runtime::Rekindle => (&REKINDLE, "rekindle"),
    };
    let wanted = std::env::var("REKINDLE_RUNTIMES").unwrap_or_else(|_| "go,rekindle".into());
    if !wanted.split(',').any(|one| one.trim() == name) {
        return Ok(None);
    }
    let made = cell
        .get_or_init(async || new_node(runtime).await.map_err(|e| format!("{e:#}")))
        .await;
    made.as_ref().map(Some).map_err(|e| anyhow!("{e}"))
}

/// A node of a runtime, with what pods need.
async fn new_node(runtime: Runtime) -> Result<Node> {
    let node = Node::start(NodeConfig::new(runtime)?).await?;
    for image in [images::pause()?, images::busybox()?] {
        node.import(&image).await?;
    }
    Ok(node)
}

macro_rules! tests {
    ($($name:ident $runtime:ident { $($module:ident { $($test:ident)* })* })*) => {
        $(mod $name {
            $(mod $module {
                $(#[tokio::test]
                async fn $test() -> anyhow::Result<()> {
                    let name = concat!(stringify!($name), "::", stringify!($module), "::", stringify!($test));
                    if let Some(outcome) = rekindle_harness::vm::instead(name) { return outcome; }
                    let Some(node) = crate::stage(rekindle_harness::Runtime::$runtime).await? else { return Ok(()) };
                    let outcome = crate::$module::$test(&node.cri().await?).await;
                    outcome.map_err(|e| e.context(format!("containerd's log ends with\n{}", node.log_tail(12))))
                })*
            })*
        })*
    };
}

macro_rules! both {
    ({ $($common:tt)* } { $($ours:tt)* }) => {
        tests! {
            go Go { $($common)* }
            rekindle Rekindle { $($common)* $($ours)* }
        }
    };
}

both! {
    {
        pod {
            containers_of_a_pod_share_one_shim
            a_pod_has_one_name_one_address_and_one_shm
            a_pod_removed_in_full_run_leaves_nothing
            pods_are_found_again_after_a_restart_of_containerd
            a_shared_pid_namespace_is_shared
            a_killed_sandbox_is_told
            a_pod_has_its_own_users
        }
        container {
            logs_are_apart
            a_long_line_arrives_whole
            exec_reports_output_and_code
            stop_asks_before_it_kills
            one_container_restarts_alone
            a_killed_process_is_told
            an_end_is_told_with_its_reason
            a_missing_program_fails_the_start_alone
            last_words_arrive
            stats_are_there
        }
        checkpoint {
            the_kubelets_checkpoint_makes_an_archive
        }
    }
    {
        refusals {
            an_unknown_key_is_refused_by_name
            a_bad_uri_is_refused
            a_mount_that_climbs_is_refused
            an_image_name_that_climbs_is_refused
            a_policy_that_is_none_is_refused
            what_this_build_lacks_is_refused
            other_annotations_are_nobodys_business
        }
    }
}
