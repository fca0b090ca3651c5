//! Pods: what their containers share, and that nothing stays.

use anyhow::{Context, Result};
use rekindle_harness::cri::{ContainerState, Cri};
use rekindle_harness::{Runtime, poll};

fn parent(pid: u32) -> Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(line.context("no parent in the status")?.trim().parse()?)
}

pub(crate) async fn containers_of_a_pod_share_one_shim(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("one-shim").run().await?;
    let one = pod.container("one").args(&["/counter"]).run().await?;
    let two = pod.container("two").args(&["/counter"]).run().await?;
    let (shim, _) = cri.node().shim_of(pod.id())?;
    assert!(cri.node().shim_of(one.id()).is_err());
    assert_eq!(
        (parent(one.pid().await?)?, parent(two.pid().await?)?),
        (shim, shim)
    );
    let mut expected = vec![one.id().to_owned(), two.id().to_owned()];
    let mut listed = pod.containers().await?;
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
    pod.remove().await
}

pub(crate) async fn a_pod_has_one_name_one_address_and_one_shm(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("shared").run().await?;
    let volume = pod.empty_dir("scratch").await?;
    let shell = "sleep 1000";
    let one = pod
        .container("one")
        .bind(&volume, "/scratch", true)
        .shell(shell)
        .run()
        .await?;
    let two = pod
        .container("two")
        .bind(&volume, "/scratch", false)
        .shell(shell)
        .run()
        .await?;
    one.shell("echo from one > /dev/shm/note; echo kept > /scratch/file")
        .await?;
    assert_eq!(
        two.shell("cat /dev/shm/note /scratch/file").await?,
        "from one\nkept"
    );
    assert_ne!(two.exec(&["touch", "/scratch/other"]).await?.code, 0);
    for container in [&one, &two] {
        assert_eq!(container.shell("hostname").await?, "shared");
        assert!(
            container
                .shell("ip -4 addr show eth0")
                .await?
                .contains(pod.address())
        );
        assert!(
            container
                .shell("cat /etc/hosts")
                .await?
                .contains(&format!("{}\tshared", pod.address()))
        );
        assert!(
            container
                .shell("cat /etc/resolv.conf")
                .await?
                .contains("10.96.0.10")
        );
    }
    pod.remove().await
}

pub(crate) async fn a_pod_removed_in_full_run_leaves_nothing(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("in-full-run").run().await?;
    pod.container("one")
        .shell("trap '' TERM; sleep 1000 & sleep 1000 & wait")
        .run()
        .await?;
    pod.container("two").args(&["/counter"]).run().await?;
    pod.container("ended")
        .shell("exit 3")
        .run()
        .await?
        .ended()
        .await?;
    pod.container("created")
        .args(&["/counter"])
        .create()
        .await?;
    // The removal ends it without asking, whatever it traps; what stays is looked for in there.
    pod.remove().await
}

pub(crate) async fn pods_are_found_again_after_a_restart_of_containerd(
    cri: &Cri<'_>,
) -> Result<()> {
    // Its own node: the others' calls would be cut.
    let node = super::new_node(cri.node().runtime()).await?;
    let pod = node.cri().await?.pod("survivor").run().await?;
    let one = pod.container("one").args(&["/counter"]).run().await?;
    let before = one.counts_to(3).await?;
    let (pid, shim) = (one.pid().await?, node.shim_of(pod.id())?);
    node.restart_containerd().await?;
    // The connection is made anew by the first call that misses it, which may fail.
    poll::until("the runtime service", async || Ok(Some(one.state().await?))).await?;
    assert_eq!(one.state().await?, ContainerState::ContainerRunning);
    assert_eq!((one.pid().await?, node.shim_of(pod.id())?), (pid, shim));
    assert_eq!(one.counts_to(before.n + 5).await?.nonce, before.nonce);
    assert_eq!(one.shell("echo works").await?, "works");
    let two = pod.container("two").shell("exit 4").run().await?;
    assert_eq!(two.ended().await?.exit_code, 4);
    one.stop(0).await?;
    assert_eq!(one.ended().await?.exit_code, 137);
    pod.remove().await
}

pub(crate) async fn a_shared_pid_namespace_is_shared(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("one-for-all").shared_pids().run().await?;
    let one = pod.container("one").shell("exec sleep 1234").run().await?;
    let two = pod.container("two").shell("sleep 1000").run().await?;
    assert!(two.shell("ps").await?.contains("sleep 1234"));
    one.stop(0).await?;
    assert_eq!(one.ended().await?.exit_code, 137);
    assert_eq!(two.state().await?, ContainerState::ContainerRunning);
    pod.remove().await
}

pub(crate) async fn a_killed_sandbox_is_told(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("headless").run().await?;
    let one = pod.container("one").args(&["/counter"]).run().await?;
    for (pid, line) in cri.node().processes_of(pod.id())? {
        if line.contains("/pause") {
            let pid = nix::unistd::Pid::from_raw(pid.try_into()?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        }
    }
    poll::until("the sandbox's end", async || {
        Ok((pod.state().await? == k8s_cri::v1::PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    assert_eq!(one.state().await?, ContainerState::ContainerRunning);
    if cri.node().runtime() == Runtime::Go {
        // The shim that containerd ships stays behind then: its containers are deleted behind its back.
        return Ok(pod.stop().await?);
    }
    pod.remove().await
}

/// `hostUsers: false`: root in the pod is nobody on the node.
pub(crate) async fn a_pod_has_its_own_users(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("own-users").own_users().run().await?;
    let one = pod
        .container("one")
        .shell("id -u; stat -c %u:%g /bin/busybox /; echo mine > /file; exec sleep 1000")
        .run()
        .await?;
    one.says("the users", |text| text == "0\n0:0\n0:0\n")
        .await?;
    let pid = one.pid().await?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    assert!(status.contains("Uid:\t200000\t"), "{status}");
    assert_eq!(one.shell("cat /file").await?, "mine");
    let id = pod.id().to_owned();
    pod.remove().await?;
    cri.node().is_rid_of(&id).await
}
