//! The native SA file: TOML with `[[tunnel]]`, `[[tunnel.sa]]` or `[[sa]]`, and `[[policy]]`.
//!
//! `deploy/examples/sa.toml` shows every key with its meaning, `deploy/schema/sa-file.schema.json` is the
//! schema for editors. [`load`] reads a file, or all `*.toml` of a directory as if they were one.
//! Everything that is wrong is reported at once, each with file, line, column and what would be right;
//! nothing is returned unless all of it is right, so a bad file never disturbs what runs.
//!
//! Key material is wiped from the buffers of this module when they are dropped. The one exception is a
//! text that is not TOML at all: the parser keeps a copy of it until the error is reported.

pub(crate) mod check;
pub(crate) mod decode;
pub(crate) mod fault;
pub(crate) mod fields;
pub(crate) mod keyfile;
mod model;
mod schema;
mod selector;
pub(crate) mod value;
mod write;

use std::path::{Path, PathBuf};

pub use fault::{Fault, Location, Problem, Problems, Weakness};
pub use model::{
    Config, DEFAULT_TTL, DEFAULT_WINDOW, MAX_WINDOW, MIRROR_PREFIX, Origins, SaIdentity, Settings,
    Tunnel, default_sa_name,
};
pub use schema::json_schema;
pub use write::{WriteError, to_toml};

use fields::Text;
use keyfile::{MAX_SA_FILE, Opened};

use check::Assembler;

/// How often a directory is read anew because files come and go.
const TRIES: usize = 16;

/// Loads an SA file, or every `*.toml` of a directory (hidden files excepted) in the order of names. Files that come, go or
/// are renamed meanwhile are neither missed nor missing: the directory is read again then.
///
/// # Errors
/// All problems of all files, in the order of the text.
pub fn load(path: &Path) -> Result<Config, Problems> {
    let mut files = files_of(path)?;
    for _ in 0..TRIES {
        let config = load_all(&files);
        let now = files_of(path)?;
        if now == files {
            return config;
        }
        files = now;
    }
    load_all(&files)
}

fn load_all(files: &[PathBuf]) -> Result<Config, Problems> {
    let mut problems = Problems::default();
    let mut assembler = Assembler::default();
    for file in files {
        let whole = Location::whole(file);
        match Opened::new(file).and_then(|f| read_checked(f, file, &mut assembler, &mut problems)) {
            Ok(()) => {}
            Err(fault) => problems.push(&whole, fault),
        }
    }
    let config = assembler.finish(&mut problems);
    problems.or(config)
}

/// Checks a text as if it were the file `name`; relative key files are looked for beside it. Owner and
/// mode of `name` itself are not looked at.
///
/// # Errors
/// All problems, in the order of the text.
pub fn parse(text: &str, name: &Path) -> Result<Config, Problems> {
    let mut problems = Problems::default();
    let mut assembler = Assembler::default();
    let raw = decode::decode(&Text::new(name, text), &mut problems);
    assembler.add(raw, &mut problems);
    let config = assembler.finish(&mut problems);
    problems.or(config)
}

/// Entry for fuzzers: whatever parses must be written and read back unchanged. Key files are not opened.
pub fn fuzz_parse(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if text.contains("key_file") {
        return;
    }
    let Ok(config) = parse(text, Path::new("fuzz.toml")) else {
        return;
    };
    let written = to_toml(&config).unwrap_or_default();
    assert_eq!(parse(&written, Path::new("again.toml")), Ok(config));
}

fn read_checked(
    file: Opened,
    name: &Path,
    assembler: &mut Assembler,
    problems: &mut Problems,
) -> Result<(), Fault> {
    file.must_not_be_writable()?;
    let private = file.must_be_private();
    let text = file.read(MAX_SA_FILE)?;
    let raw = decode::decode(&Text::new(name, &text), problems);
    if raw.inline_keys {
        private?;
    }
    assembler.add(raw, problems);
    Ok(())
}

fn files_of(path: &Path) -> Result<Vec<PathBuf>, Problems> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let whole = Location::whole(path);
    let failed = |e: std::io::Error| {
        Problems::from(Problem {
            at: whole.clone(),
            fault: Fault::Io {
                action: "list",
                error: e.to_string(),
            },
        })
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let hidden = file
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if !hidden && file.extension().is_some_and(|e| e == "toml") {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(Problem {
            at: whole,
            fault: Fault::NoFiles,
        }
        .into());
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
