//! `inspect`: the plan, printed.

use super::args::InspectArgs;
use super::open;
use super::output;
use super::request::PlanOptions;

/// Prints the plan of a view; mounts nothing and reads no data.
///
/// # Errors
/// Where there is no checkpoint or no such view of it.
pub fn run(args: &InspectArgs, plan: &PlanOptions) -> anyhow::Result<()> {
    let planned = open::locate_and_plan(&args.src, plan)?;
    if args.json {
        output::print_json(&planned.plan.to_json())
    } else {
        output::print(&format!("{}\n", planned.plan))
    }
}
