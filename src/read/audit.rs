//! Checks whether FP8 codes and their scales belong together, without the unquantized original.
//!
//! Quantizers set the scale of a block to its largest magnitude divided by 448, so that the block
//! contains the largest code: 0x7E (448) or 0xFE (-448). If the blocks are read on another grid
//! than the one they were quantized on, many of them do not. `verify` reports the share that does.

use crate::tensor::to_usize;
use std::collections::BTreeMap;

use crate::codec::{ScaleCode, Scheme};
use crate::plan::{Matrix, Plan};
use crate::source::{Checkpoint, SourceId, SourceReadError};

/// Counts of scale blocks, over all FP8 matrices with F32 scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct BlockAudit {
    /// Blocks that contain a code other than zero and NaN.
    pub blocks: u64,
    /// Of these, blocks that contain the largest code.
    pub with_largest: u64,
}

/// The largest magnitude that was found in a block so far.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum BlockMax {
    Zero,
    BelowLargest,
    Largest,
}

/// The code of 448, the largest number of E4M3, without its sign bit.
const LARGEST_CODE: u8 = 0x7E;

/// Counts the blocks of all FP8 matrices of a plan. Reads all their payloads.
///
/// # Errors
/// The error of the source.
pub(crate) fn audit(checkpoint: &Checkpoint, plan: &Plan) -> Result<BlockAudit, SourceReadError> {
    // A block can cover rows of two matrices, so blocks are identified by their scales.
    let mut blocks: BTreeMap<SourceId, Vec<BlockMax>> = BTreeMap::new();
    for matrix in &plan.matrices {
        record_blocks(checkpoint, matrix, &mut blocks)?;
    }
    let mut audit = BlockAudit::default();
    for max in blocks.into_values().flatten().filter(|max| *max > BlockMax::Zero) {
        audit.blocks += 1;
        audit.with_largest += u64::from(max == BlockMax::Largest);
    }
    Ok(audit)
}

fn record_blocks(
    checkpoint: &Checkpoint,
    matrix: &Matrix,
    blocks: &mut BTreeMap<SourceId, Vec<BlockMax>>,
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
            // A scale can serve all rows of a matrix, which may not fit in memory.
            let end = end.min(row + rows_of_block.min(128));
            codes.resize(to_usize((end - row) * cols), 0);
            checkpoint.read(matrix.payload, row * cols, &mut codes)?;
            let grid = blocks.entry(band.scale).or_default();
            let first = to_usize(scale_row * scales.cols);
            let last = first + to_usize(scales.cols);
            grid.resize(grid.len().max(last), BlockMax::Zero);
            for line in codes.chunks(to_usize(cols)) {
                for (max, block) in
                    grid[first..last].iter_mut().zip(line.chunks(to_usize(cols_of_block)))
                {
                    // 0x7F is NaN.
                    let codes = block.iter().map(|c| c & 0x7F).filter(|c| *c <= LARGEST_CODE);
                    *max = (*max).max(match codes.max() {
                        None | Some(0) => BlockMax::Zero,
                        Some(LARGEST_CODE) => BlockMax::Largest,
                        Some(_) => BlockMax::BelowLargest,
                    });
                }
            }
            row = end;
        }
    }
    Ok(())
}
