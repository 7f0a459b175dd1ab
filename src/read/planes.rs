//! The stored rows that the chunks of a plane are transposes of: read before they are wanted, and let
//! go when they were.

use super::chunk::{ChunkReader, Failure, bits_of, lead, stored_payload};
use super::placement::{Span, placements};
use crate::codec::Orientation;
use crate::plan::{ChunkBox, Computed, Matrix, MatrixId};
use crate::tensor::Shape;

impl ChunkReader<'_> {
    /// Reads the stored rows that chunks of a plane are transposes of, for whoever asks for them.
    ///
    /// # Errors
    /// What the source fails with.
    pub(super) fn load<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        plane: u64,
    ) -> Result<(), Failure> {
        for (matrix, rows) in transposed_rows(computed, matrix_of, shape, plane) {
            let stored = stored_payload(matrix);
            let width = computed.grid.chunk_rows * bits_of(matrix) / 8;
            if self.worth(Orientation::Transposed, stored, width, rows.count) {
                let source = (self.checkpoint, self.counters);
                self.slabs.load(source, stored, rows.start, rows.count)?;
            }
        }
        Ok(())
    }

    /// Lets go of the stored rows that chunks of a plane are transposes of.
    pub(super) fn forget<'m>(
        &self,
        computed: &Computed,
        matrix_of: impl Fn(MatrixId) -> &'m Matrix,
        shape: &Shape,
        plane: u64,
    ) {
        for (matrix, rows) in transposed_rows(computed, matrix_of, shape, plane) {
            let lead = lead(&computed.grid) * bits_of(matrix) / 8;
            self.slabs.forget(stored_payload(matrix), lead, rows.start, rows.count);
            let Some(scales) = &matrix.scales else { continue };
            for band in &scales.bands {
                let start = rows.start.max(band.rows.start);
                let end = (rows.start + rows.count).min(band.rows.end);
                if start < end {
                    let row_of = |row| band.scale_row(row, scales.block[0]);
                    let (first, last) = (row_of(start), row_of(end - 1));
                    let stored = self.stored_scales(scales, band.scale);
                    self.slabs.forget(stored, 0, first, last - first + 1);
                }
            }
        }
    }
}

/// The matrices that chunks of a plane are transposes of, and the rows of each.
fn transposed_rows<'m>(
    computed: &Computed,
    matrix_of: impl Fn(MatrixId) -> &'m Matrix,
    shape: &Shape,
    plane: u64,
) -> Vec<(&'m Matrix, Span)> {
    let whole = ChunkBox { plane, row: 0, rows: computed.grid.rows };
    let mut found = Vec::new();
    for fragment in computed.fragments_of(plane) {
        let matrix = matrix_of(fragment.matrix);
        let placed = placements(fragment, matrix, shape, whole);
        found.extend(placed.iter().filter(|p| p.transposed).map(|p| {
            let count = p.rows.step * (p.rows.count - 1) + 1;
            (matrix, Span { start: p.rows.start, step: 1, count })
        }));
    }
    found
}
