//! Quantizes a view in the published layout: replaces matrices by payload, scale and shape tensors.
//!
//! The scales are those of an original checkpoint, or are computed from the largest magnitude of
//! each block. Either way payload, scales and shape are facets of one matrix, whose elements are
//! fragments of the source.

use std::collections::{BTreeMap, HashSet};

use super::bodies;
use crate::codec::Scheme;
use crate::mapping::{Bindings, Encoding, ResolvedMapping};
use crate::plan::arrange::ViewTensor;
use crate::plan::matrix::fused_bands;
use crate::plan::report::{Problem, Problems};
use crate::plan::{
    Body, Computed, Encoded, EncodedMatrix, EncodedMatrixId, Facet, Fragment, Grid, Matrix, Member,
    Origin, ScaleBand, ScaleOf, SourceRange,
};
use crate::source::{Checkpoint, SourceId, SourceTensor};
use crate::tensor::{DType, Float, Shape, to_u64};

/// A payload, scale or shape tensor of the view.
#[derive(Debug)]
pub(in crate::plan) struct FacetTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Shape,
    pub body: Body,
}

impl FacetTensor {
    /// A stored tensor, shown unchanged as `name`.
    fn stored(name: String, tensor: &SourceTensor, origin: Origin, source: SourceId) -> Self {
        let run = SourceRange { at: 0, bytes: tensor.bytes, origin, source, offset: 0 };
        let body = Body::Verbatim(vec![run]);
        FacetTensor { name, dtype: tensor.dtype, shape: tensor.shape.clone(), body }
    }
}

/// The result of quantizing.
#[derive(Debug, Default)]
pub(in crate::plan) struct Facets {
    pub tensors: Vec<FacetTensor>,
    pub quantized: Vec<EncodedMatrix>,
    /// Dtypes of plain tensors in the original checkpoint, by name.
    pub plain_dtypes: BTreeMap<String, DType>,
}

/// The original checkpoint, which scales are taken from, and its matrices.
#[derive(Debug)]
pub(in crate::plan) struct Original<'a> {
    pub checkpoint: &'a Checkpoint,
    pub matrices: Vec<Matrix>,
}

/// Takes the tensors out of `view_tensors` that the original checkpoint has quantized; returns
/// their facets, with the scales of the original.
pub(in crate::plan) fn quantize_like_original(
    original: &Original<'_>,
    mapping: &ResolvedMapping,
    view_tensors: &mut Vec<ViewTensor>,
    problems: &mut Problems,
) -> Facets {
    let Original { checkpoint: original, matrices: list } = original;
    let by_name: BTreeMap<String, &Matrix> = list
        .iter()
        .map(|m| (mapping.canonical(&m.name).unwrap_or_else(|| m.name.to_string()), m))
        .collect();
    let mut facets = Facets::default();
    view_tensors.retain(|tensor| {
        let Some(matrix) = by_name.get(&tensor.name) else { return true };
        if matrix.logical_dims() != tensor.shape {
            let what =
                format!("got {:?}, but the original has {:?}", tensor.shape, matrix.logical_dims());
            problems.explain(Problem::RuleShape, &tensor.name, what);
            return false;
        }
        let Some(scales) = &matrix.scales else {
            facets.plain_dtypes.insert(tensor.name.clone(), matrix.dtype);
            return true;
        };
        let stored = |b: &ScaleBand<SourceId>| b.map_scale(ScaleOf::Original);
        let member = Member {
            shape: matrix.shape.clone(),
            values: values_of(tensor, matrix.transposed),
            bands: scales.bands.iter().map(stored).collect(),
            scale_cols: scales.cols,
        };
        let id = facets.add(EncodedMatrix {
            scheme: scales.scheme,
            scale: scales.scale,
            block: scales.block,
            members: vec![member],
        });
        let payload = original.tensor(matrix.payload);
        let grid = payload_grid(&matrix.shape, payload.bytes);
        facets.tensors.push(FacetTensor {
            name: payload.name.to_string(),
            dtype: payload.dtype,
            shape: payload.shape.clone(),
            body: Body::Encoded(Encoded { grid, quantized: id, member: 0, facet: Facet::Payload }),
        });
        for source in matrix.own_scale.into_iter().chain(matrix.shape_tensor) {
            let tensor = original.tensor(source);
            let name = tensor.name.to_string();
            facets.tensors.push(FacetTensor::stored(name, tensor, Origin::Original, source));
        }
        false
    });
    facets
}

/// Takes the tensors out of `view_tensors` that the source, a published checkpoint, has quantized;
/// returns their stored tensors unchanged.
pub(in crate::plan) fn copy_quantized(
    checkpoint: &Checkpoint,
    matrices: &[Matrix],
    mapping: &ResolvedMapping,
    view_tensors: &mut Vec<ViewTensor>,
) -> Facets {
    let published = |name: &str| mapping.canonical(name).unwrap_or_else(|| name.to_owned());
    let mut facets = Facets::default();
    let mut taken = HashSet::new();
    for matrix in matrices.iter().filter(|m| m.scales.is_some()) {
        taken.insert(published(&matrix.name));
        let parts = [Some(matrix.payload), matrix.own_scale, matrix.shape_tensor];
        for source in parts.into_iter().flatten() {
            let tensor = checkpoint.tensor(source);
            let name = published(&tensor.name);
            facets.tensors.push(FacetTensor::stored(name, tensor, Origin::Source, source));
        }
    }
    view_tensors.retain(|tensor| !taken.contains(&tensor.name));
    facets
}

/// Takes the tensors out of `view_tensors` that the mapping's encodings quantize; returns their
/// facets, with computed scales.
///
/// `scale_dtype` is the dtype of INT4 scales, where the user asks for one.
pub(in crate::plan) fn quantize_by_mapping(
    mapping: &ResolvedMapping,
    scale_dtype: Option<Float>,
    view_tensors: &mut Vec<ViewTensor>,
    problems: &mut Problems,
) -> Facets {
    let mut facets = Facets::default();
    let mut left: BTreeMap<String, ViewTensor> =
        std::mem::take(view_tensors).into_iter().map(|t| (t.name.clone(), t)).collect();
    let names: Vec<String> = left.keys().cloned().collect();
    for name in names {
        let used = mapping.encodings.iter().find(|e| e.quantize.matches(&name));
        let Some(encoding) = used else { continue };
        let bound = encoding.matrix.iter().find_map(|t| t.bind(&name, &encoding.vars));
        let Some(bindings) = bound else {
            problems.explain(Problem::RuleShape, &name, "quantized under a name of another form");
            continue;
        };
        let parts: Option<Vec<ViewTensor>> = encoding
            .matrix
            .iter()
            .map(|t| left.remove(&t.format(&bindings, &encoding.vars)?))
            .collect();
        // `None` for the second name of a pair, which was taken together with the first.
        let Some(parts) = parts else { continue };
        facets.encode(encoding, &bindings, scale_dtype, &parts, problems);
    }
    view_tensors.extend(left.into_values());
    facets
}

impl Facets {
    fn add(&mut self, quantized: EncodedMatrix) -> EncodedMatrixId {
        let id = u32::try_from(self.quantized.len()).expect("the source numbers its tensors");
        self.quantized.push(quantized);
        EncodedMatrixId(id)
    }

    /// Adds the facets of a matrix, or of the two matrices of a pair.
    fn encode(
        &mut self,
        encoding: &Encoding,
        bindings: &Bindings,
        scale_dtype: Option<Float>,
        parts: &[ViewTensor],
        problems: &mut Problems,
    ) {
        let scheme = encoding.scheme;
        let dtype = match (scheme, scale_dtype) {
            (Scheme::Int4, Some(float)) => float.dtype(),
            (Scheme::Fp8 | Scheme::Fp4 | Scheme::Int4 | Scheme::Mxfp4, _) => {
                encoding.quantize.scale_dtype
            }
        };
        let geometry = geometry(encoding, parts);
        let (Some(scale), Some(geometry)) = (scheme.scale_code(dtype), geometry) else {
            for part in parts {
                let what = format!("{:?} cannot be held in {}", part.shape, scheme.name());
                problems.explain(Problem::PayloadShape, &part.name, what);
            }
            return;
        };
        let mut members = Vec::with_capacity(parts.len());
        for (part, g) in parts.iter().zip(&geometry) {
            members.push(Member {
                shape: g.matrix.clone(),
                values: values_of(part, encoding.transposed),
                bands: g.bands.clone(),
                scale_cols: g.scale.dims().last().copied().unwrap_or(1),
            });
        }
        let block = encoding.block;
        let id = self.add(EncodedMatrix { scheme, scale, block, members });
        let name = |t: &crate::mapping::NameTemplate| {
            t.format(bindings, &encoding.vars).unwrap_or_default()
        };
        for (member, g) in geometry.into_iter().enumerate() {
            let dims = g.matrix.dims().to_vec();
            let payload_bytes = g.payload.bytes(scheme.payload_dtype()).unwrap_or(0);
            let encoded =
                |grid, facet| Body::Encoded(Encoded { grid, quantized: id, member, facet });
            self.tensors.push(FacetTensor {
                name: name(&encoding.payload[member]),
                dtype: scheme.payload_dtype(),
                body: encoded(payload_grid(&g.matrix, payload_bytes), Facet::Payload),
                shape: g.payload,
            });
            let width = u64::from(dtype.bits() / 8);
            let grid = Grid::new(&g.scale, width);
            self.tensors.push(FacetTensor {
                name: name(&encoding.scale[member][0]),
                dtype,
                shape: g.scale,
                body: encoded(grid, Facet::Scale),
            });
            if let Some(template) = &encoding.shape {
                // I32, as in published checkpoints.
                let bytes = dims
                    .iter()
                    .flat_map(|d| i32::try_from(*d).unwrap_or(i32::MAX).to_le_bytes())
                    .collect();
                let n = to_u64(dims.len());
                self.tensors.push(FacetTensor {
                    name: name(template),
                    dtype: DType::I32,
                    shape: Shape::from([n]),
                    body: Body::Literal(bytes),
                });
            }
        }
    }
}

/// Shapes and bands of one member of a quantized matrix.
struct Geometry {
    matrix: Shape,
    payload: Shape,
    scale: Shape,
    bands: Vec<ScaleBand<ScaleOf>>,
}

/// The geometry of every member; `None` where the scheme cannot hold its shape.
fn geometry(encoding: &Encoding, parts: &[ViewTensor]) -> Option<Vec<Geometry>> {
    let scheme = encoding.scheme;
    let block = encoding.block;
    let mut out = Vec::with_capacity(parts.len());
    for (member, part) in parts.iter().enumerate() {
        let mut dims = part.shape.clone();
        if let (true, [.., a, b]) = (encoding.transposed, dims.as_mut_slice()) {
            std::mem::swap(a, b);
        }
        let matrix = Shape::new(dims);
        let payload = scheme.payload_shape(scheme.payload_dtype(), &matrix)?;
        let [outer @ .., rows, cols] = matrix.dims() else { return None };
        let (scale_rows, scale_cols) = (rows.div_ceil(block[0]), cols.div_ceil(block[1]));
        let mut scale = outer.to_vec();
        scale.extend([scale_rows, scale_cols]);
        let planes: u64 = outer.iter().product();
        let bands = (0..planes)
            .map(|p| ScaleBand {
                rows: p * rows..(p + 1) * rows,
                scale: ScaleOf::Member(member),
                row: p * scale_rows,
                skip: 0,
            })
            .collect();
        out.push(Geometry { payload, scale: Shape::new(scale), bands, matrix });
    }
    if let (true, Some(shards)) = (encoding.fused_shards, encoding.quantize.shards) {
        let [first, second] = parts else { return None };
        let ([first_rows, first_cols], [second_rows, second_cols]) =
            (&first.shape[..], &second.shape[..])
        else {
            return None;
        };
        let rows = [*first_rows, *second_rows];
        // Both are in one grid, so their columns and shards must agree.
        if first_cols != second_cols
            || rows.iter().any(|r| shards == 0 || !r.is_multiple_of(shards))
        {
            return None;
        }
        let scale_rows = rows.map(|r| shards * (r / shards).div_ceil(block[0]));
        let members = [ScaleOf::Member(0), ScaleOf::Member(1)];
        let (_, bands) = fused_bands(rows, scale_rows, members, block[0])?;
        for ((g, n), bands) in out.iter_mut().zip(scale_rows).zip(bands) {
            g.scale = Shape::from([n, g.scale.dims()[1]]);
            g.bands = bands;
        }
    }
    Some(out)
}

/// The elements of the matrix as F32: the fragments of the tensor, in the orientation of the
/// payload.
fn values_of(tensor: &ViewTensor, transposed: bool) -> Computed {
    let mut shape = tensor.shape.clone();
    let mut fragments = tensor.fragments.clone();
    if transposed && shape.len() >= 2 {
        let n = shape.len();
        shape.swap(n - 2, n - 1);
        for f in &mut fragments {
            f.map.target.swap(n - 2, n - 1);
        }
        let key = |f: &Fragment| f.map.target.iter().map(|a| a.start).collect::<Vec<_>>();
        fragments.sort_by_cached_key(key);
    }
    bodies::computed(&Shape::new(shape), DType::F32, fragments)
}

/// The grid of a payload. Its rows are those of the matrix, whatever shape the payload has.
fn payload_grid(matrix: &Shape, payload_bytes: u64) -> Grid {
    let [outer @ .., rows, _] = matrix.dims() else { return Grid::of(1, 1, payload_bytes) };
    let planes: u64 = outer.iter().product();
    Grid::of(planes, *rows, payload_bytes.checked_div(planes * rows).unwrap_or(0))
}
