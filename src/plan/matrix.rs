//! A matrix of the source: its payload, its scales, and which scale row serves which matrix row.

use std::ops::Range;

use crate::codec::{Code, ScaleCode, Scheme};
use crate::source::SourceId;
use crate::tensor::{BoxMap, DType, Shape};

/// A matrix of the source: one plain tensor, or the payload, scale and shape tensors of a quantized
/// matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    /// Name in the checkpoint; for a quantized matrix, the name of the decoded one.
    pub name: Box<str>,
    /// The tensor that holds the elements or their codes.
    pub payload: SourceId,
    /// Element type of the payload.
    pub dtype: DType,
    /// Extents of the decoded matrix.
    pub shape: Shape,
    /// Whether the model's tensor is this matrix with its last two axes exchanged.
    pub transposed: bool,
    /// Scales, where the matrix is quantized.
    pub scales: Option<MatrixScales>,
    /// The matrix's own scale tensor. Bands can refer to that of another matrix too.
    pub own_scale: Option<SourceId>,
    /// A tensor that holds the decoded shape; it is checked when the matrix is first decoded.
    pub shape_tensor: Option<SourceId>,
}

impl Matrix {
    /// A matrix that is one plain tensor.
    pub(crate) fn plain(name: Box<str>, payload: SourceId, dtype: DType, shape: Shape) -> Matrix {
        Matrix {
            name,
            payload,
            dtype,
            shape,
            transposed: false,
            scales: None,
            own_scale: None,
            shape_tensor: None,
        }
    }

    /// Extents of the model's tensor: those of the matrix, exchanged where it is transposed.
    pub(crate) fn logical_dims(&self) -> Vec<u64> {
        let mut dims = self.shape.dims().to_vec();
        if let (true, [.., a, b]) = (self.transposed, dims.as_mut_slice()) {
            std::mem::swap(a, b);
        }
        dims
    }

    /// The map of the whole matrix (source) to the model's tensor (target).
    pub(crate) fn logical_map(&self) -> BoxMap {
        let mut map = BoxMap::identity(self.shape.dims());
        if let (true, [.., a, b]) = (self.transposed, map.target.as_mut_slice()) {
            std::mem::swap(a, b);
        }
        map
    }

    /// Whether its elements can be converted to any floating-point dtype.
    pub(crate) fn is_castable(&self) -> bool {
        self.scales.is_some() || self.dtype.as_float().is_some()
    }

    /// Columns: the extent of the last axis.
    pub(crate) fn cols(&self) -> u64 {
        self.shape.dims().last().copied().unwrap_or(1)
    }

    /// Rows: the product of all axes but the last.
    pub(crate) fn rows(&self) -> u64 {
        self.shape.dims().split_last().map_or(1, |(_, outer)| outer.iter().product())
    }
}

/// Scales of a quantized matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MatrixScales {
    /// How the matrix is quantized.
    pub scheme: Scheme,
    /// How a scale is stored.
    pub scale: ScaleCode,
    /// Rows and columns of the matrix that one scale serves.
    pub block: [u64; 2],
    /// Scales per row of the scale tensor.
    pub cols: u64,
    /// Which scale rows serve which matrix rows; in order, without gaps.
    pub bands: Vec<ScaleBand<SourceId>>,
}

impl MatrixScales {
    /// The format of an element in the payload.
    pub(crate) fn code(&self) -> Code {
        self.scheme.code()
    }
}

/// Consecutive rows of a matrix that are served by consecutive scale rows.
///
/// Row `r` of the band has the scale row `row + (r - rows.start + skip) / block[0]`. A matrix has
/// several bands where the block grid restarts (stacked experts), or where a block spans the
/// boundary of two tensors that were quantized as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScaleBand<S> {
    /// Rows of the matrix, counted over all axes but the last.
    pub rows: Range<u64>,
    /// The scale tensor.
    pub scale: S,
    /// Scale row of the band's first row.
    pub row: u64,
    /// Number of rows of the first block that lie before the band.
    pub skip: u64,
}

impl<S: Copy> ScaleBand<S> {
    /// The same band with another kind of reference to the scale tensor.
    pub(crate) fn map_scale<T>(&self, name: impl Fn(S) -> T) -> ScaleBand<T> {
        ScaleBand {
            rows: self.rows.clone(),
            scale: name(self.scale),
            row: self.row,
            skip: self.skip,
        }
    }

    /// Scale row of a matrix row of the band, with `block` rows per scale.
    pub(crate) fn scale_row(&self, row: u64, block: u64) -> u64 {
        self.row + (row - self.rows.start + self.skip) / block
    }

    /// Matrix rows of the band that a scale row serves; can be empty.
    pub(crate) fn rows_of(&self, scale_row: u64, block: u64) -> Range<u64> {
        let Some(n) = scale_row.checked_sub(self.row) else { return 0..0 };
        let start = (self.rows.start + n * block).saturating_sub(self.skip).max(self.rows.start);
        let end = (self.rows.start + (n + 1) * block - self.skip).min(self.rows.end);
        start..end.max(start)
    }
}

/// How to read the scales of matrices that were quantized as fused shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleReading {
    /// Blocks run over the fused rows of each shard, which is how the checkpoint was quantized.
    #[default]
    Fused,
    /// Blocks run over each tensor separately and surplus scale rows are ignored, as Automodel
    /// 0.7.0 does.
    Automodel,
}

/// Maximum number of shards of a fused pair. Models have at most as many shards as K/V heads.
const MAX_SHARDS: u64 = 1 << 12;

/// Number of shards and bands of two matrices that were quantized as one, in shards.
///
/// `rows` and `scale_rows` are those of the two tensors. In each of `t` shards, the rows of the
/// first tensor come before those of the second, and blocks of `block` rows run over both. The
/// scale of a block that holds rows of both is stored with the first tensor. `t` is the smallest
/// number that explains both numbers of scale rows; `None` where none does.
///
/// ```text
/// one shard with 192 + 128 rows, in blocks of 128 rows:
///   fused rows   0..128  first 0..128                   scale row 0 of the first
///   fused rows 128..256  first 128..192, second 0..64   scale row 1 of the first
///   fused rows 256..320  second 64..128                 scale row 0 of the second
/// ```
pub(super) fn fused_bands<S: Copy>(
    rows: [u64; 2],
    scale_rows: [u64; 2],
    scales: [S; 2],
    block: u64,
) -> Option<(u64, [Vec<ScaleBand<S>>; 2])> {
    let explains = |t: u64| {
        (0..2).all(|i| {
            rows[i].is_multiple_of(t) && t * (rows[i] / t).div_ceil(block) == scale_rows[i]
        })
    };
    let most = rows[0].min(rows[1]).min(scale_rows[0]).min(MAX_SHARDS);
    let shards = (1..=most).find(|&t| explains(t))?;
    // One shard: each tensor has a plain grid of its own, nothing is shared.
    if shards == 1 {
        let plain =
            |i: usize| vec![ScaleBand { rows: 0..rows[i], scale: scales[i], row: 0, skip: 0 }];
        return Some((1, [plain(0), plain(1)]));
    }
    let (first, second) = (rows[0] / shards, rows[1] / shards);
    let (first_blocks, second_blocks) = (scale_rows[0] / shards, scale_rows[1] / shards);
    // Rows of the second tensor in the last block of the first one.
    let shared = (first_blocks * block - first).min(second);
    let mut bands = [Vec::new(), Vec::new()];
    for s in 0..shards {
        let row = s * first_blocks;
        bands[0].push(ScaleBand {
            rows: s * first..(s + 1) * first,
            scale: scales[0],
            row,
            skip: 0,
        });
        let start = s * second;
        if shared > 0 {
            bands[1].push(ScaleBand {
                rows: start..start + shared,
                scale: scales[0],
                row: row + first_blocks - 1,
                skip: first % block,
            });
        }
        if shared < second {
            bands[1].push(ScaleBand {
                rows: start + shared..start + second,
                scale: scales[1],
                row: s * second_blocks,
                skip: 0,
            });
        }
    }
    Some((shards, bands))
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: SourceId = SourceId(0);
    const V: SourceId = SourceId(1);

    #[test]
    fn a_scale_block_spans_rows_of_k_and_v() {
        // MiMo's full-attention layers: 4 heads of 192 K rows and 128 V rows.
        let (shards, [k, v]) = fused_bands([768, 512], [8, 4], [K, V], 128).unwrap();
        assert_eq!(shards, 4);
        assert_eq!(k[1], ScaleBand { rows: 192..384, scale: K, row: 2, skip: 0 });
        assert_eq!(v[2], ScaleBand { rows: 128..192, scale: K, row: 3, skip: 64 });
        assert_eq!(v[3], ScaleBand { rows: 192..256, scale: V, row: 1, skip: 0 });
    }

    #[test]
    fn scale_counts_that_fit_are_a_plain_grid() {
        // MiMo's sliding-window layers: 8 heads; 1536 rows of K are 12 blocks.
        let (shards, [k, v]) = fused_bands([1536, 1024], [12, 8], [K, V], 128).unwrap();
        assert_eq!(shards, 1);
        assert_eq!(k, [ScaleBand { rows: 0..1536, scale: K, row: 0, skip: 0 }]);
        assert_eq!(v, [ScaleBand { rows: 0..1024, scale: V, row: 0, skip: 0 }]);
    }

    #[test]
    fn rows_of_inverts_scale_row() {
        let (_, bands) = fused_bands([768, 512], [8, 4], [K, V], 128).unwrap();
        for band in bands.iter().flatten() {
            for row in band.rows.clone() {
                assert!(band.rows_of(band.scale_row(row, 128), 128).contains(&row), "{row}");
            }
        }
        let v_head = &bands[1][2];
        assert_eq!((v_head.rows_of(3, 128), v_head.rows_of(2, 128)), (128..192, 0..0));
        assert!(v_head.rows_of(4, 128).is_empty());
    }

    #[test]
    fn unexplained_scale_counts_are_refused() {
        assert_eq!(fused_bands([768, 512], [7, 4], [K, V], 128), None);
        assert_eq!(fused_bands([768, 512], [8, 5], [K, V], 128), None);
    }
}
