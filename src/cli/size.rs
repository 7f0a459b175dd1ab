//! Sizes on the command line: `512MiB`, `5GB`, or plain bytes.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
///
/// Parsed from a number and an optional unit, in upper or lower case. `KiB`, `MiB`, `GiB` and `TiB` are
/// powers of 1024, and so are `K`, `M`, `G` and `T`, as for `ls` and `mount`. `KB`, `MB`, `GB` and `TB` are
/// powers of 1000. The printed form parses back to the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Size(pub u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SizeError {
    /// It does not start with a decimal number.
    #[error("expected a number and a unit such as `512MiB` or `5GB`, got `{0}`")]
    Number(String),
    /// Its unit is unknown.
    #[error(
        "expected one of the units B, KiB, MiB, GiB, TiB, KB, MB, GB, TB, K, M, G, T, got `{0}`"
    )]
    Unit(String),
    /// It is above 2^64 - 1 bytes.
    #[error("`{0}` is more bytes than a file can have")]
    Large(String),
}

const BINARY: [(&str, u64); 4] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
const DECIMAL: [(&str, u64); 4] =
    [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Size, SizeError> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = multiplier(unit.trim_start())?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |s: &str| s.parse::<u128>().map_err(|_| SizeError::Number(text.to_owned()));
        // More digits would overflow below. Nineteen resolve single bytes of every unit.
        if fraction.len() > 19 {
            return Err(SizeError::Number(text.to_owned()));
        }
        let scale = fraction.chars().fold(1_u128, |scale, _| scale * 10);
        let fraction = digits(fraction)? * u128::from(unit) / scale;
        let bytes = digits(whole)?
            .checked_mul(u128::from(unit))
            .and_then(|whole| whole.checked_add(fraction))
            .and_then(|bytes| u64::try_from(bytes).ok());
        bytes.map(Size).ok_or_else(|| SizeError::Large(text.to_owned()))
    }
}

fn multiplier(unit: &str) -> Result<u64, SizeError> {
    if unit.is_empty() || unit.eq_ignore_ascii_case("b") {
        return Ok(1);
    }
    let named = BINARY.iter().chain(&DECIMAL).find(|(name, _)| name.eq_ignore_ascii_case(unit));
    let bare = || BINARY.iter().find(|(name, _)| name[..1].eq_ignore_ascii_case(unit));
    named.or_else(bare).map(|(_, bytes)| *bytes).ok_or_else(|| SizeError::Unit(unit.to_owned()))
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, unit): &&(&str, u64)| self.0 >= *unit && self.0.is_multiple_of(*unit);
        match BINARY.iter().find(whole).or_else(|| DECIMAL.iter().find(whole)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        let table: [(&str, u64); 16] = [
            ("0", 0),
            ("4096", 4096),
            ("17B", 17),
            ("512MiB", 512 << 20),
            ("512mib", 512 << 20),
            ("512 MiB", 512 << 20),
            ("5GB", 5_000_000_000),
            ("5gb", 5_000_000_000),
            ("4K", 4096),
            ("2T", 2 << 40),
            ("1.5GiB", 3 << 29),
            ("0.5KB", 500),
            ("1.0009KB", 1000),
            ("18446744073709551615", u64::MAX),
            ("16777215TiB", 16_777_215 << 40),
            (" 1MB ", 1_000_000),
        ];
        for (text, bytes) in table {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn invalid_sizes_are_refused() {
        let number = |s: &str| SizeError::Number(s.to_owned());
        let table = [
            ("", number("")),
            ("GB", number("GB")),
            ("1.2.3GB", number("1.2.3GB")),
            ("1.", number("1.")),
            // An empty number, and `-1` is taken for the unit.
            ("-1", SizeError::Unit("-1".to_owned())),
            ("5XB", SizeError::Unit("XB".to_owned())),
            ("5iB", SizeError::Unit("iB".to_owned())),
            ("1e9", SizeError::Unit("e9".to_owned())),
            ("16777216TiB", SizeError::Large("16777216TiB".to_owned())),
            ("18446744073709551616", SizeError::Large("18446744073709551616".to_owned())),
        ];
        for (text, error) in table {
            let got = text.parse::<Size>();
            assert_eq!(got, Err(error), "{text}");
        }
    }

    #[test]
    fn printed_sizes_parse_back() {
        let table = [
            (0, "0"),
            (1, "1"),
            (1023, "1023"),
            (1024, "1KiB"),
            (1000, "1KB"),
            (5_000_000_000, "5GB"),
            (1 << 30, "1GiB"),
            (3 << 29, "1536MiB"),
            (u64::MAX, "18446744073709551615"),
        ];
        for (bytes, text) in table {
            assert_eq!(Size(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
    }
}
