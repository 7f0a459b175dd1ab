//! The grid of chunks of a computed tensor. A chunk is the unit of decoding, caching and single
//! flight.
//!
//! ```text
//! [E, H, 2I]   plane = one index of the outer axes, row = one index of the last but one
//! +---- plane 0 ----+---- plane 1 ----+ …
//! | chunk 0 | 1 | 2 | chunk 3 | 4 | 5 |      a chunk never crosses a plane
//! ```

use crate::tensor::Shape;

/// Approximate size of a chunk in bytes: large enough that bookkeeping costs nothing, small enough
/// to stay in a core's L2 cache together with its source.
const CHUNK_BYTES: u64 = 1 << 20;

/// The rows of a chunk are a multiple of this, unless the plane has fewer. 128 is the block extent
/// of FP8 releases and a multiple of the group sizes of the other schemes, so that chunks end where
/// blocks end.
const ROW_MULTIPLE: u64 = 128;

/// The chunks of a computed tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Planes of the tensor: the product of all axes but the last two.
    pub planes: u64,
    /// Rows of a plane.
    pub rows: u64,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// Rows of a chunk; the last chunk of a plane may have fewer.
    pub chunk_rows: u64,
}

/// The position of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkBox {
    /// The plane that contains it.
    pub plane: u64,
    /// First row within the plane.
    pub row: u64,
    /// Number of rows.
    pub rows: u64,
}

impl Grid {
    /// The grid of a tensor with elements of `element` bytes.
    ///
    /// A 1-D tensor is one plane whose rows are its elements, a 0-d tensor one row.
    pub(crate) fn new(shape: &Shape, element: u64) -> Grid {
        let dims = shape.dims();
        let (planes, rows, cols) = match dims {
            [] => (1, 1, 1),
            [n] => (1, *n, 1),
            [outer @ .., rows, cols] => (outer.iter().product(), *rows, *cols),
        };
        Grid::of(planes, rows, cols * element)
    }

    /// The grid of `planes` planes with `rows` rows of `row_bytes` bytes each.
    pub(crate) fn of(planes: u64, rows: u64, row_bytes: u64) -> Grid {
        let wanted = (CHUNK_BYTES / row_bytes.max(1)).max(1);
        let chunk_rows = wanted.next_multiple_of(ROW_MULTIPLE).min(rows).max(1);
        Grid { planes, rows, row_bytes, chunk_rows }
    }

    /// Chunks of a plane.
    pub(crate) fn chunks_per_plane(&self) -> u64 {
        self.rows.div_ceil(self.chunk_rows)
    }

    /// Number of chunks.
    pub(crate) fn chunks(&self) -> u64 {
        self.planes * self.chunks_per_plane()
    }

    /// The chunk that contains the byte at offset `at` of the tensor.
    pub(crate) fn chunk_at(&self, at: u64) -> u64 {
        let plane_bytes = self.rows * self.row_bytes;
        let within = at % plane_bytes;
        (at / plane_bytes) * self.chunks_per_plane() + within / (self.chunk_rows * self.row_bytes)
    }

    /// The plane and rows of a chunk.
    pub(crate) fn chunk_box(&self, chunk: u64) -> ChunkBox {
        let per_plane = self.chunks_per_plane();
        let row = (chunk % per_plane) * self.chunk_rows;
        ChunkBox { plane: chunk / per_plane, row, rows: self.chunk_rows.min(self.rows - row) }
    }

    /// Offset of a chunk in the tensor, and its size in bytes.
    pub(crate) fn extent(&self, chunk: u64) -> (u64, u64) {
        let b = self.chunk_box(chunk);
        ((b.plane * self.rows + b.row) * self.row_bytes, b.rows * self.row_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_tensor_in_order() {
        for dims in [vec![], vec![7], vec![5, 3], vec![3, 300, 4096], vec![2, 3, 129, 65536]] {
            let shape = Shape::new(dims);
            let grid = Grid::new(&shape, 2);
            let mut at = 0;
            for chunk in 0..grid.chunks() {
                let (start, bytes) = grid.extent(chunk);
                assert_eq!(start, at, "{shape}");
                assert_eq!((grid.chunk_at(at), grid.chunk_at(at + bytes - 1)), (chunk, chunk));
                at += bytes;
            }
            assert_eq!(at, shape.elements().unwrap() * 2, "{shape}");
        }
    }

    #[test]
    fn a_chunk_of_a_mimo_expert_is_one_scale_block_high() {
        // MiMo's gate_and_up_projs: rows of 8 KiB; 128 of them are 1 MiB, and a scale block has
        // 128.
        let grid = Grid::new(&Shape::from([256, 4096, 4096]), 2);
        assert_eq!((grid.chunk_rows, grid.chunks()), (128, 256 * 32));
    }
}
