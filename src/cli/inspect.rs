//! `inspect`: prints the plan of a view.

use super::args::InspectArgs;
use super::open;
use super::output;
use super::request::ViewRequest;

/// Prints the plan of a view. Mounts nothing and reads only headers.
///
/// # Errors
/// The checkpoint is missing or damaged, the view is not possible, or stdout cannot be written.
pub(super) fn run(args: &InspectArgs, view: &ViewRequest) -> anyhow::Result<()> {
    let (_, plan) = open::plan(view)?;
    if args.json {
        output::print_json(&plan.to_json())
    } else {
        output::print(&format!("{}\n", plan))
    }
}
