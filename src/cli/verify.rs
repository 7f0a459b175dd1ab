//! `verify`: makes every check that a mount makes, then reads all tensors through the engine.

use super::args::VerifyArgs;
use super::open;
use super::output;
use super::pieces::for_each_piece;
use super::progress::{bar, rate};
use super::request::ViewRequest;
use crate::plan::{TensorId, TensorPlan};
use crate::read::{BlockAudit, Engine, EngineOptions, audit};
use crate::tensor::{ByteSize, to_u64};
use anyhow::Context as _;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use std::sync::Arc;

/// Number of failures that are shown in full.
const SHOWN_FAILURES: usize = 5;

/// The result of a check.
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

/// Checks a checkpoint and a view of it, and prints the result.
///
/// # Errors
/// The checkpoint is missing or damaged, the view is not possible, or a tensor cannot be read.
pub(super) fn run(
    args: &VerifyArgs,
    view: &ViewRequest,
    options: EngineOptions,
) -> anyhow::Result<()> {
    let (checkpoint, plan) = open::plan(view)?;
    let source = checkpoint.dir().display().to_string();
    let summary = plan.summary.to_string();
    let engine = Engine::new(Arc::clone(&checkpoint), Arc::clone(&plan), options);
    let pool = ThreadPoolBuilder::new().num_threads(options.threads).build()?;
    let mut verdict = read_all(&engine, &pool);
    if verdict.ok {
        verdict.fp8_blocks = Some(audit(&checkpoint, &plan)?).filter(|a| a.blocks > 0);
    }
    if args.json {
        output::print_json(&verdict)?;
    } else {
        output::print(&format!("checked `{source}`: {summary}\n{}", report(&verdict)))?;
    }
    anyhow::ensure!(
        verdict.ok,
        "cannot read `{source}`: {} of {} tensors failed: {}",
        verdict.failures,
        verdict.tensors,
        verdict.first_failures.join("; ")
    );
    Ok(())
}

fn report(verdict: &Verdict) -> String {
    let passed = verdict.tensors - verdict.failures;
    let size = ByteSize(verdict.bytes);
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

/// Reads every tensor, also those after one that fails.
fn read_all(engine: &Engine, pool: &ThreadPool) -> Verdict {
    let tensors = &engine.plan().tensors;
    let progress = bar("verify", tensors.iter().map(TensorPlan::bytes).sum());
    let mut failures = Vec::new();
    for (tensor, id) in tensors.iter().zip(0..) {
        let read = for_each_piece(pool, tensor.bytes(), |at, piece| {
            let read = engine.read(TensorId(id), at, piece);
            read.with_context(|| format!("tensor `{}`", tensor.name))?;
            progress.inc(to_u64(piece.len()));
            Ok(())
        });
        if let Err(error) = read {
            failures.push(output::one_line(&error));
        }
    }
    Verdict {
        ok: failures.is_empty(),
        tensors: tensors.len(),
        bytes: progress.position(),
        seconds: progress.elapsed().as_secs_f64(),
        fp8_blocks: None,
        failures: failures.len(),
        first_failures: failures.into_iter().take(SHOWN_FAILURES).collect(),
    }
}
