//! Builds a plan: source matrices, logical tensors, targets, facets, directories.

use std::collections::{BTreeSet, HashSet};

use super::arrange::{self, Completeness, DroppedCounts, ViewTensor, source_layout};
use super::gather::{WholeTensor, check_config, check_extents, gather_matrices, whole_tensors};
use super::lay_out::{
    self, DirectoryBuilder, Facets, Original, config_entries, natural_key, refuse_uncastable,
};
use super::options::{PlanOptions, Unmapped};
use super::report::{PlanError, Problem, Problems, Summary, SummaryParts};
use super::{MatrixId, Plan, ScaleReading};
use crate::mapping::{LayoutName, Mapping, ResolvedMapping};
use crate::source::Checkpoint;

impl Plan {
    /// Plans the view of a checkpoint.
    ///
    /// # Errors
    /// Whatever keeps a tensor of the view from being served, all of it at once.
    pub fn build(
        checkpoint: &Checkpoint,
        mapping: &Mapping,
        options: &PlanOptions,
    ) -> Result<Plan, PlanError> {
        let mapping = &mapping.resolve(&|key| checkpoint.config().get(key).cloned())?;
        let mut problems = Problems::default();
        let grouped = gather_matrices(checkpoint, mapping, options.scale_reading, &mut problems)?;
        let matrices = grouped.matrices;
        let wholes = whole_tensors(&matrices, checkpoint, &mut problems);
        let from = source_layout(&wholes, &matrices, checkpoint, mapping)?;
        let to = options.to.unwrap_or(match from {
            LayoutName::Hf => LayoutName::Native,
            LayoutName::Native | LayoutName::Transformers => LayoutName::Hf,
        });
        let (source, target) = (mapping.layout(from)?, mapping.layout(to)?);
        check_extents(&wholes, mapping, source, &mut problems);

        let original = options.quantize.as_ref().and_then(|q| q.original.as_deref());
        let original = match original {
            Some(original) => Some(Original {
                checkpoint: original,
                matrices: gather_matrices(original, mapping, options.scale_reading, &mut problems)?
                    .matrices,
            }),
            None => None,
        };
        let mut dropped = DroppedCounts::new();
        let mut leftovers: Vec<MatrixId> = Vec::new();
        let logical = match source {
            None => arrange::from_published(&wholes, mapping, &mut problems),
            Some(layout) => arrange::from_layout(
                &wholes,
                layout,
                original.as_ref().map(|o| &o.matrices[..]),
                &mut dropped,
                &mut leftovers,
                &mut problems,
            ),
        };
        let mut targets = match target {
            None => Vec::new(),
            Some(layout) => {
                arrange::to_layout(&logical, layout, &mut dropped, &mut leftovers, &mut problems)
            }
        };
        let published = |name: &str| mapping.layouts().any(|l| l.match_hf(name).is_some());
        let strangers = options.unmapped == Unmapped::Refuse
            && (!leftovers.is_empty() || target.is_none() && !logical.keys().all(|n| published(n)));
        let mut completeness = Completeness {
            logical: &logical,
            mapping,
            source,
            target,
            allowed: &options.allow_missing,
            allowed_missing: Vec::new(),
            absent_layers: BTreeSet::new(),
        };
        completeness.check(strangers, &mut problems);
        let (allowed_missing, absent_layers) =
            (completeness.allowed_missing, completeness.absent_layers);
        check_config(checkpoint.config(), &matrices, &mut problems);
        if target.is_none() {
            targets = arrange::to_published(logical, mapping, source.is_some(), &mut leftovers);
        }
        let unmapped = unmapped(&leftovers, &wholes, options.unmapped, &mut targets, &mut problems);
        // A published checkpoint that is quantized is so already, in its own way.
        let stored = source.is_none() && matrices.iter().any(|m| m.scales.is_some());
        let stored = stored && options.quantize.is_some() && original.is_none();
        let facets = if stored && target.is_none() {
            lay_out::copy_quantized(checkpoint, &matrices, mapping, &mut targets)
        } else {
            facets(mapping, options, original.as_ref(), to, &mut targets, &mut problems)?
        };
        targets.retain(|t| options.selects(&t.name));
        targets.sort_by_cached_key(|t| natural_key(&t.name));
        for pair in targets.windows(2).filter(|w| w[0].name == w[1].name) {
            let source =
                |t: &ViewTensor| t.fragments.first().map(|f| &*matrices[f.matrix.index()].name);
            let [a, b] = [&pair[0], &pair[1]].map(|t| source(t).unwrap_or_default());
            problems.explain(Problem::SameName, &pair[0].name, format!("`{a}` and `{b}`"));
        }
        let encoded = facets.quantized.iter().flat_map(|q| &q.members);
        for fragment in encoded.flat_map(|m| &m.values.fragments) {
            refuse_uncastable(&matrices[fragment.matrix.index()], &mut problems);
        }
        problems.finish()?;
        if targets.is_empty() && facets.tensors.is_empty() {
            return Err(PlanError::Empty);
        }

        let mut layer = DirectoryBuilder {
            tensors: Vec::with_capacity(targets.len()),
            matrices: &matrices,
            dtype: options.dtype,
            cast_floats: target.is_some_and(|l| l.cast_floats),
            plain_dtypes: &facets.plain_dtypes,
            problems: Problems::default(),
        };
        // A part of a view may hold none of what is quantized.
        let is_quantized = facets.tensors.iter().any(|f| options.selects(&f.name));
        let mut directories = layer.directories(&targets, to, options)?;
        layer.add_facets(facets.tensors, options, &mut directories)?;
        let DirectoryBuilder { tensors, problems, .. } = layer;
        problems.finish()?;
        let original = options.quantize.as_ref().and_then(|q| q.original.clone());
        let quantized = facets.quantized;
        let like = if stored { Some(checkpoint) } else { original.as_deref() };
        let config_entries =
            config_entries(is_quantized, like, mapping, &targets, &tensors, &quantized)?;
        let parts = SummaryParts {
            mapping,
            from,
            to,
            dtype: options.dtype,
            fused: (grouped.fused_pairs > 0 || options.scale_reading == ScaleReading::Automodel)
                .then_some((options.scale_reading, grouped.fused_pairs)),
            quantized: &quantized,
            dropped,
            unmapped,
            allowed_missing,
            absent_layers,
            checkpoint,
        };
        let summary = Summary::new(parts, &tensors, &directories);
        Ok(Plan { tensors, matrices, quantized, original, directories, config_entries, summary })
    }
}

/// The facets of all targets that are quantized on the way back; they are taken from `targets`.
fn facets(
    mapping: &ResolvedMapping,
    options: &PlanOptions,
    original: Option<&Original<'_>>,
    to: LayoutName,
    targets: &mut Vec<ViewTensor>,
    problems: &mut Problems,
) -> Result<Facets, PlanError> {
    let Some(quantize) = &options.quantize else { return Ok(Facets::default()) };
    if to != LayoutName::Hf {
        return Err(PlanError::QuantizedLayout(to));
    }
    match original {
        Some(original) => Ok(lay_out::quantize_like_original(original, mapping, targets, problems)),
        None => {
            let facets =
                lay_out::quantize_by_mapping(mapping, quantize.scale_dtype, targets, problems);
            if facets.quantized.is_empty() && !mapping.published_plain {
                let lacks = "which tensors of this checkpoint are quantized";
                let mapping = mapping.name.clone();
                return Err(PlanError::UnknownQuantization { mapping, lacks });
            }
            Ok(facets)
        }
    }
}

/// What is done with tensors that no rule names, and how many there are.
fn unmapped(
    leftovers: &[MatrixId],
    wholes: &[WholeTensor<'_>],
    what: Unmapped,
    targets: &mut Vec<ViewTensor>,
    problems: &mut Problems,
) -> Option<(Unmapped, u64)> {
    let leftovers: HashSet<MatrixId> = leftovers.iter().copied().collect();
    let left = |whole: &&WholeTensor<'_>| whole.parts.iter().any(|(m, _)| leftovers.contains(m));
    let mut n = 0;
    for whole in wholes.iter().filter(left) {
        n += 1;
        match what {
            Unmapped::Refuse => problems.add(Problem::NoRule, whole.name),
            Unmapped::Drop => {}
            Unmapped::Keep => targets.push(ViewTensor {
                name: whole.name.to_owned(),
                shape: whole.shape.clone(),
                fragments: whole.fragments(),
                grouped: false,
                expert_axis: false,
                dtype: None,
            }),
        }
    }
    (n > 0).then_some((what, n))
}
