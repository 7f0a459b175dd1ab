//! Checks that the subcommands and options of `mount-ckpt` in code blocks exist.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::LazyLock;

use crate::common::mount::BINARY;
use crate::page::{Block, Page};

/// Words that may precede a command.
const PREFIX_WORDS: [&str; 12] =
    ["!", "do", "else", "env", "exec", "if", "nohup", "sudo", "then", "time", "until", "while"];

/// Options of a command, and whether each takes a value.
type OptionTable = BTreeMap<String, bool>;

/// Options of each subcommand, and of `mount-ckpt` itself under the name "".
static OPTIONS: LazyLock<BTreeMap<String, OptionTable>> = LazyLock::new(|| {
    let help = help(&["--help"]);
    let (_, commands) = help.split_once("\nCommands:\n").expect("the help lists commands");
    let commands = commands.lines().take_while(|line| !line.is_empty());
    let names = commands.filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
    let of_command = |name: String| (name.clone(), options(&self::help(&[&name, "--help"])));
    let all = names.filter(|name| name != "help").map(of_command);
    all.chain([(String::new(), options(&help))]).collect()
});

fn help(args: &[&str]) -> String {
    let output = Command::new(BINARY).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Parses lines of the help text such as `  -o <OPTS>`, `  -f, --foreground` or
/// `      --to <LAYOUT>`.
fn options(help: &str) -> OptionTable {
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let mut taken = OptionTable::new();
    for line in lines {
        let takes_value = line.split("  ").next().unwrap().contains('<');
        let names = line.split([' ', ',']).filter(|word| word.starts_with('-'));
        taken.extend(names.map(|name| (name.to_owned(), takes_value)));
    }
    taken
}

/// Problems with the commands of a page.
pub fn unknown_options(page: &Page) -> Vec<String> {
    let words = |block: &Block| block.info.split_whitespace().map(str::to_owned).collect();
    let mut problems = Vec::new();
    for block in &page.blocks {
        let info: Vec<String> = words(block);
        let info: Vec<&str> = info.iter().map(String::as_str).collect();
        let text = match info[..] {
            ["sh" | "bash"] => block.text.clone(),
            ["console"] | [] => typed(&block.text),
            _ => continue,
        };
        for (line, command) in commands(&text, block.line) {
            let problem = problem_of(&command);
            problems.extend(problem.map(|problem| format!("{}: {problem}", page.at(line))));
        }
    }
    problems
}

/// The commands after `$ ` with their continuation lines. All other lines are empty.
fn typed(session: &str) -> String {
    let mut goes_on = false;
    let mut typed = String::new();
    for line in session.lines() {
        let command = line.strip_prefix("$ ").or(goes_on.then_some(line)).unwrap_or_default();
        goes_on = command.ends_with('\\');
        typed += &format!("{command}\n");
    }
    typed
}

/// The `mount-ckpt` commands of a script: line, and words after the name.
fn commands(script: &str, first: usize) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for (line, words) in simple_commands(script, first) {
        // A script for another shell: `bash -c '…'`, `trap '…' EXIT`.
        for word in words.iter().filter(|word| word.contains("mount-ckpt ")) {
            found.extend(commands(word, line));
        }
        let is_before =
            |word: &&String| PREFIX_WORDS.contains(&word.as_str()) || word.contains('=');
        let words: Vec<String> = words.iter().skip_while(is_before).cloned().collect();
        if let Some((name, args)) = words.split_first()
            && name.rsplit('/').next() == Some("mount-ckpt")
        {
            found.push((line, args.to_vec()));
        }
    }
    found
}

/// Splits a script into commands and words as a shell does: drops redirections, removes quotes,
/// expands nothing.
fn simple_commands(script: &str, first: usize) -> Vec<(usize, Vec<String>)> {
    let mut done = Vec::new();
    let (mut words, mut word): (Vec<String>, Option<String>) = (Vec::new(), None);
    let (mut line, mut start) = (first, first);
    let mut chars = script.chars().chain(['\n']).peekable();
    let mut quote = None;
    while let Some(c) = chars.next() {
        let next = chars.peek().copied();
        match (quote, c) {
            (Some(q), _) if c == q => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '\\') if next == Some('\n') => {
                chars.next();
                line += 1;
            }
            (None, '#') if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
            (None, '&') if word.as_ref().is_some_and(|w| w.ends_with('>')) => {
                word.get_or_insert_default().push(c);
            }
            (None, ' ' | '\t' | '\n' | ';' | '&' | '|' | '(' | ')' | '`') => {
                words.extend(word.take().filter(|word| word != "$"));
                if !matches!(c, ' ' | '\t') {
                    done.push((start, std::mem::take(&mut words)));
                }
            }
            _ => {
                if words.is_empty() && word.is_none() {
                    start = line;
                }
                word.get_or_insert_default().push(c);
            }
        }
        line += usize::from(c == '\n');
    }
    let is_redirection = |word: &String| {
        word.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with(['>', '<'])
    };
    done.iter_mut().for_each(|(_, words)| words.retain(|word| !is_redirection(word)));
    done.retain(|(_, words)| !words.is_empty());
    done
}

/// The problem with these arguments of `mount-ckpt`, if any.
fn problem_of(args: &[String]) -> Option<String> {
    let sub = args.first().filter(|name| OPTIONS.contains_key(*name));
    let (of, shown, args) = match sub {
        Some(name) => (&OPTIONS[name], format!("`mount-ckpt {name}`"), &args[1..]),
        None => (&OPTIONS[""], "mount-ckpt".to_owned(), args),
    };
    let mut arguments = 0;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let name = arg.split('=').next().unwrap();
        let names: Vec<String> = match arg.strip_prefix('-') {
            Some(letters) if !letters.starts_with('-') && !letters.is_empty() => {
                letters.chars().map(|letter| format!("-{letter}")).collect()
            }
            Some(_) => vec![name.to_owned()],
            None => {
                arguments += 1;
                continue;
            }
        };
        if let Some(unknown) = names.iter().find(|name| !of.contains_key(*name)) {
            return Some(format!("{shown} has no `{unknown}`"));
        }
        let asks = ["--help", "-h", "--version", "-V"];
        if names.iter().any(|name| asks.contains(&name.as_str())) {
            return None;
        }
        if of[&names[names.len() - 1]] && !arg.contains('=') {
            args.next();
        }
    }
    (sub.is_none() && arguments != 2)
        .then(|| "mount-ckpt needs SRC and MNT, or a subcommand".to_owned())
}
