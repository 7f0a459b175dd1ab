//! Per-tensor directories: one safetensors file for each tensor.
//!
//! To keep 200,000 such files cheap, a directory stores only the ids of its tensors and the order
//! of their names: 8 bytes for each. A file's inode number follows from the position of its tensor,
//! and its header is built for each request.

use std::borrow::Cow;

use crate::plan::TensorId;

const SUFFIX: &str = ".safetensors";

/// Longest file name, in bytes: NAME_MAX of Linux.
const NAME_MAX: usize = 255;

/// File name for a tensor: its name with `%`, `/` and NUL escaped as `%25`, `%2F` and `%00`, and
/// the suffix.
pub(super) fn file_name(tensor: &str) -> String {
    let mut name = String::with_capacity(tensor.len() + SUFFIX.len());
    for c in tensor.chars() {
        match c {
            '%' => name.push_str("%25"),
            '/' => name.push_str("%2F"),
            '\0' => name.push_str("%00"),
            c => name.push(c),
        }
    }
    name.push_str(SUFFIX);
    name
}

/// The inverse of [`file_name`]; `None` if `file` is not the file name of any tensor.
fn tensor_name(file: &str) -> Option<Cow<'_, str>> {
    let name = file.strip_suffix(SUFFIX)?;
    if name.contains(['/', '\0']) {
        return None;
    }
    if !name.contains('%') {
        return Some(Cow::Borrowed(name));
    }
    let mut parts = name.split('%');
    let mut tensor = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let c = match part.get(..2)? {
            "25" => '%',
            "2F" => '/',
            "00" => '\0',
            _ => return None,
        };
        tensor.push(c);
        tensor.push_str(&part[2..]);
    }
    Some(Cow::Owned(tensor))
}

/// The tensors of one directory of the plan, by position and sorted by name.
#[derive(Debug)]
pub(super) struct TensorDirectory {
    tensors: Box<[TensorId]>,
    /// Positions in `tensors`, sorted by tensor name. A tensor whose file name would be too long
    /// has a position but no file.
    sorted: Box<[u32]>,
}

impl TensorDirectory {
    /// A directory of these tensors, which must be distinct.
    ///
    /// # Panics
    /// If there are 2^32 tensors or more, which a [`TensorId`] cannot count.
    pub(super) fn new<'a>(
        tensors: &[TensorId],
        name_of: impl Fn(TensorId) -> &'a str,
    ) -> TensorDirectory {
        let count = u32::try_from(tensors.len()).expect("tensors are counted by a u32");
        let fits = |name: &str| {
            // An escape is three bytes: most names are short enough without a closer look.
            name.len() * 3 + SUFFIX.len() <= NAME_MAX || file_name(name).len() <= NAME_MAX
        };
        let mut sorted: Vec<(&str, u32)> =
            tensors.iter().map(|&id| name_of(id)).zip(0..count).collect();
        sorted.retain(|(name, _)| fits(name));
        sorted.sort_unstable();
        TensorDirectory {
            tensors: tensors.into(),
            sorted: sorted.into_iter().map(|(_, position)| position).collect(),
        }
    }

    /// Number of files.
    pub(super) fn len(&self) -> usize {
        self.sorted.len()
    }

    /// The tensor at a position.
    pub(super) fn tensor(&self, position: u32) -> Option<TensorId> {
        self.tensors.get(usize::try_from(position).ok()?).copied()
    }

    /// Position of the `n`th file, sorted by name.
    pub(super) fn nth(&self, n: usize) -> Option<u32> {
        self.sorted.get(n).copied()
    }

    /// Position of the tensor whose file name is `file`.
    pub(super) fn find<'a>(
        &self,
        file: &str,
        name_of: impl Fn(TensorId) -> &'a str,
    ) -> Option<u32> {
        let wanted = tensor_name(file)?;
        let name_at = |&position: &u32| self.tensor(position).map(&name_of).unwrap_or_default();
        let n = self.sorted.binary_search_by(|p| name_at(p).cmp(wanted.as_ref())).ok()?;
        self.nth(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_escaped_both_ways() {
        for (tensor, file) in [
            ("model.norm.weight", "model.norm.weight.safetensors"),
            ("a/b", "a%2Fb.safetensors"),
            ("100%\0", "100%25%00.safetensors"),
            ("%2F", "%252F.safetensors"),
            ("", ".safetensors"),
            ("é%", "é%25.safetensors"),
        ] {
            assert_eq!(file_name(tensor), file);
            assert_eq!(tensor_name(file).as_deref(), Some(tensor));
        }
        for file in
            ["a", "a%2f.safetensors", "a%.safetensors", "%é.safetensors", "a%41.safetensors"]
        {
            assert_eq!(tensor_name(file), None, "{file}");
        }
    }

    #[test]
    fn files_are_found_by_name_and_listed_in_order() {
        let long = "x".repeat(NAME_MAX - SUFFIX.len());
        let too_long = "x".repeat(NAME_MAX - SUFFIX.len() + 1);
        let slashes = "/".repeat(82);
        let names = ["m.b", &too_long, "m.a", "m/c", &long, &slashes, "m.b.weight"];
        let name_of = |id: TensorId| names[id.0 as usize];
        let ids: Vec<TensorId> = (0..7).map(TensorId).rev().collect();
        let tree = TensorDirectory::new(&ids, name_of);
        let listed: Vec<&str> = (0..tree.len())
            .map(|n| name_of(tree.tensor(tree.nth(n).expect("listed")).expect("in range")))
            .collect();
        assert_eq!(listed, ["m.a", "m.b", "m.b.weight", "m/c", long.as_str()]);
        for name in listed {
            let position = tree.find(&file_name(name), name_of).expect("listed");
            assert_eq!(tree.tensor(position).map(name_of), Some(name));
        }
        for absent in ["m.c.safetensors", "m.b", &file_name(&too_long)] {
            assert_eq!(tree.find(absent, name_of), None, "{absent}");
        }
        assert_eq!(tree.tensor(7), None);
        assert_eq!(tree.nth(5), None);
    }
}
