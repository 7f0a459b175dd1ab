//! The part of a fragment that falls into a chunk, seen as a 2-D box of the matrix and where it
//! goes in the chunk.

use crate::plan::{ChunkBox, Fragment, Matrix};
use crate::tensor::{Axis, BoxMap, Shape};

/// Start, step and count along one direction, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub start: u64,
    pub step: u64,
    pub count: u64,
}

/// A 2-D box of a matrix (rows are all axes but the last) and its place in a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Rows of the matrix.
    pub rows: Span,
    /// Columns of the matrix.
    pub cols: Span,
    /// Whether matrix rows run along the chunk's columns.
    pub transposed: bool,
    /// Rows of the chunk; their count is that of what runs along them.
    pub to_rows: Span,
    /// Columns of the chunk.
    pub to_cols: Span,
}

/// What of a fragment falls into a chunk: nothing, one placement, or (where neither of the chunk's
/// directions moves along the matrix's columns) one for each row of the chunk.
pub(super) fn placements(
    fragment: &Fragment,
    matrix: &Matrix,
    shape: &Shape,
    chunk: ChunkBox,
) -> Vec<Placement> {
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
    let span = |axis: Axis| Span { start: axis.start, step: axis.step, count: count(axis.along) };
    let cols = span(last);
    let rows_along = |along: Option<u8>| match row_step(along) {
        Some(step) => Span { start: row_start, step, count: count(along) },
        None => Span { start: row_start, step: 1, count: 1 },
    };
    let (to_rows, to_cols) = (span(to_row), span(to_col));

    let cols_move_rows = last.along.is_some() && last.along == along_rows;
    let cols_move_cols = last.along.is_some() && last.along == along_cols;
    if cols_move_rows {
        let rows = rows_along(along_cols);
        return vec![Placement { rows, cols, transposed: true, to_rows, to_cols }];
    }
    if cols_move_cols || along_cols.is_none() {
        let rows = rows_along(along_rows);
        return vec![Placement { rows, cols, transposed: false, to_rows, to_cols }];
    }
    // The chunk's columns move along matrix rows, and so do its rows, if they move at all.
    let step = row_step(along_rows).unwrap_or(0);
    let rows = rows_along(along_cols);
    (0..count(along_rows))
        .map(|i| Placement {
            rows: Span { start: rows.start + i * step, ..rows },
            cols,
            transposed: true,
            to_rows: Span { start: to_rows.start + i * to_rows.step, step: 1, count: 1 },
            to_cols,
        })
        .collect()
}

/// The chunk's box in the tensor.
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

/// Whether a fragment turns rows into columns somewhere: its source is read in narrow strips.
pub(super) fn transposes(map: &BoxMap) -> bool {
    let last = map.source.last().and_then(|a| a.along);
    last.is_some() && map.target.last().and_then(|a| a.along) != last
}
