//! Takes a checkpoint's tensors together into matrices: payload, scale and shape tensors become
//! one, everything else is a matrix of its own.

use super::matrix::{Band, Matrix, MatrixScales, ScaleReading, fused_bands};
use super::problems::{PlanError, Problem, Problems};
use crate::codec::{ScaleGrid, Scheme};
use crate::mapping::{Bindings, Encoding, Resolved};
use crate::source::{Checkpoint, SourceId, SourceTensor};
use crate::tensor::{DType, Shape};

/// The matrices of a checkpoint, in the order of their payloads' names.
#[derive(Debug)]
pub struct Matrices {
    pub list: Vec<Matrix>,
    /// Pairs whose scales are shared over the boundary of the two tensors.
    pub fused_pairs: u64,
}

/// Groups all tensors of `checkpoint` by the mapping's encodings.
pub fn matrices(
    checkpoint: &Checkpoint,
    mapping: &Resolved,
    reading: ScaleReading,
    problems: &mut Problems,
) -> Result<Matrices, PlanError> {
    let mut grouping = Grouping {
        checkpoint,
        reading,
        config_block: checkpoint.config().weight_block_size()?,
        used: vec![false; checkpoint.tensors().len()],
        found: Vec::new(),
        fused_pairs: 0,
        problems,
    };
    for encoding in &mapping.encodings {
        grouping.group(encoding);
    }
    grouping.leftovers(mapping);
    let mut found = grouping.found;
    let fused_pairs = grouping.fused_pairs;
    found.sort_by_key(|m| m.payload);
    Ok(Matrices { list: found, fused_pairs })
}

struct Grouping<'a> {
    checkpoint: &'a Checkpoint,
    reading: ScaleReading,
    config_block: Option<[u64; 2]>,
    used: Vec<bool>,
    found: Vec<Matrix>,
    fused_pairs: u64,
    problems: &'a mut Problems,
}

/// A payload and its scale, before the scale's rows are dealt out.
struct Quantized {
    payload: SourceId,
    scale: SourceId,
    shape: Shape,
    scale_code: crate::codec::ScaleCode,
    name: Box<str>,
}

impl Grouping<'_> {
    fn tensor(&self, id: SourceId) -> &SourceTensor {
        self.checkpoint.tensor(id)
    }

    fn group(&mut self, encoding: &Encoding) {
        let ids = (0..).map(SourceId).take(self.checkpoint.tensors().len());
        for id in ids {
            let tensor = self.checkpoint.tensor(id);
            if self.used[id.index()] || !encoding.scheme.takes_payload(tensor.dtype) {
                continue;
            }
            let Some(bindings) = encoding.payload[0].bind(&tensor.name, &encoding.vars) else {
                continue;
            };
            if encoding.fused_shards {
                self.pair(encoding, &bindings);
            } else if let Some(q) = self.quantized(encoding, 0, &bindings) {
                self.single(encoding, q, &bindings);
            }
        }
    }

    /// Payload and scale number `i` of the encoding; `None` where they are not both there.
    fn quantized(
        &mut self,
        encoding: &Encoding,
        i: usize,
        bindings: &Bindings,
    ) -> Option<Quantized> {
        let name = |t: &crate::mapping::NameTemplate| t.format(bindings, &encoding.vars);
        let payload = self.checkpoint.find(&name(&encoding.payload[i])?)?;
        let scale_name = name(&encoding.scale[i])?;
        let tensor = self.checkpoint.tensor(payload);
        let Some(shape) = encoding.scheme.matrix_shape(tensor.dtype, &tensor.shape) else {
            // Bytes of a payload's dtype can be something else, unless their scale is there.
            if self.checkpoint.find(&scale_name).is_some() || is_only_a_payload(encoding, tensor) {
                self.used[payload.index()] = true;
                self.problems.explain(Problem::PayloadShape, &tensor.name, &tensor.shape);
            }
            return None;
        };
        let Some(scale) = self.checkpoint.find(&scale_name) else {
            self.used[payload.index()] = true;
            self.problems.explain(
                Problem::MissingScale,
                &scale_name,
                format!("for `{}`, which is {}", tensor.name, tensor.dtype),
            );
            return None;
        };
        let Some(scale_code) = encoding.scheme.scale_code(self.tensor(scale).dtype) else {
            let dtype = self.tensor(scale).dtype;
            self.used[payload.index()] = true;
            self.used[scale.index()] = true;
            self.problems.explain(Problem::ScaleDtype, &scale_name, dtype);
            return None;
        };
        let name = name(&encoding.matrix[i])?.into_boxed_str();
        Some(Quantized { payload, scale, shape, scale_code, name })
    }

    fn block(&self, encoding: &Encoding) -> [u64; 2] {
        match encoding.scheme {
            Scheme::Fp8 => self.config_block.unwrap_or(encoding.block),
            Scheme::Fp4 | Scheme::Int4 | Scheme::Mxfp4 => encoding.block,
        }
    }

    fn single(&mut self, encoding: &Encoding, q: Quantized, bindings: &Bindings) {
        let block = self.block(encoding);
        self.used[q.payload.index()] = true;
        self.used[q.scale.index()] = true;
        let given = &self.tensor(q.scale).shape;
        let Some(grid) = encoding.scheme.scale_grid(&q.shape, given, block) else {
            self.scale_shape_problem(&q, block);
            return;
        };
        let bands = plain_bands(&q, &grid);
        let shape_tensor = self.shape_tensor(encoding, bindings);
        self.add(encoding, q, &grid, bands, shape_tensor);
    }

    fn shape_tensor(&mut self, encoding: &Encoding, bindings: &Bindings) -> Option<SourceId> {
        let name = encoding.shape.as_ref()?.format(bindings, &encoding.vars)?;
        let Some(id) = self.checkpoint.find(&name) else {
            self.problems.add(Problem::MissingPart, &name);
            return None;
        };
        self.used[id.index()] = true;
        let tensor = self.tensor(id);
        let integers = matches!(tensor.dtype, DType::I32 | DType::I64);
        if !integers || tensor.shape.elements() != Some(2) {
            let what = format!("{} {}", tensor.dtype, tensor.shape);
            self.problems.explain(Problem::ShapeTensor, &name, what);
        }
        Some(id)
    }

    /// A pair whose rows were quantized as one.
    fn pair(&mut self, encoding: &Encoding, bindings: &Bindings) {
        let parts = [0, 1].map(|i| self.quantized(encoding, i, bindings));
        let [Some(first), Some(second)] = parts else {
            // What is missing was noted, or it is no pair: the next encoding may take it.
            return;
        };
        let block = self.block(encoding);
        for q in [&first, &second] {
            self.used[q.payload.index()] = true;
            self.used[q.scale.index()] = true;
        }
        let rows = [&first, &second].map(|q| q.shape.dims()[0]);
        let cols = first.shape.dims()[1].div_ceil(block[1]);
        let scale_shapes = [&first, &second].map(|q| self.tensor(q.scale).shape.dims().to_vec());
        let two_d = |q: &Quantized, s: &[u64]| {
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
                    |i: usize, scale| vec![Band { rows: 0..rows[i], scale, row: 0, skip: 0 }];
                enough.then(|| (1, [plain(0, first.scale), plain(1, second.scale)]))
            }
        });
        let Some((shards, [of_first, of_second])) = bands.flatten() else {
            self.scale_shape_problem(&first, block);
            self.scale_shape_problem(&second, block);
            return;
        };
        self.fused_pairs += u64::from(shards > 1);
        for (q, bands) in [(first, of_first), (second, of_second)] {
            let grid = ScaleGrid { block, plane_rows: q.shape.dims()[0], rows: 0, cols };
            self.add(encoding, q, &grid, bands, None);
        }
    }

    fn add(
        &mut self,
        encoding: &Encoding,
        q: Quantized,
        grid: &ScaleGrid,
        bands: Vec<Band<SourceId>>,
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

    fn scale_shape_problem(&mut self, q: &Quantized, block: [u64; 2]) {
        let scale = self.checkpoint.tensor(q.scale);
        let what = format!(
            "{} for a payload that decodes to {} in blocks of {}x{}",
            scale.shape, q.shape, block[0], block[1]
        );
        self.problems.explain(Problem::ScaleShape, &scale.name, what);
    }

    /// What no encoding took: plain tensors, and parts whose payload is not there.
    fn leftovers(&mut self, mapping: &Resolved) {
        for id in (0..).map(SourceId).take(self.checkpoint.tensors().len()) {
            if self.used[id.index()] {
                continue;
            }
            let tensor = self.checkpoint.tensor(id);
            let orphan = is_a_part(mapping, &tensor.name)
                && !mapping.layouts().any(|l| l.writes_out(&tensor.name));
            if orphan {
                self.problems.add(Problem::MissingPayload, &tensor.name);
                continue;
            }
            let (name, dtype, shape) = (tensor.name.clone(), tensor.dtype, tensor.shape.clone());
            self.found.push(Matrix::plain(name, id, dtype, shape));
        }
    }
}

/// Whether a name is one of scales or shapes.
fn is_a_part(mapping: &Resolved, name: &str) -> bool {
    mapping.encodings.iter().any(|e| {
        let mut parts = e.scale.iter().chain(&e.shape);
        parts.any(|t| t.bind(name, &e.vars).is_some())
    })
}

/// Whether a tensor of this dtype under a payload's name can be nothing but a payload.
fn is_only_a_payload(encoding: &Encoding, tensor: &SourceTensor) -> bool {
    encoding.scheme == Scheme::Fp8 && tensor.dtype == DType::F8E4M3
}

fn plain_bands(q: &Quantized, grid: &ScaleGrid) -> Vec<Band<SourceId>> {
    let all_rows: u64 = q.shape.dims()[..q.shape.rank() - 1].iter().product();
    let planes = all_rows.checked_div(grid.plane_rows).unwrap_or(0);
    if grid.block[0] == 1 {
        // One scale row a matrix row: planes run on.
        return vec![Band { rows: 0..all_rows, scale: q.scale, row: 0, skip: 0 }];
    }
    (0..planes)
        .map(|p| Band {
            rows: p * grid.plane_rows..(p + 1) * grid.plane_rows,
            scale: q.scale,
            row: p * grid.rows,
            skip: 0,
        })
        .collect()
}
