//! Builds a plan: the steps in the order in which they run.

use std::collections::{BTreeSet, HashSet};

use super::arrange::{self, Completeness, DroppedCounts, LogicalTensors, ViewTensor};
use super::gather::{WholeTensor, check_config, check_extents, gather_matrices, whole_tensors};
use super::lay_out::{
    self, DirectoryBuilder, Facets, Original, config_entries, natural_key, refuse_uncastable,
};
use super::options::{PlanOptions, Unmapped};
use super::report::{PlanError, Problem, Problems, Summary, SummaryParts};
use super::{
    ConfigEntries, Directory, EncodedMatrix, Matrix, MatrixId, Plan, ScaleReading, TensorPlan,
};
use crate::mapping::{Layout, LayoutName, Mapping, ResolvedMapping};
use crate::source::Checkpoint;

impl Plan {
    /// Plans the view of a checkpoint.
    ///
    /// # Errors
    /// Every reason why a tensor of the view could not be served, all in one error.
    pub fn build(
        checkpoint: &Checkpoint,
        mapping: &Mapping,
        options: &PlanOptions,
    ) -> Result<Plan, PlanError> {
        let mapping = &mapping.resolve(&|key| checkpoint.config().get(key).cloned())?;
        let mut problems = Problems::default();

        let gathered = gather_matrices(checkpoint, mapping, options.scale_reading, &mut problems)?;
        let matrices = gathered.matrices;
        let whole_tensors = whole_tensors(&matrices, checkpoint, &mut problems);
        let layouts = Layouts::choose(&whole_tensors, &matrices, checkpoint, mapping, options)?;
        check_extents(&whole_tensors, mapping, layouts.source, &mut problems);
        let original = gather_original(mapping, options, &mut problems)?;
        let planner = Planner {
            checkpoint,
            mapping,
            options,
            matrices: &matrices,
            whole_tensors: &whole_tensors,
            layouts,
            original,
        };

        let mut arranged = planner.arrange(&mut problems);
        let facets = planner.quantize(&mut arranged.tensors, &mut problems)?;
        planner.select(&mut arranged.tensors, &mut problems);
        planner.check_encoded_values(&facets, &mut problems);
        problems.finish()?;
        if arranged.tensors.is_empty() && facets.tensors.is_empty() {
            return Err(PlanError::Empty);
        }

        let laid_out = planner.lay_out(&arranged.tensors, facets)?;
        let summary = planner.summarize(gathered.fused_pairs, arranged, &laid_out);
        let LaidOut { tensors, directories, quantized, config_entries } = laid_out;
        let original = options.quantize.as_ref().and_then(|q| q.original.clone());
        Ok(Plan { tensors, matrices, quantized, original, directories, config_entries, summary })
    }
}

/// The layouts that the plan leads from and to.
#[derive(Clone, Copy, Debug)]
struct Layouts<'a> {
    from: LayoutName,
    to: LayoutName,
    /// Rules of the source's layout; `None` for the published one, which needs none.
    source: Option<&'a Layout>,
    /// Rules of the view's layout; `None` for the published one.
    view: Option<&'a Layout>,
}

impl<'a> Layouts<'a> {
    /// Detects the source's layout; the view's is the requested one. The default is `native` for a
    /// published checkpoint and `hf` for any other.
    fn choose(
        whole_tensors: &[WholeTensor<'_>],
        matrices: &[Matrix],
        checkpoint: &Checkpoint,
        mapping: &'a ResolvedMapping,
        options: &PlanOptions,
    ) -> Result<Layouts<'a>, PlanError> {
        let from = arrange::source_layout(whole_tensors, matrices, checkpoint, mapping)?;
        let to = options.to.unwrap_or(match from {
            LayoutName::Hf => LayoutName::Native,
            LayoutName::Native | LayoutName::Transformers => LayoutName::Hf,
        });
        Ok(Layouts { from, to, source: mapping.layout(from)?, view: mapping.layout(to)? })
    }
}

/// The matrices of the checkpoint that scales are taken from, where the options name one.
fn gather_original<'a>(
    mapping: &ResolvedMapping,
    options: &'a PlanOptions,
    problems: &mut Problems,
) -> Result<Option<Original<'a>>, PlanError> {
    let original = options.quantize.as_ref().and_then(|q| q.original.as_deref());
    let Some(checkpoint) = original else { return Ok(None) };
    let gathered = gather_matrices(checkpoint, mapping, options.scale_reading, problems)?;
    Ok(Some(Original { checkpoint, matrices: gathered.matrices }))
}

/// What every step of planning reads and none changes.
#[derive(Debug)]
struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    mapping: &'a ResolvedMapping,
    options: &'a PlanOptions,
    matrices: &'a [Matrix],
    whole_tensors: &'a [WholeTensor<'a>],
    layouts: Layouts<'a>,
    original: Option<Original<'a>>,
}

/// The tensors of the view, and what was left out or is missing.
#[derive(Debug)]
struct Arranged {
    tensors: Vec<ViewTensor>,
    dropped: DroppedCounts,
    unmapped: Option<(Unmapped, u64)>,
    missing: Missing,
}

/// What is missing from the source and is no problem.
#[derive(Debug)]
struct Missing {
    /// Tensors and layers that the user allowed to be missing.
    allowed: Vec<String>,
    /// Optional layers that config.json names.
    absent_layers: BTreeSet<String>,
}

/// The parts of a plan that depend on dtypes and directories.
#[derive(Debug)]
struct LaidOut {
    tensors: Vec<TensorPlan>,
    directories: Vec<Directory>,
    quantized: Vec<EncodedMatrix>,
    config_entries: ConfigEntries,
}

impl Planner<'_> {
    /// Assembles the tensors of the view, through the logical tensors of the checkpoint, and looks
    /// for those that are missing or that no rule names.
    fn arrange(&self, problems: &mut Problems) -> Arranged {
        let mut dropped = DroppedCounts::new();
        let mut unmapped = Vec::new();
        let logical = self.logical_tensors(&mut dropped, &mut unmapped, problems);
        let grouped = self.layouts.view.map(|layout| {
            arrange::to_layout(&logical, layout, &mut dropped, &mut unmapped, problems)
        });
        let missing = self.check_completeness(&logical, &unmapped, problems);
        check_config(self.checkpoint.config(), self.matrices, problems);
        let mut tensors = grouped.unwrap_or_else(|| {
            let named_by_layout = self.layouts.source.is_some();
            arrange::to_published(logical, self.mapping, named_by_layout, &mut unmapped)
        });
        let unmapped = self.place_unmapped(&unmapped, &mut tensors, problems);
        Arranged { tensors, dropped, unmapped, missing }
    }

    /// The tensors of the published checkpoint, as boxes of the source's matrices.
    fn logical_tensors(
        &self,
        dropped: &mut DroppedCounts,
        unmapped: &mut Vec<MatrixId>,
        problems: &mut Problems,
    ) -> LogicalTensors {
        match self.layouts.source {
            None => arrange::from_published(self.whole_tensors, self.mapping, problems),
            Some(layout) => arrange::from_layout(
                self.whole_tensors,
                layout,
                self.original.as_ref().map(|o| &o.matrices[..]),
                dropped,
                unmapped,
                problems,
            ),
        }
    }

    /// Notes what the model needs and the checkpoint does not hold.
    fn check_completeness(
        &self,
        logical: &LogicalTensors,
        unmapped: &[MatrixId],
        problems: &mut Problems,
    ) -> Missing {
        let Layouts { source, view, .. } = self.layouts;
        let is_published =
            |name: &String| self.mapping.layouts().any(|l| l.match_hf(name).is_some());
        let has_unmapped = self.options.unmapped == Unmapped::Refuse
            && (!unmapped.is_empty() || view.is_none() && !logical.keys().all(is_published));
        let mut completeness = Completeness {
            logical,
            mapping: self.mapping,
            source,
            view,
            allowed: &self.options.allow_missing,
            allowed_missing: Vec::new(),
            absent_layers: BTreeSet::new(),
        };
        completeness.check(has_unmapped, problems);
        let Completeness { allowed_missing, absent_layers, .. } = completeness;
        Missing { allowed: allowed_missing, absent_layers }
    }

    /// Refuses, keeps or drops the tensors that no rule names; gives the action and their number.
    fn place_unmapped(
        &self,
        unmapped: &[MatrixId],
        tensors: &mut Vec<ViewTensor>,
        problems: &mut Problems,
    ) -> Option<(Unmapped, u64)> {
        let action = self.options.unmapped;
        let unmapped: HashSet<MatrixId> = unmapped.iter().copied().collect();
        let is_unmapped =
            |whole: &&WholeTensor<'_>| whole.parts.iter().any(|(m, _)| unmapped.contains(m));
        let mut count = 0;
        for whole in self.whole_tensors.iter().filter(is_unmapped) {
            count += 1;
            match action {
                Unmapped::Refuse => problems.add(Problem::NoRule, whole.name),
                Unmapped::Drop => {}
                Unmapped::Keep => tensors.push(ViewTensor {
                    name: whole.name.to_owned(),
                    shape: whole.shape.clone(),
                    fragments: whole.fragments(),
                    grouped: false,
                    expert_axis: false,
                    dtype: None,
                }),
            }
        }
        (count > 0).then_some((action, count))
    }

    /// Whether the view shows the quantized tensors of the source as they are: a published
    /// checkpoint that is quantized already is quantized in its own way.
    fn copies_quantized(&self) -> bool {
        self.layouts.source.is_none()
            && self.matrices.iter().any(|m| m.scales.is_some())
            && self.options.quantize.is_some()
            && self.original.is_none()
    }

    /// Takes the tensors that the view holds quantized out of `tensors`; gives their payload, scale
    /// and shape tensors.
    fn quantize(
        &self,
        tensors: &mut Vec<ViewTensor>,
        problems: &mut Problems,
    ) -> Result<Facets, PlanError> {
        let Some(quantize) = &self.options.quantize else { return Ok(Facets::default()) };
        let mapping = self.mapping;
        if self.layouts.to != LayoutName::Hf {
            return Err(PlanError::QuantizedLayout(self.layouts.to));
        }
        if self.copies_quantized() {
            return Ok(lay_out::copy_quantized(self.checkpoint, self.matrices, mapping, tensors));
        }
        if let Some(original) = &self.original {
            return Ok(lay_out::quantize_like_original(original, mapping, tensors, problems));
        }
        let facets = lay_out::quantize_by_mapping(mapping, quantize.scale_dtype, tensors, problems);
        if facets.quantized.is_empty() && !mapping.published_plain {
            let lacks = "which tensors of this checkpoint are quantized";
            return Err(PlanError::UnknownQuantization { mapping: mapping.name.clone(), lacks });
        }
        Ok(facets)
    }

    /// Applies the name filters, sorts the tensors, and refuses names that occur twice.
    fn select(&self, tensors: &mut Vec<ViewTensor>, problems: &mut Problems) {
        tensors.retain(|t| self.options.selects(&t.name));
        tensors.sort_by_cached_key(|t| natural_key(&t.name));
        for pair in tensors.windows(2).filter(|w| w[0].name == w[1].name) {
            let first_matrix = |t: &ViewTensor| {
                t.fragments.first().map(|f| &*self.matrices[f.matrix.index()].name)
            };
            let [a, b] = [&pair[0], &pair[1]].map(|t| first_matrix(t).unwrap_or_default());
            problems.explain(Problem::SameName, &pair[0].name, format!("`{a}` and `{b}`"));
        }
    }

    /// Refuses matrices whose elements cannot be quantized because they are no floating-point
    /// numbers.
    fn check_encoded_values(&self, facets: &Facets, problems: &mut Problems) {
        let members = facets.quantized.iter().flat_map(|q| &q.members);
        for fragment in members.flat_map(|m| &m.values.fragments) {
            refuse_uncastable(&self.matrices[fragment.matrix.index()], problems);
        }
    }

    /// Gives every tensor its dtype and body, and puts the tensors into directories.
    fn lay_out(&self, tensors: &[ViewTensor], facets: Facets) -> Result<LaidOut, PlanError> {
        let options = self.options;
        let mut builder = DirectoryBuilder {
            tensors: Vec::with_capacity(tensors.len()),
            matrices: self.matrices,
            dtype: options.dtype,
            cast_floats: self.layouts.view.is_some_and(|l| l.cast_floats),
            plain_dtypes: &facets.plain_dtypes,
            problems: Problems::default(),
        };
        // The filters can leave out everything that is quantized.
        let is_quantized = facets.tensors.iter().any(|f| options.selects(&f.name));
        let mut directories = builder.directories(tensors, self.layouts.to, options)?;
        builder.add_facets(facets.tensors, options, &mut directories)?;
        let DirectoryBuilder { tensors: plans, problems, .. } = builder;
        problems.finish()?;
        let quantized = facets.quantized;
        let like = match &self.original {
            Some(original) => Some(original.checkpoint),
            None => self.copies_quantized().then_some(self.checkpoint),
        };
        let config_entries =
            config_entries(is_quantized, like, self.mapping, tensors, &plans, &quantized)?;
        Ok(LaidOut { tensors: plans, directories, quantized, config_entries })
    }

    /// What the mount reports: one line.
    fn summarize(&self, fused_pairs: u64, arranged: Arranged, laid_out: &LaidOut) -> Summary {
        let Arranged { dropped, unmapped, missing, .. } = arranged;
        let reading = self.options.scale_reading;
        let has_fused = fused_pairs > 0 || reading == ScaleReading::Automodel;
        let parts = SummaryParts {
            mapping: self.mapping,
            from: self.layouts.from,
            to: self.layouts.to,
            dtype: self.options.dtype,
            fused: has_fused.then_some((reading, fused_pairs)),
            quantized: &laid_out.quantized,
            dropped,
            unmapped,
            allowed_missing: missing.allowed,
            absent_layers: missing.absent_layers,
            checkpoint: self.checkpoint,
        };
        Summary::new(parts, &laid_out.tensors, &laid_out.directories)
    }
}
