//! The log of the process: where its lines go, and their form.
//!
//! | process | destination | form |
//! |---|---|---|
//! | foreground | stderr | time, level, message |
//! | foreground, stderr connected to the journal | stderr | `<6>` severity prefix, message |
//! | background | `/dev/log`, which the journal and syslog daemons serve | RFC 3164 |
//! | with a log file | that file, instead | time, level, message |
//!
//! With `json` set, each line is a JSON object instead.

use crate::source::printable;
use std::env;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What is logged, where and how.
#[derive(Clone, Debug)]
pub(crate) struct LogOptions {
    /// Least severe level that is logged.
    pub level: Level,
    /// File to append to. `None`: stderr or the system's log, as the module's table says.
    pub file: Option<PathBuf>,
    /// Write each line as a JSON object.
    pub json: bool,
}

/// The log file cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open log file `{}`: {why}", .file.display())]
pub(crate) struct LogError {
    file: PathBuf,
    why: io::Error,
}

/// Sets up the log of this process. A second call does nothing.
///
/// # Errors
/// The log file cannot be opened.
pub(crate) fn init(options: &LogOptions, background: bool) -> Result<(), LogError> {
    let sink = match &options.file {
        Some(file) => {
            let opened = OpenOptions::new().create(true).append(true).open(file);
            Sink::File(Arc::new(opened.map_err(|why| LogError { file: file.clone(), why })?))
        }
        None if background => Sink::system(),
        None if stderr_is_journal() => Sink::Journal,
        None => Sink::Stderr,
    };
    // fuser logs each mount and unmount at info, as our own lines do.
    let verbose = options.level > Level::INFO;
    let library = if verbose { options.level } else { Level::WARN.min(options.level) };
    // fuser logs an error for each reader that was interrupted before it got its reply.
    let reply = if verbose { LevelFilter::from_level(library) } else { LevelFilter::OFF };
    let filter = Targets::new()
        .with_default(options.level)
        .with_target("fuser", library)
        .with_target("fuser::reply", reply);
    let dated = matches!(sink, Sink::Stderr | Sink::File(_));
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(sink);
    let lines: Box<dyn tracing_subscriber::Layer<_> + Send + Sync> = match (options.json, dated) {
        (true, _) => Box::new(lines.json().flatten_event(true)),
        (false, true) => Box::new(lines.with_target(false)),
        (false, false) => Box::new(lines.with_target(false).with_level(false).without_time()),
    };
    start(tracing_subscriber::registry().with(lines).with(filter));
    Ok(())
}

/// Makes `subscriber` the log of the process, unless it has one already.
fn start(subscriber: impl Subscriber + Send + Sync + 'static) {
    let _ = subscriber.try_init();
}

/// Whether systemd connected stderr to the journal (systemd.exec(5), `$JOURNAL_STREAM`).
fn stderr_is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let stderr = File::open("/proc/self/fd/2").and_then(|file| file.metadata());
    let stderr = stderr.or_else(|_| std::fs::metadata("/proc/self/fd/2"));
    stderr.is_ok_and(|meta| stream == format!("{}:{}", meta.dev(), meta.ino()))
}

/// Where log lines are written.
#[derive(Clone, Debug)]
enum Sink {
    Stderr,
    /// stderr, each line prefixed with its severity (sd-daemon(3)).
    Journal,
    /// The system's log socket, each line prefixed with priority, program and process id (RFC 3164).
    System(Arc<UnixDatagram>),
    File(Arc<File>),
    Nowhere,
}

impl Sink {
    fn system() -> Sink {
        let connected = UnixDatagram::unbound().and_then(|socket| {
            socket.connect("/dev/log")?;
            // A log daemon that does not read must not block the mount.
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        connected.map_or(Sink::Nowhere, |socket| Sink::System(Arc::new(socket)))
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { sink: self.clone(), severity: severity(Level::INFO) }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        Line { sink: self.clone(), severity: severity(*meta.level()) }
    }
}

/// The severity of a level, as syslog(3) numbers them.
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// Writer of one line. `tracing_subscriber` passes each line in one call.
#[derive(Debug)]
struct Line {
    sink: Sink,
    severity: u8,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Tensor names come from the checkpoint. Escape what would end a line or control a terminal.
        let text = String::from_utf8_lossy(bytes);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let text = format!("{}\n", printable(line));
        let text = text.as_bytes();
        match &self.sink {
            Sink::Stderr => io::stderr().write_all(text)?,
            Sink::Journal => io::stderr().write_all(&[self.prefix().as_bytes(), text].concat())?,
            Sink::System(socket) => {
                socket.send(&[self.prefix().as_bytes(), text.trim_ascii_end()].concat())?;
            }
            Sink::File(file) => (&**file).write_all(text)?,
            Sink::Nowhere => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Line {
    fn prefix(&self) -> String {
        // The facility of system daemons (syslog(3)).
        const DAEMON: u8 = 3 << 3;
        match &self.sink {
            Sink::System(_) => {
                format!("<{}>mount-ckpt[{}]: ", DAEMON | self.severity, std::process::id())
            }
            Sink::Journal => format!("<{}>", self.severity),
            Sink::Stderr | Sink::File(_) | Sink::Nowhere => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syslog_lines_have_a_priority_and_the_program_name() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let sink = Sink::System(Arc::new(ours));
        // A priority is the facility `daemon`, 24 in syslog(3), plus the severity.
        for (level, priority) in
            [(Level::ERROR, 27), (Level::WARN, 28), (Level::INFO, 30), (Level::DEBUG, 31)]
        {
            let mut line = Line { sink: sink.clone(), severity: severity(level) };
            line.write_all(b"shard gone\n").unwrap();
            let mut got = [0; 100];
            let n = theirs.recv(&mut got).unwrap();
            let want = format!("<{priority}>mount-ckpt[{}]: shard gone", std::process::id());
            assert_eq!(String::from_utf8_lossy(&got[..n]), want);
        }
    }

    #[test]
    fn control_characters_of_a_name_are_escaped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        let mut line = Line { sink: Sink::File(Arc::new(file)), severity: 4 };
        line.write_all(b"WARN tensor `a\x1b[2J\nINFO all is well`\n").unwrap();
        let expected = "WARN tensor `a\\u{1b}[2J\\nINFO all is well`\n";
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }

    #[test]
    fn a_log_file_that_cannot_be_opened_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = Some(dir.path().join("absent/log"));
        let error = init(&LogOptions { level: Level::INFO, file, json: false }, true).unwrap_err();
        assert!(error.to_string().contains("cannot open log file"), "{error}");
    }
}
