//! Quantization schemes: which dtypes and shapes of payload and scale tensors belong to a matrix,
//! and which scale covers which element.
//!
//! Arithmetic on shapes only; no bytes are decoded here. A tensor of any rank counts as a matrix
//! whose columns are its last axis: `[experts, out, in]` has `experts * out` rows.

use super::{Code, ScaleCode, fp4_scale_e8m0, fp8_scale, fp8_scale_e8m0, int4_scale, scale_to_f32};
use crate::tensor::{DType, Float, Shape};

/// How a quantized matrix is stored: a payload tensor of codes and a tensor of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Scheme {
    /// F8_E4M3 payload of the matrix's shape; a scale for each block of rows and columns.
    Fp8,
    /// E2M1 codes, two to a byte (I8, U8 or F4); a scale for each group of columns of a row.
    Fp4,
    /// 4-bit integers stored plus 8, eight to an int32 (`pack-quantized` of compressed-tensors); a
    /// scale for each group of columns of a row.
    Int4,
    /// E2M1 codes in blocks `[…, rows, cols / 32, 16]` U8 with E8M0 scales `[…, rows, cols / 32]`
    /// (gpt-oss's MXFP4).
    Mxfp4,
}

/// Layout of the scales of one matrix: a grid of `rows` by `cols` scales for each plane. A plane is
/// `plane_rows` rows of the matrix, for example one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScaleGrid {
    /// Rows and columns that one scale covers.
    pub block: [u64; 2],
    /// Rows of a plane. Each plane starts a new grid.
    pub plane_rows: u64,
    /// Scale rows of a plane.
    pub rows: u64,
    /// Scales in a scale row.
    pub cols: u64,
}

impl Scheme {
    /// All schemes with their names in mapping files.
    pub(crate) const ALL: [(Scheme, &'static str); 4] = [
        (Scheme::Fp8, "fp8"),
        (Scheme::Fp4, "fp4"),
        (Scheme::Int4, "int4"),
        (Scheme::Mxfp4, "mxfp4"),
    ];

    /// The scheme that a mapping file calls `name`.
    pub(crate) fn parse(name: &str) -> Option<Scheme> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(s, _)| *s)
    }

    /// The name that mapping files use.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Scheme::Fp8 => "fp8",
            Scheme::Fp4 => "fp4",
            Scheme::Int4 => "int4",
            Scheme::Mxfp4 => "mxfp4",
        }
    }

    /// Encoding of the payload's elements.
    pub(crate) fn code(self) -> Code {
        match self {
            Scheme::Fp8 => Code::E4M3,
            Scheme::Fp4 | Scheme::Mxfp4 => Code::E2M1,
            Scheme::Int4 => Code::Int4,
        }
    }

    /// Whether a tensor of this dtype can be a payload of the scheme.
    pub(crate) fn takes_payload(self, dtype: DType) -> bool {
        match self {
            Scheme::Fp8 => dtype == DType::F8E4M3,
            Scheme::Fp4 => matches!(dtype, DType::I8 | DType::U8 | DType::F4),
            Scheme::Int4 => dtype == DType::I32,
            Scheme::Mxfp4 => dtype == DType::U8,
        }
    }

    /// Encoding of scales stored in this dtype, or `None` if the scheme does not allow the dtype.
    pub(crate) fn scale_code(self, dtype: DType) -> Option<ScaleCode> {
        let floats = dtype.as_float().map(|float| match float {
            Float::F32 => ScaleCode::F32,
            Float::BF16 => ScaleCode::BF16,
            Float::F16 => ScaleCode::F16,
        });
        // Files written before safetensors had F8_E8M0 store the same bytes as U8.
        let powers = matches!(dtype, DType::F8E8M0 | DType::U8).then_some(ScaleCode::E8M0);
        match self {
            Scheme::Fp8 | Scheme::Fp4 => floats.or(powers),
            Scheme::Int4 => floats,
            Scheme::Mxfp4 => powers,
        }
    }

    /// Dtype of the payloads that published checkpoints hold.
    pub(crate) fn payload_dtype(self) -> DType {
        match self {
            Scheme::Fp8 => DType::F8E4M3,
            Scheme::Fp4 => DType::I8,
            Scheme::Int4 => DType::I32,
            Scheme::Mxfp4 => DType::U8,
        }
    }

    /// Dtype of the scales that published checkpoints hold; a mapping may name another one.
    pub(crate) fn scale_dtype(self) -> DType {
        match self {
            Scheme::Fp8 => DType::F32,
            Scheme::Fp4 => DType::F8E8M0,
            Scheme::Int4 => DType::BF16,
            Scheme::Mxfp4 => DType::U8,
        }
    }

    /// Shape of the payload of a matrix; `None` if the number of columns is not a multiple of what
    /// the payload packs together.
    pub(crate) fn payload_shape(self, dtype: DType, matrix: &Shape) -> Option<Shape> {
        let (&cols, rows) = matrix.dims().split_last()?;
        let narrowed = |factor: u64, tail: &[u64]| {
            let mut dims = rows.to_vec();
            dims.push(cols.is_multiple_of(factor).then_some(cols / factor)?);
            dims.extend(tail);
            Some(Shape::new(dims))
        };
        match self {
            Scheme::Fp8 => Some(matrix.clone()),
            Scheme::Fp4 if dtype == DType::F4 => Some(matrix.clone()),
            Scheme::Fp4 => narrowed(2, &[]),
            Scheme::Int4 => narrowed(8, &[]),
            Scheme::Mxfp4 => narrowed(32, &[16]),
        }
    }

    /// The scale of a block whose largest magnitude is `amax`. `code` is how the scale will be
    /// stored, which may round it further.
    pub(crate) fn scale_of(self, code: ScaleCode, amax: f32) -> f32 {
        let power = |byte: u8| {
            let mut value = [0.0];
            scale_to_f32(ScaleCode::E8M0, &[byte], &mut value);
            value[0]
        };
        match (self, code) {
            (Scheme::Fp8, ScaleCode::E8M0) => power(fp8_scale_e8m0(amax)),
            (Scheme::Fp8, ScaleCode::F32 | ScaleCode::BF16 | ScaleCode::F16) => fp8_scale(amax),
            (Scheme::Fp4 | Scheme::Mxfp4, _) => power(fp4_scale_e8m0(amax)),
            (Scheme::Int4, _) => int4_scale(amax),
        }
    }

    /// Shape of the matrix that a payload of this dtype and shape holds; `None` if there is no such
    /// matrix.
    pub(crate) fn matrix_shape(self, dtype: DType, payload: &Shape) -> Option<Shape> {
        let dims = payload.dims();
        let (&last, outer) = dims.split_last()?;
        let widened = |last: u64, factor: u64, outer: &[u64]| {
            let mut dims = outer.to_vec();
            dims.push(last.checked_mul(factor)?);
            Some(Shape::new(dims))
        };
        if outer.is_empty() {
            return None;
        }
        match self {
            Scheme::Fp8 => Some(payload.clone()),
            // The shape of an F4 tensor counts elements, that of a byte tensor bytes.
            Scheme::Fp4 if dtype == DType::F4 => Some(payload.clone()),
            Scheme::Fp4 => widened(last, 2, outer),
            Scheme::Int4 => widened(last, 8, outer),
            Scheme::Mxfp4 => {
                let (&groups, rows) = outer.split_last()?;
                if last != 16 || rows.is_empty() {
                    return None;
                }
                widened(groups, 32, rows)
            }
        }
    }

    /// The grid of a scale tensor of shape `scale` over a matrix. `block` is the model's scale
    /// block (rows, columns). `None` if the shape fits no grid.
    ///
    /// Published checkpoints also have one scale for the whole matrix (0-d or a single element),
    /// one scale for each row, and the scales of a grid as a flat 1-D tensor; all are accepted.
    pub(crate) fn scale_grid(
        self,
        matrix: &Shape,
        scale: &Shape,
        block: [u64; 2],
    ) -> Option<ScaleGrid> {
        let (&cols, outer) = matrix.dims().split_last()?;
        let &plane_rows = outer.last()?;
        let all_rows: u64 = outer.iter().product();
        let planes: u64 = outer[..outer.len() - 1].iter().product();
        let given = scale.elements()?;
        if given == 1 && all_rows > 0 {
            let block = [all_rows, cols.max(1)];
            return Some(ScaleGrid { block, plane_rows: all_rows, rows: 1, cols: 1 });
        }
        let grid = match self {
            Scheme::Fp8 => {
                let (rows, cols_n) = (plane_rows.div_ceil(block[0]), cols.div_ceil(block[1]));
                if given == planes * rows * cols_n {
                    ScaleGrid { block, plane_rows, rows, cols: cols_n }
                } else if given == all_rows {
                    let block = [1, cols.max(1)];
                    ScaleGrid { block, plane_rows, rows: plane_rows, cols: 1 }
                } else {
                    return None;
                }
            }
            Scheme::Fp4 | Scheme::Int4 | Scheme::Mxfp4 => {
                if all_rows == 0 || !given.is_multiple_of(all_rows) {
                    return None;
                }
                let groups = given / all_rows;
                let group = if groups == cols.div_ceil(block[1]) {
                    block[1]
                } else if groups == 1 {
                    cols
                } else {
                    return None;
                };
                ScaleGrid { block: [1, group], plane_rows, rows: plane_rows, cols: groups }
            }
        };
        let mut full = outer[..outer.len() - 1].to_vec();
        full.extend([grid.rows, grid.cols]);
        let flat = scale.rank() == 1;
        (flat || scale.dims() == full).then_some(grid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dims: &[u64]) -> Shape {
        Shape::new(dims)
    }

    #[test]
    fn payload_shapes_give_matrix_shapes() {
        type Case<'a> = (Scheme, DType, &'a [u64], Option<&'a [u64]>);
        let cases: [Case<'_>; 7] = [
            (Scheme::Fp8, DType::F8E4M3, &[144, 160], Some(&[144, 160])),
            (Scheme::Fp4, DType::I8, &[96, 80], Some(&[96, 160])),
            (Scheme::Fp4, DType::F4, &[96, 160], Some(&[96, 160])),
            (Scheme::Int4, DType::I32, &[64, 12], Some(&[64, 96])),
            (Scheme::Mxfp4, DType::U8, &[4, 8, 3, 16], Some(&[4, 8, 96])),
            (Scheme::Mxfp4, DType::U8, &[4, 8, 3, 15], None),
            (Scheme::Fp8, DType::F8E4M3, &[144], None),
        ];
        for (scheme, dtype, payload, expected) in cases {
            let got = scheme.matrix_shape(dtype, &shape(payload));
            assert_eq!(got, expected.map(shape), "{scheme:?} {payload:?}");
            if let Some(matrix) = got {
                let back = scheme.payload_shape(dtype, &matrix);
                assert_eq!(back, Some(shape(payload)), "{scheme:?} {matrix}");
            }
        }
    }

    #[test]
    fn scale_shapes_give_a_grid_or_are_refused() {
        let fp8 = [128, 128];
        let group = [1, 32];
        type Case<'a> = (Scheme, &'a [u64], [u64; 2], &'a [u64], Option<([u64; 2], u64, u64)>);
        let cases: [Case<'_>; 17] = [
            (Scheme::Fp8, &[144, 160], fp8, &[2, 2], Some((fp8, 2, 2))),
            (Scheme::Fp8, &[144, 160], fp8, &[4], Some((fp8, 2, 2))),
            (Scheme::Fp8, &[144, 160], fp8, &[], Some(([144, 160], 1, 1))),
            (Scheme::Fp8, &[144, 160], fp8, &[1], Some(([144, 160], 1, 1))),
            (Scheme::Fp8, &[144, 160], fp8, &[144], Some(([1, 160], 144, 1))),
            (Scheme::Fp8, &[144, 160], fp8, &[144, 1], Some(([1, 160], 144, 1))),
            (Scheme::Fp8, &[144, 160], fp8, &[2, 1], None),
            (Scheme::Fp8, &[144, 160], fp8, &[1, 4], None),
            (Scheme::Fp8, &[384, 160], fp8, &[4, 2], None),
            (Scheme::Fp8, &[4, 160, 288], fp8, &[4, 2, 3], Some((fp8, 2, 3))),
            (Scheme::Fp8, &[4, 160, 288], fp8, &[4, 3, 2], None),
            (Scheme::Int4, &[64, 96], group, &[64, 3], Some(([1, 32], 64, 3))),
            (Scheme::Int4, &[64, 96], group, &[192], Some(([1, 32], 64, 3))),
            (Scheme::Int4, &[64, 96], group, &[64], Some(([1, 96], 64, 1))),
            (Scheme::Int4, &[64, 96], group, &[3, 64], None),
            (Scheme::Int4, &[64, 96], group, &[64, 2], None),
            (Scheme::Mxfp4, &[4, 8, 96], group, &[4, 8, 3], Some(([1, 32], 8, 3))),
        ];
        for (scheme, matrix, block, scale, expected) in cases {
            let got = scheme
                .scale_grid(&shape(matrix), &shape(scale), block)
                .map(|g| (g.block, g.rows, g.cols));
            assert_eq!(got, expected, "{scheme:?} {matrix:?} with scales {scale:?}");
        }
    }
}
