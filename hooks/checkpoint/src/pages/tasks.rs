//! The processes of a container: their numbers inside it, by which CRIU's images name them, and here.

use std::{collections::HashMap, fs, io};

use super::PagesError;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its number in the PID namespace of this process.
    pub pid: i32,
    /// Its parent's number there.
    pub parent: i32,
    /// Its number in the container.
    pub container_pid: i32,
    /// Its name, at most 15 bytes.
    pub comm: String,
    /// Resident memory, bytes.
    pub rss: u64,
}

/// The processes of a container, by their numbers in it.
#[derive(Debug, Clone, Default)]
pub struct Tasks(HashMap<i32, Task>);

impl Tasks {
    /// The container's first process and all below it: the tree that CRIU dumps. The tasks should be
    /// stopped, or the list is old when it is returned.
    ///
    /// # Errors
    /// When `/proc` cannot be read, or a process is in a PID namespace below the container's.
    pub fn below(init: i32) -> Result<Self, PagesError> {
        let mut found = HashMap::new();
        let mut open = vec![init];
        let mut depth = None;
        while let Some(pid) = open.pop() {
            let path = format!("/proc/{pid}/status");
            let status =
                fs::read_to_string(&path).map_err(|source| PagesError::Tasks { path, source })?;
            let (task, levels) = parse_status(pid, &status);
            // CRIU numbers processes as the container's first process sees them.
            if levels != *depth.get_or_insert(levels) {
                return Err(PagesError::NestedPidNamespace { pid });
            }
            found.insert(task.container_pid, task);
            open.extend(children(pid)?);
        }
        Ok(Self(found))
    }

    /// The process that has this number in the container.
    pub fn by_container_pid(&self, pid: i32) -> Option<&Task> {
        self.0.get(&pid)
    }

    /// All, by their numbers in the container.
    pub fn all(&self) -> Vec<Task> {
        let mut all: Vec<Task> = self.0.values().cloned().collect();
        all.sort_by_key(|task| task.container_pid);
        all
    }
}

impl FromIterator<Task> for Tasks {
    fn from_iter<I: IntoIterator<Item = Task>>(tasks: I) -> Self {
        Self(
            tasks
                .into_iter()
                .map(|task| (task.container_pid, task))
                .collect(),
        )
    }
}

/// What a status file says, and in how many PID namespaces the process has a number.
fn parse_status(pid: i32, status: &str) -> (Task, usize) {
    let field = |key: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .unwrap_or_default()
            .trim()
    };
    let numbers = field("NSpid").split_ascii_whitespace();
    let container_pid = numbers.clone().last().and_then(|text| text.parse().ok());
    let rss = field("VmRSS").split_ascii_whitespace().next();
    let task = Task {
        pid,
        parent: field("PPid").parse().unwrap_or(0),
        container_pid: container_pid.unwrap_or(pid),
        comm: field("Name").to_owned(),
        rss: rss.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0) << 10,
    };
    (task, numbers.count())
}

/// The children of all threads of a process: a child belongs to the thread that made it.
fn children(pid: i32) -> Result<Vec<i32>, PagesError> {
    let dir = format!("/proc/{pid}/task");
    let read = |path: &str| {
        let path = path.to_owned();
        |source: io::Error| PagesError::Tasks { path, source }
    };
    let mut found = Vec::new();
    for thread in fs::read_dir(&dir).map_err(read(&dir))? {
        let path = thread.map_err(read(&dir))?.path().join("children");
        let text = match fs::read_to_string(&path) {
            // The thread has ended since.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(read(&path.to_string_lossy()))?,
        };
        found.extend(
            text.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    Ok(found)
}

/// When a process began, in ticks since the host's start (`/proc/<pid>/stat`): with its number, which process it is.
///
/// # Errors
/// When there is no such process.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Its name, in parentheses, may have any character.
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let ticks = behind.split_ascii_whitespace().nth(19);
    let ticks = ticks.and_then(|text| text.parse().ok());
    ticks.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read() {
        let status = "Name:\tpython3\nState:\tt (tracing stop)\nPPid:\t57\nNSpid:\t4711\t58\t7\nVmRSS:\t  512 kB\n";
        let (task, levels) = parse_status(58, status);
        assert_eq!(
            (task.pid, task.parent, task.container_pid, levels),
            (58, 57, 7, 3)
        );
        assert_eq!((task.comm.as_str(), task.rss), ("python3", 512 << 10));
    }

    #[test]
    fn this_process_finds_itself_and_its_child() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let me = std::process::id().cast_signed();
        let tasks = Tasks::below(me).unwrap().all();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(tasks.iter().any(|task| task.pid == me && task.rss > 0));
        assert!(start_time(me).unwrap() > 0);
        assert!(
            tasks
                .iter()
                .any(|task| task.pid == child.id().cast_signed())
        );
    }
}
