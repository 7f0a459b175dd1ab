//! Measures the cost of a mount relative to baselines on the same machine, and prints one table. The
//! results and what they mean are in `bench/README.md`.
//!
//! ```text
//! cargo run --release --example bench [-- [OPTIONS] [ROW…]]
//! ```
//! In each round the subject and its baseline run one after the other. A ratio is the median over all
//! rounds but the first. Checkpoints of real tensor sizes are written below `--data` (6 GB, and 2 GB
//! more while it runs) and kept for the next run. Needs `/dev/fuse`; some rows need root.

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
#[command(about = "Measures the cost of a mount relative to baselines", name = "bench")]
struct Arguments {
    /// Directory on a disk where the checkpoints are written and kept
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    data: PathBuf,
    /// Number of rounds after the first, which is not counted
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Python interpreter with torch, safetensors and nemo-automodel 0.7.0, for the row that
    /// compares with Automodel
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// Measure only rows whose names contain one of these texts [default: all rows]
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
