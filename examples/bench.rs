//! Measures what a mount costs, against what the same machine does without it, in one table.
//!
//! ```text
//! cargo run --release --example bench [-- [OPTIONS] [ROW…]]
//! ```
//! Each ratio is the median over rounds of the subject's rate and the baseline's, taken in turn in
//! the same run; the first round is not counted. Checkpoints of real tensor sizes are made below
//! `--data` (12 GB) and kept for the next run. Needs `/dev/fuse`; some rows need root.

#[path = "bench/checkpoints.rs"]
mod checkpoints;
#[path = "bench/kernels.rs"]
mod kernels;
#[path = "bench/mounts.rs"]
mod mounts;
#[path = "bench/null.rs"]
mod null;
#[path = "bench/readers.rs"]
mod readers;
#[path = "bench/table.rs"]
mod table;
#[path = "bench/views.rs"]
mod views;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use table::HEAD;
use views::Bench;

#[derive(Parser)]
#[command(about = "Measures what a mount costs, as a table of ratios", name = "bench")]
struct Arguments {
    /// Where the checkpoints are made and kept, on a disk
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    data: PathBuf,
    /// Rounds that are counted
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// A Python with torch, safetensors and nemo-automodel 0.7.0, for the row that compares with it
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// Rows whose names contain one of these; none is all
    rows: Vec<String>,
}

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [first, rest @ ..] = argv.as_slice()
        && first == mounts::SERVE
    {
        return mounts::serve(rest);
    }
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let wanted = |name: &str| {
        arguments.rows.is_empty() || arguments.rows.iter().any(|part| name.contains(part))
    };
    println!("{HEAD}");
    for row in kernels::rows(arguments.rounds, &wanted)? {
        println!("{}", row.markdown());
    }
    let Arguments { data, rounds, python, .. } = arguments;
    Bench { data, rounds: *rounds, python: python.as_deref() }.run(wanted)
}
