//! Scale and shape tensors whose payload is missing or something else.

use super::matrices::Grouping;
use crate::mapping::Encoding;
use crate::plan::report::Problem;
use crate::source::SourceId;
use crate::tensor::DType;

impl Grouping<'_> {
    /// Refuses scale and shape tensors that no payload took.
    pub(super) fn orphans(&mut self) {
        for id in (0..).map(SourceId).take(self.checkpoint.tensors().len()) {
            let name = &self.tensor(id).name;
            if self.used[id.index()] || self.mapping.layouts().any(|l| l.writes_out(name)) {
                continue;
            }
            let mapping = self.mapping;
            let owners = mapping.encodings.iter().filter_map(|e| Owner::of(e, name));
            let owners: Vec<Owner<'_>> = owners.collect();
            if let Some(owner) = owners.first() {
                self.used[id.index()] = true;
                self.orphan(name, owner, &owners);
            }
        }
    }

    fn orphan(&mut self, name: &str, owner: &Owner<'_>, owners: &[Owner<'_>]) {
        let canonical = self.mapping.canonical(&owner.matrix);
        if self.problems.is_refused(canonical.as_deref().unwrap_or(&owner.matrix)) {
            return;
        }
        let found = self.checkpoint.find(&owner.payload);
        match found.filter(|id| !self.used[id.index()]) {
            None => {
                let why = if found.is_some() { "has another scale" } else { "is missing" };
                let what = format!("`{}` {why}", owner.payload);
                self.problems.explain(Problem::MissingPayload, name, what);
            }
            Some(id) => {
                let takes = |d| owners.iter().any(|o| o.encoding.scheme.takes_payload(d));
                let (expected, got) = (one_of(takes), self.tensor(id).dtype);
                let what = format!("expected {expected} beside `{name}`, got {got}");
                self.problems.explain(Problem::PayloadDtype, &owner.payload, what);
                self.refuse(&owner.matrix, [Some(id), None]);
            }
        }
        self.refuse(&owner.matrix, [None, None]);
    }
}

/// The payload and the matrix that a scale or shape tensor belongs to, by its name.
pub(super) struct Owner<'e> {
    encoding: &'e Encoding,
    payload: String,
    matrix: String,
}

impl<'e> Owner<'e> {
    pub(super) fn of(encoding: &'e Encoding, part: &str) -> Option<Owner<'e>> {
        let spellings = encoding.scale.iter().enumerate();
        let scales = spellings.flat_map(|(i, spelled)| spelled.iter().map(move |t| (i, t)));
        let shape = encoding.shape.iter().map(|t| (0, t));
        scales.chain(shape).find_map(|(i, template)| {
            let bindings = template.bind(part, &encoding.vars)?;
            let payload = encoding.payload[i].format(&bindings, &encoding.vars)?;
            let matrix = encoding.matrix[i].format(&bindings, &encoding.vars)?;
            Some(Owner { encoding, payload, matrix })
        })
    }
}

/// The dtypes that are taken, in words.
pub(super) fn one_of(takes: impl Fn(DType) -> bool) -> String {
    let mut names: Vec<&str> = DType::all().filter(|d| takes(*d)).map(DType::name).collect();
    let last = names.pop().unwrap_or_default();
    if names.is_empty() { last.to_owned() } else { format!("{} or {last}", names.join(", ")) }
}
