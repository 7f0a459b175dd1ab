//! A cache of source rows, for decoding transposed tensors.
//!
//! A chunk of a transposed tensor needs a few columns of every row of the source matrix: a narrow
//! strip. Read on its own, a strip is 2048 runs of 128 bytes and costs 1 ms and more in system
//! calls (`cargo test --release --lib cost_of_a_run -- --ignored --nocapture`); the whole 8 MiB are
//! read in the same time. So wider rows are read once and kept until the reader has passed them.
//!
//! ```text
//!               columns of the source matrix, in bytes
//!              0      lead                        row_bytes
//!              +-------+--------------------------+
//!   segment 0  |leading|                          |   one segment: about 2 MiB of
//!              +-------+        the rest          +   consecutive rows of one panel
//!   segment 1  | panel |                          |
//!              +-------+--------------------------+
//!              |<----------- whole rows --------->|   a panel too
//! ```

use super::box_copy::StridedRange;
use super::buffer::{Buffer, HUGE_PAGE};
use super::cache::{Cache, CacheRequest, SharedBuffer};
use super::counters::{Counters, add};
use super::decode::DecodeError;
use crate::source::{Checkpoint, SourceId};
use crate::tensor::to_usize;

/// Upper limit of the source-row cache, and of the kernel read-ahead that is requested for a matrix
/// on first use. Gate and up of one expert of the largest models are 32 MiB, and few experts are
/// read at a time.
pub(super) const MAX_SOURCE_ROW_BYTES: u64 = 256 << 20;

/// Boxes of fewer source bytes than this are read directly, strip by strip: their runs are close
/// together.
const MIN_CACHED_BYTES: u64 = 64 << 10;

/// Rows of a segment are a multiple of this if a segment has at least as many, so that a scale
/// block does not cross two segments.
const SEGMENT_ROW_MULTIPLE: u64 = 128;

/// A range of byte columns of a source tensor that is seen as rows: the whole rows or a part of
/// each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel {
    pub tensor: SourceId,
    /// Rows of the tensor.
    pub rows: u64,
    /// Bytes of a row of the tensor.
    pub row_bytes: u64,
    /// First byte of each row that belongs to the panel.
    pub start: u64,
    /// Bytes of each row that belong to the panel.
    pub width: u64,
}

/// How many bytes of each source row to read for a strip; what is more than the strip is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceWidth {
    /// The strip alone: no sign that more will be needed.
    Strip,
    /// The leading panel, or the rest of the row, whichever the strip is in.
    Panel,
    /// Whole rows.
    WholeRows,
}

/// Identifies a segment in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct SegmentKey {
    tensor: SourceId,
    /// Position of the segment in its panel.
    index: u64,
    /// First byte of each row.
    start: u64,
    /// Bytes of each row.
    width: u64,
}

/// Consecutive rows of a panel: the unit in which source rows are read and cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    key: SegmentKey,
    /// First row.
    pub start: u64,
    /// Number of rows.
    pub rows: u64,
    row_bytes: u64,
    /// Size of its buffer, in bytes; the same for all segments of a panel, so that buffers can be
    /// recycled.
    len: usize,
}

/// The bytes of a segment.
pub(super) struct SegmentBytes {
    bytes: SharedBuffer,
    segment: Segment,
}

/// The cached segments.
pub(super) struct SourceRows(Cache<SegmentKey, DecodeError>);

impl SegmentBytes {
    /// The bytes of the panel from a row on, without gaps between rows.
    pub(super) fn rows_from(&self, row: u64) -> &[u8] {
        &self.bytes[to_usize((row - self.segment.start) * self.segment.key.width)..]
    }
}

impl Panel {
    /// The whole rows of a tensor of `rows` rows of `row_bytes` bytes.
    pub(super) fn whole_rows(tensor: SourceId, rows: u64, row_bytes: u64) -> Panel {
        Panel { tensor, rows, row_bytes, start: 0, width: row_bytes }
    }

    /// The panel that contains byte `at` of the rows, which are split into the leading `lead` bytes
    /// and the rest.
    pub(super) fn containing(self, lead: u64, at: u64) -> Panel {
        let lead = lead.min(self.row_bytes);
        let (start, width) = if at < lead { (0, lead) } else { (lead, self.row_bytes - lead) };
        Panel { start, width, ..self }
    }

    /// Rows of a segment: as many as fill a huge page.
    fn segment_rows(&self) -> u64 {
        let huge = u64::try_from(HUGE_PAGE).expect("it is 2 MiB");
        let rows = (huge / self.width.max(1)).max(1);
        if rows < SEGMENT_ROW_MULTIPLE { rows } else { rows - rows % SEGMENT_ROW_MULTIPLE }
    }

    /// The segments that contain rows `start..start + count`.
    pub(super) fn segments(self, start: u64, count: u64) -> impl Iterator<Item = Segment> {
        let each = self.segment_rows();
        let full = HUGE_PAGE.max(to_usize(each * self.width));
        let len = if self.rows > each { full } else { to_usize(self.rows * self.width) };
        (start / each..(start + count).div_ceil(each)).map(move |index| {
            let start = index * each;
            let key =
                SegmentKey { tensor: self.tensor, index, start: self.start, width: self.width };
            let rows = each.min(self.rows - start);
            Segment { key, start, rows, row_bytes: self.row_bytes, len }
        })
    }

    /// Whether a strip of `width` bytes of `count` rows is narrow and large enough to be worth
    /// caching wider rows.
    pub(super) fn is_narrow_strip(self, width: u64, count: u64) -> bool {
        width < self.row_bytes && count * self.row_bytes >= MIN_CACHED_BYTES
    }
}

impl Segment {
    /// The part of `rows` that is in the segment.
    pub(super) fn intersection(&self, rows: StridedRange) -> StridedRange {
        let start = self.start.max(rows.start);
        let end = (self.start + self.rows).min(rows.start + rows.count);
        StridedRange { start, step: 1, count: end.saturating_sub(start) }
    }
}

impl SourceRows {
    /// An empty cache of up to `budget` bytes.
    pub(super) fn new(budget: u64) -> SourceRows {
        SourceRows(Cache::new(budget, Buffer::huge))
    }

    /// Bytes that are cached or being read.
    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Bytes that may be cached.
    pub(super) fn budget(&self) -> u64 {
        self.0.budget()
    }

    /// Whether `bytes` of source rows take at most a quarter of the budget.
    pub(super) fn can_hold(&self, bytes: u64) -> bool {
        bytes <= self.0.budget() / 4
    }

    /// Whether the segment of a row is cached or being read.
    pub(super) fn contains(&self, panel: Panel, row: u64) -> bool {
        panel.segments(row, 1).any(|segment| self.0.contains(&segment.key))
    }

    /// Returns a segment, and reads it from the source if it is not cached. If another thread is
    /// reading it: waits with `wait`, returns `None` without.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn get(
        &self,
        source: (&Checkpoint, &Counters),
        segment: Segment,
        wait: bool,
    ) -> Result<Option<SegmentBytes>, DecodeError> {
        // Segments are not consumed byte by byte: `release` drops them as a whole.
        let request = CacheRequest { key: segment.key, len: segment.len, remaining: 1 };
        let read = |buffer: &mut [u8]| {
            let (checkpoint, counters) = source;
            let SegmentKey { tensor, start, width, .. } = segment.key;
            add(&counters.source_bytes, segment.rows * width);
            let offset = segment.start * segment.row_bytes + start;
            let (rows, width) = (to_usize(segment.rows), to_usize(width));
            checkpoint
                .read_rows(tensor, offset, width, segment.row_bytes, rows, buffer, width)
                .map_err(DecodeError::from)
        };
        let found = if wait {
            Some(self.0.get(request, DecodeError::Abandoned, read)?)
        } else {
            self.0.get_unless_in_flight(request, DecodeError::Abandoned, read)?
        };
        Ok(found.map(|(bytes, _)| SegmentBytes { bytes, segment }))
    }

    /// Reads the segments of some rows into the cache; skips those that other threads are reading.
    ///
    /// # Errors
    /// The error of the source.
    pub(super) fn prefetch(
        &self,
        source: (&Checkpoint, &Counters),
        panel: Panel,
        start: u64,
        count: u64,
    ) -> Result<(), DecodeError> {
        panel.segments(start, count).try_for_each(|s| self.get(source, s, false).map(drop))
    }

    /// Drops the segments of some rows, of `whole` rows and of both panels.
    pub(super) fn release(&self, whole: Panel, lead: u64, start: u64, count: u64) {
        let panels = [whole, whole.containing(lead, 0), whole.containing(lead, lead)];
        for segment in panels.into_iter().flat_map(|panel| panel.segments(start, count)) {
            self.0.consume(&segment.key, 1);
        }
    }
}
