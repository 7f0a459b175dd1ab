//! Opens the checkpoint that a request names and plans its view.

use super::request::{MappingChoice, ViewRequest};
use crate::mapping::Mapping;
use crate::plan::Plan;
use crate::source::{self, Checkpoint};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The absolute path, without symlinks, of the checkpoint directory that `src` names. `src` is a path
/// or a name in the local hub cache.
///
/// # Errors
/// There is no such directory.
pub(super) fn locate(src: &Path) -> anyhow::Result<PathBuf> {
    // Only a path can be other than UTF-8; names of the hub cannot.
    let found = match src.to_str() {
        Some(name) => source::resolve(name)?,
        None => src.to_owned(),
    };
    found.canonicalize().with_context(|| format!("cannot open `{}`", found.display()))
}

/// Opens the checkpoint of a request and plans its view. This makes every check of the checkpoint that
/// a mount makes.
///
/// # Errors
/// The checkpoint is missing or damaged, or the requested view of it is not possible.
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
