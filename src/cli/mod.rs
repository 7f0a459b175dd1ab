//! The command line: what a person types, and what he is told.
//!
//! Raw arguments ([`args`]) become checked values ([`request`], by [`resolve`]); then each command has its file.
//! [`open`] is the one place that meets the rooms which do the work. Exit codes: 0; 2 for a usage
//! error; 1 for anything refused or failed, with one message on stderr.

mod args;
mod choices;
mod documents;
mod export;
mod inspect;
mod memory;
mod mount;
mod mount_words;
mod open;
mod output;
mod pieces;
mod progress;
mod request;
mod resolve;
mod size;
mod status;
mod verify;

use self::args::{Cli, Command};
use self::resolve::UsageError;
use crate::mount::log;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use tracing::Level;

/// Why a command ends without having done what it was asked for.
enum Failure {
    /// It was asked wrongly, or for help.
    Usage(clap::Error),
    /// It was refused, or failed.
    Failed(anyhow::Error),
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Failure {
        Failure::Usage(error)
    }
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Failure {
        Failure::Usage(Cli::command().error(ErrorKind::ArgumentConflict, error))
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Failed(error)
    }
}

/// Runs the command line `argv`, program name first.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(&argv.into_iter().collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => {
            // Where stderr is closed there is nobody to tell; the exit code tells.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
        Err(Failure::Failed(error)) => {
            output::complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(argv: &[OsString]) -> Result<(), Failure> {
    let cli = Cli::from_arg_matches(&Cli::command().try_get_matches_from(argv)?)?;
    let Some(command) = cli.command else {
        refuse_late_subcommand(&cli.mount)?;
        let (args, words) = resolve::with_mount_words(argv, cli.mount)?;
        return Ok(mount::run(&resolve::mount(args, words)?)?);
    };
    match command {
        Command::Inspect(args) => {
            let view = resolve::view(&args.src, &args.view)?;
            start_log(&args.log)?;
            inspect::run(&args, &view)?;
        }
        Command::Verify(args) => {
            let view = resolve::view(&args.src, &args.view)?;
            start_log(&args.log)?;
            verify::run(&args, &view, resolve::engine(&args.engine))?;
        }
        Command::Export(args) => {
            let view = resolve::view(&args.src, &args.view)?;
            start_log(&args.log)?;
            export::run(&args, &view, resolve::engine(&args.engine))?;
        }
        Command::Status(args) => status::run(&args)?,
        Command::Umount(args) => status::unmount_all(&args)?,
        Command::Models(args) => documents::models(&args)?,
        Command::Completions(args) => documents::completions(&args)?,
        Command::Man(args) => documents::man(&args)?,
    }
    Ok(())
}

/// `mount-ckpt --to hf inspect SRC` reads as a mount of `inspect` at `SRC`, and is not meant so.
fn refuse_late_subcommand(args: &args::MountArgs) -> Result<(), clap::Error> {
    let mut command = Cli::command();
    let src = args.src.as_deref().unwrap_or(Path::new(""));
    let name = src.to_str().unwrap_or_default();
    if command.find_subcommand(name).is_none() || src.exists() {
        return Ok(());
    }
    let message = format!("`{name}` has to come first: mount-ckpt {name} [OPTIONS] …");
    Err(command.error(ErrorKind::InvalidSubcommand, message))
}

/// Commands that end soon log what looks wrong, and to stderr.
fn start_log(args: &args::LogArgs) -> anyhow::Result<()> {
    Ok(log::init(&resolve::log(args, Level::WARN), false)?)
}
