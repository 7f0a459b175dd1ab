//! Checkpoints that must be refused. Each row of a table changes one thing in a golden checkpoint
//! and contains the complete expected message.

#[path = "../common/mod.rs"]
mod common;

mod config;
mod dtypes;
mod files;
mod missing;
mod native;
mod shapes;

use std::path::Path;

use common::toy::Toy;
use mount_ckpt::PlanOptions;

/// A family, a change, and the message. `~` stands for the prefix of the experts of a layer.
type Case = (&'static str, fn(&mut Toy) -> &mut Toy, &'static str);

const MIMO: &str = "mimo-v2-flash";
const FLASH: &str = "deepseek-v4-flash";
const BASE: &str = "deepseek-v4-base";
const KIMI: &str = "kimi-k25-vl";
const QWEN: &str = "qwen3-vl-moe";

/// The message with which the checkpoint is refused; a text with the summary if it is accepted.
fn refusal(toy: &Toy, options: &PlanOptions, damage: impl FnOnce(&Path)) -> String {
    match toy.mount(options, damage) {
        Ok(mounted) => format!("accepted: {}", mounted.engine.plan().summary),
        Err(message) => message,
    }
}

/// Checks all rows before the test fails.
fn assert_refused(load: fn(&'static str) -> Toy, cases: &[Case]) {
    let mut differences = String::new();
    for (i, (family, change, expected)) in cases.iter().enumerate() {
        let mut toy = load(family);
        change(&mut toy);
        let got = refusal(&toy, &PlanOptions::default(), |_| {});
        if got != *expected {
            let row = format!("row {i}, {family}\n  expected {expected}\n  got      {got}\n");
            differences.push_str(&row);
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}
