//! Parses a Markdown page into headings, links, code spans and blocks.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// Directories that contain pages, and whose paths are checked in code spans.
const DIRECTORIES: [&str; 4] = ["src", "tests", "examples", "systemd"];

/// A Markdown file.
#[derive(Debug, Default)]
pub struct Page {
    /// Relative to the repository.
    pub path: PathBuf,
    /// Fenced blocks, in order.
    pub blocks: Vec<Block>,
    /// Line and target.
    links: Vec<(usize, String)>,
    /// Line and text.
    spans: Vec<(usize, String)>,
    /// Anchors of the headings.
    anchors: BTreeSet<String>,
}

/// A fenced block of code.
#[derive(Debug)]
pub struct Block {
    /// The line of its first line of code.
    pub line: usize,
    /// The text after the opening fence.
    pub info: String,
    pub text: String,
}

/// All pages of the repository: in its root and anywhere in [`DIRECTORIES`].
pub fn pages(root: &Path) -> Vec<Page> {
    let mut found: Vec<PathBuf> = files(root).filter(|path| path.is_file()).collect();
    let mut dirs: Vec<PathBuf> = DIRECTORIES.iter().map(|dir| root.join(dir)).collect();
    while let Some(dir) = dirs.pop() {
        let (below, files): (Vec<_>, _) = files(&dir).partition(|path| path.is_dir());
        dirs.extend(below);
        found.extend::<Vec<_>>(files);
    }
    found.retain(|path| path.extension().is_some_and(|e| e == "md"));
    found.sort();
    let parse = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        Page::parse(path.strip_prefix(root).unwrap().to_owned(), &text)
    };
    found.iter().map(parse).collect()
}

/// The entries of a directory that are not hidden.
fn files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let entries = entries.map(|entry| entry.unwrap());
    entries.filter(|e| !e.file_name().to_string_lossy().starts_with('.')).map(|e| e.path())
}

impl Page {
    pub fn parse(path: PathBuf, text: &str) -> Page {
        let mut page = Page { path, ..Page::default() };
        let mut heading: Option<String> = None;
        let mut block: Option<Block> = None;
        for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
            let line = text[..range.start].matches('\n').count() + 1;
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push((line, dest_url.into_string()));
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => page.add_anchor(&heading.take().unwrap()),
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))) => {
                    let info = info.into_string();
                    block = Some(Block { line: line + 1, info, text: String::new() });
                }
                Event::End(TagEnd::CodeBlock) => page.blocks.extend(block.take()),
                Event::Code(code) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&code);
                    }
                    page.spans.push((line, code.into_string()));
                }
                Event::Text(text) => {
                    let open = block.as_mut().map(|block| &mut block.text).or(heading.as_mut());
                    if let Some(open) = open {
                        open.push_str(&text);
                    }
                }
                _ => {}
            }
        }
        page
    }

    /// GitHub's anchor for a heading: lower case, without punctuation, hyphens for spaces. Repeated
    /// anchors get a number.
    fn add_anchor(&mut self, heading: &str) {
        let kept = heading.to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let slug: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let again = (1..).map(|n| format!("{slug}-{n}"));
        let mut names = [slug.clone()].into_iter().chain(again);
        self.anchors.extend(names.find(|name| !self.anchors.contains(name)));
    }

    /// `PAGE:LINE`, which editors can open.
    pub fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.path.display())
    }

    pub fn broken_links(&self, root: &Path) -> Vec<String> {
        let is_local = |link: &&(usize, String)| {
            !["https:", "http:", "mailto:"].iter().any(|scheme| link.1.starts_with(scheme))
        };
        let why = |(line, link): &(usize, String)| {
            let problem = self.why_broken(root, link)?;
            Some(format!("{}: {problem}", self.at(*line)))
        };
        self.links.iter().filter(is_local).filter_map(why).collect()
    }

    fn why_broken(&self, root: &Path, link: &str) -> Option<String> {
        let (path, anchor) = link.split_once('#').map_or((link, None), |(p, a)| (p, Some(a)));
        let here = root.join(&self.path);
        let target = if path.is_empty() { here } else { here.parent().unwrap().join(path) };
        // GitHub resolves an absolute path against its own site.
        if path.starts_with('/') || !(path.is_empty() || target.exists()) {
            return Some(format!("`{path}` is not there"));
        }
        if !path.is_empty() && !target.canonicalize().unwrap().starts_with(root) {
            return Some(format!("`{path}` is not in the repository"));
        }
        let anchor = anchor?;
        let has_anchor = if path.is_empty() {
            self.anchors.contains(anchor)
        } else {
            let file = if target.is_dir() { target.join("README.md") } else { target };
            file.extension().is_some_and(|e| e == "md")
                && fs::read_to_string(file)
                    .is_ok_and(|text| Page::parse(PathBuf::new(), &text).anchors.contains(anchor))
        };
        (!has_anchor).then(|| format!("`{link}`: no such heading"))
    }

    pub fn absent_paths(&self, root: &Path) -> Vec<String> {
        let is_path = |text: &str| {
            let (first, _) = text.split_once('/').unwrap_or_default();
            DIRECTORIES.contains(&first) && !text.contains(char::is_whitespace)
        };
        let paths = self.spans.iter().filter(|(_, text)| is_path(text));
        paths
            .filter(|(_, path)| !exists(root, Path::new(path)))
            .map(|(line, path)| format!("{}: `{path}` is not there", self.at(*line)))
            .collect()
    }
}

/// Whether a path exists. A component in capitals, or with `*` or `…`, matches any name.
fn exists(at: &Path, path: &Path) -> bool {
    let mut parts = path.components();
    let Some(Component::Normal(part)) = parts.next() else { return true };
    let part = part.to_str().unwrap();
    let capitals = part.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    if capitals || part.contains(['*', '…']) {
        let rest = parts.as_path();
        let ends: Vec<&str> = part.split(['*', '…']).collect();
        let fits = |name: &str| {
            capitals || name.starts_with(ends[0]) && name.ends_with(ends[ends.len() - 1])
        };
        return at.is_dir()
            && files(at).any(|entry| {
                fits(entry.file_name().unwrap().to_str().unwrap()) && exists(&entry, rest)
            });
    }
    at.join(part).exists() && exists(&at.join(part), parts.as_path())
}
