//! Two system calls in a thread of another process, on x86-64.
//!
//! Sources: `ptrace(2)`; `arch/x86/kernel/signal.c` for what becomes of a call that was interrupted.
#![allow(unsafe_code, reason = "requests of ptrace that nix does not have")]

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    thread,
    time::{Duration, Instant},
};

use linux_raw_sys::general::UFFD_USER_MODE_ONLY;
use nix::{
    errno::Errno,
    libc::{self, user_regs_struct},
    sys::{
        ptrace,
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// How long a thread may take to stop. One that waits in the kernel for a disk does not, and is let be.
const PATIENCE: Duration = Duration::from_millis(500);
/// `PTRACE_O_SUSPEND_SECCOMP`: the filters of a container may refuse or even punish the call.
const SUSPEND_SECCOMP: i32 = 1 << 21;
const GETSIGMASK: libc::c_uint = 0x420a;
const SETSIGMASK: libc::c_uint = 0x420b;
/// Bytes of the kernel's signal set.
const SIGNAL_SET: usize = 8;
/// The code segment of 64-bit programs.
const USER_CS: u64 = 0x33;
/// What the kernel puts into `rax` when a call was interrupted, and who is to call again (`linux/errno.h`).
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

#[derive(Debug, thiserror::Error)]
pub(super) enum InjectError {
    #[error("cannot {doing}")]
    Kernel {
        doing: &'static str,
        source: io::Error,
    },
    #[error("{0}")]
    Unfit(&'static str),
}

fn kernel<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> InjectError {
    move |source| InjectError::Kernel {
        doing,
        source: source.into(),
    }
}

/// Opens a userfaultfd for the memory of `pid`.
pub(super) fn userfaultfd(pid: i32) -> Result<OwnedFd, InjectError> {
    let instruction = syscall_in_vdso(pid)?;
    let pidfd = rustix::process::Pid::from_raw(pid).ok_or(InjectError::Unfit("no process"))?;
    let pidfd = pidfd_open(pidfd, PidfdFlags::empty()).map_err(kernel("open the process"))?;
    let stopped = Stopped::seize(Pid::from_raw(pid), instruction)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY as i32;
    let fd = stopped.call(libc::SYS_userfaultfd, flags as u64)?;
    let ours = pidfd_getfd(&pidfd, fd as i32, PidfdGetfdFlags::empty())
        .map_err(kernel("duplicate its userfaultfd"));
    stopped.call(libc::SYS_close, fd)?;
    ours
}

/// Where the process has a `syscall` instruction.
fn syscall_in_vdso(pid: i32) -> Result<u64, InjectError> {
    const CODE: [u8; 2] = [0x0f, 0x05];
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(kernel("read its maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    let range = line.and_then(|line| line.split_whitespace().next()?.split_once('-'));
    let number = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = range
        .and_then(|(start, end)| Some((number(start)?, number(end)?)))
        .ok_or(InjectError::Unfit("it has no vDSO"))?;
    let mut code = vec![0; (end - start) as usize];
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(kernel("open its memory"))?;
    memory
        .read_exact_at(&mut code, start)
        .map_err(kernel("read its vDSO"))?;
    let at = code.windows(2).position(|bytes| bytes == CODE);
    let at = at.ok_or(InjectError::Unfit("its vDSO makes no system call"))?;
    Ok(start + at as u64)
}

/// A thread that is stopped, and goes on as it was when this is dropped.
struct Stopped {
    pid: Pid,
    /// As the thread was stopped, and as it shall go on.
    registers: user_regs_struct,
    signals: u64,
    instruction: u64,
}

impl Stopped {
    fn seize(pid: Pid, instruction: u64) -> Result<Self, InjectError> {
        // SAFETY: takes numbers only.
        let seized = unsafe {
            let options = ptrace::Options::PTRACE_O_TRACESYSGOOD.bits() | SUSPEND_SECCOMP;
            libc::ptrace(libc::PTRACE_SEIZE, pid.as_raw(), 0, options)
        };
        if seized < 0 {
            return Err(kernel("trace it")(io::Error::last_os_error()));
        }
        // From here on an error ends with the program, and with it the tracing: nothing was changed yet.
        ptrace::interrupt(pid).map_err(kernel("stop it"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match stop_of(pid, deadline)? {
                WaitStatus::PtraceEvent(_, Signal::SIGTRAP, libc::PTRACE_EVENT_STOP) => break,
                // It was stopped by a signal: it is to stay so.
                WaitStatus::PtraceEvent(..) => {
                    let _ = ptrace::detach(pid, None);
                    return Err(InjectError::Unfit("it is stopped"));
                }
                // A signal that came first is its own.
                WaitStatus::Stopped(_, signal) => {
                    ptrace::cont(pid, signal).map_err(kernel("pass on its signal"))?;
                }
                _ => {}
            }
        }
        let found = registers_and_signals(pid);
        let (registers, signals) = match found {
            Ok((registers, signals)) if registers.cs == USER_CS => (registers, signals),
            other => {
                let _ = ptrace::detach(pid, None);
                return Err(other
                    .err()
                    .unwrap_or(InjectError::Unfit("it is a 32-bit program")));
            }
        };
        let stopped = Self {
            pid,
            registers: as_interrupted(registers),
            signals,
            instruction,
        };
        // No handler may run on registers that are not the thread's.
        set_signals(pid, u64::MAX).map_err(kernel("hold its signals back"))?;
        Ok(stopped)
    }

    /// Makes a system call of one argument.
    fn call(&self, number: i64, argument: u64) -> Result<u64, InjectError> {
        let registers = user_regs_struct {
            rip: self.instruction,
            rax: number as u64,
            rdi: argument,
            // Or the kernel would take it for a call that was interrupted.
            orig_rax: u64::MAX,
            ..self.registers
        };
        ptrace::setregs(self.pid, registers).map_err(kernel("set its registers"))?;
        let (mut entered, mut signal) = (false, None);
        loop {
            ptrace::syscall(self.pid, signal).map_err(kernel("let it make a call"))?;
            signal = None;
            // It stands still before and behind the call.
            match waitpid(self.pid, Some(WaitPidFlag::__WALL))
                .map_err(kernel("wait for its call"))?
            {
                WaitStatus::PtraceSyscall(_) if entered => break,
                WaitStatus::PtraceSyscall(_) => entered = true,
                // SIGSTOP, which cannot be held back. It stops when it is let go.
                WaitStatus::Stopped(_, stop) => signal = Some(stop),
                WaitStatus::PtraceEvent(..) => {}
                _ => return Err(InjectError::Unfit("it has ended")),
            }
        }
        let answer = ptrace::getregs(self.pid)
            .map_err(kernel("read its registers"))?
            .rax as i64;
        match answer {
            -4095..0 => Err(kernel("make it call")(io::Error::from_raw_os_error(
                -answer as i32,
            ))),
            answer => Ok(answer as u64),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Each fails only for a thread that is gone.
        let _ = ptrace::setregs(self.pid, self.registers);
        let _ = set_signals(self.pid, self.signals);
        let _ = ptrace::detach(self.pid, None);
    }
}

/// The registers of a thread that was interrupted in a call, so that it calls again, as the kernel would have it.
fn as_interrupted(mut registers: user_regs_struct) -> user_regs_struct {
    let in_call = registers.orig_rax.cast_signed() >= 0;
    let again = match -registers.rax.cast_signed() {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND if in_call => registers.orig_rax,
        ERESTART_RESTARTBLOCK if in_call => libc::SYS_restart_syscall as u64,
        _ => return registers,
    };
    registers.rax = again;
    registers.rip -= 2;
    registers.orig_rax = u64::MAX;
    registers
}

/// How it stopped next.
fn stop_of(pid: Pid, deadline: Instant) -> Result<WaitStatus, InjectError> {
    loop {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
        match waitpid(pid, Some(flags)).map_err(kernel("wait for it to stop"))? {
            WaitStatus::StillAlive if Instant::now() < deadline => pause(),
            WaitStatus::StillAlive => return Err(InjectError::Unfit("it does not stop")),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                return Err(InjectError::Unfit("it has ended"));
            }
            status => return Ok(status),
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "a program that does nothing else"
)]
fn pause() {
    thread::sleep(Duration::from_micros(100));
}

fn registers_and_signals(pid: Pid) -> Result<(user_regs_struct, u64), InjectError> {
    let registers = ptrace::getregs(pid).map_err(kernel("read its registers"))?;
    let mut signals = 0_u64;
    // SAFETY: the kernel writes 8 bytes to `signals`.
    let read = unsafe { libc::ptrace(GETSIGMASK, pid.as_raw(), SIGNAL_SET, &raw mut signals) };
    Errno::result(read).map_err(kernel("read its signals"))?;
    Ok((registers, signals))
}

fn set_signals(pid: Pid, signals: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads 8 bytes of `signals`.
    let set = unsafe { libc::ptrace(SETSIGMASK, pid.as_raw(), SIGNAL_SET, &raw const signals) };
    Errno::result(set).map(drop)
}
