//! Builds a plan: source matrices, logical tensors, targets, dtypes, directories.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use regex::Regex;

use super::assemble::{self, Dropped, Leftover, Target};
use super::complete;
use super::detect::source_layout;
use super::matrix::{Matrix, ScaleReading};
use super::problems::{PlanError, Problem, Problems};
use super::quantize::{self, FacetTensor, Facets};
use super::show::{Summary, SummaryParts};
use super::slice::{self, ExpertParallel, ExpertShard};
use super::{Body, Directory, Plan, Quantization, Quantized, TensorId, TensorPlan, cover, sources};
use crate::mapping::{LayoutName, QuantizationConfig, Resolved};
use crate::source::{Checkpoint, Config};
use crate::tensor::{DType, Float, Shape};

/// What the user asks of a view.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Layout of the view; `None`: `native` of an hf checkpoint, `hf` of any other.
    pub to: Option<LayoutName>,
    /// What quantized and grouped tensors become.
    pub dtype: Float,
    /// How scales of fused shards are read.
    pub scale_reading: ScaleReading,
    /// What becomes of tensors that no rule names.
    pub unmapped: Unmapped,
    /// Only tensors whose names match one of these; all where there are none.
    pub include: Vec<Regex>,
    /// No tensors whose names match one of these.
    pub exclude: Vec<Regex>,
    /// Ranks that share the experts.
    pub expert_parallel: Option<ExpertParallel>,
    /// Ranks that share axis 1 of grouped tensors.
    pub expert_shard: Option<ExpertShard>,
    /// With layout `hf`: quantize as the model's checkpoints are; `None` leaves numbers as they are.
    pub quantize: Option<Quantize>,
}

/// How matrices are quantized on the way back.
#[derive(Clone, Debug, Default)]
pub struct Quantize {
    /// Scales come from this checkpoint, and so does which matrices are quantized.
    pub original: Option<Arc<Checkpoint>>,
    /// What INT4 scales are stored as; BF16 where nothing is said.
    pub scale_dtype: Option<Float>,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            to: None,
            dtype: Float::BF16,
            scale_reading: ScaleReading::default(),
            unmapped: Unmapped::default(),
            include: Vec::new(),
            exclude: Vec::new(),
            expert_parallel: None,
            expert_shard: None,
            quantize: None,
        }
    }
}

/// What becomes of source tensors that no rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unmapped {
    /// The mount is refused.
    #[default]
    Refuse,
    /// They are shown under their own names, as they are.
    Keep,
    /// They are left out.
    Drop,
}

impl Plan {
    /// Plans the view of a checkpoint.
    ///
    /// # Errors
    /// Whatever keeps a tensor of the view from being served, all of it at once.
    pub fn build(
        checkpoint: &Checkpoint,
        mapping: &Resolved,
        options: &PlanOptions,
    ) -> Result<Plan, PlanError> {
        let mut problems = Problems::default();
        let grouped = sources::matrices(checkpoint, mapping, options.scale_reading, &mut problems)?;
        let matrices = grouped.list;
        let from = source_layout(&matrices, checkpoint, mapping)?;
        let to = options.to.unwrap_or(match from {
            LayoutName::Hf => LayoutName::Native,
            LayoutName::Native | LayoutName::Transformers => LayoutName::Hf,
        });
        let (source, target) = (mapping.layout(from)?, mapping.layout(to)?);

        let mut dropped = Dropped::new();
        let mut leftovers: Vec<Leftover> = Vec::new();
        let logical = match source {
            None => assemble::from_published(&matrices, checkpoint, mapping, &mut problems),
            Some(layout) => assemble::from_layout(
                &matrices,
                layout,
                &mut dropped,
                &mut leftovers,
                &mut problems,
            ),
        };
        complete::check(&logical, mapping, source, target, &mut problems);
        let mut targets = match target {
            None => assemble::to_published(logical, mapping, source.is_some(), &mut leftovers),
            Some(layout) => {
                assemble::to_layout(&logical, layout, &mut dropped, &mut leftovers, &mut problems)
            }
        };
        let unmapped =
            unmapped(&leftovers, &matrices, options.unmapped, &mut targets, &mut problems);
        let facets = facets(checkpoint, mapping, options, to, &mut targets, &mut problems)?;
        targets.retain(|t| selected(&t.name, options));
        targets.sort_by_cached_key(|t| natural_key(&t.name));
        for pair in targets.windows(2).filter(|w| w[0].name == w[1].name) {
            let source =
                |t: &Target| t.fragments.first().map(|f| &*matrices[f.matrix.index()].name);
            let [a, b] = [&pair[0], &pair[1]].map(|t| source(t).unwrap_or_default());
            problems.explain(Problem::SameName, &pair[0].name, format!("`{a}` and `{b}`"));
        }
        let encoded = facets.quantized.iter().flat_map(|q| &q.members);
        for fragment in encoded.flat_map(|m| &m.values.fragments) {
            refuse_uncastable(&matrices[fragment.matrix.index()], &mut problems);
        }
        problems.finish()?;
        if targets.is_empty() && facets.tensors.is_empty() {
            return Err(PlanError::Empty("no tensor is left by --include and --exclude"));
        }

        let mut layer = Layers {
            tensors: Vec::with_capacity(targets.len()),
            matrices: &matrices,
            dtype: options.dtype,
            cast_floats: target.is_some_and(|l| l.cast_floats),
            plain_dtypes: &facets.plain_dtypes,
            problems: Problems::default(),
        };
        let mut directories = layer.directories(&targets, to, options)?;
        layer.add_facets(facets.tensors, options, &mut directories)?;
        let Layers { tensors, problems, .. } = layer;
        problems.finish()?;
        let quantization = quantization(
            checkpoint,
            mapping,
            options,
            from,
            &matrices,
            &targets,
            &facets.quantized,
        )?;
        let parts = SummaryParts {
            mapping,
            from,
            to,
            dtype: options.dtype,
            fused: (grouped.fused_pairs > 0 || options.scale_reading == ScaleReading::Automodel)
                .then_some((options.scale_reading, grouped.fused_pairs)),
            dropped,
            unmapped,
            checkpoint,
        };
        let summary = Summary::new(parts, &tensors, &directories);
        let original = options.quantize.as_ref().and_then(|q| q.original.clone());
        let quantized = facets.quantized;
        Ok(Plan { tensors, matrices, quantized, original, directories, quantization, summary })
    }
}

/// Puts tensors into directories, sharing those that no cut changes.
struct Layers<'a> {
    tensors: Vec<TensorPlan>,
    matrices: &'a [Matrix],
    dtype: Float,
    cast_floats: bool,
    plain_dtypes: &'a BTreeMap<String, DType>,
    problems: Problems,
}

impl Layers<'_> {
    fn directories(
        &mut self,
        targets: &[Target],
        to: LayoutName,
        options: &PlanOptions,
    ) -> Result<Vec<Directory>, PlanError> {
        let cuts = options.expert_parallel.is_some() || options.expert_shard.is_some();
        if cuts && to == LayoutName::Hf {
            let why = "--ep-size and --ep-shard-size cut grouped experts, which the layout `hf` \
                       does not have; use --to native or --to transformers";
            return Err(PlanError::Option(why.to_owned()));
        }
        let shard = |t: &Target, problems: &mut Problems| match options.expert_shard {
            Some(shard) if t.expert_axis => Some(slice::axis_shard(t, shard, problems)),
            Some(_) | None => None,
        };
        let (size, ranks) = match options.expert_parallel {
            None => (1, vec![]),
            Some(ExpertParallel { size, rank: Some(rank) }) => (size, vec![rank]),
            Some(ExpertParallel { size, rank: None }) => (size, (0..size).collect()),
        };
        let at_root = options.expert_parallel.is_some_and(|ep| ep.rank.is_some());
        let mut directories = Vec::with_capacity(ranks.len() + 1);
        let mut whole: Vec<Option<TensorId>> = vec![None; targets.len()];
        if !at_root {
            for (slot, target) in whole.iter_mut().zip(targets) {
                let sharded = shard(target, &mut self.problems);
                *slot = Some(self.add(sharded.as_ref().unwrap_or(target))?);
            }
            let tensors = whole.iter().copied().flatten().collect();
            directories.push(Directory { name: String::new(), tensors });
        }
        for rank in ranks {
            let mut tensors = Vec::with_capacity(targets.len());
            for (slot, target) in whole.iter_mut().zip(targets) {
                tensors.push(match (target.expert_axis, *slot) {
                    (true, _) => {
                        let cut = slice::expert_slice(target, size, rank, &mut self.problems);
                        let sharded = shard(&cut, &mut self.problems);
                        self.add(sharded.as_ref().unwrap_or(&cut))?
                    }
                    (false, Some(id)) => id,
                    (false, None) => *slot.insert(self.add(target)?),
                });
            }
            let name = if at_root { String::new() } else { slice::directory_name(rank, size) };
            directories.push(Directory { name, tensors });
        }
        Ok(directories)
    }

    /// Adds facets to the root, in the order of all names.
    fn add_facets(
        &mut self,
        facets: Vec<FacetTensor>,
        options: &PlanOptions,
        directories: &mut [Directory],
    ) -> Result<(), PlanError> {
        let Some(root) = directories.first_mut().filter(|_| !facets.is_empty()) else {
            return Ok(());
        };
        for facet in facets.into_iter().filter(|f| selected(&f.name, options)) {
            let id = u32::try_from(self.tensors.len()).map_err(|_| PlanError::TooMany)?;
            let FacetTensor { name, dtype, shape, body } = facet;
            if shape.bytes(dtype).is_none() {
                self.problems.explain(Problem::Size, &name, format!("{shape} {dtype}"));
            }
            self.tensors.push(TensorPlan { name: name.into(), dtype, shape, body });
            root.tensors.push(TensorId(id));
        }
        root.tensors.sort_by_cached_key(|id| natural_key(&self.tensors[id.index()].name));
        for pair in root.tensors.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|id| &self.tensors[id.index()].name);
            if a == b {
                self.problems.add(Problem::SameName, a);
            }
        }
        Ok(())
    }

    fn add(&mut self, target: &Target) -> Result<TensorId, PlanError> {
        let id = u32::try_from(self.tensors.len()).map_err(|_| PlanError::TooMany)?;
        let dtype = self.dtype_of(target);
        let shape = Shape::new(target.shape.as_slice());
        if shape.bytes(dtype).is_none() {
            self.problems.explain(Problem::Size, &target.name, format!("{shape} {dtype}"));
        } else if !cover::covers(&shape, &target.fragments) {
            self.problems.explain(
                Problem::RuleShape,
                &target.name,
                "its parts leave gaps or overlap",
            );
        }
        let body = match cover::verbatim_runs(&shape, dtype, &target.fragments, self.matrices) {
            Some(runs) => Body::Verbatim(runs),
            None => {
                if dtype.bits() < 8 {
                    let what = format!("{dtype} cannot be moved element by element");
                    self.problems.explain(Problem::RuleDtype, &target.name, what);
                }
                Body::Computed(cover::computed(&shape, dtype, target.fragments.clone()))
            }
        };
        self.tensors.push(TensorPlan { name: target.name.as_str().into(), dtype, shape, body });
        Ok(TensorId(id))
    }

    fn dtype_of(&mut self, target: &Target) -> DType {
        let matrices = self.matrices;
        let mut made_of = target.fragments.iter().map(|f| &matrices[f.matrix.index()]);
        let Some(first) = made_of.clone().next() else { return self.dtype.dtype() };
        let quantized = made_of.clone().any(|m| m.scales.is_some());
        let floats = made_of.clone().all(Matrix::is_castable);
        if self.cast_floats && floats {
            return if self.dtype == Float::F32 { DType::BF16 } else { self.dtype.dtype() };
        }
        if let (Some(original), true) = (self.plain_dtypes.get(&target.name), floats)
            && original.as_float().is_some()
        {
            return *original;
        }
        if quantized || target.grouped {
            for matrix in made_of {
                refuse_uncastable(matrix, &mut self.problems);
            }
            return self.dtype.dtype();
        }
        if let Some(other) = made_of.find(|m| m.dtype != first.dtype) {
            let what = format!(
                "expected {} as `{}`, got {} in `{}`",
                first.dtype, first.name, other.dtype, other.name
            );
            self.problems.explain(Problem::RuleDtype, &target.name, what);
        }
        first.dtype
    }
}

/// Refuses a matrix whose numbers cannot be had as floating-point numbers.
fn refuse_uncastable(matrix: &Matrix, problems: &mut Problems) {
    if !matrix.is_castable() && !problems.is_refused(&matrix.name) {
        problems.refuse_matrix(matrix.name.to_string());
        let what = format!("expected a quantized matrix, BF16, F16 or F32, got {}", matrix.dtype);
        problems.explain(Problem::RuleDtype, &matrix.name, what);
    }
}

/// The facets of all targets that are quantized on the way back; they are taken from `targets`.
fn facets(
    checkpoint: &Checkpoint,
    mapping: &Resolved,
    options: &PlanOptions,
    to: LayoutName,
    targets: &mut Vec<Target>,
    problems: &mut Problems,
) -> Result<Facets, PlanError> {
    let Some(quantize) = &options.quantize else { return Ok(Facets::default()) };
    if to != LayoutName::Hf {
        let why = format!("--quantize is for the layout `hf`; the view's is `{to}`");
        return Err(PlanError::Option(why));
    }
    match &quantize.original {
        Some(original) => {
            let reading = options.scale_reading;
            quantize::by_original(original, mapping, reading, targets, problems)
        }
        None => {
            let text = |key: &str| checkpoint.config().string(key).ok().map(str::to_owned);
            let scale_dtype = quantize.scale_dtype;
            let facets = quantize::by_mapping(mapping, &text, scale_dtype, targets, problems);
            if facets.quantized.is_empty() && !mapping.published_plain {
                return Err(PlanError::Option(format!(
                    "the mapping `{}` does not say which tensors of this checkpoint are quantized; \
                     take them from a checkpoint with --scales-from",
                    mapping.name
                )));
            }
            Ok(facets)
        }
    }
}

/// What becomes of `quantization_config`.
fn quantization(
    checkpoint: &Checkpoint,
    mapping: &Resolved,
    options: &PlanOptions,
    from: LayoutName,
    matrices: &[Matrix],
    targets: &[Target],
    quantized: &[Quantized],
) -> Result<Quantization, PlanError> {
    if quantized.is_empty() {
        // A grouped layout is never quantized: its config.json may be the published one all the same.
        let was = from != LayoutName::Hf || matrices.iter().any(|m| m.scales.is_some());
        return Ok(if was { Quantization::Remove } else { Quantization::Keep });
    }
    let original = options.quantize.as_ref().and_then(|q| q.original.as_deref());
    if let Some(config) = original.and_then(|o| quantization_of(o.config())) {
        return Ok(Quantization::Replace(config));
    }
    if quantization_of(checkpoint.config()).is_some() {
        return Ok(Quantization::Keep);
    }
    let Some(mut config) = mapping.quantization.clone() else {
        return Err(PlanError::Option(format!(
            "the mapping `{}` does not say what `quantization_config` is; take it from a \
             checkpoint with --scales-from",
            mapping.name
        )));
    };
    if let (Some(key), Some(value)) = (&config.unquantized, config.value.as_object_mut()) {
        value.insert(key.clone(), unquantized_modules(targets).into());
    }
    Ok(Quantization::Replace(config))
}

/// Modules whose weight matrices are not quantized.
fn unquantized_modules(targets: &[Target]) -> Vec<String> {
    let matrices = targets.iter().filter(|t| t.shape.len() == 2);
    matrices.filter_map(|t| t.name.strip_suffix(".weight")).map(str::to_owned).collect()
}

/// `quantization_config` of a checkpoint, and where it stands.
fn quantization_of(config: &Config) -> Option<QuantizationConfig> {
    const KEY: &str = "quantization_config";
    if let Some(value) = config.top().get(KEY) {
        return Some(QuantizationConfig { within: None, unquantized: None, value: value.clone() });
    }
    config.top().iter().find_map(|(name, object)| {
        let value = object.as_object()?.get(KEY)?.clone();
        Some(QuantizationConfig { within: Some(name.clone()), unquantized: None, value })
    })
}

/// What is done with matrices that no rule names, and how many there are.
fn unmapped(
    leftovers: &[Leftover],
    matrices: &[Matrix],
    what: Unmapped,
    targets: &mut Vec<Target>,
    problems: &mut Problems,
) -> Option<(Unmapped, u64)> {
    let distinct: HashSet<_> = leftovers.iter().copied().collect();
    let mut ids: Vec<_> = distinct.into_iter().collect();
    ids.sort();
    for &id in &ids {
        let matrix = &matrices[id.index()];
        match what {
            Unmapped::Refuse => problems.add(Problem::NoRule, &matrix.name),
            Unmapped::Drop => {}
            Unmapped::Keep => targets.push(Target {
                name: matrix.name.to_string(),
                shape: matrix.logical_dims(),
                fragments: vec![super::Fragment { map: matrix.logical_map(), matrix: id }],
                grouped: false,
                expert_axis: false,
            }),
        }
    }
    let n = u64::try_from(ids.len()).expect("ids have 32 bits");
    (n > 0).then_some((what, n))
}

fn selected(name: &str, options: &PlanOptions) -> bool {
    let starts = |re: &Regex| re.find(name).is_some_and(|m| m.start() == 0);
    let included = options.include.is_empty() || options.include.iter().any(starts);
    included && !options.exclude.iter().any(starts)
}

/// Sorts `layers.2` before `layers.10`.
fn natural_key(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut left = name;
    while !left.is_empty() {
        let text = left.find(|c: char| c.is_ascii_digit()).unwrap_or(left.len());
        let (word, rest) = left.split_at(text);
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, rest) = rest.split_at(digits);
        key.push((0, word.to_owned()));
        if !number.is_empty() {
            key.push((number.parse().unwrap_or(u64::MAX), String::new()));
        }
        left = rest;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_their_numbers() {
        let mut names = ["layers.10.a", "layers.2.b", "layers.2.a", "layers.1.a", "embed"];
        names.sort_by_cached_key(|n| natural_key(n));
        assert_eq!(names, ["embed", "layers.1.a", "layers.2.a", "layers.2.b", "layers.10.a"]);
    }

    #[test]
    fn filters_match_from_the_start() {
        let re = |t| vec![Regex::new(t).unwrap()];
        let options = |include, exclude| PlanOptions { include, exclude, ..PlanOptions::default() };
        assert!(selected("model.mtp.x", &options(vec![], re("mtp"))));
        assert!(!selected("model.mtp.x", &options(vec![], re(".*mtp"))));
        assert!(selected("model.x", &options(re("model"), vec![])));
        assert!(!selected("lm_head.x", &options(re("model"), vec![])));
    }
}
