//! The default command: checks, then the mount in the foreground or in the background.

use super::open::{self, Owner};
use super::output;
use super::request::MountRequest;
use crate::daemon::background::{self, Report};
use crate::daemon::mountpoint::{self, Needs};
use crate::daemon::signals::Signals;
use crate::daemon::{self, log};
use fuser::{MountOption, SessionACL};
use std::path::PathBuf;

/// Mounts; returns once the mount answers, or with `-f` once it has ended.
///
/// # Errors
/// Where there is no checkpoint, no such view of it, or no way to mount it.
pub fn run(request: &MountRequest) -> anyhow::Result<()> {
    if request.foreground {
        return serve(request, None);
    }
    match Report::take() {
        Some(report) => serve(request, Some(report)),
        None => {
            // What is refused here is refused without a second process.
            check(request)?;
            let line = background::launch()?;
            output::print(&format!("{line}\n"))
        }
    }
}

/// The checkpoint's directory and the mount point, both absolute.
fn check(request: &MountRequest) -> anyhow::Result<(PathBuf, PathBuf)> {
    let source = open::locate(&request.src)?;
    let at = mountpoint::check(&request.at, &source, request.nonempty)?;
    mountpoint::check_machine(Needs {
        others: request.kernel.acl != SessionACL::Owner,
        auto_unmount: request.kernel.extra.contains(&MountOption::AutoUnmount),
    })?;
    Ok((source, at))
}

fn serve(request: &MountRequest, report: Option<Report>) -> anyhow::Result<()> {
    let mut report = report;
    let served = try_serve(request, &mut report);
    match (served, report) {
        // Nobody has heard of it, so the waiting process shall say it.
        (Err(error), Some(report)) => {
            report.failed(&output::in_words(&error));
            std::process::exit(1)
        }
        (served, _) => served,
    }
}

/// Takes the report out of `report` once the mount is up.
fn try_serve(request: &MountRequest, report: &mut Option<Report>) -> anyhow::Result<()> {
    let background = report.is_some();
    log::init(&request.log, background)?;
    let signals = Signals::listen(background)?;
    let claim = mountpoint::claim(&request.at)?;
    let (source, at) = check(request)?;
    let planned = open::plan(&source, &request.plan)?;
    let line =
        format!("mounted `{}` at `{}`: {}", source.display(), at.display(), planned.plan.summary);
    let kernel = &request.kernel;
    let owner = Owner {
        uid: kernel.uid,
        gid: kernel.gid,
        file_mode: kernel.file_mode,
        dir_mode: kernel.dir_mode,
    };
    let view = open::view(
        planned.engine(&request.engine, request.kernel.direct_io),
        &request.plan,
        &owner,
    )?;
    let options = open::mount_options(&source, kernel, &request.engine);
    let ready = || {
        claim.release();
        report.take().map_or(Ok(()), |report| report.ready(&line))
    };
    let served = daemon::mount_and_wait(view, &at, &options, &signals, &line, ready);
    if let (Err(error), true, None) = (&served, background, &report) {
        // The waiting process has returned, so the log is all there is.
        tracing::error!("{error}");
    }
    Ok(served?)
}
