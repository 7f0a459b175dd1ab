//! Rows of stored tensors that are kept while transposed chunks are decoded from them.
//!
//! A chunk of a transposed matrix is a narrow strip of all its rows: 2048 runs of 128 bytes cost
//! 1 ms and more in system calls (`cargo test --release --lib cost_of_a_run -- --ignored
//! --nocapture`), the whole 8 MiB are read in as much. So rows are read whole, in bands, and kept
//! until their reader has left them behind.

use super::buffer::{Buffer, HUGE_PAGE};
use super::cache::{Bytes, Cache, Wanted};
use super::chunk::Failure;
use super::counters::{Counters, add};
use super::placement::Span;
use crate::source::{Checkpoint, SourceId};
use crate::tensor::to_usize;

/// Most bytes of stored rows that are kept for the next chunk, or asked for ahead of strips: one
/// expert's gate and up of the largest models are 32 MiB, and more than a few are not read at a time.
pub(super) const MAX_SLAB_BYTES: u64 = 256 << 20;

/// Stored tensors that are smaller are read as they are: the runs lie close together.
const SMALL: u64 = 64 << 10;

/// Rows of a band are a multiple of this where a band has more: blocks then do not straddle two.
const ROW_MULTIPLE: u64 = 128;

/// A band of a stored tensor: its rows from `index` times the rows of a band on, and of each some
/// bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    tensor: SourceId,
    index: u64,
    at: u64,
    width: u64,
}

/// The bands that lie ready.
pub(super) struct Slabs(Cache<Key, Failure>);

/// A stored tensor as rows, and a panel of it: of each row, `width` bytes from `at` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub tensor: SourceId,
    pub rows: u64,
    pub row_bytes: u64,
    pub at: u64,
    pub width: u64,
}

/// A band of rows of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Band {
    key: Key,
    /// First row.
    pub start: u64,
    /// Number of rows.
    pub rows: u64,
    row_bytes: u64,
    len: usize,
}

/// What is read of stored rows beyond the strip that is wanted now, and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// Nothing: for all that is known, nobody wants it.
    Nothing,
    /// The leading columns, or all others.
    Part,
    /// Whole rows.
    Rows,
}

/// The bytes of a band.
pub(super) struct Slab {
    bytes: Bytes,
    band: Band,
}

impl Slab {
    /// Bytes of the panel from a row on, without gaps between rows.
    pub(super) fn rows_from(&self, row: u64) -> &[u8] {
        &self.bytes[to_usize((row - self.band.start) * self.band.key.width)..]
    }
}

impl Stored {
    /// A tensor of `rows` rows of `row_bytes` bytes, whole.
    pub(super) fn whole(tensor: SourceId, rows: u64, row_bytes: u64) -> Stored {
        Stored { tensor, rows, row_bytes, at: 0, width: row_bytes }
    }

    /// The panel of the leading `lead` bytes of each row, or of all others, that holds byte `at`.
    pub(super) fn part(self, lead: u64, at: u64) -> Stored {
        let lead = lead.min(self.row_bytes);
        let (at, width) = if at < lead { (0, lead) } else { (lead, self.row_bytes - lead) };
        Stored { at, width, ..self }
    }

    /// Rows of a band: as many as fill a huge page.
    fn band_rows(&self) -> u64 {
        let huge = u64::try_from(HUGE_PAGE).expect("it is 2 MiB");
        let rows = (huge / self.width.max(1)).max(1);
        if rows < ROW_MULTIPLE { rows } else { rows - rows % ROW_MULTIPLE }
    }

    /// The bands that hold rows `start..start + count`.
    pub(super) fn bands(self, start: u64, count: u64) -> impl Iterator<Item = Band> {
        let each = self.band_rows();
        let whole = HUGE_PAGE.max(to_usize(each * self.width));
        let len = if self.rows > each { whole } else { to_usize(self.rows * self.width) };
        (start / each..(start + count).div_ceil(each)).map(move |index| {
            let start = index * each;
            let key = Key { tensor: self.tensor, index, at: self.at, width: self.width };
            let rows = each.min(self.rows - start);
            Band { key, start, rows, row_bytes: self.row_bytes, len }
        })
    }

    /// Whether strips of `width` bytes of `count` rows are better read from slabs.
    pub(super) fn narrow(self, width: u64, count: u64) -> bool {
        width < self.row_bytes && count * self.row_bytes >= SMALL
    }
}

impl Band {
    /// What of `rows` lies in the band.
    pub(super) fn within(&self, rows: Span) -> Span {
        let start = self.start.max(rows.start);
        let end = (self.start + self.rows).min(rows.start + rows.count);
        Span { start, step: 1, count: end.saturating_sub(start) }
    }
}

impl Slabs {
    /// No slabs; up to `budget` bytes of them.
    pub(super) fn new(budget: u64) -> Slabs {
        Slabs(Cache::new(budget, Buffer::huge))
    }

    /// Bytes that lie ready or are being read.
    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Bytes that may be held.
    pub(super) fn budget(&self) -> u64 {
        self.0.budget()
    }

    /// Whether `bytes` of stored rows can be kept while others are.
    pub(super) fn can_hold(&self, bytes: u64) -> bool {
        bytes <= self.0.budget() / 4
    }

    /// Whether the first band of some rows lies ready or is being read.
    pub(super) fn has(&self, stored: Stored, start: u64) -> bool {
        stored.bands(start, 1).any(|band| self.0.has(&band.key))
    }

    /// The band, read where it is not there; `None` where another reader reads it just now and
    /// `wait` is not set.
    ///
    /// # Errors
    /// What the source fails with.
    pub(super) fn get(
        &self,
        source: (&Checkpoint, &Counters),
        band: Band,
        wait: bool,
    ) -> Result<Option<Slab>, Failure> {
        let wanted = Wanted { key: band.key, len: band.len, uses: 1 };
        let read = |buffer: &mut [u8]| {
            let (checkpoint, counters) = source;
            let Key { tensor, at, width, .. } = band.key;
            add(&counters.source_bytes, band.rows * width);
            let (at, rows) = (band.start * band.row_bytes + at, to_usize(band.rows));
            checkpoint
                .read_rows(
                    tensor,
                    at,
                    to_usize(width),
                    band.row_bytes,
                    rows,
                    buffer,
                    to_usize(width),
                )
                .map_err(Failure::from)
        };
        let found = if wait {
            Some(self.0.get(wanted, Failure::Abandoned, read)?)
        } else {
            self.0.get_unless_busy(wanted, Failure::Abandoned, read)?
        };
        Ok(found.map(|(bytes, _)| Slab { bytes, band }))
    }

    /// Has rows of a stored tensor lie ready for those who ask for them.
    ///
    /// # Errors
    /// What the source fails with.
    pub(super) fn load(
        &self,
        source: (&Checkpoint, &Counters),
        stored: Stored,
        start: u64,
        count: u64,
    ) -> Result<(), Failure> {
        stored.bands(start, count).try_for_each(|b| self.get(source, b, false).map(drop))
    }

    /// Lets go of what is held of rows of a stored tensor, whole or in panels.
    pub(super) fn forget(&self, stored: Stored, lead: u64, start: u64, count: u64) {
        let panels = [stored, stored.part(lead, 0), stored.part(lead, lead)];
        for band in panels.into_iter().flat_map(|panel| panel.bands(start, count)) {
            self.0.given(&band.key, 1);
        }
    }
}
