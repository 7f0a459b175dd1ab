//! Runs blocks that are marked `run`, and compares their output.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use regex::Regex;

use crate::common::mount::{BINARY, Scratch, mounts_below};
use crate::common::{copy_files, golden};
use crate::page::{Block, Page};

/// Folders of `tests/golden`, and the names under which pages use them: those of the releases.
pub const CHECKPOINTS: [(&str, &str); 10] = [
    ("deepseek-v3", "DeepSeek-V3"),
    ("deepseek-v4-base", "DeepSeek-V4-Flash-Base"),
    ("deepseek-v4-flash", "DeepSeek-V4-Flash"),
    ("glm4-moe", "GLM-4.5"),
    ("gpt-oss", "gpt-oss-20b"),
    ("kimi-k25-vl", "Kimi-K2.5"),
    ("mimo-v2-flash", "MiMo-V2-Flash"),
    ("minimax-m2", "MiniMax-M2.7"),
    ("qwen3-moe", "Qwen3-30B-A3B"),
    ("qwen3-vl-moe", "Qwen3-VL-30B-A3B"),
];

/// Runs the blocks of a page. Without `/dev/fuse` nothing is run.
pub fn failures(page: &Page) -> Vec<String> {
    let blocks: Vec<(&Block, Option<&Block>)> = page
        .blocks
        .iter()
        .enumerate()
        .filter(|(_, block)| block.info == "sh run")
        .map(|(i, block)| (block, page.blocks.get(i + 1).filter(|b| b.info == "text output")))
        .collect();
    let orphans = page.blocks.iter().enumerate().filter(|(i, block)| {
        block.info == "text output" && (*i == 0 || page.blocks[i - 1].info != "sh run")
    });
    let orphan = |(_, block): (usize, &Block)| {
        format!("{}: no `sh run` block is before this output", page.at(block.line))
    };
    let mut problems: Vec<String> = orphans.map(orphan).collect();
    let scratch = if blocks.is_empty() { None } else { Scratch::new() };
    if let Some(scratch) = scratch {
        problems.extend(run(page, &blocks, &scratch));
    }
    problems
}

fn run(page: &Page, blocks: &[(&Block, Option<&Block>)], scratch: &Scratch) -> Vec<String> {
    let work = scratch.path().join("work");
    fs::create_dir_all(work.join("mnt")).unwrap();
    for (folder, name) in CHECKPOINTS {
        copy_files(&golden(folder).join("checkpoint"), &work.join(name));
    }
    let output = |i: usize| scratch.path().join(format!("{i}.out"));
    let mut script = "set -euo pipefail\n".to_owned();
    for (i, (block, _)) in blocks.iter().enumerate() {
        write!(script, "exec >'{}' 2>&1\n{}", output(i).display(), block.text).unwrap();
    }
    let file = scratch.path().join("script");
    fs::write(&file, script).unwrap();
    let path = std::env::var("PATH").unwrap();
    let ours = Path::new(BINARY).parent().unwrap();
    let status = Command::new("timeout")
        .args(["--kill-after=10", "300", "bash"])
        .arg(file)
        .current_dir(&work)
        .env("PATH", format!("{}:{path}", ours.display()))
        .env("HOME", &work)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();

    let mut problems = Vec::new();
    for (i, (block, expected)) in blocks.iter().enumerate() {
        // The output file of a block exists only if bash reached the block.
        let Ok(got) = fs::read_to_string(output(i)) else { break };
        let last = !output(i + 1).exists();
        if last && !status.success() {
            problems.push(format!("{}: {status}:\n{got}", page.at(block.line)));
        } else if let Some(expected) = expected
            && !fits(&expected.text, &got)
        {
            let at = page.at(expected.line);
            problems.push(format!("{at}: expected\n{}\ngot\n{got}", expected.text));
        }
    }
    // A page that failed did not reach its `umount`.
    let left = if status.success() { mounts_below(&work) } else { Vec::new() };
    for at in left {
        let at = at.strip_prefix(&work).unwrap().display().to_string();
        problems.push(format!("{}: `{at}` is still mounted at the end", page.path.display()));
    }
    problems
}

/// Whether a text matches the expected one, in which `…` stands for any text.
fn fits(expected: &str, got: &str) -> bool {
    let parts: Vec<String> = expected.trim_end().split('…').map(regex::escape).collect();
    Regex::new(&format!("(?s)^{}$", parts.join(".*"))).unwrap().is_match(got.trim_end())
}
