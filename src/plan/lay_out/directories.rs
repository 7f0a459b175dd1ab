//! Puts tensors into directories: chooses the dtype and body of each, cuts those that ranks share,
//! and sorts them by name.

use std::collections::BTreeMap;

use super::bodies;
use super::quantize::FacetTensor;
use super::ranks::{self, ExpertParallel};
use crate::mapping::LayoutName;
use crate::plan::arrange::ViewTensor;
use crate::plan::fragment::covers;
use crate::plan::options::PlanOptions;
use crate::plan::report::{PlanError, Problem, Problems};
use crate::plan::{Body, Directory, Matrix, TensorId, TensorPlan};
use crate::tensor::{DType, Float, Shape};

/// Collects the tensor plans of all directories. A tensor that no cut changes is shared by them.
pub(in crate::plan) struct DirectoryBuilder<'a> {
    /// Output: the tensors of all directories.
    pub tensors: Vec<TensorPlan>,
    pub matrices: &'a [Matrix],
    /// Dtype of dequantized and grouped tensors.
    pub dtype: Float,
    /// Whether all floating-point tensors are cast to it.
    pub cast_floats: bool,
    /// Dtypes of plain tensors in the original checkpoint, by name.
    pub plain_dtypes: &'a BTreeMap<String, DType>,
    /// Output: what is wrong with the tensors.
    pub problems: Problems,
}

impl DirectoryBuilder<'_> {
    /// The directories of the view: the whole model as the root, and one for each expert-parallel
    /// rank beneath it; or a single rank as the root.
    pub(in crate::plan) fn directories(
        &mut self,
        view_tensors: &[ViewTensor],
        to: LayoutName,
        options: &PlanOptions,
    ) -> Result<Vec<Directory>, PlanError> {
        let cuts = options.expert_parallel.is_some() || options.expert_shard.is_some();
        if cuts && to == LayoutName::Hf {
            return Err(PlanError::NoGroupedExperts(to));
        }
        let shard = |t: &ViewTensor, problems: &mut Problems| match options.expert_shard {
            Some(shard) if t.expert_axis => Some(ranks::axis_shard(t, shard, problems)),
            Some(_) | None => None,
        };
        let (size, ranks) = match options.expert_parallel {
            None => (1, vec![]),
            Some(ExpertParallel { size, rank: Some(rank) }) => (size, vec![rank]),
            Some(ExpertParallel { size, rank: None }) => (size, (0..size).collect()),
        };
        let at_root = options.expert_parallel.is_some_and(|ep| ep.rank.is_some());
        let mut directories = Vec::with_capacity(ranks.len() + 1);
        let mut whole: Vec<Option<TensorId>> = vec![None; view_tensors.len()];
        if !at_root {
            for (slot, tensor) in whole.iter_mut().zip(view_tensors) {
                let sharded = shard(tensor, &mut self.problems);
                *slot = Some(self.add(sharded.as_ref().unwrap_or(tensor))?);
            }
            let tensors = whole.iter().copied().flatten().collect();
            directories.push(Directory { name: String::new(), tensors });
        }
        for rank in ranks {
            let mut tensors = Vec::with_capacity(view_tensors.len());
            for (slot, tensor) in whole.iter_mut().zip(view_tensors) {
                tensors.push(match (tensor.expert_axis, *slot) {
                    (true, _) => {
                        let cut = ranks::expert_slice(tensor, size, rank, &mut self.problems);
                        let sharded = shard(&cut, &mut self.problems);
                        self.add(sharded.as_ref().unwrap_or(&cut))?
                    }
                    (false, Some(id)) => id,
                    (false, None) => *slot.insert(self.add(tensor)?),
                });
            }
            let name = if at_root { String::new() } else { ranks::directory_name(rank, size) };
            directories.push(Directory { name, tensors });
        }
        Ok(directories)
    }

    /// Adds payload, scale and shape tensors to the root, which stays sorted by name.
    pub(in crate::plan) fn add_facets(
        &mut self,
        facets: Vec<FacetTensor>,
        options: &PlanOptions,
        directories: &mut [Directory],
    ) -> Result<(), PlanError> {
        let Some(root) = directories.first_mut().filter(|_| !facets.is_empty()) else {
            return Ok(());
        };
        for facet in facets.into_iter().filter(|f| options.selects(&f.name)) {
            let id = u32::try_from(self.tensors.len()).map_err(|_| PlanError::TooMany)?;
            let FacetTensor { name, dtype, shape, body } = facet;
            if shape.bytes(dtype).is_none() {
                self.problems.explain(Problem::Size, &name, format!("{shape} {dtype}"));
            }
            self.tensors.push(TensorPlan { name: name.into(), dtype, shape, body });
            root.tensors.push(TensorId(id));
        }
        root.tensors.sort_by_cached_key(|id| natural_key(&self.tensors[id.index()].name));
        for pair in root.tensors.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|id| &self.tensors[id.index()].name);
            if a == b {
                self.problems.add(Problem::SameName, a);
            }
        }
        Ok(())
    }

    /// Adds a tensor: chooses its dtype and body, and notes what is wrong with them.
    fn add(&mut self, tensor: &ViewTensor) -> Result<TensorId, PlanError> {
        let id = u32::try_from(self.tensors.len()).map_err(|_| PlanError::TooMany)?;
        let dtype = self.dtype_of(tensor);
        let shape = Shape::new(tensor.shape.as_slice());
        if shape.bytes(dtype).is_none() {
            self.problems.explain(Problem::Size, &tensor.name, format!("{shape} {dtype}"));
        } else if !covers(&shape, &tensor.fragments) {
            self.problems.explain(
                Problem::RuleShape,
                &tensor.name,
                "its parts leave gaps or overlap",
            );
        }
        let body = match bodies::verbatim_runs(&shape, dtype, &tensor.fragments, self.matrices) {
            Some(runs) => Body::Verbatim(runs),
            None => {
                if dtype.bits() < 8 {
                    let what = format!("{dtype} cannot be moved element by element");
                    self.problems.explain(Problem::RuleDtype, &tensor.name, what);
                }
                Body::Computed(bodies::computed(&shape, dtype, tensor.fragments.clone()))
            }
        };
        self.tensors.push(TensorPlan { name: tensor.name.as_str().into(), dtype, shape, body });
        Ok(TensorId(id))
    }

    /// The dtype of a tensor in the view.
    fn dtype_of(&mut self, tensor: &ViewTensor) -> DType {
        let matrices = self.matrices;
        let mut sources = tensor.fragments.iter().map(|f| &matrices[f.matrix.index()]);
        let Some(first) = sources.clone().next() else { return self.dtype.dtype() };
        let quantized = sources.clone().any(|m| m.scales.is_some());
        let floats = sources.clone().all(Matrix::is_castable);
        if self.cast_floats && floats {
            return if self.dtype == Float::F32 { DType::BF16 } else { self.dtype.dtype() };
        }
        if let (Some(original), true) = (self.plain_dtypes.get(&tensor.name), floats)
            && original.as_float().is_some()
        {
            return *original;
        }
        if let (Some(published), true) = (tensor.dtype, floats) {
            return published;
        }
        if quantized || tensor.grouped {
            for matrix in sources {
                refuse_uncastable(matrix, &mut self.problems);
            }
            return self.dtype.dtype();
        }
        if let Some(other) = sources.find(|m| m.dtype != first.dtype) {
            let what = format!(
                "expected {} as `{}`, got {} in `{}`",
                first.dtype, first.name, other.dtype, other.name
            );
            self.problems.explain(Problem::RuleDtype, &tensor.name, what);
        }
        first.dtype
    }
}

/// Refuses a matrix whose elements cannot be converted to floating-point numbers.
pub(in crate::plan) fn refuse_uncastable(matrix: &Matrix, problems: &mut Problems) {
    if !matrix.is_castable() && !problems.is_refused(&matrix.name) {
        problems.mark_refused(matrix.name.to_string());
        let what = format!("expected a quantized matrix, BF16, F16 or F32, got {}", matrix.dtype);
        problems.explain(Problem::RuleDtype, &matrix.name, what);
    }
}

/// A sort key by which `layers.2` comes before `layers.10`.
pub(in crate::plan) fn natural_key(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut left = name;
    while !left.is_empty() {
        let text = left.find(|c: char| c.is_ascii_digit()).unwrap_or(left.len());
        let (word, rest) = left.split_at(text);
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, rest) = rest.split_at(digits);
        key.push((0, word.to_owned()));
        if !number.is_empty() {
            key.push((number.parse().unwrap_or(u64::MAX), String::new()));
        }
        left = rest;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_sort_numerically() {
        let mut names = ["layers.10.a", "layers.2.b", "layers.2.a", "layers.1.a", "embed"];
        names.sort_by_cached_key(|n| natural_key(n));
        assert_eq!(names, ["embed", "layers.1.a", "layers.2.a", "layers.2.b", "layers.10.a"]);
    }
}
