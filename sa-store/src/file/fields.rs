//! Reads the keys of a TOML table, each with its place, and collects what is wrong instead of stopping.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::fault::{Fault, Location, Problems, nearest};
use super::value::quoted;

/// Text of one file, able to turn byte offsets into lines and columns.
pub(crate) struct Text<'i> {
    pub(crate) file: Arc<Path>,
    text: &'i str,
    line_starts: Vec<usize>,
}

impl<'i> Text<'i> {
    pub(crate) fn new(file: &Path, text: &'i str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, b)| *b == b'\n');
        let line_starts = std::iter::once(0).chain(ends.map(|(i, _)| i + 1)).collect();
        Self {
            file: file.into(),
            text,
            line_starts,
        }
    }

    pub(crate) fn at(&self, span: &Range<usize>) -> Location {
        let line = self.line_starts.partition_point(|s| *s <= span.start);
        let start = line
            .checked_sub(1)
            .and_then(|l| self.line_starts.get(l))
            .copied()
            .unwrap_or(0);
        let before = self.text.get(start..span.start).unwrap_or("");
        Location {
            file: self.file.clone(),
            line: u32::try_from(line).unwrap_or(u32::MAX),
            column: u32::try_from(before.chars().count() + 1).unwrap_or(u32::MAX),
        }
    }
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) v: T,
    pub(crate) at: Location,
}

impl<T> At<T> {
    pub(crate) fn map<U>(self, f: impl FnOnce(T) -> U) -> At<U> {
        At {
            v: f(self.v),
            at: self.at,
        }
    }
}

/// The keys of one table.
pub(crate) struct Fields<'t, 'i> {
    text: &'t Text<'i>,
    table: &'t DeTable<'i>,
    /// How messages call the table, without brackets.
    pub(crate) name: &'static str,
    pub(crate) at: Location,
}

/// A string or a number, for keys that take both.
pub(crate) enum Scalar<'t> {
    Text(&'t str),
    Number(u64),
}

impl<'t, 'i> Fields<'t, 'i> {
    /// Opens a table and reports each key that is not among `known`.
    pub(crate) fn open(
        text: &'t Text<'i>,
        table: &'t DeTable<'i>,
        at: Location,
        name: &'static str,
        known: &[&'static str],
        problems: &mut Problems,
    ) -> Self {
        for key in table.keys() {
            if !known.contains(&key.get_ref().as_ref()) {
                let got = key.get_ref().as_ref();
                problems.push(
                    &text.at(&key.span()),
                    Fault::UnknownKey {
                        table: name,
                        key: super::value::shown(got),
                        suggestion: nearest(got, known.iter().copied()),
                        known: known.join(", "),
                    },
                );
            }
        }
        Self {
            text,
            table,
            name,
            at,
        }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Where the value of `key` stands; the table's place when it is absent.
    pub(crate) fn place(&self, key: &str) -> Location {
        match self.table.get(key) {
            Some(v) => self.text.at(&v.span()),
            None => self.at.clone(),
        }
    }

    fn value(&self, key: &str) -> Option<At<&'t Spanned<DeValue<'i>>>> {
        let v = self.table.get(key)?;
        Some(At {
            v,
            at: self.text.at(&v.span()),
        })
    }

    /// A string, read by `read`.
    pub(crate) fn text<T>(
        &self,
        key: &str,
        problems: &mut Problems,
        read: impl FnOnce(&'t str) -> Result<T, Fault>,
    ) -> Option<At<T>> {
        let v = self.value(key)?;
        match v.v.get_ref() {
            DeValue::String(s) => accept(v.at, read(s), problems),
            other => wrong_type(&v.at, key, "a string", other, problems),
        }
    }

    /// Key material: like [`text`](Self::text), but only when the parser made no copy of it.
    pub(crate) fn secret<T>(
        &self,
        key: &'static str,
        problems: &mut Problems,
        read: impl FnOnce(&'t str) -> Result<T, Fault>,
    ) -> Option<At<T>> {
        let v = self.value(key)?;
        match v.v.get_ref() {
            DeValue::String(Cow::Borrowed(s)) => accept(v.at, read(s), problems),
            DeValue::String(Cow::Owned(_)) => {
                problems.push(&v.at, Fault::KeyEscaped(key));
                None
            }
            other => wrong_type(
                &v.at,
                key,
                "a string of hexadecimal digits",
                other,
                problems,
            ),
        }
    }

    /// A string or an unsigned integer, read by `read`.
    pub(crate) fn scalar<T>(
        &self,
        key: &str,
        want: &'static str,
        problems: &mut Problems,
        read: impl FnOnce(Scalar<'t>) -> Result<T, Fault>,
    ) -> Option<At<T>> {
        let v = self.value(key)?;
        match v.v.get_ref() {
            DeValue::String(s) => accept(v.at, read(Scalar::Text(s)), problems),
            DeValue::Integer(i) => match u64::from_str_radix(i.as_str(), i.radix()) {
                Ok(n) => accept(v.at, read(Scalar::Number(n)), problems),
                Err(_) => {
                    problems.push(&v.at, out_of_range(key, i.to_string(), 0, u64::MAX));
                    None
                }
            },
            other => wrong_type(&v.at, key, want, other, problems),
        }
    }

    /// An integer of `range`.
    pub(crate) fn number<T>(
        &self,
        key: &str,
        range: std::ops::RangeInclusive<T>,
        problems: &mut Problems,
    ) -> Option<At<T>>
    where
        T: TryFrom<u64> + Into<u64> + PartialOrd + Copy,
    {
        let v = self.value(key)?;
        match v.v.get_ref() {
            DeValue::Integer(i) => {
                let n = u64::from_str_radix(i.as_str(), i.radix()).ok();
                match n.and_then(|n| T::try_from(n).ok()) {
                    Some(n) if range.contains(&n) => Some(At { v: n, at: v.at }),
                    _ => {
                        let (min, max) = ((*range.start()).into(), (*range.end()).into());
                        problems.push(&v.at, out_of_range(key, i.to_string(), min, max));
                        None
                    }
                }
            }
            other => wrong_type(&v.at, key, "a number", other, problems),
        }
    }

    pub(crate) fn flag(&self, key: &str, problems: &mut Problems) -> Option<At<bool>> {
        let v = self.value(key)?;
        match v.v.get_ref() {
            DeValue::Boolean(b) => Some(At { v: *b, at: v.at }),
            other => wrong_type(&v.at, key, "true or false", other, problems),
        }
    }

    /// A sub-table.
    pub(crate) fn table(
        &self,
        key: &str,
        name: &'static str,
        known: &[&'static str],
        problems: &mut Problems,
    ) -> Option<Fields<'t, 'i>> {
        let v = self.value(key)?;
        match v.v.get_ref() {
            DeValue::Table(t) => Some(Fields::open(self.text, t, v.at, name, known, problems)),
            other => wrong_type(&v.at, key, "a table { … }", other, problems),
        }
    }

    /// Whether the value of `key` is a table.
    pub(crate) fn is_table(&self, key: &str) -> bool {
        matches!(
            self.table.get(key).map(Spanned::get_ref),
            Some(DeValue::Table(_))
        )
    }

    /// An array of tables.
    pub(crate) fn tables(
        &self,
        key: &str,
        name: &'static str,
        known: &[&'static str],
        problems: &mut Problems,
    ) -> Vec<Fields<'t, 'i>> {
        let Some(v) = self.value(key) else {
            return Vec::new();
        };
        let DeValue::Array(items) = v.v.get_ref() else {
            wrong_type::<()>(&v.at, key, "an array of tables", v.v.get_ref(), problems);
            return Vec::new();
        };
        let mut out = Vec::with_capacity(items.len());
        for item in items.iter() {
            let at = self.text.at(&item.span());
            match item.get_ref() {
                DeValue::Table(t) => {
                    out.push(Fields::open(self.text, t, at, name, known, problems));
                }
                other => {
                    wrong_type::<()>(&at, key, "an array of tables", other, problems);
                }
            }
        }
        out
    }

    /// Reports that a key is needed.
    pub(crate) fn missing(
        &self,
        key: &'static str,
        example: &'static str,
        problems: &mut Problems,
    ) {
        problems.push(
            &self.at,
            Fault::Missing {
                table: format!("[{}]", self.name),
                key,
                example,
            },
        );
    }
}

/// Parses TOML; syntax problems are reported, and what could be read is read on.
pub(crate) fn parse<'i>(text: &Text<'i>, problems: &mut Problems) -> Option<Spanned<DeTable<'i>>> {
    let (table, errors) = DeTable::parse_recoverable(text.text);
    for e in &errors {
        let at = text.at(&e.span().unwrap_or(0..0));
        // Only the message: the error's own display would quote the line, and with it a key.
        problems.push(&at, Fault::Syntax(format!("not TOML: {}", e.message())));
    }
    errors.is_empty().then_some(table)
}

fn accept<T>(at: Location, r: Result<T, Fault>, problems: &mut Problems) -> Option<At<T>> {
    match r {
        Ok(v) => Some(At { v, at }),
        Err(fault) => {
            problems.push(&at, fault);
            None
        }
    }
}

fn out_of_range(key: &str, got: String, min: u64, max: u64) -> Fault {
    Fault::OutOfRange {
        key: key.into(),
        got,
        min,
        max,
    }
}

fn wrong_type<T>(
    at: &Location,
    key: &str,
    want: &'static str,
    got: &DeValue<'_>,
    problems: &mut Problems,
) -> Option<T> {
    problems.push(
        at,
        Fault::WrongType {
            key: key.into(),
            want,
            got: got.type_str(),
        },
    );
    None
}

/// Reports that a word of `known` was expected, for values that are not strings.
pub(crate) fn expected_words(key: &str, got: &str, known: &[&str]) -> Fault {
    Fault::BadValue {
        key: key.into(),
        got: super::value::shown(got),
        suggestion: nearest(got, known.iter().copied()),
        want: quoted(known.iter().copied()),
    }
}
