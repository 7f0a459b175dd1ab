//! The default command: mounts a view, in the foreground or in the background.

use super::open;
use super::output;
use super::request::MountRequest;
use crate::mount::background::{self, Report};
use crate::mount::mountpoint::{self, Requirements};
use crate::mount::signals::Signals;
use crate::mount::{log, serve};
use crate::read::Engine;
use crate::view::View;
use std::path::PathBuf;
use std::sync::Arc;

/// Mounts a view. Returns once the mount answers, or with `-f` once it was unmounted.
///
/// # Errors
/// The checkpoint is missing or damaged, the view is not possible, or the mount is refused or breaks.
pub(super) fn run(request: &MountRequest) -> anyhow::Result<()> {
    if request.foreground {
        return serve_and_report(request, None);
    }
    match Report::in_second_process() {
        Some(report) => serve_and_report(request, Some(report)),
        None => {
            // The quick checks come first, so that their errors need no second process.
            check(request)?;
            let line = background::launch()?;
            output::print(&format!("{line}\n"))
        }
    }
}

/// Checks the mount point and the machine. Returns the checkpoint's directory and the mount point,
/// both absolute.
fn check(request: &MountRequest) -> anyhow::Result<(PathBuf, PathBuf)> {
    let source = open::locate(&request.view.src)?;
    let at = mountpoint::check(&request.at, &source, request.nonempty)?;
    mountpoint::check_machine(Requirements::of(&request.mount))?;
    Ok((source, at))
}

/// Serves a mount until it is unmounted. An error before the mount was up goes to the process that
/// waits for `report`, if there is one.
fn serve_and_report(request: &MountRequest, report: Option<Report>) -> anyhow::Result<()> {
    let mut report = report;
    let served = serve(request, &mut report);
    match (served, report) {
        (Err(error), Some(report)) => {
            report.failed(&output::one_line(&error));
            std::process::exit(1)
        }
        (served, _) => served,
    }
}

/// Serves a mount until it is unmounted. Takes the report out of `report` once the mount is up.
fn serve(request: &MountRequest, report: &mut Option<Report>) -> anyhow::Result<()> {
    let background = report.is_some();
    log::init(&request.log, background)?;
    let signals = Signals::listen(background)?;
    let lock = mountpoint::lock(&request.at)?;
    let (source, at) = check(request)?;
    let (checkpoint, plan) = open::plan(&request.view)?;
    let line = format!("mounted `{}` at `{}`: {}", source.display(), at.display(), plan.summary);
    let engine = Arc::new(Engine::new(checkpoint, plan, request.engine));
    let view = Arc::new(View::new(engine, &request.view.files)?);
    let ready = || {
        lock.release();
        report.take().map_or(Ok(()), |report| report.ready(&line))
    };
    let served = serve::mount_and_wait(view, &at, &request.mount, &signals, &line, ready);
    if let (Err(error), true, None) = (&served, background, &report) {
        // The first process has returned, so the error can only go to the log.
        tracing::error!("{error}");
    }
    Ok(served?)
}
