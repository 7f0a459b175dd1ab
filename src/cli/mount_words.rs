//! Parses `-o`: the options of mount(8), and every long option of the command.
//!
//! `-o ro,model=mimo-v2-flash,allow_other` is how mount(8) and fstab pass options. An item of the list is
//! called a word here, since "option" already means too much. A word is one of
//! - an option of mount(8): it goes to the kernel, has no meaning for a read-only view and is ignored, or
//!   is refused because it asks for writing;
//! - the name of a long option, with dashes or underscores: it becomes that option.

use super::args::Cli;
use clap::CommandFactory;
use fuser::MountOption;

/// The parsed words of all `-o`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MountWords {
    /// Words that are long options, as `--name` or `--name=value`.
    pub long: Vec<String>,
    /// Words that are passed to the kernel.
    pub kernel: Vec<MountOption>,
    /// `fsname=NAME`: the source column of the mount table.
    pub fs_name: Option<String>,
    /// `nonempty`: accept a mount point that is not empty; the mount hides its entries.
    pub nonempty: bool,
}

/// Why a word is refused. Printed as a usage error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum WordError {
    /// It is neither an option of mount(8) nor a long option.
    #[error(
        "`-o` has no option `{0}`: it takes the options of mount(8) and every long option of --help"
    )]
    Unknown(String),
    /// It is a long option that needs a value, and has none.
    #[error("`-o {0}` needs a value: `-o {0}=…`")]
    NoValue(String),
    /// `rw`.
    #[error("`-o rw`: a view is read-only and cannot be written to; leave `rw` out, or use `ro`")]
    Writable,
    /// `remount`.
    #[error("`-o remount`: a mount cannot change its options; unmount it and mount it again")]
    Remount,
}

impl MountWords {
    /// Parses the values of all `-o`, in their order.
    ///
    /// # Errors
    /// The first word that is refused.
    pub(super) fn parse(options: &[String]) -> Result<MountWords, WordError> {
        let command = Cli::command();
        let named = |name: &str| command.get_arguments().find(|a| a.get_long() == Some(name));
        let mut words = MountWords::default();
        for list in options {
            let list = split(list);
            let from_mount = made_by_mount(&list);
            for word in list.iter().filter(|word| !word.is_empty()) {
                if word == "rw" && !from_mount {
                    return Err(WordError::Writable);
                }
                if !words.take_mount_word(word)? {
                    let (name, value) = match word.split_once('=') {
                        Some((name, value)) => (name, Some(value)),
                        None => (word.as_str(), None),
                    };
                    let name = name.replace('_', "-");
                    let Some(option) = named(&name) else {
                        return Err(WordError::Unknown(word.clone()));
                    };
                    // Without a value, clap would take the next argument for it.
                    if value.is_none() && option.get_action().takes_values() {
                        return Err(WordError::NoValue(word.clone()));
                    }
                    words.long.push(match value {
                        Some(value) => format!("--{name}={value}"),
                        None => format!("--{name}"),
                    });
                }
            }
        }
        Ok(words)
    }

    /// Handles an option of mount(8). Returns false for any other word.
    fn take_mount_word(&mut self, word: &str) -> Result<bool, WordError> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            // Ignored: a view is read-only and has no devices or set-user-id files in any case.
            "ro" | "rw" | "nodev" | "dev" | "nosuid" | "suid" | "exec" | "atime" => {}
            // Ignored: nothing is written, so there are no delayed writes and no access times.
            "async" | "sync" | "dirsync" | "relatime" | "norelatime" | "strictatime"
            | "nostrictatime" | "lazytime" | "nolazytime" | "diratime" | "nodiratime" => {}
            // Ignored: they are for mount(8), for systemd or for the reader of fstab.
            "defaults" | "auto" | "noauto" | "user" | "nouser" | "users" | "owner" | "group"
            | "nofail" | "_netdev" | "comment" | "subtype" | "silent" | "loud" => {}
            _ if name.starts_with("x-") || name.starts_with("X-") => {}
            "noexec" => self.kernel.push(MountOption::NoExec),
            "noatime" => self.kernel.push(MountOption::NoAtime),
            "default_permissions" => self.kernel.push(MountOption::DefaultPermissions),
            "max_read" | "context" | "fscontext" | "defcontext" | "rootcontext" => {
                // The kernel splits at commas too, and understands the same quotes as mount(8).
                let quoted = || format!("{name}=\"{value}\"");
                let word = if value.contains(',') { quoted() } else { word.to_owned() };
                self.kernel.push(MountOption::CUSTOM(word));
            }
            "fsname" => self.fs_name = Some(value.to_owned()),
            "nonempty" => self.nonempty = true,
            "remount" => return Err(WordError::Remount),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Whether mount(8) and its helper mount.fuse3 made this list, in which case `rw` is not the user's wish:
/// mount(8) puts `rw` first unless the user says `ro`, and mount.fuse3 always adds `dev` or `nodev` and
/// `suid` or `nosuid`.
fn made_by_mount(words: &[String]) -> bool {
    let has = |a: &str, b: &str| words.iter().any(|word| word == a || word == b);
    words.first().is_some_and(|word| word == "rw") && has("dev", "nodev") && has("suid", "nosuid")
}

/// Splits at commas, except those that are escaped (`\,`, as in libfuse) or in double quotes (as in
/// mount(8)). Other backslashes are kept, since regular expressions contain them.
fn split(list: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        let word = words.len() - 1;
        match c {
            '\\' if chars.peek() == Some(&',') => words[word].extend(chars.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => words.push(String::new()),
            c => words[word].push(c),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<MountWords, WordError> {
        MountWords::parse(&options.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn long_options_are_accepted() {
        let table: [(&[&str], &[&str]); 8] = [
            (&["model=mimo-v2-flash,to=hf"], &["--model=mimo-v2-flash", "--to=hf"]),
            (&["to=hf", "dtype=f32"], &["--to=hf", "--dtype=f32"]),
            (&["allow_other,direct-io"], &["--allow-other", "--direct-io"]),
            (&["shard_size=1GB,cache-size=0"], &["--shard-size=1GB", "--cache-size=0"]),
            (&["auto_unmount,uid=7,foreground"], &["--auto-unmount", "--uid=7", "--foreground"]),
            (&[r"include=a\,b,exclude=\d+\."], &["--include=a,b", r"--exclude=\d+\."]),
            (&["include=\"a,b\",to=hf"], &["--include=a,b", "--to=hf"]),
            (&["log_file=/a_b=c,,"], &["--log-file=/a_b=c"]),
        ];
        for (options, long) in table {
            let words = parse(options).unwrap();
            assert_eq!(words.long, long, "{options:?}");
            assert_eq!((words.kernel.len(), words.nonempty, words.fs_name), (0, false, None));
        }
    }

    #[test]
    fn options_of_mount_are_accepted() {
        let kernel = |kernel: &[MountOption]| MountWords {
            kernel: kernel.to_vec(),
            ..MountWords::default()
        };
        let context = "context=system_u:object_r:fusefs_t:s0:c1";
        let table = [
            ("ro,nosuid,nodev,_netdev,auto,noauto,user,nofail,x-systemd.automount", kernel(&[])),
            ("defaults,X-mount.mkdir=0755,comment=mine,users,relatime", kernel(&[])),
            ("noexec,noatime", kernel(&[MountOption::NoExec, MountOption::NoAtime])),
            (
                "default_permissions,max_read=131072",
                kernel(&[
                    MountOption::DefaultPermissions,
                    MountOption::CUSTOM("max_read=131072".to_owned()),
                ]),
            ),
            (context, kernel(&[MountOption::CUSTOM(context.to_owned())])),
            (
                "context=\"s0:c1,c2\"",
                kernel(&[MountOption::CUSTOM("context=\"s0:c1,c2\"".to_owned())]),
            ),
            ("nonempty", MountWords { nonempty: true, ..MountWords::default() }),
            ("fsname=a=b", MountWords { fs_name: Some("a=b".to_owned()), ..MountWords::default() }),
        ];
        for (options, words) in table {
            assert_eq!(parse(&[options]), Ok(words), "{options}");
        }
    }

    #[test]
    fn rw_is_refused_unless_mount_8_added_it() {
        // What `mount -t fuse.mount-ckpt` (util-linux 2.38, fuse 3.14) passes to the command.
        for options in ["rw,dev,suid", "rw,noatime,to=hf,dev,suid", "rw,noexec,nosuid,nodev"] {
            assert!(parse(&[options]).is_ok(), "{options}");
        }
        for options in ["rw", "rw,noatime", "to=hf,rw,dev,suid", "rw,dev"] {
            assert_eq!(parse(&[options]), Err(WordError::Writable), "{options}");
        }
    }

    #[test]
    fn unknown_options_are_named() {
        for word in ["bogus", "bogus=1", "help", "version", "o=x", "quota"] {
            let unknown = matches!(parse(&["ro", word]), Err(WordError::Unknown(w)) if w == word);
            assert!(unknown, "{word}");
        }
        assert_eq!(parse(&["remount"]), Err(WordError::Remount));
    }
}
