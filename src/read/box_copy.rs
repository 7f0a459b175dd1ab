//! Intersects a fragment with a chunk: 2-D copies from a matrix into the chunk.
//!
//! A fragment maps an N-d box of a matrix to an N-d box of the view's tensor. A chunk is some rows
//! of one plane. What the fragment contributes to the chunk is a 2-D box of the matrix, possibly
//! strided, possibly transposed.

use crate::plan::{ChunkBox, Fragment, Matrix};
use crate::tensor::{Axis, BoxMap, Shape};

/// A strided range along one axis: start, step and count, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StridedRange {
    pub start: u64,
    pub step: u64,
    pub count: u64,
}

/// A copy of a 2-D box of a matrix, whose rows are all axes but the last, to a box of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BoxCopy {
    /// Rows of the matrix.
    pub rows: StridedRange,
    /// Columns of the matrix.
    pub cols: StridedRange,
    /// Whether rows of the matrix become columns of the chunk.
    pub transposed: bool,
    /// Rows of the chunk, as many as `rows`, or as `cols` if `transposed`.
    pub to_rows: StridedRange,
    /// Columns of the chunk.
    pub to_cols: StridedRange,
}

/// The copies that a fragment contributes to a chunk: none, one, or (if neither axis of the chunk
/// runs along the matrix's columns) one for each row of the chunk.
pub(super) fn copies_into_chunk(
    fragment: &Fragment,
    matrix: &Matrix,
    shape: &Shape,
    chunk: ChunkBox,
) -> Vec<BoxCopy> {
    let (start, extent) = chunk_region(shape, chunk);
    let Some(map) = fragment.map.within(&start, &extent) else { return Vec::new() };
    let map = map.relative_to(&start);
    let rank = shape.rank();
    let row_axis = rank.checked_sub(if rank == 1 { 1 } else { 2 });
    let col_axis = (rank >= 2).then(|| rank - 1);
    let target = |axis: Option<usize>| axis.map_or(Axis::fixed(0), |a| map.target[a]);
    let (to_row, to_col) = (target(row_axis), target(col_axis));
    let (along_rows, along_cols) = (to_row.along, to_col.along);

    let source_strides = matrix.shape.strides();
    let cols_of_matrix = matrix.cols();
    let (last, outer) = match map.source.split_last() {
        Some((last, outer)) => (*last, outer),
        None => (Axis::fixed(0), &[][..]),
    };
    // Matrix rows: all axes but the last, flattened.
    let row_stride = |axis: usize| source_strides[axis] / cols_of_matrix.max(1);
    let row_start = outer.iter().enumerate().map(|(a, x)| x.start * row_stride(a)).sum();
    let row_step = |along: Option<u8>| {
        let moving = |(_, x): &(usize, &Axis)| x.along.is_some() && x.along == along;
        outer.iter().enumerate().find(moving).map(|(a, x)| x.step * row_stride(a))
    };
    let count = |along: Option<u8>| along.map_or(1, |k| map.extent[usize::from(k)]);
    let span =
        |axis: Axis| StridedRange { start: axis.start, step: axis.step, count: count(axis.along) };
    let cols = span(last);
    let rows_along = |along: Option<u8>| match row_step(along) {
        Some(step) => StridedRange { start: row_start, step, count: count(along) },
        None => StridedRange { start: row_start, step: 1, count: 1 },
    };
    let (to_rows, to_cols) = (span(to_row), span(to_col));

    let cols_move_rows = last.along.is_some() && last.along == along_rows;
    let cols_move_cols = last.along.is_some() && last.along == along_cols;
    if cols_move_rows {
        let rows = rows_along(along_cols);
        return vec![BoxCopy { rows, cols, transposed: true, to_rows, to_cols }];
    }
    if cols_move_cols || along_cols.is_none() {
        let rows = rows_along(along_rows);
        return vec![BoxCopy { rows, cols, transposed: false, to_rows, to_cols }];
    }
    // Both axes of the chunk run along rows of the matrix; its rows may be a single one.
    let step = row_step(along_rows).unwrap_or(0);
    let rows = rows_along(along_cols);
    (0..count(along_rows))
        .map(|i| BoxCopy {
            rows: StridedRange { start: rows.start + i * step, ..rows },
            cols,
            transposed: true,
            to_rows: StridedRange { start: to_rows.start + i * to_rows.step, step: 1, count: 1 },
            to_cols,
        })
        .collect()
}

/// The chunk as a box of the tensor: start and extent for each axis.
fn chunk_region(shape: &Shape, chunk: ChunkBox) -> (Vec<u64>, Vec<u64>) {
    let dims = shape.dims();
    match dims {
        [] => (vec![], vec![]),
        [_] => (vec![chunk.row], vec![chunk.rows]),
        [outer @ .., _, cols] => {
            let mut start = vec![0; outer.len()];
            let mut left = chunk.plane;
            for axis in (0..outer.len()).rev() {
                start[axis] = left % outer[axis];
                left /= outer[axis];
            }
            let mut extent = vec![1; outer.len()];
            start.extend([chunk.row, 0]);
            extent.extend([chunk.rows, *cols]);
            (start, extent)
        }
    }
}

/// Whether a fragment turns columns into rows, so that a chunk needs a narrow strip of its source.
pub(super) fn transposes(map: &BoxMap) -> bool {
    let last = map.source.last().and_then(|a| a.along);
    last.is_some() && map.target.last().and_then(|a| a.along) != last
}
