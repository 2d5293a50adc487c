//! Importers: other programs' SAs and policies as the native model.
//!
//! * [`Format::Xfrm`]: output of `ip xfrm state` and `ip xfrm policy` (with `-d` and `-s`, too), and the
//!   commands `ip xfrm state add …` and `ip xfrm policy add …`, in any mixture.
//! * [`Format::Secgw`]: the `.cfg` of DPDK's ipsec-secgw.
//! * [`Format::Setkey`]: `add` and `spdadd` of setkey.
//!
//! What the gateway cannot do is refused with its place, never left out. What belongs to another file (the
//! routes and neighbours of ipsec-secgw) comes back as [`Imported::remarks`]. The result passed every
//! check of an SA file; [`crate::file::to_toml`] writes it as one.

mod algorithms;
mod draft;
mod secgw;
mod setkey;
mod words;
mod xfrm;

use std::net::IpAddr;
use std::path::Path;

use crate::file::{Config, Fault, Location, Problem, Problems};

use draft::Draft;
pub use xfrm::{KernelAlgorithms, kernel_suite};

/// Where the text comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `ip xfrm`.
    Xfrm,
    /// ipsec-secgw.
    Secgw,
    /// setkey.
    Setkey,
}

/// What the texts do not say.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Our own addresses: they tell inbound from outbound where the text does not.
    pub local: Vec<IpAddr>,
    /// Consent to weak settings.
    pub allow_weak: bool,
    /// The keys were never used: leases start without a record.
    pub first_use: bool,
}

/// Result of an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The SAs and policies.
    pub config: Config,
    /// What the text also says and an SA file has no place for, with its place and what to do about it.
    pub remarks: Vec<Remark>,
}

/// Something that belongs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// Place.
    pub at: Location,
    /// What it is and where it belongs.
    pub text: String,
}

/// Guesses the format from the first line that says something.
pub fn detect(text: &str) -> Option<Format> {
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let format = match (first, second) {
            ("" | "#", _) => continue,
            (w, _) if w.starts_with('#') => continue,
            ("ip" | "src" | "/sbin/ip" | "/usr/sbin/ip", _) => Format::Xfrm,
            ("sp", "ipv4" | "ipv6") | ("sa", "in" | "out") | ("rt", _) | ("neigh", _) => {
                Format::Secgw
            }
            ("add" | "spdadd" | "flush;" | "spdflush;" | "flush" | "spdflush", _) => Format::Setkey,
            _ => return None,
        };
        return Some(format);
    }
    None
}

/// Reads `text`; `name` is how messages call it.
///
/// # Errors
/// Every problem with file, line and column.
pub fn import(
    text: &str,
    name: &Path,
    format: Format,
    options: &Options,
) -> Result<Imported, Problems> {
    let mut problems = Problems::default();
    let mut draft = Draft::default();
    match format {
        Format::Xfrm => xfrm::read(text, name, &mut draft, &mut problems),
        Format::Secgw => secgw::read(text, name, &mut draft, &mut problems),
        Format::Setkey => setkey::read(text, name, &mut draft, &mut problems),
    }
    let remarks = std::mem::take(&mut draft.remarks);
    let config = draft.finish(options, &mut problems);
    problems.or(Imported { config, remarks })
}

/// Imports a file. It may hold keys, so nobody else may be able to read it.
///
/// # Errors
/// As [`import`], and when the file cannot be read or its format is not known.
pub fn import_file(
    path: &Path,
    format: Option<Format>,
    options: &Options,
) -> Result<Imported, Problems> {
    let fail = |fault| {
        Problems::from(Problem {
            at: Location::whole(path),
            fault,
        })
    };
    let file = crate::file::keyfile::Opened::new(path).map_err(fail)?;
    file.must_be_private().map_err(fail)?;
    let text = file.read(crate::file::keyfile::MAX_SA_FILE).map_err(fail)?;
    let format = match format.or_else(|| detect(&text)) {
        Some(f) => f,
        None => {
            let what = "this is neither ip xfrm, ipsec-secgw nor setkey; name the format";
            return Err(fail(Fault::Unsupported(what.into())));
        }
    };
    import(&text, path, format, options)
}

/// Entry for fuzzers: whatever imports must be written and read back unchanged.
pub fn fuzz_import(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let options = Options {
        allow_weak: true,
        ..Options::default()
    };
    for format in [Format::Xfrm, Format::Secgw, Format::Setkey] {
        if let Ok(i) = import(text, Path::new("fuzz"), format, &options) {
            let written = crate::file::to_toml(&i.config).unwrap_or_default();
            let back = crate::file::parse(&written, Path::new("fuzz.toml"));
            assert_eq!(back, Ok(i.config));
        }
    }
}

#[cfg(test)]
mod tests;
