//! Report: the problems of a checkpoint as one error, and the plan as text, JSON and summary.

mod problems;
mod show;

pub use problems::PlanError;
pub(crate) use problems::{Problem, Problems};
pub use show::Summary;
pub(super) use show::SummaryParts;
