//! Whether scales and codes belong together: what `verify` can tell of them without an original.
//!
//! A block whose scale is its largest magnitude divided by 448 holds the code 0x7E or 0xFE (448).
//! Read on a grid that is not the one it was quantized on, many blocks do not.

use crate::tensor::to_usize;
use std::collections::BTreeMap;

use crate::codec::{ScaleCode, Scheme};
use crate::plan::{Matrix, Plan};
use crate::source::{Checkpoint, SourceId, SourceReadError};

/// Blocks of FP8 matrices with F32 scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct BlockAudit {
    /// Blocks that hold a code other than zero.
    pub blocks: u64,
    /// Of these, blocks that hold the largest code.
    pub with_largest: u64,
}

/// What a block was found to hold.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holds {
    Zeros,
    Less,
    Largest,
}

/// E4M3's largest number, 448, without its sign.
const LARGEST: u8 = 0x7E;

/// Looks at every block of every FP8 matrix of a plan; reads all their payloads.
///
/// # Errors
/// What the source fails with.
pub(crate) fn audit(checkpoint: &Checkpoint, plan: &Plan) -> Result<BlockAudit, SourceReadError> {
    // A block can reach over two matrices, so blocks are found by their scales.
    let mut blocks: BTreeMap<SourceId, Vec<Holds>> = BTreeMap::new();
    for matrix in &plan.matrices {
        mark(checkpoint, matrix, &mut blocks)?;
    }
    let mut audit = BlockAudit::default();
    for holds in blocks.into_values().flatten().filter(|h| *h > Holds::Zeros) {
        audit.blocks += 1;
        audit.with_largest += u64::from(holds == Holds::Largest);
    }
    Ok(audit)
}

fn mark(
    checkpoint: &Checkpoint,
    matrix: &Matrix,
    blocks: &mut BTreeMap<SourceId, Vec<Holds>>,
) -> Result<(), SourceReadError> {
    let Some(scales) = &matrix.scales else { return Ok(()) };
    if scales.scheme != Scheme::Fp8 || scales.scale != ScaleCode::F32 {
        return Ok(());
    }
    let [rows_of_block, cols_of_block] = scales.block;
    let cols = matrix.cols();
    let mut codes = Vec::new();
    for band in &scales.bands {
        let mut row = band.rows.start;
        while row < band.rows.end {
            let scale_row = band.scale_row(row, rows_of_block);
            let end = band.rows_of(scale_row, rows_of_block).end;
            // A scale for all rows of a matrix can serve more than memory holds.
            let end = end.min(row + rows_of_block.min(128));
            codes.resize(to_usize((end - row) * cols), 0);
            checkpoint.read(matrix.payload, row * cols, &mut codes)?;
            let grid = blocks.entry(band.scale).or_default();
            let first = to_usize(scale_row * scales.cols);
            let last = first + to_usize(scales.cols);
            grid.resize(grid.len().max(last), Holds::Zeros);
            for line in codes.chunks(to_usize(cols)) {
                for (holds, block) in
                    grid[first..last].iter_mut().zip(line.chunks(to_usize(cols_of_block)))
                {
                    // 0x7F is NaN.
                    let codes = block.iter().map(|c| c & 0x7F).filter(|c| *c <= LARGEST);
                    *holds = (*holds).max(match codes.max() {
                        None | Some(0) => Holds::Zeros,
                        Some(LARGEST) => Holds::Largest,
                        Some(_) => Holds::Less,
                    });
                }
            }
            row = end;
        }
    }
    Ok(())
}
