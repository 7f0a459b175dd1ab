//! The default command: checks, then the mount in the foreground or in the background.

use super::open;
use super::output;
use super::request::MountRequest;
use crate::mount::background::{self, Report};
use crate::mount::mountpoint::{self, Needs};
use crate::mount::signals::Signals;
use crate::mount::{log, serve};
use crate::read::Engine;
use crate::view::View;
use std::path::PathBuf;
use std::sync::Arc;

/// Mounts; returns once the mount answers, or with `-f` once it has ended.
///
/// # Errors
/// Where there is no checkpoint, no such view of it, or no way to mount it.
pub(super) fn run(request: &MountRequest) -> anyhow::Result<()> {
    if request.foreground {
        return run_to_the_end(request, None);
    }
    match Report::take() {
        Some(report) => run_to_the_end(request, Some(report)),
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
    let source = open::locate(&request.view.src)?;
    let at = mountpoint::check(&request.at, &source, request.nonempty)?;
    mountpoint::check_machine(Needs::of(&request.mount))?;
    Ok((source, at))
}

fn run_to_the_end(request: &MountRequest, report: Option<Report>) -> anyhow::Result<()> {
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
    let (checkpoint, plan) = open::plan(&request.view)?;
    let line = format!("mounted `{}` at `{}`: {}", source.display(), at.display(), plan.summary);
    let engine = Arc::new(Engine::new(checkpoint, plan, request.engine));
    let view = Arc::new(View::new(engine, &request.view.files)?);
    let ready = || {
        claim.release();
        report.take().map_or(Ok(()), |report| report.ready(&line))
    };
    let served = serve::mount_and_wait(view, &at, &request.mount, &signals, &line, ready);
    if let (Err(error), true, None) = (&served, background, &report) {
        // The waiting process has returned, so the log is all there is.
        tracing::error!("{error}");
    }
    Ok(served?)
}
