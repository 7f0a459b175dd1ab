//! The progress bar of long commands, on stderr if that is a terminal.

use crate::tensor::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::time::Duration;

/// A bar for `total` bytes, labelled `what`. It clears its line when it is dropped.
pub(super) fn bar(what: &'static str, total: u64) -> ProgressBar {
    let template = "{msg}: {done} of {total} ({percent} %), {rate}, {eta_precise} left";
    let style = ProgressStyle::with_template(template)
        .expect("the template is valid")
        .with_key("done", |state: &ProgressState, out: &mut dyn Write| {
            let _ = write!(out, "{}", ByteSize(state.pos()));
        })
        .with_key("total", |state: &ProgressState, out: &mut dyn Write| {
            let _ = write!(out, "{}", ByteSize(state.len().unwrap_or_default()));
        })
        .with_key("rate", |state: &ProgressState, out: &mut dyn Write| {
            let _ = out.write_str(&rate(state.pos(), state.elapsed()));
        });
    // Draws nothing if stderr is not a terminal.
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.with_style(style).with_message(what).with_finish(ProgressFinish::AndClear)
}

/// The mean rate of `bytes` bytes in `time`, for instance `512.0 MiB/s`.
pub(super) fn rate(bytes: u64, time: Duration) -> String {
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = u128::from(bytes) * 1000 / u128::from(millis);
    format!("{}/s", ByteSize(u64::try_from(rate).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use indicatif::InMemoryTerm;

    #[test]
    fn the_bar_shows_progress_and_rate() {
        let terminal = InMemoryTerm::new(1, 100);
        let bar = bar("export", 4 << 30);
        bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(terminal.clone())));
        bar.inc(1 << 30);
        bar.tick();
        let shown = terminal.contents();
        assert!(shown.starts_with("export: 1.0 GiB of 4.0 GiB (25 %), "), "{shown}");
        assert!(shown.contains("iB/s, ") && shown.ends_with(" left"), "{shown}");
        drop(bar);
        assert_eq!(terminal.contents(), "");
    }

    #[test]
    fn a_rate_is_bytes_per_second() {
        let table = [(1 << 30, 2000, "512.0 MiB/s"), (0, 1000, "0 B/s"), (5, 0, "4.8 KiB/s")];
        for (bytes, millis, text) in table {
            assert_eq!(rate(bytes, Duration::from_millis(millis)), text);
        }
    }
}
