//! Scratch memory of the kernels, one allocation of 304 KiB for each thread.
//!
//! It holds the look-up tables in use and one strip: the part of a tile that is transposed at a
//! time. A strip is small enough that its codes and its floats stay in the cache.

use std::cell::RefCell;

use super::fp8::Fp8Table;

/// FP8 look-up tables that are in use at a time, one for each scale block: 16 KiB of L1 cache.
pub(super) const MAX_TABLES: usize = 32;

/// Most columns of a strip.
pub(super) const STRIP_COLS: usize = 512;

/// Most bytes that a strip takes from each row of its source.
pub(super) const STRIP_SOURCE_ROW_BYTES: usize = 1024;

/// Most bytes that a strip writes to each row of a transposed output: four cache lines.
pub(super) const STRIP_OUT_ROW_BYTES: usize = 256;

/// Padding after each row of a strip, in bytes. With a row pitch that is a power of two, all
/// elements of a column would fall into one set of the L1 cache.
pub(super) const ROW_PAD_BYTES: usize = 64;

/// Bytes of a strip of 1-byte elements, which has the most rows and therefore the most padding.
const STRIP_BUFFER_BYTES: usize = STRIP_OUT_ROW_BYTES * (STRIP_COLS + ROW_PAD_BYTES);

/// Look-up tables and one strip, in the orientation of the source.
pub(super) struct KernelScratch {
    pub(super) tables: [Fp8Table; MAX_TABLES],
    /// The codes of the strip.
    pub(super) codes: StripBuffer,
    /// The decoded strip; or a decoded row, where the output is not transposed.
    pub(super) floats: StripBuffer,
}

/// The bytes of a strip, aligned to a cache line.
#[repr(align(64))]
pub(super) struct StripBuffer(pub(super) [u8; STRIP_BUFFER_BYTES]);

thread_local! {
    static SCRATCH: RefCell<Box<KernelScratch>> = RefCell::new(Box::new(KernelScratch {
        tables: [Fp8Table::ZERO; MAX_TABLES],
        codes: StripBuffer([0; STRIP_BUFFER_BYTES]),
        floats: StripBuffer([0; STRIP_BUFFER_BYTES]),
    }));
}

/// Runs `work` with this thread's scratch memory. Its contents are those of the last use.
///
/// # Panics
/// If `work` calls this function again.
pub(super) fn with(work: impl FnOnce(&mut KernelScratch)) {
    SCRATCH.with_borrow_mut(|scratch| work(scratch));
}
