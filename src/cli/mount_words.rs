//! `-o`: the words of mount(8), and every long option written as one.

use super::args::Cli;
use clap::CommandFactory;
use fuser::MountOption;

/// What the words of all `-o` come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MountWords {
    /// Long options, as `--name` or `--name=value`.
    pub long: Vec<String>,
    /// What goes to the kernel.
    pub kernel: Vec<MountOption>,
    /// `fsname=`: what the mount table shows as the source.
    pub fs_name: Option<String>,
    /// `nonempty`: the mount point may hold files, which the mount hides.
    pub nonempty: bool,
}

/// A word that cannot be honoured. Prints as a usage error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum WordError {
    /// Not a word of mount(8) and not a long option.
    #[error(
        "`-o` has no option `{0}`: it takes the words of mount(8) and every long option of --help"
    )]
    Unknown(String),
    /// A long option that takes a value, without one.
    #[error("`-o {0}` needs a value: `-o {0}=…`")]
    NoValue(String),
    /// `rw`.
    #[error(
        "`-o rw`: a view is read-only, there is no way to write through it; leave `rw` out or say `ro`"
    )]
    Writable,
    /// `remount`.
    #[error("`-o remount`: a view is fixed while it is mounted; unmount it and mount it again")]
    Remount,
}

impl MountWords {
    /// Reads the values of all `-o`, in order.
    ///
    /// # Errors
    /// At the first word that is unknown, or known and refused.
    pub(super) fn parse(options: &[String]) -> Result<MountWords, WordError> {
        let command = Cli::command();
        let named = |name: &str| command.get_arguments().find(|a| a.get_long() == Some(name));
        let mut words = MountWords::default();
        for list in options {
            let list = split(list);
            let helper = called_by_mount(&list);
            for word in list.iter().filter(|word| !word.is_empty()) {
                if word == "rw" && !helper {
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
                    // Without one, the option would take the next argument for its value.
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

    /// Takes a word of mount(8); false where it is none.
    fn take_mount_word(&mut self, word: &str) -> Result<bool, WordError> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            // A view is read-only and has neither devices nor set-user-id files, whatever is asked.
            "ro" | "rw" | "nodev" | "dev" | "nosuid" | "suid" | "exec" | "atime" => {}
            // Nothing is written, so nothing is written late and no time of access changes.
            "async" | "sync" | "dirsync" | "relatime" | "norelatime" | "strictatime"
            | "nostrictatime" | "lazytime" | "nolazytime" | "diratime" | "nodiratime" => {}
            // For mount(8) itself, for systemd and for the reader of fstab.
            "defaults" | "auto" | "noauto" | "user" | "nouser" | "users" | "owner" | "group"
            | "nofail" | "_netdev" | "comment" | "subtype" | "silent" | "loud" => {}
            _ if name.starts_with("x-") || name.starts_with("X-") => {}
            "noexec" => self.kernel.push(MountOption::NoExec),
            "noatime" => self.kernel.push(MountOption::NoAtime),
            "default_permissions" => self.kernel.push(MountOption::DefaultPermissions),
            "max_read" | "context" | "fscontext" | "defcontext" | "rootcontext" => {
                // The kernel splits at commas too, and takes the quotes as mount(8) does.
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

/// Whether mount(8) made this list. It puts `rw` first unless told `ro`, and mount.fuse3 sees to it
/// that a list says something about devices and about set-user-id. So this `rw` is nobody's wish.
fn called_by_mount(words: &[String]) -> bool {
    let has = |a: &str, b: &str| words.iter().any(|word| word == a || word == b);
    words.first().is_some_and(|word| word == "rw") && has("dev", "nodev") && has("suid", "nosuid")
}

/// Splits at commas that are neither escaped (`\,`, as libfuse has it) nor in double quotes (as
/// mount(8) has it). Other backslashes stand: they belong to regular expressions.
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
    fn long_options_are_words() {
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
    fn words_of_mount_are_taken() {
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
    fn rw_is_refused_unless_mount_put_it_there() {
        // The lists that `mount -t fuse.mount-ckpt` of util-linux 2.38 and fuse 3.14 hands over.
        for options in ["rw,dev,suid", "rw,noatime,to=hf,dev,suid", "rw,noexec,nosuid,nodev"] {
            assert!(parse(&[options]).is_ok(), "{options}");
        }
        for options in ["rw", "rw,noatime", "to=hf,rw,dev,suid", "rw,dev"] {
            assert_eq!(parse(&[options]), Err(WordError::Writable), "{options}");
        }
    }

    #[test]
    fn unknown_words_are_named() {
        for word in ["bogus", "bogus=1", "help", "version", "o=x", "quota"] {
            let unknown = matches!(parse(&["ro", word]), Err(WordError::Unknown(w)) if w == word);
            assert!(unknown, "{word}");
        }
        assert_eq!(parse(&["remount"]), Err(WordError::Remount));
    }
}
