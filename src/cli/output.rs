//! Prints results to stdout and errors to stderr.
//!
//! The only module that adds names of options to errors of other rooms ([`hints`]): those rooms are
//! also a library, whose callers have no options.

use std::borrow::Cow;
use std::error::Error;
use std::io::{self, ErrorKind, Write};

use crate::mapping::MappingError;
use crate::mount::background::LaunchError;
use crate::mount::mountpoint::MountPointError;
use crate::mount::unmount::UnmountError;
use crate::plan::{PlanError, Problem};
use crate::source::printable;

/// Prints to stdout. Escapes control characters other than line ends and tabs, since names in a
/// checkpoint may contain any. A reader that closes the pipe early (`| head`) is no error.
///
/// # Errors
/// Writing fails for another reason, for instance because the disk is full.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let is_odd = |c: char| c.is_control() && c != '\n' && c != '\t';
    let escaped = |c: char| if is_odd(c) { c.escape_default().to_string() } else { c.into() };
    let text: Cow<'_, str> = match text.contains(is_odd) {
        true => text.chars().map(escaped).collect::<String>().into(),
        false => text.into(),
    };
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to stdout"))
        }
        _ => Ok(()),
    }
}

/// Prints a value as indented JSON.
///
/// # Errors
/// The same as [`print()`].
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Prints the error of a command to stderr, on one line.
pub(super) fn print_error(error: &anyhow::Error) {
    let _ = writeln!(io::stderr(), "mount-ckpt: {}", printable(&one_line(error)));
}

/// An error, its causes and the options that help, as one line: `error: cause (hint)`. A cause that the
/// text already ends with is not repeated.
pub(super) fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            let colon = if text.is_empty() { "" } else { ": " };
            text.push_str(colon);
            text.push_str(&cause);
        }
    }
    let hints = error.chain().flat_map(hints).collect::<Vec<_>>();
    if !hints.is_empty() {
        text.push_str(&format!(" ({})", hints.join("; ")));
    }
    text
}

/// The options of the command line that help with an error.
fn hints(error: &(dyn Error + 'static)) -> Vec<&'static str> {
    let (unmapped, missing) =
        ("tensors without a rule: --unmapped keep|drop", "missing tensors: --allow-missing RE");
    match error.downcast_ref() {
        Some(PlanError::Refused(problems)) => {
            let table = [(Problem::NoRule, unmapped), (Problem::Incomplete, missing)];
            return table.iter().filter(|(p, _)| problems.has(*p)).map(|(_, hint)| *hint).collect();
        }
        Some(PlanError::UnknownQuantization { .. }) => return vec!["--scales-from DIR"],
        Some(PlanError::Empty) => return vec!["filters: --include, --exclude"],
        _ => {}
    }
    if let Some(MappingError::UnknownModelType { .. }) = error.downcast_ref() {
        return vec!["name one with --model, or write one and give it with --mapping FILE"];
    }
    match error.downcast_ref() {
        Some(MountPointError::AllowOther(_)) => {
            return vec!["or leave out --allow-other, --allow-root and --auto-unmount"];
        }
        Some(MountPointError::NotEmpty(_)) => {
            return vec!["-o nonempty hides what is in it while it is mounted"];
        }
        _ => {}
    }
    if let Some(UnmountError::Busy(_)) = error.downcast_ref() {
        return vec!["mount-ckpt umount --lazy detaches a mount that is in use"];
    }
    match error.downcast_ref() {
        Some(LaunchError::Died(_)) => vec!["-f mounts in the foreground and shows the log"],
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_printed_once() {
        let cause = || anyhow::anyhow!("disk on fire");
        let table = [
            (cause(), "disk on fire"),
            (cause().context("cannot read `a`"), "cannot read `a`: disk on fire"),
            (cause().context("cannot read `a`: disk on fire"), "cannot read `a`: disk on fire"),
            (cause().context("b").context("c"), "c: b: disk on fire"),
        ];
        for (error, words) in table {
            assert_eq!(one_line(&error), words);
        }
    }

    #[test]
    fn errors_name_the_options_that_help() {
        let table = [
            (anyhow::Error::new(MountPointError::NotEmpty("/mnt".to_owned())), "-o nonempty"),
            (anyhow::Error::new(MountPointError::AllowOther("conf".to_owned())), "--allow-other"),
            (anyhow::Error::new(UnmountError::Busy("/mnt".to_owned())), "umount --lazy"),
            (anyhow::Error::new(LaunchError::Died("signal: 9".to_owned())), "-f "),
            (anyhow::Error::new(PlanError::Empty), "--include, --exclude"),
        ];
        for (error, option) in table {
            assert!(
                !error.to_string().contains(option),
                "only the hint should name the option: {error}"
            );
            let line = one_line(&error.context("outer"));
            assert!(line.contains(option) && line.ends_with(')'), "{line}");
        }
    }
}
