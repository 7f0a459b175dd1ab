//! Checks the Markdown pages of the project: links, paths, commands and their output.
//!
//! - A relative link must lead to a file or directory of the repository, its `#anchor` to a
//!   heading.
//! - A code span such as `src/lib.rs` must name a file or directory. A component in capitals
//!   (`src/ROOM`) or with `*` stands for any name.
//! - A line that starts with `mount-ckpt` in a block of `sh` or `bash`, or after `$ ` in a block
//!   of `console` or of no language, must use subcommands and options that exist.
//! - A block that opens with ```` ```sh run ```` is run. All such blocks of a page run in order,
//!   in one bash with `set -euo pipefail`. Its working directory, which is also `$HOME`, is a new
//!   directory with an empty directory `mnt` and the small checkpoints of `tests/golden` under
//!   the names in [`run::CHECKPOINTS`], such as `MiMo-V2-Flash`. The `mount-ckpt` under test is
//!   first in `PATH`. The page fails if a command fails, or if something is still mounted at the
//!   end.
//! - A block that opens with ```` ```text output ```` must equal what the run block before it
//!   prints to stdout and stderr. `…` stands for any text.

mod commands;
#[path = "../common/mod.rs"]
mod common;
mod page;
mod run;

use std::path::Path;

use page::{Page, pages};

/// The root of the repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Panics with all problems of all pages.
fn assert_no_problems(problems: impl Fn(&Page) -> Vec<String>) {
    let pages = pages(root());
    assert!(pages.iter().any(|page| page.path == Path::new("README.md")), "README.md is a page");
    let found: Vec<String> = pages.iter().flat_map(problems).collect();
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

#[test]
fn links_lead_to_files_and_headings() {
    assert_no_problems(|page| page.broken_links(root()));
}

#[test]
fn paths_in_code_spans_exist() {
    assert_no_problems(|page| page.absent_paths(root()));
}

#[test]
fn commands_use_options_that_exist() {
    assert_no_problems(commands::unknown_options);
}

#[test]
fn blocks_marked_as_run_do_what_they_show() {
    let can_mount = common::mount::Scratch::new().is_some();
    if can_mount {
        assert_no_problems(run::failures);
    }
}

/// Asserts that `check` finds this problem and no other in a page with this text; none if `problem`
/// is empty.
fn assert_finds(check: impl Fn(&Page) -> Vec<String>, text: &str, problem: &str) {
    let found = check(&Page::parse("examples/page.md".into(), text));
    match problem {
        "" => assert_eq!(found, [""; 0], "{text}"),
        _ => assert!(found.len() == 1 && found[0].contains(problem), "{text}\n{found:?}"),
    }
}

#[test]
fn broken_links_are_found() {
    let links = |page: &Page| page.broken_links(root());
    for (text, problem) in [
        ("[a](quickstart.rs) [b](../src) [c](https://example.org/x) ![d](../LICENSE)", ""),
        ("## A `b_c`, d-e\n## A b\n## A b\n[a](#a-b_c-d-e) [b](#a-b-1)", ""),
        ("[a](../tests/loaders/README.md#tests-with-the-loaders-from-pypi)", ""),
        ("[a](../tests/loaders#tests-with-the-loaders-from-pypi)", ""),
        ("[a][x]\n\n[x]: absent.md", "examples/page.md:1: `absent.md` is not there"),
        ("text\n\n[a](absent.md)", "examples/page.md:3: `absent.md` is not there"),
        ("![a](absent.svg)", "`absent.svg` is not there"),
        ("[a](/etc/passwd)", "`/etc/passwd` is not there"),
        ("[a](../../..)", "`../../..` is not in the repository"),
        ("## A b\n[a](#a-b-1)", "`#a-b-1`: no such heading"),
        ("[a](../README.md#absent)", "`../README.md#absent`: no such heading"),
        ("[a](quickstart.rs#absent)", "`quickstart.rs#absent`: no such heading"),
    ] {
        assert_finds(links, text, problem);
    }
}

#[test]
fn absent_paths_are_found() {
    let paths = |page: &Page| page.absent_paths(root());
    for (text, problem) in [
        ("`src/main.rs`, `tests/golden/`, `tests/releases/NAME/config.json`, `tests/*.rs`", ""),
        ("`/data/src/x`, `source/x`, `src/main.rs is small`", ""),
        ("`src/absent.rs`", "examples/page.md:1: `src/absent.rs` is not there"),
        ("`tests/releases/NAME/absent.json`", "`tests/releases/NAME/absent.json` is not there"),
        ("| a |\n|---|\n| `tests/absent/` |", "examples/page.md:3: `tests/absent/` is not there"),
    ] {
        assert_finds(paths, text, problem);
    }
}

#[test]
fn unknown_options_are_found() {
    for (text, problem) in [
        ("```sh\nmount-ckpt --to hf --ep-size=8 SRC MNT # --absent\n```", ""),
        ("```sh\nsudo A=b /usr/bin/mount-ckpt umount -l \\\n  --quiet MNT && ls --absent\n```", ""),
        ("```\n$ mount-ckpt status --json\nmount-ckpt --absent\n```", ""),
        ("```\nmount-ckpt --absent\n```", ""),
        ("```toml\nmount-ckpt --absent\n```", ""),
        (
            "```sh\nmount-ckpt --absent SRC MNT\n```",
            "examples/page.md:2: mount-ckpt has no `--absent`",
        ),
        (
            "```sh\nls\nx=$(mount-ckpt --absent)\n```",
            "examples/page.md:3: mount-ckpt has no `--absent`",
        ),
        (
            "```console\n$ mount-ckpt inspect \\\n  --lazy\n```",
            "`mount-ckpt inspect` has no `--lazy`",
        ),
        ("```sh\nmount-ckpt umount -fq MNT\n```", "`mount-ckpt umount` has no `-f`"),
        ("```sh\ntrue | mount-ckpt remount SRC MNT\n```", "needs SRC and MNT, or a subcommand"),
        ("```sh\nmount-ckpt --to SRC -f MNT\n```", "needs SRC and MNT, or a subcommand"),
    ] {
        assert_finds(commands::unknown_options, text, problem);
    }
}

#[test]
fn blocks_that_do_not_do_what_they_show_are_found() {
    if common::mount::Scratch::new().is_none() {
        return;
    }
    let mount = "```sh run\nmount-ckpt MiMo-V2-Flash mnt\n```\n";
    let shown = "```text output\nmounted `…/MiMo-V2-Flash` at `…/mnt`: mimo-v2-flash, …\n```\n";
    let unmount = "```sh run\ncd mnt\nls\ncd $OLDPWD\nmount-ckpt umount mnt\n```\n";
    let listed = "```text output\nconfig.json\n…\ntokenizer_config.json\n```\n";
    let whole = [mount, shown, "text\n", unmount, listed].concat();
    for (text, problem) in [
        (whole.clone(), ""),
        (mount.to_owned(), "examples/page.md: `mnt` is still mounted at the end"),
        (whole.replace("mimo-v2-flash, …", "qwen, …"), "examples/page.md:5: expected\nmounted"),
        (whole.replace("config.json\n…", "…\nabsent\n…"), "examples/page.md:15: expected"),
        (whole.replace("ls\n", "ls\ncat absent | wc -l\n"), "absent: No such file or directory"),
        (whole.replace("ls\n", "ls\nls >>$absent\n"), "absent: unbound variable"),
        (whole.replace("-ckpt MiMo", "-ckpt --absent MiMo"), "examples/page.md:2: exit status: 2"),
        ("```sh run\nif\n```".to_owned(), "syntax error"),
        (shown.to_owned(), "examples/page.md:2: no `sh run` block is before this output"),
    ] {
        assert_finds(run::failures, &text, problem);
    }
}
