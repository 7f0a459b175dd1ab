//! Virtual environments with the loaders below `target/`, created once for each set of
//! requirements.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, OnceLock};

/// Directory of the environments, kept between runs: about 6 GB, mostly torch.
static HOME: LazyLock<PathBuf> =
    LazyLock::new(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("loaders"));

/// A virtual environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Python {
    /// torch, transformers, safetensors and the streamers.
    Base,
    /// As `Base`, but with nemo-automodel and the version of transformers that it pins.
    Automodel,
}

impl Python {
    /// A command that runs a script of `tests/loaders`. `None` if the environments cannot be
    /// created.
    pub fn script(self, name: &str) -> Option<Command> {
        let mut command = self.command()?;
        command.arg(crate::in_repository("tests/loaders").join(name));
        Some(command)
    }

    /// The interpreter, without a script. `None` as above.
    pub fn command(self) -> Option<Command> {
        static READY: OnceLock<bool> = OnceLock::new();
        if !READY.get_or_init(ready) {
            return None;
        }
        let mut command = Command::new(self.home().join("bin/python"));
        command
            .env("HF_HUB_OFFLINE", "1")
            // With a GPU, some loaders take another code path.
            .env("CUDA_VISIBLE_DEVICES", "")
            // No bytecode in the source tree; the environments have none either (`--no-compile`).
            .env("PYTHONPYCACHEPREFIX", HOME.join("bytecode"))
            .env_remove("PYTHONDONTWRITEBYTECODE");
        Some(command)
    }

    fn home(self) -> PathBuf {
        HOME.join(match self {
            Python::Base => "base",
            Python::Automodel => "automodel",
        })
    }

    fn requirements(self) -> PathBuf {
        crate::in_repository("tests/loaders").join(match self {
            Python::Base => "requirements.txt",
            Python::Automodel => "requirements-automodel.txt",
        })
    }

    fn pip(self) -> Command {
        let mut pip = Command::new(self.home().join("bin/pip"));
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-compile"]);
        pip.arg("--requirement").arg(self.requirements());
        pip
    }
}

/// Whether the environments exist or could be created. With `CI` set, a failure fails the test.
fn ready() -> bool {
    let made = make();
    if let Err(why) = &made {
        crate::not_tested(&format!("no Python environment with the loaders: {why}"));
    }
    made.is_ok()
}

/// Creates both environments, unless they match the requirements already.
fn make() -> Result<(), String> {
    fs::create_dir_all(&*HOME).unwrap();
    // Two runs of the tests may start at the same time.
    let lock = File::create(HOME.join("lock")).unwrap();
    lock.lock().unwrap();
    let version = run(Command::new("python3").arg("--version"))?;
    let mut wanted = String::from_utf8_lossy(&version.stdout).into_owned();
    for python in [Python::Base, Python::Automodel] {
        wanted += &fs::read_to_string(python.requirements()).unwrap();
    }
    let stamp = HOME.join("requirements");
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    for old in [stamp.clone(), Python::Base.home(), Python::Automodel.home()] {
        let _ = if old.is_dir() { fs::remove_dir_all(&old) } else { fs::remove_file(&old) };
    }
    eprintln!("installing PyTorch and the loaders below `{}`, which takes minutes", HOME.display());
    for python in [Python::Base, Python::Automodel] {
        run(Command::new("python3").args(["-m", "venv"]).arg(python.home()))?;
    }
    run(&mut Python::Base.pip())?;
    // The second environment also sees the packages of the first; its own come first.
    let (base, automodel) = (site(Python::Base), site(Python::Automodel));
    fs::write(automodel.join("base.pth"), base.to_str().unwrap()).unwrap();
    run(Python::Automodel.pip().arg("--no-deps"))?;
    fs::write(stamp, wanted).unwrap();
    Ok(())
}

/// `lib/python3.*/site-packages` of an environment.
fn site(python: Python) -> PathBuf {
    let versions = fs::read_dir(python.home().join("lib")).unwrap();
    let mut sites = versions.map(|version| version.unwrap().path().join("site-packages"));
    sites.find(|site| site.is_dir()).expect("venv makes site-packages")
}

fn run(command: &mut Command) -> Result<Output, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let printed = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {printed}", output.status))
}
