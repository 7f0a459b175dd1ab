//! From the name of a checkpoint to the plan of its view.

use super::request::{MappingChoice, ViewRequest};
use crate::mapping::Mapping;
use crate::plan::Plan;
use crate::source::{self, Checkpoint};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The checkpoint directory that `src` names, absolute and without symlinks in it.
///
/// # Errors
/// Where there is none.
pub(super) fn locate(src: &Path) -> anyhow::Result<PathBuf> {
    // A name of the hub is UTF-8; a path need not be.
    let found = match src.to_str() {
        Some(name) => source::resolve(name)?,
        None => src.to_owned(),
    };
    found.canonicalize().with_context(|| format!("cannot look at `{}`", found.display()))
}

/// Opens the checkpoint of a request and plans its view: every check that a mount makes of it.
///
/// # Errors
/// Where there is no checkpoint, it is damaged, or no such view of it can be.
pub(super) fn plan(request: &ViewRequest) -> anyhow::Result<(Arc<Checkpoint>, Arc<Plan>)> {
    let checkpoint = Checkpoint::open(&locate(&request.src)?)?;
    let mapping = match &request.mapping {
        MappingChoice::Auto => Mapping::for_model_types(&checkpoint.config().model_types())?,
        MappingChoice::Named(name) => Mapping::named(name)?,
        MappingChoice::File(file) => Mapping::load(file)?,
    };
    let mut options = request.plan.clone();
    if let (Some(quantize), Some(src)) = (&mut options.quantize, &request.scales_from) {
        let original = locate(src).and_then(|dir| Ok(Checkpoint::open(&dir)?));
        let original = original.with_context(|| format!("--scales-from `{}`", src.display()))?;
        quantize.original = Some(Arc::new(original));
    }
    let plan = Plan::build(&checkpoint, &mapping, &options)?;
    Ok((Arc::new(checkpoint), Arc::new(plan)))
}
