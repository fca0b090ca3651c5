//! System calls that no safe wrapper covers.
#![allow(unsafe_code, reason = "each block says why it is sound")]

use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    process::Command,
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::{AddressFamily, SockFlag, SockType, socket},
    },
};
use tokio::io::unix::AsyncFd;

/// Makes `fd` descriptor `number` of the process that `command` starts, with no close-on-exec. `fd` has
/// to stay open until the process has been started.
pub(crate) fn pass_fd(command: &mut Command, fd: RawFd, number: RawFd) {
    let pass = move || {
        // SAFETY: dup2 and fcntl are async-signal-safe and touch no memory.
        let done = unsafe {
            if fd == number {
                libc::fcntl(number, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, number)
            }
        };
        if done < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    // SAFETY: the closure only makes the two calls above; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(pass) };
}

/// Ends the process that `command` starts when this one ends, killed or not. To be used from the
/// runtime's own thread: the kernel means the thread that forked.
pub(crate) fn die_with_us(command: &mut Command) {
    let ask = || {
        // SAFETY: prctl with PR_SET_PDEATHSIG is async-signal-safe and touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure only makes the call above; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(ask) };
}

/// How many descriptors this process could have before [`more_descriptors`].
static DESCRIPTORS: OnceLock<(u64, u64)> = OnceLock::new();

/// Lets this process have as many descriptors as it may: of a container whose memory is still coming in it
/// holds one for each process.
pub(crate) fn more_descriptors() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if soft < hard && DESCRIPTORS.set((soft, hard)).is_ok() {
        let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        if let Err(error) = raised {
            tracing::debug!(%error, "keeping the limit of descriptors");
        }
    }
}

/// Gives a child the limit that this process began with: runc would hand a container any other.
pub(crate) fn descriptors_as_before(command: &mut Command) {
    let Some((soft, hard)) = DESCRIPTORS.get().copied() else {
        return;
    };
    let limit = move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from);
    // SAFETY: the closure makes one system call; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(limit) };
}

/// Takes over the listener that [`pass_fd`] handed to this process.
pub(crate) fn take_listener(number: RawFd) -> io::Result<UnixListener> {
    // SAFETY: fcntl with F_SETFD changes no memory; a number that is no descriptor gives an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open (just checked), it was put there for us, and nothing else in here uses it.
    let listener = unsafe { UnixListener::from_raw_fd(number) };
    listener.local_addr().map(|_| listener)
}

/// Sends any signal, real-time ones included.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory of ours.
    if unsafe { libc::kill(pid, signal) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Registers a descriptor with the runtime.
pub(crate) fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays the same open descriptor for as long as the AsyncFd owns it.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// Kills the children of a process, whichever of its threads made them.
pub(crate) fn kill_children(pid: i32) {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return;
    };
    for thread in threads.flatten() {
        let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in children
            .split_ascii_whitespace()
            .filter_map(|text| text.parse().ok())
        {
            let _ = kill(child, libc::SIGKILL);
        }
    }
}

/// A user namespace that nobody is in, with the lines of its `uid_map` and `gid_map`.
pub(crate) fn user_namespace(uids: &str, gids: &str) -> io::Result<OwnedFd> {
    /// Ends the process that was made for it.
    struct Idle(libc::pid_t);
    impl Drop for Idle {
        fn drop(&mut self) {
            let _ = kill(self.0, libc::SIGKILL);
            // SAFETY: takes two numbers and no place for an answer.
            unsafe { libc::waitpid(self.0, std::ptr::null_mut(), libc::__WCLONE) };
        }
    }
    // Without a signal at its end the process is none of the children that `exits` reaps.
    // SAFETY: as fork; the child makes only the two calls below, which allocate nothing and take no lock.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER, 0, 0, 0, 0) };
    match libc::pid_t::try_from(pid) {
        Ok(0) => loop {
            // SAFETY: see above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::pause();
            }
        },
        Ok(pid @ 1..) => {
            let idle = Idle(pid);
            std::fs::write(format!("/proc/{pid}/uid_map"), uids)?;
            std::fs::write(format!("/proc/{pid}/gid_map"), gids)?;
            let namespace = std::fs::File::open(format!("/proc/{pid}/ns/user"))?;
            drop(idle);
            Ok(namespace.into())
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Shows the files of a mount that is attached nowhere as the users' of a namespace.
pub(crate) fn map_users(mount: &OwnedFd, users: &OwnedFd, read_only: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP
            | if read_only {
                libc::MOUNT_ATTR_RDONLY
            } else {
                0
            },
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(users.as_raw_fd().cast_unsigned()),
    };
    // SAFETY: the path is a constant and the structure lives until the call is over, with its size told.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Brings up the loopback device of this thread's network namespace (`netdevice(7)`).
pub(crate) fn loopback_up() -> nix::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: a name and a union of numbers and addresses, of which zeros are one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    // SAFETY: the kernel reads the name and writes the flags.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request)
    })?;
    // SAFETY: the member that the call before has written.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: the kernel reads both.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })?;
    Ok(())
}

/// Whether two processes have one memory, as between `vfork` and `exec`.
pub(crate) fn share_memory(one: i32, other: i32) -> bool {
    /// `KCMP_VM` of `include/uapi/linux/kcmp.h`.
    const VM: i32 = 1;
    // SAFETY: compares two processes by number, and touches no memory of this one. Without the call in the
    // kernel CRIU does not work either.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, VM, 0, 0) == 0 }
}

/// A duplicate numbered above everything that a child gets by number, so that placing one descriptor
/// cannot overwrite another that is yet to be placed.
pub(crate) fn out_of_the_way(fd: &OwnedFd, above: RawFd) -> io::Result<OwnedFd> {
    let number = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(above))?;
    // SAFETY: the kernel has just made it for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
