//! Measures rates of a subject and its baseline, and formats the rows of the table.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::Result;

/// The measurements of a row, and its target.
pub enum Value {
    /// Rates of the subject and of the baseline, in GB/s, one pair for each round.
    Ratio { rates: Vec<[f64; 2]>, at_least: f64 },
    /// Numbers in a unit, and the largest that meets the target.
    Number { measured: Vec<f64>, at_most: f64, unit: &'static str },
    /// The row was not measured, for this reason.
    Missing(String),
}

/// A row of the table.
pub struct Row {
    pub name: String,
    pub against: &'static str,
    pub value: Value,
}

/// Runs `subject` and `baseline` one after the other, `rounds` times and once before, which is not
/// counted. Both return the bytes that they moved.
pub fn compare(
    rounds: usize,
    mut subject: impl FnMut() -> Result<u64>,
    mut baseline: impl FnMut() -> Result<u64>,
) -> Result<Vec<[f64; 2]>> {
    let mut rates = Vec::with_capacity(rounds + 1);
    for _ in 0..=rounds {
        rates.push([rate(&mut subject)?, rate(&mut baseline)?]);
    }
    rates.remove(0);
    Ok(rates)
}

/// Calls `run`, which returns the bytes that it moved, and returns its rate in GB/s.
fn rate(run: &mut impl FnMut() -> Result<u64>) -> Result<f64> {
    let start = Instant::now();
    let bytes = run()?;
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / 1e9)
}

/// The median; of an even number of values, the upper one of the middle two.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The smallest and the largest value.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::MAX, f64::MIN), |(low, high), n| (low.min(n), high.max(n)))
}

impl Row {
    /// The row of the table as Markdown.
    pub fn markdown(&self) -> String {
        let mut line = format!("| {} | {} | ", self.name, self.against);
        match &self.value {
            Value::Ratio { rates, at_least } => {
                let ratios = || rates.iter().map(|[subject, baseline]| subject / baseline);
                let (low, high) = range(ratios());
                let [subject, baseline] = [0, 1].map(|i| median(rates.iter().map(|pair| pair[i])));
                let _ = write!(
                    line,
                    "{:.2} ({low:.2} to {high:.2}) | {at_least} | {subject:.2} : {baseline:.2} GB/s |",
                    median(ratios()),
                );
            }
            Value::Number { measured, at_most, unit } => {
                let all = || measured.iter().copied();
                let (low, high) = range(all());
                let middle = median(all());
                let _ = write!(
                    line,
                    "{middle:.2} ({low:.2} to {high:.2}) {unit} | at most {at_most} {unit} | |"
                );
            }
            Value::Missing(why) => {
                let _ = write!(line, "not measured | | {why} |");
            }
        }
        line
    }
}

/// The head of the table.
pub const HEAD: &str =
    "| row | against | median (range) | at least | medians |\n|---|---|---|---|---|";
