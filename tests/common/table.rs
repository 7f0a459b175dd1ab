//! Parses `tests/releases/NAME/tensors.txt`: every stored tensor of a published release with its
//! dtype and shape.
//!
//! A line is `NAME DTYPE [SHAPE]`. `{0-47}`, `{0,5,11}` or `{0-60:2}` (every second number) in a
//! name is a set of numbers; the line stands for all combinations. `#` starts a comment.

use std::path::Path;

/// Name, dtype and shape of every tensor, in the order of the lines.
///
/// # Panics
///
/// If the table cannot be read, or a line is not as described above.
pub fn table(dir: &Path) -> Vec<(String, String, Vec<u64>)> {
    let path = dir.join("tensors.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).flat_map(tensors_of_line).collect()
}

fn tensors_of_line(line: &str) -> Vec<(String, String, Vec<u64>)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [name, dtype, shape] = fields[..] else { panic!("expected three fields in `{line}`") };
    let shape = shape.strip_prefix('[').and_then(|s| s.strip_suffix(']'));
    let shape = shape.unwrap_or_else(|| panic!("expected a shape at the end of `{line}`"));
    let dims = shape.split(',').filter(|dim| !dim.is_empty());
    let shape: Vec<u64> = dims.map(|dim| dim.parse().unwrap()).collect();
    names(name).into_iter().map(|name| (name, dtype.to_owned(), shape.clone())).collect()
}

/// Expands a name pattern to all its names; the last numbers vary fastest.
fn names(pattern: &str) -> Vec<String> {
    let Some((before, rest)) = pattern.split_once('{') else { return vec![pattern.to_owned()] };
    let (range, after) = rest.split_once('}').unwrap_or_else(|| panic!("no `}}` in `{pattern}`"));
    let rests = names(after);
    let with = |n: u64| rests.iter().map(move |rest| format!("{before}{n}{rest}"));
    numbers(range).into_iter().flat_map(with).collect()
}

/// Parses `0-3`, `0,5,11` or `0-60:2` to numbers.
fn numbers(range: &str) -> Vec<u64> {
    let parse = |text: &str| text.parse().unwrap_or_else(|e| panic!("`{range}`: {e}"));
    let part = |part: &str| {
        let (span, step) = part.split_once(':').unwrap_or((part, "1"));
        let (first, last) = span.split_once('-').unwrap_or((span, span));
        let step = usize::try_from(parse(step)).unwrap();
        (parse(first)..=parse(last)).step_by(step).collect::<Vec<u64>>()
    };
    range.split(',').flat_map(part).collect()
}

#[test]
fn patterns_expand_to_all_names() {
    let line = "a.{0-1}.b.{0,5-9:2} F32 [2,3]";
    let got: Vec<String> = tensors_of_line(line).into_iter().map(|(name, ..)| name).collect();
    let expected =
        ["a.0.b.0", "a.0.b.5", "a.0.b.7", "a.0.b.9", "a.1.b.0", "a.1.b.5", "a.1.b.7", "a.1.b.9"];
    assert_eq!(got, expected);
    assert_eq!(tensors_of_line("x I64 []"), [("x".to_owned(), "I64".to_owned(), vec![])]);
}
