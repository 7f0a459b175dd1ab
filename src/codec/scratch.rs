//! Memory that the kernels work in, one piece for each thread.

use std::cell::RefCell;

use super::fp8::Table;

/// Look-up tables that are in use at a time, one for each FP8 scale: 16 KiB of L1 cache.
pub(super) const TABLES: usize = 32;

/// Columns of a strip that is transposed at a time.
pub(super) const STRIP_COLS: usize = 512;

/// Bytes that a strip takes of each row of its source, at most.
pub(super) const STRIP_BYTES: usize = 1024;

/// Bytes that a strip adds to each row of a transposed output: four cache lines.
pub(super) const STRIP_ROW_BYTES: usize = 256;

/// Bytes between the rows of a strip beyond their own: a row pitch that is a power of two would map
/// a whole column to one set of the L1 cache.
pub(super) const PAD: usize = 64;

/// Bytes of a strip of 1-byte elements, which has most rows and so most padding.
const BLOCK: usize = STRIP_ROW_BYTES * (STRIP_COLS + PAD);

/// Tables, and a strip in its own orientation: its codes, and what they become.
pub(super) struct Scratch {
    pub(super) tables: [Table; TABLES],
    pub(super) codes: Block,
    pub(super) block: Block,
}

/// The bytes of a strip, aligned to a cache line.
#[repr(align(64))]
pub(super) struct Block(pub(super) [u8; BLOCK]);

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch {
        tables: [Table::ZERO; TABLES],
        codes: Block([0; BLOCK]),
        block: Block([0; BLOCK]),
    }));
}

/// Runs `work` with this thread's scratch memory, whose contents are left from its last use.
///
/// # Panics
/// Where `work` calls this function again.
pub(super) fn with(work: impl FnOnce(&mut Scratch)) {
    SCRATCH.with_borrow_mut(|scratch| work(scratch));
}
