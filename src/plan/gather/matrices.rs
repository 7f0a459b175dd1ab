//! Combines the tensors of a checkpoint into matrices: payload, scale and shape tensors become one
//! quantized matrix, every other tensor is a plain matrix.

use std::collections::HashSet;

use super::orphans::dtype_list;
use crate::codec::{ScaleGrid, Scheme};
use crate::mapping::{Bindings, Encoding, NameTemplate, ResolvedMapping};
use crate::plan::fragment::MAX_FRAGMENTS;
use crate::plan::matrix::fused_bands;
use crate::plan::report::{PlanError, Problem, Problems};
use crate::plan::{Matrix, MatrixScales, ScaleBand, ScaleReading};
use crate::source::{Checkpoint, SourceId, SourceTensor};
use crate::tensor::{DType, Shape};

/// The matrices of a checkpoint, sorted by the ids of their payloads.
#[derive(Debug)]
pub(in crate::plan) struct GatheredMatrices {
    pub matrices: Vec<Matrix>,
    /// Number of pairs in which a scale block holds rows of both tensors.
    pub fused_pairs: u64,
}

/// Applies the encodings of the mapping to all tensors of `checkpoint`.
pub(in crate::plan) fn gather_matrices(
    checkpoint: &Checkpoint,
    mapping: &ResolvedMapping,
    reading: ScaleReading,
    problems: &mut Problems,
) -> Result<GatheredMatrices, PlanError> {
    let mut gatherer = MatrixGatherer {
        checkpoint,
        mapping,
        reading,
        config_block: checkpoint.config().weight_block_size()?,
        config_group: checkpoint.config().group_size()?,
        used: vec![false; checkpoint.tensors().len()],
        found: Vec::new(),
        fused_pairs: 0,
        problems,
    };
    gatherer.refuse_unsupported_schemes();
    for encoding in &mapping.encodings {
        gatherer.apply_encoding(encoding);
    }
    gatherer.refuse_unsupported_companions();
    gatherer.refuse_orphans();
    gatherer.add_plain_tensors();
    let mut found = gatherer.found;
    let fused_pairs = gatherer.fused_pairs;
    found.sort_by_key(|m| m.payload);
    Ok(GatheredMatrices { matrices: found, fused_pairs })
}

/// The state of [`gather_matrices`].
pub(super) struct MatrixGatherer<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) mapping: &'a ResolvedMapping,
    reading: ScaleReading,
    config_block: Option<[u64; 2]>,
    config_group: Option<u64>,
    /// For each tensor, whether it belongs to a matrix already or was refused.
    pub(super) used: Vec<bool>,
    found: Vec<Matrix>,
    fused_pairs: u64,
    pub(super) problems: &'a mut Problems,
}

/// A payload and its scale tensor, before scale rows are assigned to matrix rows.
pub(super) struct PayloadAndScale {
    payload: SourceId,
    scale: SourceId,
    shape: Shape,
    scale_code: crate::codec::ScaleCode,
    name: Box<str>,
}

/// The result of looking for a quantized matrix.
pub(super) enum PayloadLookup {
    /// There is no tensor of that name, or it is no payload.
    Absent,
    /// The payload or the scale was refused, and noted as a problem.
    Refused,
    /// Both are there.
    Found(PayloadAndScale),
}

impl<'a> MatrixGatherer<'a> {
    /// The ids of all tensors of the checkpoint.
    pub(super) fn ids(&self) -> impl Iterator<Item = SourceId> + use<> {
        (0..).map(SourceId).take(self.checkpoint.tensors().len())
    }

    pub(super) fn tensor(&self, id: SourceId) -> &'a SourceTensor {
        self.checkpoint.tensor(id)
    }

    /// Names of the matrices that were found so far.
    pub(super) fn quantized_names(&self) -> HashSet<String> {
        self.found.iter().map(|m| m.name.to_string()).collect()
    }

    /// Finds all matrices of one encoding.
    fn apply_encoding(&mut self, encoding: &Encoding) {
        for id in self.ids() {
            let tensor = self.tensor(id);
            if self.used[id.index()] || !encoding.scheme.takes_payload(tensor.dtype) {
                continue;
            }
            let bound = encoding.payload.iter().find_map(|t| t.bind(&tensor.name, &encoding.vars));
            let Some(bindings) = bound else { continue };
            if encoding.fused_shards {
                self.apply_to_pair(encoding, &bindings);
            } else if let PayloadLookup::Found(q) =
                self.find_payload_and_scale(encoding, 0, &bindings)
            {
                self.add_single(encoding, q, &bindings);
            }
        }
    }

    /// Looks for payload and scale number `i` of the encoding.
    fn find_payload_and_scale(
        &mut self,
        encoding: &Encoding,
        i: usize,
        bindings: &Bindings,
    ) -> PayloadLookup {
        let name = |t: &NameTemplate| t.format(bindings, &encoding.vars).unwrap_or_default();
        let Some(payload) = self.checkpoint.find(&name(&encoding.payload[i])) else {
            return PayloadLookup::Absent;
        };
        let tensor = self.tensor(payload);
        let scheme = encoding.scheme;
        let matrix = name(&encoding.matrix[i]);
        if self.used[payload.index()] || !scheme.takes_payload(tensor.dtype) {
            let refused = self.used[payload.index()] && self.problems.is_refused(&matrix);
            return if refused { PayloadLookup::Refused } else { PayloadLookup::Absent };
        }
        let mut spellings = encoding.scale[i].iter().map(name);
        let scale = encoding.scale[i].iter().find_map(|t| self.checkpoint.find(&name(t)));
        let shape = scheme.matrix_shape(tensor.dtype, &tensor.shape);
        let is_matrix =
            |s: &Shape| s.elements().is_some_and(|n| n > 0) && plane_count(s) <= MAX_FRAGMENTS;
        let Some(shape) = shape.filter(is_matrix) else {
            // Without a scale, a tensor of the payload's dtype may be something else.
            if scale.is_none() && !is_only_a_payload(encoding, tensor) {
                return PayloadLookup::Absent;
            }
            let what = format!("expected a matrix, got {} {}", tensor.dtype, tensor.shape);
            self.problems.explain(Problem::PayloadShape, &tensor.name, what);
            return self.refuse(&matrix, [Some(payload), scale]);
        };
        let Some(scale) = scale else {
            let scale = spellings.next().unwrap_or_default();
            let what = format!("for `{}`, which is {}", tensor.name, tensor.dtype);
            self.problems.explain(Problem::MissingScale, &scale, what);
            return self.refuse(&matrix, [Some(payload), None]);
        };
        let (scale_name, given) = (&self.tensor(scale).name, self.tensor(scale).dtype);
        let Some(scale_code) = scheme.scale_code(given) else {
            let expected = dtype_list(|d| scheme.scale_code(d).is_some());
            let what = format!("expected {expected}, got {given}");
            self.problems.explain(Problem::ScaleDtype, scale_name, what);
            return self.refuse(&matrix, [Some(payload), Some(scale)]);
        };
        let name = matrix.into_boxed_str();
        PayloadLookup::Found(PayloadAndScale { payload, scale, shape, scale_code, name })
    }

    /// Marks a matrix and its tensors as refused, so that nothing else is reported about them.
    pub(super) fn refuse(&mut self, matrix: &str, parts: [Option<SourceId>; 2]) -> PayloadLookup {
        for id in parts.into_iter().flatten() {
            self.used[id.index()] = true;
        }
        let name = self.mapping.canonical(matrix).unwrap_or_else(|| matrix.to_owned());
        self.problems.mark_refused(name);
        PayloadLookup::Refused
    }

    /// Rows and columns that a scale serves: by config.json where it says so, else by the mapping.
    fn block(&self, encoding: &Encoding) -> [u64; 2] {
        match encoding.scheme {
            Scheme::Fp8 => self.config_block.unwrap_or(encoding.block),
            Scheme::Int4 => self.config_group.map_or(encoding.block, |group| [1, group]),
            Scheme::Fp4 | Scheme::Mxfp4 => encoding.block,
        }
    }

    /// Adds a matrix that was quantized on its own.
    fn add_single(&mut self, encoding: &Encoding, q: PayloadAndScale, bindings: &Bindings) {
        let block = self.block(encoding);
        self.used[q.payload.index()] = true;
        self.used[q.scale.index()] = true;
        let given = &self.tensor(q.scale).shape;
        let Some(grid) = encoding.scheme.scale_grid(&q.shape, given, block) else {
            let expected = plain_scale_shape(&q.shape, block).to_string();
            self.refuse_scale_shape(&q, block, &expected);
            return;
        };
        let bands = plain_bands(&q, &grid);
        let shape_tensor = self.shape_tensor(encoding, bindings);
        self.add_quantized(encoding, q, &grid, bands, shape_tensor);
    }

    /// The tensor that holds the decoded shape, where the encoding has one; its dtype and size are
    /// checked.
    fn shape_tensor(&mut self, encoding: &Encoding, bindings: &Bindings) -> Option<SourceId> {
        let name = encoding.shape.as_ref()?.format(bindings, &encoding.vars)?;
        let Some(id) = self.checkpoint.find(&name) else {
            let payload = encoding.payload[0].format(bindings, &encoding.vars).unwrap_or_default();
            self.problems.explain(Problem::MissingPart, &name, format!("for `{payload}`"));
            return None;
        };
        self.used[id.index()] = true;
        let tensor = self.tensor(id);
        let integers = matches!(tensor.dtype, DType::I32 | DType::I64);
        if !integers || tensor.shape.elements() != Some(2) {
            let what = format!("expected I32 or I64 [2], got {} {}", tensor.dtype, tensor.shape);
            self.problems.explain(Problem::ShapeTensor, &name, what);
        }
        Some(id)
    }

    /// Finds both matrices of a pair that was quantized as one.
    fn apply_to_pair(&mut self, encoding: &Encoding, bindings: &Bindings) {
        match [0, 1].map(|i| self.find_payload_and_scale(encoding, i, bindings)) {
            [PayloadLookup::Found(first), PayloadLookup::Found(second)] => {
                self.add_pair(encoding, first, second)
            }
            [PayloadLookup::Found(q), PayloadLookup::Absent] => {
                self.refuse_half_pair(encoding, q, 1, bindings)
            }
            [PayloadLookup::Absent, PayloadLookup::Found(q)] => {
                self.refuse_half_pair(encoding, q, 0, bindings)
            }
            // One was refused; without it, the scales of the other have no meaning.
            [PayloadLookup::Found(q), PayloadLookup::Refused]
            | [PayloadLookup::Refused, PayloadLookup::Found(q)] => {
                self.refuse(&q.name, [Some(q.payload), Some(q.scale)]);
            }
            [
                PayloadLookup::Absent | PayloadLookup::Refused,
                PayloadLookup::Absent | PayloadLookup::Refused,
            ] => {}
        }
    }

    /// Refuses a matrix of a pair without its partner, number `other`: it is unknown which scale
    /// serves which of its rows.
    fn refuse_half_pair(
        &mut self,
        encoding: &Encoding,
        q: PayloadAndScale,
        other: usize,
        bindings: &Bindings,
    ) {
        let name = encoding.payload[other].format(bindings, &encoding.vars).unwrap_or_default();
        let payload = self.tensor(q.payload);
        match self.checkpoint.find(&name) {
            None => {
                let what = format!("for `{}`, which was quantized with it", payload.name);
                self.problems.explain(Problem::MissingPart, &name, what);
                let missing = encoding.matrix[other].format(bindings, &encoding.vars);
                self.problems.mark_missing(&missing.unwrap_or_default());
            }
            Some(id) => {
                let (with, dtype, got) = (&payload.name, payload.dtype, self.tensor(id).dtype);
                let what = format!("expected {dtype} as `{with}`, got {got}");
                self.problems.explain(Problem::PayloadDtype, &name, what);
                let other = encoding.matrix[other].format(bindings, &encoding.vars);
                let scale = encoding.scale.iter().flatten().find_map(|t| {
                    let scale = t.format(bindings, &encoding.vars)?;
                    self.checkpoint.find(&scale).filter(|s| *s != q.scale)
                });
                self.refuse(&other.unwrap_or_default(), [Some(id), scale]);
            }
        }
        self.refuse(&q.name, [Some(q.payload), Some(q.scale)]);
    }

    /// Adds both matrices of a pair.
    fn add_pair(&mut self, encoding: &Encoding, first: PayloadAndScale, second: PayloadAndScale) {
        let block = self.block(encoding);
        for q in [&first, &second] {
            self.used[q.payload.index()] = true;
            self.used[q.scale.index()] = true;
        }
        let rows = [&first, &second].map(|q| q.shape.dims()[0]);
        let cols = first.shape.dims()[1].div_ceil(block[1]);
        let scale_shapes = [&first, &second].map(|q| self.tensor(q.scale).shape.dims().to_vec());
        let two_d = |q: &PayloadAndScale, s: &[u64]| {
            q.shape.rank() == 2
                && s.len() == 2
                && s[1] == cols
                && q.shape.dims()[1] == first.shape.dims()[1]
        };
        let plain_2d = two_d(&first, &scale_shapes[0]) && two_d(&second, &scale_shapes[1]);
        let bands = plain_2d.then(|| match self.reading {
            ScaleReading::Fused => fused_bands(
                rows,
                [scale_shapes[0][0], scale_shapes[1][0]],
                [first.scale, second.scale],
                block[0],
            ),
            ScaleReading::Automodel => {
                let enough = (0..2).all(|i| scale_shapes[i][0] >= rows[i].div_ceil(block[0]));
                let plain =
                    |i: usize, scale| vec![ScaleBand { rows: 0..rows[i], scale, row: 0, skip: 0 }];
                enough.then(|| (1, [plain(0, first.scale), plain(1, second.scale)]))
            }
        });
        let Some((shards, [of_first, of_second])) = bands.flatten() else {
            self.add_pair_unshared(encoding, [first, second], block);
            return;
        };
        self.fused_pairs += u64::from(shards > 1);
        for (q, bands) in [(first, of_first), (second, of_second)] {
            let grid = ScaleGrid { block, plane_rows: q.shape.dims()[0], rows: 0, cols };
            self.add_quantized(encoding, q, &grid, bands, None);
        }
    }

    /// Adds a pair whose scale shapes fit no number of shards, if each scale fits its own matrix.
    fn add_pair_unshared(
        &mut self,
        encoding: &Encoding,
        pair: [PayloadAndScale; 2],
        block: [u64; 2],
    ) {
        let grids = [&pair[0], &pair[1]]
            .map(|q| encoding.scheme.scale_grid(&q.shape, &self.tensor(q.scale).shape, block));
        if let [Some(first), Some(second)] = grids {
            for (q, grid) in pair.into_iter().zip([first, second]) {
                let bands = plain_bands(&q, &grid);
                self.add_quantized(encoding, q, &grid, bands, None);
            }
            return;
        }
        for (q, grid) in pair.iter().zip(grids) {
            if grid.is_some() {
                self.refuse(&q.name, [None, None]);
                continue;
            }
            let plain = plain_scale_shape(&q.shape, block);
            self.refuse_scale_shape(q, block, &format!("{plain} or the rows of fused shards"));
        }
    }

    /// Adds a quantized matrix.
    fn add_quantized(
        &mut self,
        encoding: &Encoding,
        q: PayloadAndScale,
        grid: &ScaleGrid,
        bands: Vec<ScaleBand<SourceId>>,
        shape_tensor: Option<SourceId>,
    ) {
        let scales = MatrixScales {
            scheme: encoding.scheme,
            scale: q.scale_code,
            block: grid.block,
            cols: grid.cols,
            bands,
        };
        let dtype = self.tensor(q.payload).dtype;
        self.found.push(Matrix {
            name: q.name,
            payload: q.payload,
            dtype,
            shape: q.shape,
            transposed: encoding.transposed,
            scales: Some(scales),
            own_scale: Some(q.scale),
            shape_tensor,
        });
    }

    fn refuse_scale_shape(&mut self, q: &PayloadAndScale, block: [u64; 2], expected: &str) {
        let scale = self.tensor(q.scale);
        let (got, of, [rows, cols]) = (&scale.shape, &q.shape, block);
        let what = format!("expected {expected}, got {got}: {of} in blocks of {rows}x{cols}");
        self.problems.explain(Problem::ScaleShape, &scale.name, what);
        self.refuse(&q.name, [Some(q.payload), Some(q.scale)]);
    }

    /// Adds the tensors that no encoding took, as plain matrices.
    fn add_plain_tensors(&mut self) {
        for id in self.ids() {
            if self.used[id.index()] {
                continue;
            }
            let tensor = self.tensor(id);
            let (name, dtype, shape) = (tensor.name.clone(), tensor.dtype, tensor.shape.clone());
            self.found.push(Matrix::plain(name, id, dtype, shape));
        }
    }
}

/// Number of planes of the last two axes; for stacked experts, the number of experts.
fn plane_count(shape: &Shape) -> u64 {
    shape.dims().iter().rev().skip(2).fold(1, |n, extent| n.saturating_mul(*extent))
}

/// The shape that the scales of a matrix have with this block.
fn plain_scale_shape(matrix: &Shape, block: [u64; 2]) -> Shape {
    let mut dims = matrix.dims().to_vec();
    if let [.., rows, cols] = dims.as_mut_slice() {
        (*rows, *cols) = (rows.div_ceil(block[0]), cols.div_ceil(block[1]));
    }
    Shape::new(dims)
}

/// Whether a tensor with the name and dtype of a payload must be one, even without a scale: other
/// schemes use integer dtypes, which ordinary tensors have too.
fn is_only_a_payload(encoding: &Encoding, tensor: &SourceTensor) -> bool {
    encoding.scheme == Scheme::Fp8 && tensor.dtype == DType::F8E4M3
}

/// The bands of a matrix whose block grid starts anew in each plane.
fn plain_bands(q: &PayloadAndScale, grid: &ScaleGrid) -> Vec<ScaleBand<SourceId>> {
    let all_rows: u64 = q.shape.dims()[..q.shape.rank() - 1].iter().product();
    let planes = all_rows.checked_div(grid.plane_rows).unwrap_or(0);
    if grid.block[0] == 1 {
        // One scale row per matrix row: the grid need not restart, one band serves all planes.
        return vec![ScaleBand { rows: 0..all_rows, scale: q.scale, row: 0, skip: 0 }];
    }
    (0..planes)
        .map(|p| ScaleBand {
            rows: p * grid.plane_rows..(p + 1) * grid.plane_rows,
            scale: q.scale,
            row: p * grid.rows,
            skip: 0,
        })
        .collect()
}
