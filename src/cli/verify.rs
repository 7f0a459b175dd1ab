//! `verify`: every check that a mount makes, then all the data, read through the engine.

use super::args::VerifyArgs;
use super::open::{self, ViewTensor};
use super::output;
use super::pieces::for_each_piece;
use super::progress::{Progress, rate};
use super::request::{EngineOptions, PlanOptions};
use super::size::Size;
use crate::read::{BlockAudit, Engine, audit};
use serde::Serialize;

/// How many failures are told one by one.
const TOLD: usize = 5;

/// What was checked, and what failed.
#[derive(Debug, Serialize)]
struct Verdict {
    ok: bool,
    tensors: usize,
    bytes: u64,
    seconds: f64,
    fp8_blocks: Option<BlockAudit>,
    failures: usize,
    first_failures: Vec<String>,
}

/// Checks a checkpoint and a view of it.
///
/// # Errors
/// Where there is no checkpoint, no such view of it, or its data cannot be read.
pub fn run(args: &VerifyArgs, plan: &PlanOptions, engine: &EngineOptions) -> anyhow::Result<()> {
    let planned = open::locate_and_plan(&args.src, plan)?;
    let source = planned.checkpoint.dir().display().to_string();
    let summary = planned.plan.summary.to_string();
    let threads = engine.threads;
    let (engine, checkpoint) = planned.engine(engine, false);
    let mut verdict = read_all(&engine, &open::tensors(&engine), threads);
    if verdict.ok {
        verdict.fp8_blocks = Some(audit(&checkpoint, engine.plan())?).filter(|a| a.blocks > 0);
    }
    if args.json {
        output::print_json(&verdict)?;
    } else {
        output::print(&format!("checked `{source}`: {summary}\n{}", told(&verdict)))?;
    }
    anyhow::ensure!(
        verdict.ok,
        "`{source}` does not hold: {} of {} tensors failed: {}",
        verdict.failures,
        verdict.tensors,
        verdict.first_failures.join("; ")
    );
    Ok(())
}

fn told(verdict: &Verdict) -> String {
    let passed = verdict.tensors - verdict.failures;
    let size = Size(verdict.bytes).rounded();
    let rate = rate(verdict.bytes, std::time::Duration::from_secs_f64(verdict.seconds));
    let blocks = verdict.fp8_blocks.map_or_else(String::new, |audit| {
        format!(
            "FP8 blocks: {} of {} hold the largest code, as scales of amax / 448 make them\n",
            audit.with_largest, audit.blocks
        )
    });
    format!(
        "headers, names, shapes: passed\n\
         data: {passed} of {} tensors passed, {size} read at {rate}\n{blocks}",
        verdict.tensors
    )
}

/// Reads every tensor to its end, those after a failure too.
fn read_all(engine: &Engine, tensors: &[ViewTensor], threads: usize) -> Verdict {
    let progress = Progress::new("verify", tensors.iter().map(|tensor| tensor.bytes).sum());
    let mut failures = Vec::new();
    for tensor in tensors {
        let read = for_each_piece(tensor.bytes, threads, |at, piece| {
            open::read_tensor(engine, tensor, at, piece)?;
            progress.add(u64::try_from(piece.len()).expect("a piece is below 2^64 bytes"));
            Ok(())
        });
        if let Err(error) = read {
            failures.push(output::in_words(&error));
        }
    }
    Verdict {
        ok: failures.is_empty(),
        tensors: tensors.len(),
        bytes: progress.done(),
        seconds: progress.elapsed().as_secs_f64(),
        fp8_blocks: None,
        failures: failures.len(),
        first_failures: failures.into_iter().take(TOLD).collect(),
    }
}
