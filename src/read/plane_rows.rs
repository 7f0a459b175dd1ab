//! Prefetches and releases the source rows of a plane, for planes that are transposes.

use super::box_copy::{StridedRange, copies_into_chunk};
use super::decode::{ChunkDecoder, DecodeError, leading_columns, payload_bits, payload_panel};
use crate::codec::Orientation;
use crate::plan::{ChunkBox, Computed, Matrix, MatrixId};
use crate::tensor::Shape;

impl ChunkDecoder<'_> {
    /// Reads the payload rows that a plane's chunks are transposed from into the cache. Their
    /// scales are read when a chunk is decoded.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn prefetch_plane<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        plane: u64,
    ) -> Result<(), DecodeError> {
        for (matrix, rows) in transposed_rows(computed, matrix_of, shape, plane) {
            let whole_rows = payload_panel(matrix);
            let width = computed.grid.chunk_rows * payload_bits(matrix) / 8;
            if self.use_cached_rows(Orientation::Transposed, whole_rows, width, rows.count) {
                let source = (self.checkpoint, self.counters);
                self.source_rows.prefetch(source, whole_rows, rows.start, rows.count)?;
            }
        }
        Ok(())
    }

    /// Drops the payload and scale rows that a plane's chunks are transposed from from the cache.
    pub(super) fn release_plane<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        plane: u64,
    ) {
        for (matrix, rows) in transposed_rows(computed, matrix_of, shape, plane) {
            let lead = leading_columns(&computed.grid) * payload_bits(matrix) / 8;
            self.source_rows.release(payload_panel(matrix), lead, rows.start, rows.count);
            let Some(scales) = &matrix.scales else { continue };
            for band in &scales.bands {
                let start = rows.start.max(band.rows.start);
                let end = (rows.start + rows.count).min(band.rows.end);
                if start < end {
                    let row_of = |row| band.scale_row(row, scales.block[0]);
                    let (first, last) = (row_of(start), row_of(end - 1));
                    let whole_rows = self.scale_panel(scales, band.scale);
                    self.source_rows.release(whole_rows, 0, first, last - first + 1);
                }
            }
        }
    }
}

/// The matrices that a plane's chunks are transposed from, and the rows of each.
fn transposed_rows<'m>(
    computed: &Computed,
    matrix_of: impl Fn(MatrixId) -> &'m Matrix,
    shape: &Shape,
    plane: u64,
) -> Vec<(&'m Matrix, StridedRange)> {
    let whole = ChunkBox { plane, row: 0, rows: computed.grid.rows };
    let mut found = Vec::new();
    for fragment in computed.fragments_of(plane) {
        let matrix = matrix_of(fragment.matrix);
        let copies = copies_into_chunk(fragment, matrix, shape, whole);
        found.extend(copies.iter().filter(|p| p.transposed).map(|p| {
            let count = p.rows.step * (p.rows.count - 1) + 1;
            (matrix, StridedRange { start: p.rows.start, step: 1, count })
        }));
    }
    found
}
