#![doc = include_str!("README.md")]

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
use mountpoint::Requirements;
use std::path::Path;
use std::sync::Arc;

/// Mounts `view` at the empty directory `at` and returns once the kernel has accepted the mount.
///
/// Threads of this process answer its requests until the mount is unmounted. Dropping the returned
/// [`Mounted`] detaches it.
///
/// # Errors
/// This machine or this user cannot mount, `at` is not an empty directory outside the checkpoint, or
/// the kernel refuses the mount.
pub fn mount(view: Arc<View>, at: &Path, options: &MountOptions) -> Result<Mounted, MountError> {
    mountpoint::check_machine(Requirements::of(options))?;
    let at = mountpoint::check(at, view.source(), false)?;
    let filesystem = Filesystem::new(view, options.direct_io);
    mount_filesystem(filesystem, &at, options).map_err(|why| MountError::Refused { at, why })
}
