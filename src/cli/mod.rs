#![doc = include_str!("README.md")]

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

/// Why a command ends early.
enum CommandError {
    /// A usage error. Also a request for help or the version, which clap reports the same way.
    Usage(clap::Error),
    /// The command was refused or failed.
    Failed(anyhow::Error),
}

impl From<clap::Error> for CommandError {
    fn from(error: clap::Error) -> CommandError {
        CommandError::Usage(error)
    }
}

impl From<UsageError> for CommandError {
    fn from(error: UsageError) -> CommandError {
        CommandError::Usage(Cli::command().error(ErrorKind::ArgumentConflict, error))
    }
}

impl From<anyhow::Error> for CommandError {
    fn from(error: anyhow::Error) -> CommandError {
        CommandError::Failed(error)
    }
}

/// Runs the command line `argv`, whose first item is the program's name, and returns the exit code.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(&argv.into_iter().collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(CommandError::Usage(error)) => {
            // If stderr is closed, the exit code has to do.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
        Err(CommandError::Failed(error)) => {
            output::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(argv: &[OsString]) -> Result<(), CommandError> {
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

/// Refuses a subcommand that comes after options: clap takes `mount-ckpt --to hf inspect SRC` for a
/// mount of the checkpoint `inspect` at `SRC`. A directory of that name in the working directory is
/// taken for a checkpoint.
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

/// Sets up the log of a command other than mounting: to stderr, warnings and errors by default.
fn start_log(args: &args::LogArgs) -> anyhow::Result<()> {
    Ok(log::init(&resolve::log(args, Level::WARN), false)?)
}
