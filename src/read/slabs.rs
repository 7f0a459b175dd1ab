//! Rows of stored tensors that are kept while transposed chunks are decoded from them.
//!
//! A chunk of a transposed matrix is a narrow strip of all its rows: 2048 runs of 128 bytes cost
//! 1 ms and more in system calls (`cargo test --release --lib cost_of_a_run -- --ignored
//! --nocapture`), the whole 8 MiB are read in as much. So rows are read whole, in bands, and every
//! band goes once all of it was used.

use super::buffer::{Buffer, HUGE_PAGE};
use super::cache::{Bytes, Cache, Wanted};
use super::chunk::{Failure, len};
use super::counters::{Counters, add};
use super::placement::Span;
use crate::source::{Checkpoint, SourceId};

/// Strips of a tensor that are this part of its width or more are read as they are.
const WIDE_STRIP: u64 = 2;

/// Stored tensors that are smaller are read as they are: the runs lie close together.
const SMALL: u64 = 64 << 10;

/// Rows of a band are a multiple of this where a band has more: blocks then do not straddle two.
const ROW_MULTIPLE: u64 = 128;

/// A band of a stored tensor: its rows from `index` times the rows of a band on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    tensor: SourceId,
    index: u64,
}

/// The bands that lie ready.
pub struct Slabs(Cache<Key, Failure>);

/// Rows of a stored tensor: `rows` of them, of `row_bytes` bytes each.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    pub tensor: SourceId,
    pub rows: u64,
    pub row_bytes: u64,
}

/// A band of rows of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    key: Key,
    /// First row.
    pub start: u64,
    /// Number of rows.
    pub rows: u64,
    row_bytes: u64,
    len: usize,
}

/// The bytes of a band while a strip of it is used.
pub struct Slab<'a> {
    bytes: Bytes,
    band: Band,
    slabs: &'a Slabs,
    used: u64,
}

impl Slab<'_> {
    /// Bytes of the band from a row on, rows as far apart as they are stored.
    pub fn from_row(&self, row: u64) -> &[u8] {
        &self.bytes[len((row - self.band.start) * self.band.row_bytes)..]
    }
}

impl Drop for Slab<'_> {
    fn drop(&mut self) {
        self.bytes = Bytes::default();
        self.slabs.0.given(&self.band.key, self.used);
    }
}

impl Stored {
    /// Rows of a band: as many as fill a huge page.
    fn band_rows(&self) -> u64 {
        let huge = u64::try_from(HUGE_PAGE).expect("it is 2 MiB");
        let rows = (huge / self.row_bytes.max(1)).max(1);
        if rows < ROW_MULTIPLE { rows } else { rows - rows % ROW_MULTIPLE }
    }

    /// The bands that hold rows `start..start + count`.
    pub fn bands(self, start: u64, count: u64) -> impl Iterator<Item = Band> {
        let each = self.band_rows();
        let whole = HUGE_PAGE.max(len(each * self.row_bytes));
        let len = if self.rows > each { whole } else { len(self.rows * self.row_bytes) };
        (start / each..(start + count).div_ceil(each)).map(move |index| {
            let start = index * each;
            let key = Key { tensor: self.tensor, index };
            let rows = each.min(self.rows - start);
            Band { key, start, rows, row_bytes: self.row_bytes, len }
        })
    }

    /// Whether strips of `width` bytes of `count` rows are better read from slabs.
    pub fn narrow(self, width: u64, count: u64) -> bool {
        width * WIDE_STRIP < self.row_bytes && count * self.row_bytes >= SMALL
    }
}

impl Band {
    /// What of `rows` lies in the band.
    pub fn within(&self, rows: Span) -> Span {
        let start = self.start.max(rows.start);
        let end = (self.start + self.rows).min(rows.start + rows.count);
        Span { start, step: 1, count: end.saturating_sub(start) }
    }

    /// Its use: every bit once.
    fn uses(&self) -> u64 {
        self.rows * self.row_bytes * 8
    }
}

impl Slabs {
    /// No slabs; up to `budget` bytes of them.
    pub fn new(budget: u64) -> Slabs {
        Slabs(Cache::new(budget, Buffer::huge))
    }

    /// Bytes that lie ready or are being read.
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Bytes that may be held.
    pub fn budget(&self) -> u64 {
        self.0.budget()
    }

    /// Whether `bytes` of stored rows can be kept while others are.
    pub fn can_hold(&self, bytes: u64) -> bool {
        bytes <= self.0.budget() / 4
    }

    /// The band, read where it is not there, for `used` of its bits; `None` where another reader
    /// reads it just now and `wait` is not set.
    ///
    /// # Errors
    /// What the source fails with.
    pub fn get(
        &self,
        source: (&Checkpoint, &Counters),
        band: Band,
        used: u64,
        wait: bool,
    ) -> Result<Option<Slab<'_>>, Failure> {
        let wanted = Wanted { key: band.key, len: band.len, uses: band.uses() };
        let read = |buffer: &mut [u8]| {
            let (checkpoint, counters) = source;
            let bytes = &mut buffer[..len(band.rows * band.row_bytes)];
            add(&counters.source_bytes, band.rows * band.row_bytes);
            let at = band.start * band.row_bytes;
            checkpoint.read(band.key.tensor, at, bytes).map_err(Failure::from)
        };
        let found = if wait {
            Some(self.0.get(wanted, Failure::Abandoned, read)?)
        } else {
            self.0.get_unless_busy(wanted, Failure::Abandoned, read)?
        };
        Ok(found.map(|(bytes, _)| Slab { bytes, band, slabs: self, used }))
    }

    /// Has rows of a stored tensor lie ready for those who ask for them.
    ///
    /// # Errors
    /// What the source fails with.
    pub fn load(
        &self,
        source: (&Checkpoint, &Counters),
        stored: Stored,
        start: u64,
        count: u64,
    ) -> Result<(), Failure> {
        stored.bands(start, count).try_for_each(|b| self.get(source, b, 0, false).map(drop))
    }
}
