//! What goes to stdout and stderr.

use std::borrow::Cow;
use std::error::Error;
use std::io::{self, ErrorKind, Write};

use crate::mapping::MappingError;
use crate::mount::mountpoint::MountPointError;
use crate::plan::{PlanError, Problem};
use crate::source::printable;

/// Prints to stdout, control characters but for line ends and tabs escaped. A reader that has seen
/// enough (`| head`) is no error.
///
/// # Errors
/// Where stdout is a full disk, for one.
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

/// Prints a value as JSON.
///
/// # Errors
/// As [`print`].
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// The one message of a command that failed.
pub(super) fn complain(error: &anyhow::Error) {
    let _ = writeln!(io::stderr(), "mount-ckpt: {}", printable(&in_words(error)));
}

/// An error and its causes on one line. A cause that the text ends with already is not said twice.
pub(super) fn in_words(error: &anyhow::Error) -> String {
    let mut words = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !words.ends_with(&cause) {
            let colon = if words.is_empty() { "" } else { ": " };
            words.push_str(colon);
            words.push_str(&cause);
        }
    }
    let hints = error.chain().flat_map(hints).collect::<Vec<_>>();
    if !hints.is_empty() {
        words.push_str(&format!(" ({})", hints.join("; ")));
    }
    words
}

/// The options that help against an error: the rooms that refuse do not know what options are called.
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
            vec!["or leave out --allow-other, --allow-root and --auto-unmount"]
        }
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let cause = || anyhow::anyhow!("disk on fire");
        let table = [
            (cause(), "disk on fire"),
            (cause().context("cannot read `a`"), "cannot read `a`: disk on fire"),
            (cause().context("cannot read `a`: disk on fire"), "cannot read `a`: disk on fire"),
            (cause().context("b").context("c"), "c: b: disk on fire"),
        ];
        for (error, words) in table {
            assert_eq!(in_words(&error), words);
        }
    }
}
