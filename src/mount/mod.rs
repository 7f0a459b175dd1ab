//! A view as a mounted file system, from the checks before the mount to its end.
//!
//! [`fuse`] answers the kernel's requests from a [`View`], [`session`] connects it to the kernel and
//! ends the connection, [`splice`] sends large replies without a copy. The other modules are for the
//! process that serves a mount: [`mountpoint`] checks where it may be, [`serve`] runs it from the mount
//! to its end, with [`signals`], [`background`], [`log`] and [`unmount`].

pub(crate) mod background;
mod fuse;
pub(crate) mod log;
pub(crate) mod mountinfo;
pub(crate) mod mountpoint;
pub(crate) mod serve;
mod session;
pub(crate) mod signals;
mod splice;
pub(crate) mod unmount;

pub use fuse::Filesystem;
pub use serve::MountError;
pub use session::{MountOptions, Mountable, Mounted, mount_filesystem};

use crate::view::View;
use mountpoint::Needs;
use std::path::Path;
use std::sync::Arc;

/// Mounts `view` at `at`, an empty directory, and returns once the kernel has it. Threads of this
/// process answer its requests until the returned [`Mounted`] is dropped or somebody unmounts it.
///
/// # Errors
/// Where this machine or this user cannot mount, where `at` is not an empty directory outside the
/// checkpoint, and where the kernel refuses the options.
pub fn mount(view: Arc<View>, at: &Path, options: &MountOptions) -> Result<Mounted, MountError> {
    mountpoint::check_machine(Needs::of(options))?;
    let at = mountpoint::check(at, view.source(), false)?;
    let filesystem = Filesystem::new(view, options.direct_io);
    mount_filesystem(filesystem, &at, options).map_err(|why| MountError::Refused { at, why })
}
