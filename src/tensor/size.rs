//! Checked conversions between sizes in memory (`usize`) and in files (`u64`), and sizes as text.

use std::fmt;

/// Converts a size in memory to a size in a file.
pub(crate) fn to_u64(n: usize) -> u64 {
    u64::try_from(n).expect("memory is smaller than 2^64 bytes")
}

/// Converts the size of something that is held in memory to a length.
///
/// # Panics
/// If `n` exceeds the address space, which can happen on a 32-bit target only.
pub(crate) fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("what is held in memory has a length below 2^64")
}

/// Formats a number of bytes in binary units with one decimal: `1.5 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut unit = 0;
        while unit + 1 < UNITS.len() && self.0 >> (10 * (unit + 1)) > 0 {
            unit += 1;
        }
        if unit == 0 {
            return write!(f, "{} B", self.0);
        }
        // Rounded down, in integers: exact for every size.
        let tenths = (u128::from(self.0) * 10) >> (10 * unit);
        write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_binary_units() {
        let table = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 30, "5.0 GiB"),
            (5_000_000_000, "4.6 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ];
        for (n, text) in table {
            assert_eq!(ByteSize(n).to_string(), text);
        }
    }
}
