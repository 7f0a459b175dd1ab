//! Refuses orphans: scale and shape tensors whose payload is missing or is no payload.

use super::matrices::MatrixGatherer;
use crate::mapping::Encoding;
use crate::plan::report::Problem;
use crate::tensor::DType;

impl MatrixGatherer<'_> {
    /// Refuses scale and shape tensors that belong to no matrix that was found.
    pub(super) fn refuse_orphans(&mut self) {
        for id in self.ids() {
            let name = &self.tensor(id).name;
            if self.used[id.index()] || self.mapping.layouts().any(|l| l.names_exactly(name)) {
                continue;
            }
            let mapping = self.mapping;
            let candidates = mapping.encodings.iter().filter_map(|e| PayloadRef::of(e, name));
            let candidates: Vec<PayloadRef<'_>> = candidates.collect();
            if let Some(payload_ref) = candidates.first() {
                self.used[id.index()] = true;
                self.refuse_orphan(name, payload_ref, &candidates);
            }
        }
    }

    fn refuse_orphan(
        &mut self,
        name: &str,
        payload_ref: &PayloadRef<'_>,
        candidates: &[PayloadRef<'_>],
    ) {
        let canonical = self.mapping.canonical(&payload_ref.matrix);
        if self.problems.is_refused(canonical.as_deref().unwrap_or(&payload_ref.matrix)) {
            return;
        }
        let found = self.checkpoint.find(&payload_ref.payload);
        match found.filter(|id| !self.used[id.index()]) {
            None => {
                let why = if found.is_some() { "has another scale" } else { "is missing" };
                let what = format!("`{}` {why}", payload_ref.payload);
                self.problems.explain(Problem::MissingPayload, name, what);
            }
            Some(id) => {
                let takes = |d| candidates.iter().any(|o| o.encoding.scheme.takes_payload(d));
                let (expected, got) = (dtype_list(takes), self.tensor(id).dtype);
                let what = format!("expected {expected} beside `{name}`, got {got}");
                self.problems.explain(Problem::PayloadDtype, &payload_ref.payload, what);
                self.refuse(&payload_ref.matrix, [Some(id), None]);
            }
        }
        self.refuse(&payload_ref.matrix, [None, None]);
    }
}

/// The names of the payload and the matrix that a scale or shape tensor refers to by its own name.
pub(super) struct PayloadRef<'e> {
    encoding: &'e Encoding,
    payload: String,
    matrix: String,
}

impl<'e> PayloadRef<'e> {
    /// What the tensor `part` refers to, if its name is that of a scale or shape tensor.
    pub(super) fn of(encoding: &'e Encoding, part: &str) -> Option<PayloadRef<'e>> {
        let spellings = encoding.scale.iter().enumerate();
        let scales = spellings.flat_map(|(i, spelled)| spelled.iter().map(move |t| (i, t)));
        let shape = encoding.shape.iter().map(|t| (0, t));
        scales.chain(shape).find_map(|(i, template)| {
            let bindings = template.bind(part, &encoding.vars)?;
            let payload = encoding.payload[i].format(&bindings, &encoding.vars)?;
            let matrix = encoding.matrix[i].format(&bindings, &encoding.vars)?;
            Some(PayloadRef { encoding, payload, matrix })
        })
    }
}

/// The dtypes that `takes` accepts, as text: `F32, F16 or BF16`.
pub(super) fn dtype_list(takes: impl Fn(DType) -> bool) -> String {
    let mut names: Vec<&str> = DType::all().filter(|d| takes(*d)).map(DType::name).collect();
    let last = names.pop().unwrap_or_default();
    if names.is_empty() { last.to_owned() } else { format!("{} or {last}", names.join(", ")) }
}
