//! What a plan says: why it refuses, and what it is.

mod problems;
mod show;

pub use problems::PlanError;
pub(crate) use problems::{Problem, Problems};
pub use show::Summary;
pub(super) use show::SummaryParts;
