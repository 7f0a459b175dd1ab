//! Going into the background without forking: the command starts itself again, detached, and waits
//! for what that process has to report.
//!
//! ```text
//! launch()  ── same arguments, stdout is a pipe ──>  Report::take()
//!   waits   <───────────── `+line` or `-message` ──  Report::ready / failed
//!   returns                                          serves until unmounted
//! ```
//! A fork of a process with threads would leave them behind; this does not, and needs no unsafe.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Set in the second process to the process id of the first, so that it does not start a third.
const MARK: &str = "MOUNT_CKPT_BACKGROUND";

/// Why there is no mount in the background.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// The second process does not start.
    #[error("cannot start the background process: {0}")]
    Start(io::Error),
    /// It started and reported why it cannot mount.
    #[error("{0}")]
    Failed(String),
    /// It ended without a word.
    #[error("the background process ended before the mount answered ({0}): try again with `-f`")]
    Died(String),
}

/// Starts this command again in the background and waits until it reports.
///
/// Returns the line it reports once the mount answers.
///
/// # Errors
/// Where the mount does not come up.
pub(crate) fn launch() -> Result<String, LaunchError> {
    let program = env::current_exe().map_err(LaunchError::Start)?;
    let mut args = env::args_os();
    let name = args.next().unwrap_or_else(|| program.clone().into());
    let mut child = Command::new(program)
        .arg0(name)
        .args(args)
        .env(MARK, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(LaunchError::Start)?;
    let mut said = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut said).map_err(LaunchError::Start)?;
    }
    if let Some(line) = said.strip_prefix('+') {
        return Ok(line.to_owned());
    }
    let status = child.wait().map_err(LaunchError::Start)?;
    Err(match said.strip_prefix('-') {
        Some(message) => LaunchError::Failed(message.to_owned()),
        None => LaunchError::Died(status.to_string()),
    })
}

/// The second process's one word to the first.
#[derive(Debug)]
pub(crate) struct Report(());

impl Report {
    /// `None` in the first process, the one that a person started.
    ///
    /// In the second, detaches it from the terminal's session, so that Ctrl-C ends the wait and a
    /// closed terminal ends nothing.
    pub(crate) fn take() -> Option<Report> {
        let parent = nix::unistd::getppid().to_string();
        if env::var_os(MARK)? != *parent {
            return None;
        }
        // Fails for a leader of a process group only, which has its own session already.
        let _ = nix::unistd::setsid();
        Some(Report(()))
    }

    /// Says that the mount answers, and lets go of the terminal and of the working directory.
    ///
    /// # Errors
    /// Where nobody listens any more.
    pub(crate) fn ready(self, line: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        write!(stdout, "+{line}")?;
        stdout.flush()?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stderr(&null)?;
        env::set_current_dir("/")?;
        // Last: with it the pipe closes, and the first process returns.
        nix::unistd::dup2_stdout(&null)?;
        Ok(())
    }

    /// Says why there is no mount.
    pub(crate) fn failed(self, message: &str) {
        // Where nobody listens there is nobody to tell.
        let _ = write!(io::stdout().lock(), "-{message}");
        let _ = io::stdout().flush();
    }
}
