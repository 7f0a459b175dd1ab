//! `inspect`: the plan, printed.

use super::args::InspectArgs;
use super::open;
use super::output;
use super::request::ViewRequest;

/// Prints the plan of a view; mounts nothing and reads no data.
///
/// # Errors
/// Where there is no checkpoint or no such view of it.
pub(super) fn run(args: &InspectArgs, view: &ViewRequest) -> anyhow::Result<()> {
    let (_, plan) = open::plan(view)?;
    if args.json {
        output::print_json(&plan.to_json())
    } else {
        output::print(&format!("{}\n", plan))
    }
}
