//! Splits imported text into words that know their places.

use std::path::Path;

use zeroize::Zeroizing;

use crate::file::fault::{Fault, Location, Problems};
use crate::file::fields::{At, Text};
use crate::file::value::shown;

/// A word of the text. `quoted` words are never keywords or hexadecimal.
#[derive(Clone, Debug)]
pub(in crate::import) struct Word<'i> {
    pub(in crate::import) text: &'i str,
    pub(in crate::import) at: Location,
    pub(in crate::import) quoted: bool,
}

/// A statement: its words and a way through them.
#[derive(Clone, Debug)]
pub(in crate::import) struct Words<'i> {
    words: Vec<Word<'i>>,
    next: usize,
    /// Place of the statement.
    pub(in crate::import) at: Location,
}

/// Where statements end, besides the end of the text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::import) enum End {
    /// At the end of a line, unless it ends with `\`.
    Line,
    /// At `;`.
    Semicolon,
    /// Before a line that is not indented.
    Indent,
}

/// A statement under way.
type Result<T> = std::result::Result<T, (Location, Fault)>;

impl<'i> Words<'i> {
    pub(in crate::import) fn next(&mut self) -> Option<Word<'i>> {
        let w = self.words.get(self.next).cloned();
        self.next += usize::from(w.is_some());
        w
    }

    pub(in crate::import) fn peek(&self) -> Option<&Word<'i>> {
        self.words.get(self.next)
    }

    /// The next word when it is this keyword.
    pub(in crate::import) fn take(&mut self, keyword: &str) -> Option<Location> {
        let w = self.peek().filter(|w| !w.quoted && w.text == keyword)?;
        let at = w.at.clone();
        self.next += 1;
        Some(at)
    }

    /// The next word, which `what` must follow.
    pub(in crate::import) fn value(&mut self, what: &str) -> Result<Word<'i>> {
        let last = self.words.last().map_or(&self.at, |w| &w.at).clone();
        self.next()
            .ok_or_else(|| (last, Fault::Syntax(format!("{what} is lacking here"))))
    }

    /// The next word, read by `read`, which gets the name of what it reads.
    pub(in crate::import) fn parsed<T>(
        &mut self,
        what: &str,
        read: impl FnOnce(&str, &'i str) -> std::result::Result<T, Fault>,
    ) -> Result<At<T>> {
        let w = self.value(what)?;
        match read(what, w.text) {
            Ok(v) => Ok(At { v, at: w.at }),
            Err(f) => Err((w.at, f)),
        }
    }

    /// The next word as a number, decimal or `0x`.
    pub(in crate::import) fn number<T: TryFrom<u64>>(&mut self, what: &str) -> Result<At<T>> {
        self.parsed(what, number)
    }

    /// All words that are left.
    pub(in crate::import) fn rest(&mut self) -> &[Word<'i>] {
        let from = std::mem::replace(&mut self.next, self.words.len());
        self.words.get(from..).unwrap_or_default()
    }
}

/// A number, decimal or `0x`.
pub(in crate::import) fn number<T: TryFrom<u64>>(
    what: &str,
    s: &str,
) -> std::result::Result<T, Fault> {
    let n = match s.strip_prefix("0x") {
        Some(h) => u64::from_str_radix(h, 16),
        None => s.parse(),
    };
    n.ok()
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| Fault::BadValue {
            key: what.to_owned(),
            got: shown(s),
            suggestion: None,
            want: "a number that fits".into(),
        })
}

/// A port of the outer UDP header (RFC 3948), which is never 0.
pub(in crate::import) fn udp_port(what: &str, s: &str) -> std::result::Result<u16, Fault> {
    match number(what, s)? {
        0 => Err(Fault::BadValue {
            key: what.to_owned(),
            got: shown(s),
            suggestion: None,
            want: "a UDP port, which is never 0".into(),
        }),
        port => Ok(port),
    }
}

/// Key material: `0x` and hexadecimal digits, bytes set apart by `:` (ipsec-secgw), or else the characters
/// themselves, which both ip and setkey take for keys.
pub(in crate::import) fn key(
    key: &'static str,
    w: &Word<'_>,
) -> std::result::Result<Zeroizing<Vec<u8>>, Fault> {
    if !w.quoted && w.text.starts_with("0x") {
        return crate::file::value::hex(key, w.text);
    }
    Ok(Zeroizing::new(w.text.as_bytes().to_vec()))
}

/// Splits `text` into statements. `#` starts a comment.
pub(in crate::import) fn statements<'i>(
    text: &'i str,
    name: &Path,
    end: End,
    problems: &mut Problems,
) -> Vec<Words<'i>> {
    let places = Text::new(name, text);
    let mut out: Vec<Words<'i>> = Vec::new();
    let mut open: Vec<Word<'i>> = Vec::new();
    let mut offset = 0;
    let mut joined = false;
    for line in text.split_inclusive('\n') {
        let body = line.trim_end_matches(['\n', '\r']);
        let indented = body.starts_with([' ', '\t']);
        if end == End::Indent && !indented && !joined {
            close(&mut open, &mut out);
        }
        let continued = body.ends_with('\\');
        let body = body.strip_suffix('\\').unwrap_or(body);
        let mut rest = body;
        loop {
            rest = rest.trim_start();
            let start = offset + (body.len() - rest.len());
            let Some(first) = rest.chars().next() else {
                break;
            };
            let at = places.at(&(start..start));
            if first == '#' {
                break;
            }
            if first == ';' {
                rest = rest.get(1..).unwrap_or("");
                close(&mut open, &mut out);
                continue;
            }
            if first == '"' || first == '\'' {
                let inner = rest.get(1..).unwrap_or("");
                let Some(len) = inner.find(first) else {
                    problems.push(&at, Fault::Syntax("this quotation does not end".into()));
                    break;
                };
                open.push(Word {
                    text: inner.get(..len).unwrap_or(""),
                    at,
                    quoted: true,
                });
                rest = inner.get(len + 1..).unwrap_or("");
                continue;
            }
            let len = rest
                .find(|c: char| c.is_whitespace() || c == ';')
                .unwrap_or(rest.len());
            open.push(Word {
                text: rest.get(..len).unwrap_or(""),
                at,
                quoted: false,
            });
            rest = rest.get(len..).unwrap_or("");
        }
        if end == End::Line && !continued {
            close(&mut open, &mut out);
        }
        joined = continued;
        offset += line.len();
    }
    close(&mut open, &mut out);
    out
}

fn close<'i>(open: &mut Vec<Word<'i>>, out: &mut Vec<Words<'i>>) {
    if let Some(first) = open.first() {
        let at = first.at.clone();
        out.push(Words {
            words: std::mem::take(open),
            next: 0,
            at,
        });
    }
}
