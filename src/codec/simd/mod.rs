//! Kernels for particular instruction sets, chosen at run time.
//!
//! Every kernel equals the portable loop that it replaces, bit for bit.

/// Which instructions the kernels may use. A value proves that this machine has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
}

impl Level {
    /// No kernels: loops that the compiler vectorises for the target's baseline.
    pub const PORTABLE: Level = Level(Kind::Portable);

    /// The fastest level of this machine.
    pub fn best() -> Level {
        Level::PORTABLE
    }

    /// Every level of this machine, slowest first. Tests run them all.
    pub fn available() -> Vec<Level> {
        vec![Level::PORTABLE]
    }

    /// A name for logs and reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
        }
    }
}
