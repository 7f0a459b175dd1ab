//! `models`, `completions` and `man`: prints documents about the program itself.

use super::args::{Cli, CompletionsArgs, ManArgs, ModelsArgs};
use super::output;
use crate::mapping;
use anyhow::Context as _;
use clap::CommandFactory;

/// Lists the built-in mappings.
///
/// # Errors
/// Stdout cannot be written.
pub(super) fn models(args: &ModelsArgs) -> anyhow::Result<()> {
    let models = mapping::shipped();
    if args.json {
        return output::print_json(&models);
    }
    let width = models.iter().map(|model| model.name.len()).max().unwrap_or(0);
    let lines = models.iter().map(|model| {
        let (types, layouts) = (model.model_types.join(", "), model.layouts.join(", "));
        format!("{:width$}  model_type {types}; layouts {layouts}\n", model.name)
    });
    output::print(&lines.collect::<String>())
}

/// Prints a completion script for a shell.
///
/// # Errors
/// Stdout cannot be written.
pub(super) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "mount-ckpt", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

/// Prints the manual page, or writes a page for each command into a directory.
///
/// # Errors
/// Stdout or the directory cannot be written.
pub(super) fn man(args: &ManArgs) -> anyhow::Result<()> {
    // The page is the same from every build and on every machine, which the long version is not.
    let command = Cli::command().long_version(None);
    if let Some(dir) = &args.dir {
        let written =
            std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command, dir));
        return written
            .with_context(|| format!("cannot write manual pages to `{}`", dir.display()));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    output::print(&String::from_utf8_lossy(&page))
}
