//! Parses `model.safetensors.index.json`, which lists the tensors of a checkpoint and the shard of
//! each.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::{Component, Path};

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::error::SourceError;
use super::first_few::FirstFew;
use super::text::Text;

/// File name of the index.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A parsed index. Names are borrowed from its text.
#[derive(Debug)]
pub(super) struct Index<'a> {
    /// File names of the shards, sorted.
    pub files: Vec<Cow<'a, str>>,
    /// Tensors with the position of their shard in `files`, sorted by name, without duplicates.
    pub tensors: Vec<(Cow<'a, str>, usize)>,
}

impl<'a> Index<'a> {
    /// Parses the text of the index at `path`.
    ///
    /// `metadata.total_size` is ignored: it is often wrong in published indices, and the headers of
    /// the shards have the sizes.
    ///
    /// # Errors
    /// If the text is not such an object, a file name is not a plain `*.safetensors` name, a tensor
    /// is listed twice, or there are no tensors.
    pub(super) fn parse(path: &Path, text: &'a [u8]) -> Result<Index<'a>, SourceError> {
        let json_error = |source| SourceError::Json { path: path.to_owned(), source };
        let mut json = serde_json::Deserializer::from_slice(text);
        let index = json.deserialize_map(IndexVisitor).map_err(json_error)?;
        json.end().map_err(json_error)?;
        let Index { files, mut tensors } = index;
        let names: FirstFew<String> =
            files.iter().filter(|n| !is_plain(n)).map(|n| format!("`{n}`")).collect();
        if !names.is_empty() {
            return Err(SourceError::FileNames { index: path.to_owned(), names });
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let twice: FirstFew<String> = tensors
            .windows(2)
            .filter(|pair| pair[0].0 == pair[1].0)
            .map(|pair| format!("`{}`", pair[0].0))
            .collect();
        if !twice.is_empty() {
            return Err(SourceError::ListedTwice { index: path.to_owned(), tensors: twice });
        }
        if tensors.is_empty() {
            return Err(SourceError::EmptyIndex { index: path.to_owned() });
        }
        Ok(Index { files, tensors }.with_files_sorted())
    }

    /// Sorts `files` and renumbers the tensors accordingly.
    fn with_files_sorted(self) -> Index<'a> {
        let Index { files, mut tensors } = self;
        let mut order: Vec<usize> = (0..files.len()).collect();
        order.sort_by(|&a, &b| files[a].cmp(&files[b]));
        let mut place = vec![0; files.len()];
        for (to, &from) in order.iter().enumerate() {
            place[from] = to;
        }
        for (_, file) in &mut tensors {
            *file = place[*file];
        }
        Index { files: order.into_iter().map(|i| files[i].clone()).collect(), tensors }
    }
}

/// Whether `name` is the name of a safetensors file in the directory of the index itself.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!(components.next(), Some(Component::Normal(n)) if n == name);
    single
        && components.next().is_none()
        && name.len() > ".safetensors".len()
        && name.ends_with(".safetensors")
        && !name.contains(['\\', '\0'])
}

/// Deserializes the index object.
struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `weight_map`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut index = None;
        while let Some(Text(key)) = map.next_key()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
            } else if index.replace(map.next_value_seed(WeightMapVisitor)?).is_some() {
                return Err(A::Error::custom("`weight_map` occurs twice"));
            }
        }
        index.ok_or_else(|| A::Error::missing_field("weight_map"))
    }
}

/// Deserializes `weight_map`. Files are numbered in the order of their first occurrence.
struct WeightMapVisitor;

impl<'de> DeserializeSeed<'de> for WeightMapVisitor {
    type Value = Index<'de>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Index<'de>, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = Index<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`weight_map` to map tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut index = Index { files: Vec::new(), tensors: Vec::new() };
        let mut known: HashMap<Cow<'de, str>, usize> = HashMap::new();
        while let Some((Text(tensor), Text(file))) = map.next_entry()? {
            let id = match known.get(&file) {
                Some(&id) => id,
                None => {
                    index.files.push(file.clone());
                    known.insert(file, index.files.len() - 1);
                    index.files.len() - 1
                }
            };
            index.tensors.push((tensor, id));
        }
        Ok(index)
    }
}
