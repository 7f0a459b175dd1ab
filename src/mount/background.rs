//! Moves a mount into the background without a fork: the command starts itself a second time and
//! waits until that process reports the mount or an error.
//!
//! ```text
//! first process                                      second process
//! launch()  ── same arguments, stdout is a pipe ──>  Report::in_second_process()
//!   waits   <───────────── `+line` or `-message` ──  Report::ready / failed
//!   returns                                          serves until unmounted
//! ```
//! A fork copies only the calling thread and is unsafe code in Rust; this way has neither problem.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Environment variable that tells the second process apart: the process id of the first. A variable
/// that was inherited from further up names another parent and is ignored.
const FIRST_PROCESS_VARIABLE: &str = "MOUNT_CKPT_BACKGROUND";

/// Why a mount in the background did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// The second process could not be started, or its report could not be read.
    #[error("cannot start the background process: {0}")]
    Start(io::Error),
    /// The second process reported this error.
    #[error("{0}")]
    Failed(String),
    /// The second process ended without a report.
    #[error("the background process ended before the mount answered ({0})")]
    Died(String),
}

/// Starts this command again in the background and returns the line that it reports once the mount
/// answers.
///
/// # Errors
/// The second process does not start, reports an error, or ends without a report.
pub(crate) fn launch() -> Result<String, LaunchError> {
    let program = env::current_exe().map_err(LaunchError::Start)?;
    let mut args = env::args_os();
    let name = args.next().unwrap_or_else(|| program.clone().into());
    let mut child = Command::new(program)
        .arg0(name)
        .args(args)
        .env(FIRST_PROCESS_VARIABLE, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(LaunchError::Start)?;
    let mut report = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut report).map_err(LaunchError::Start)?;
    }
    if let Some(line) = report.strip_prefix('+') {
        return Ok(line.to_owned());
    }
    let status = child.wait().map_err(LaunchError::Start)?;
    Err(match report.strip_prefix('-') {
        Some(message) => LaunchError::Failed(message.to_owned()),
        None => LaunchError::Died(status.to_string()),
    })
}

/// The channel on which the second process reports to the first, once.
#[derive(Debug)]
pub(crate) struct Report(());

impl Report {
    /// `Some` in the second process, `None` in one that was started otherwise.
    ///
    /// Also moves the second process into a session of its own: Ctrl-C then interrupts only the first,
    /// and closing the terminal does not end the mount.
    pub(crate) fn in_second_process() -> Option<Report> {
        let parent = nix::unistd::getppid().to_string();
        if env::var_os(FIRST_PROCESS_VARIABLE)? != *parent {
            return None;
        }
        // Fails only for the leader of a process group, which a child of `launch` never is.
        let _ = nix::unistd::setsid();
        Some(Report(()))
    }

    /// Reports that the mount answers, then lets go of stderr, the working directory and stdout.
    ///
    /// # Errors
    /// The first process is gone, or `/dev/null` cannot be opened.
    pub(crate) fn ready(self, line: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        write!(stdout, "+{line}")?;
        stdout.flush()?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stderr(&null)?;
        env::set_current_dir("/")?;
        // Last, since this closes the pipe, on which the first process returns.
        nix::unistd::dup2_stdout(&null)?;
        Ok(())
    }

    /// Reports why there is no mount.
    pub(crate) fn failed(self, message: &str) {
        // If the first process is gone, there is nobody left to report to.
        let _ = write!(io::stdout().lock(), "-{message}");
        let _ = io::stdout().flush();
    }
}
