//! What can be wrong with an SA file or an imported text, where, and what would be right.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use crate::sa::Spi;
use crate::suite::Suite;

/// A place in a file. Lines and columns count from 1; a column is a character, not a byte.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// The file, as it was named to us.
    pub file: Arc<Path>,
    /// Line; 0 when the whole file is meant.
    pub line: u32,
    /// Column; 0 when the whole file or line is meant.
    pub column: u32,
}

impl Location {
    /// The file as a whole.
    pub fn whole(file: &Path) -> Self {
        Self {
            file: file.into(),
            line: 0,
            column: 0,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if self.column > 0 {
            write!(f, ":{}", self.column)?;
        }
        Ok(())
    }
}

/// A setting that works but gives less protection than the reader of the file would expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Weakness {
    /// Every byte of the key is the same.
    #[error("every byte of the key is the same")]
    ConstantKey,
    /// RFC 4106 allows it; a forger succeeds far sooner than with 16 bytes.
    #[error("an 8-byte ICV can be forged after far fewer attempts than a 16-byte one")]
    ShortIcv,
    /// Inbound SA without anti-replay.
    #[error("window = 0 turns anti-replay off")]
    NoAntiReplay,
    /// The integrity key starts with the encryption key.
    #[error("the integrity key repeats the encryption key")]
    SharedKey,
}

/// The rule that an SA file or an imported text breaks. The operator is to correct the text, except for
/// [`Fault::Io`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The operating system refused.
    #[error("cannot {action}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        error: String,
    },
    /// Not TOML, or not the grammar of the imported format.
    #[error("{0}")]
    Syntax(String),
    /// The text is longer than the limit.
    #[error("the file has {got} bytes; the limit is {max}")]
    TooLarge {
        /// Its length.
        got: u64,
        /// The limit.
        max: u64,
    },
    /// A directory without SA files.
    #[error("no *.toml file in this directory; an empty file stands for \"no SAs\"")]
    NoFiles,
    /// A key that the table does not have.
    #[error("[{table}] has no key \"{key}\"; {}", hint(.suggestion, "the keys are", .known))]
    UnknownKey {
        /// Table.
        table: &'static str,
        /// The key.
        key: String,
        /// The nearest known key.
        suggestion: Option<String>,
        /// All known keys.
        known: String,
    },
    /// A key that must be there.
    #[error("{table} lacks \"{key}\"; add {example}")]
    Missing {
        /// Table.
        table: String,
        /// Key.
        key: &'static str,
        /// What to write, for example.
        example: &'static str,
    },
    /// A value of another TOML type.
    #[error("\"{key}\" must be {want}, not {got}")]
    WrongType {
        /// Key.
        key: String,
        /// Type it takes.
        want: &'static str,
        /// Type that was found.
        got: &'static str,
    },
    /// A number outside its range.
    #[error("\"{key}\" is {got}; it must lie in {min} to {max}")]
    OutOfRange {
        /// Key.
        key: String,
        /// The number.
        got: String,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// A word or notation that the key does not take.
    #[error("\"{key}\" does not take \"{got}\"; {}", hint(.suggestion, "write", .want))]
    BadValue {
        /// Key.
        key: String,
        /// What was found.
        got: String,
        /// The nearest accepted word.
        suggestion: Option<String>,
        /// What is accepted.
        want: String,
    },
    /// Names go to metrics, logs and file names, so their characters are limited.
    #[error("\"{name}\" is no name: 1 to {max} of the characters A-Z a-z 0-9 . _ : @ + / - are")]
    BadName {
        /// What was found.
        name: String,
        /// Longest name.
        max: usize,
    },
    /// Names that begin so are those of tunnels, SAs and policies of an IKE daemon.
    #[error("\"{0}\" is refused: names that begin with \"ike:\" belong to the IKE daemon")]
    ReservedName(String),
    /// No such suite.
    #[error("unknown suite \"{got}\"; {}", hint(.suggestion, "one of", .known))]
    UnknownSuite {
        /// What was found.
        got: String,
        /// The nearest suite.
        suggestion: Option<String>,
        /// All suites in short.
        known: &'static str,
    },
    /// An ESP SA that neither encrypts nor authenticates, or encrypts without integrity.
    #[error("{0} is refused: ESP without integrity protects nothing; add an HMAC or use an AEAD")]
    NoIntegrity(String),
    /// Key material of another length than the suite takes. The material itself is never shown.
    #[error("\"{key}\" has {got} bytes; {suite} takes {want} ({detail})")]
    KeyLength {
        /// Key of the table.
        key: &'static str,
        /// Suite.
        suite: Suite,
        /// What it takes, bytes.
        want: usize,
        /// What was found, bytes.
        got: usize,
        /// How the material is made up.
        detail: String,
    },
    /// Key material that is not hexadecimal.
    #[error(
        "\"{key}\" is not hexadecimal at its character {position}; write an even number of digits 0-9 a-f"
    )]
    KeyNotHex {
        /// Key of the table.
        key: &'static str,
        /// 1-based index of the offending character.
        position: usize,
    },
    /// Key material written with TOML escapes would leave copies in memory that cannot be wiped.
    #[error("\"{0}\" must be written without escapes, on one line")]
    KeyEscaped(&'static str),
    /// The suite has no such key.
    #[error("{suite} takes no \"{key}\"; remove it")]
    KeyUnwanted {
        /// Key of the table.
        key: &'static str,
        /// Suite.
        suite: Suite,
    },
    /// Both inline and by file.
    #[error("\"{key}\" and \"{key}_file\" exclude each other; keep one")]
    KeyTwice {
        /// Key of the table.
        key: &'static str,
    },
    /// RFC 4303 section 2.1.
    #[error("SPI {0} is reserved (RFC 4303 section 2.1); use 0x100 or above")]
    ReservedSpi(u32),
    /// Two SAs that a packet cannot tell apart.
    #[error("SPI {spi} to {dst} is already used at {first}; give one of the two SAs another SPI")]
    DuplicateSpi {
        /// SPI.
        spi: Spi,
        /// Destination.
        dst: IpAddr,
        /// The first use.
        first: Location,
    },
    /// Two things of one name.
    #[error("{kind} \"{name}\" already exists at {first}; names are unique")]
    DuplicateName {
        /// Kind.
        kind: &'static str,
        /// Name.
        name: String,
        /// The first use.
        first: Location,
    },
    /// One key for two SAs.
    #[error("this key is also that of the SA at {first}; every SA needs its own ({why})")]
    KeyReused {
        /// The first use.
        first: Location,
        /// What would go wrong.
        why: &'static str,
    },
    /// An SA or policy that names no existing tunnel.
    #[error("no tunnel is named \"{name}\"; {}", hint(.suggestion, "the tunnels are", .known))]
    UnknownTunnel {
        /// Name.
        name: String,
        /// The nearest tunnel.
        suggestion: Option<String>,
        /// All tunnels.
        known: String,
    },
    /// Addresses of both families where one is needed.
    #[error("{a} and {b} are of different address families; use IPv4 or IPv6 for both")]
    FamilyMismatch {
        /// One.
        a: String,
        /// The other.
        b: String,
    },
    /// Not the address of a host.
    #[error("{0} cannot be an end of a tunnel; use a unicast address")]
    NotUnicast(IpAddr),
    /// The same address at both ends.
    #[error("\"local\" and \"remote\" are both {0}")]
    SameEnds(IpAddr),
    /// A selector key that needs another.
    #[error("\"{key}\" needs {need}")]
    Needs {
        /// Key.
        key: &'static str,
        /// What it needs.
        need: &'static str,
    },
    /// Keys that exclude each other.
    #[error("\"{a}\" and {b} exclude each other; keep one")]
    Conflict {
        /// One.
        a: &'static str,
        /// The other.
        b: &'static str,
    },
    /// The replay bitmap needs a power of two.
    #[error("window = {got} is no power of two; use {below} or {above}")]
    WindowNotPowerOfTwo {
        /// Found.
        got: u32,
        /// Next lower.
        below: u32,
        /// Next higher.
        above: u32,
    },
    /// RFC 4303 section 3.3.3: the high half of an ESN can be inferred only with a window.
    #[error("ESN needs anti-replay: set window to 32 or more, or esn = false")]
    EsnNeedsWindow,
    /// A hard limit that comes before the soft one.
    #[error("hard.{what} = {hard} is below soft.{what} = {soft}; the soft limit must come first")]
    HardBelowSoft {
        /// Which limit.
        what: &'static str,
        /// Hard limit.
        hard: u64,
        /// Soft limit.
        soft: u64,
    },
    /// A weak setting without consent.
    #[error("{0}; change it, or write allow_weak = true if that is meant")]
    Weak(Weakness),
    /// Others could read or change secrets.
    #[error("mode {mode:04o} lets {who} {verb} it, and it {holds}; run: chmod {want:o} {file}")]
    Permissions {
        /// Permission bits.
        mode: u32,
        /// Wanted bits.
        want: u32,
        /// Who.
        who: &'static str,
        /// What they can do.
        verb: &'static str,
        /// What is at stake.
        holds: &'static str,
        /// The file.
        file: String,
    },
    /// A file with keys that belongs to somebody else.
    #[error("it belongs to user {uid}; a file with keys must belong to root or to user {us}")]
    ForeignOwner {
        /// Owner.
        uid: u32,
        /// Effective user of this process.
        us: u32,
    },
    /// A device, pipe, socket or directory where a file is needed.
    #[error("{0} is not a regular file")]
    NotRegular(String),
    /// Something that the imported format can say and this gateway cannot do. Nothing is dropped silently.
    #[error("{0}")]
    Unsupported(String),
}

/// One problem and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Place.
    pub at: Location,
    /// Rule.
    pub fault: Fault,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.fault)
    }
}

/// Every problem that was found, in the order of files and lines; never empty when returned as an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds one.
    pub fn push(&mut self, at: &Location, fault: Fault) {
        self.0.push(Problem {
            at: at.clone(),
            fault,
        });
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `value` when there are no problems, else the problems in the order of the text.
    pub fn or<T>(mut self, value: T) -> Result<T, Problems> {
        if self.0.is_empty() {
            return Ok(value);
        }
        self.0.sort_by(|a, b| {
            (&a.at.file, a.at.line, a.at.column).cmp(&(&b.at.file, b.at.line, b.at.column))
        });
        // A fault of a tunnel is found again with each SA that inherits it.
        self.0.dedup();
        Err(self)
    }
}

impl From<Problem> for Problems {
    fn from(p: Problem) -> Self {
        Self(vec![p])
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Problems {
    /// One line a problem, at most a hundred.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX: usize = 100;
        for (i, p) in self.0.iter().enumerate() {
            if i == MAX {
                return write!(f, "\nand {} more", self.0.len() - MAX);
            }
            if i > 0 {
                f.write_str("\n")?;
            }
            p.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The word of `known` nearest to `got`, when it is near enough to be a slip of the pen.
pub(crate) fn nearest<'k>(got: &str, known: impl IntoIterator<Item = &'k str>) -> Option<String> {
    let got: Vec<char> = got.to_lowercase().chars().take(64).collect();
    let limit = (got.len() / 3).clamp(1, 5);
    known
        .into_iter()
        .map(|k| (distance(&got, k), k))
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k.to_owned())
}

/// Edits (insert, delete, replace, swap of neighbours) from `a` to `b`.
fn distance(a: &[char], b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for (i, &ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &cb) in b.iter().enumerate() {
            let replace = rows[i][j] + usize::from(ca != cb);
            let mut best = replace.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && ca == b[j - 1] && a[i - 1] == cb {
                best = best.min(rows[i - 1][j - 1] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows.last().and_then(|r| r.last()).copied().unwrap_or(0)
}

fn hint(suggestion: &Option<String>, intro: &str, known: &impl fmt::Display) -> String {
    match suggestion {
        Some(s) => format!("did you mean \"{s}\"?"),
        None => format!("{intro} {known}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_pen_find_their_word_and_strangers_do_not() {
        let known = ["window", "suite", "remote"];
        assert_eq!(nearest("windwo", known).as_deref(), Some("window"));
        assert_eq!(nearest("Suite", known).as_deref(), Some("suite"));
        assert_eq!(nearest("colour", known), None);
    }
}
