//! From text to tables. Goes on after an error, so that all of them are reported at once.

use std::ops::Range;

use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::file::FileConfig;
use super::problem::Problems;

/// The tables, and the places of their keys.
pub(super) struct Decoded<'t> {
    pub(super) file: FileConfig,
    doc: Spanned<DeTable<'t>>,
    /// Every port was read, so that a name which is not among them is really unknown.
    pub(super) ports_complete: bool,
}

impl Decoded<'_> {
    /// Place of a key: `["port", "2", "mtu"]`. The nearest table above it when the key is not in the file.
    pub(super) fn span(&self, path: &[&str]) -> Option<Range<usize>> {
        let (first, rest) = path.split_first()?;
        let mut value = self.doc.get_ref().get(*first)?;
        for step in rest {
            let next = match value.get_ref() {
                DeValue::Table(t) => t.get(*step),
                DeValue::Array(a) => step.parse::<usize>().ok().and_then(|i| a.get(i)),
                _ => None,
            };
            let Some(next) = next else { break };
            value = next;
        }
        Some(value.span())
    }
}

/// Reads the text. `None` when it is not TOML.
pub(super) fn decode<'t>(text: &'t str, problems: &mut Problems) -> Option<Decoded<'t>> {
    let (doc, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        for e in errors {
            problems.push(e.span(), e.message());
        }
        return None;
    }
    let mut file = FileConfig::default();
    let mut ports_complete = true;
    for (key, value) in doc.get_ref() {
        let name = key.get_ref().as_ref();
        match name {
            "sa_files" => set(&mut file.sa_files, value, problems),
            "workers" => set(&mut file.workers, value, problems),
            "memory" => set(&mut file.memory, value, problems),
            "port" => ports_complete = list(&mut file.port, value, problems),
            "engine" => drop(list(&mut file.engine, value, problems)),
            "route" => drop(list(&mut file.route, value, problems)),
            "neighbour" => drop(list(&mut file.neighbour, value, problems)),
            "kernel" => set(&mut file.kernel, value, problems),
            "sas" => set(&mut file.sas, value, problems),
            "ike" => set(&mut file.ike, value, problems),
            "leases" => set(&mut file.leases, value, problems),
            "rekey" => set(&mut file.rekey, value, problems),
            "crypto" => set(&mut file.crypto, value, problems),
            "reassembly" => set(&mut file.reassembly, value, problems),
            "exception" => set(&mut file.exception, value, problems),
            "metrics" => set(&mut file.metrics, value, problems),
            "api" => set(&mut file.api, value, problems),
            "log" => set(&mut file.log, value, problems),
            "privileges" => set(&mut file.privileges, value, problems),
            "test" => set(&mut file.test, value, problems),
            other => problems.push(Some(key.span()), unknown_top(other)),
        }
    }
    Some(Decoded {
        file,
        doc,
        ports_complete,
    })
}

fn unknown_top(key: &str) -> String {
    let known = "sa_files, [workers], [memory], [[port]], [[engine]], [[route]], [[neighbour]], [kernel], [sas], [ike], [leases], [rekey], [crypto], \
                 [reassembly], [exception], [metrics], [api], [log], [privileges], [test]";
    format!("unknown key \"{key}\"; the file has {known}")
}

fn set<'t, T: Deserialize<'t>>(
    place: &mut T,
    value: &Spanned<DeValue<'t>>,
    problems: &mut Problems,
) {
    if let Some(v) = read(value, problems) {
        *place = v;
    }
}

/// Reads an array of tables; false when one of them could not be read.
fn list<'t, T: Deserialize<'t>>(
    place: &mut Vec<T>,
    value: &Spanned<DeValue<'t>>,
    problems: &mut Problems,
) -> bool {
    let Some(items) = value.get_ref().as_array() else {
        problems.push(
            Some(value.span()),
            "write this as an array of tables, with double brackets",
        );
        return false;
    };
    // Those that fail still hold their place, so that the others' numbers are those of the file.
    let read: Vec<Option<T>> = items.iter().map(|v| read(v, problems)).collect();
    let complete = read.iter().all(Option::is_some);
    if complete {
        place.extend(read.into_iter().flatten());
    }
    complete
}

/// Reads one value. After an error the key at fault is taken out and the rest read again, to find the next.
fn read<'t, T: Deserialize<'t>>(
    value: &Spanned<DeValue<'t>>,
    problems: &mut Problems,
) -> Option<T> {
    let mut rest = value.clone();
    let mut removed: Vec<String> = Vec::new();
    loop {
        let error = match T::deserialize(rest.clone().into_deserializer()) {
            Ok(v) => return removed.is_empty().then_some(v),
            Err(e) => e,
        };
        let consequence = removed
            .iter()
            .any(|k| error.message() == format!("missing field `{k}`"));
        if !consequence {
            problems.push(
                error.span().or_else(|| Some(value.span())),
                explain(error.message()),
            );
        }
        let span = error.span()?;
        let DeValue::Table(table) = rest.get_mut() else {
            return None;
        };
        let at_fault = table
            .iter()
            .find(|(k, v)| covers(&k.span(), &span) || covers(&v.span(), &span));
        let key = at_fault.map(|(k, _)| k.get_ref().to_string())?;
        table.remove(key.as_str());
        removed.push(key);
    }
}

fn covers(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

fn explain(message: &str) -> String {
    message
        .replace("unknown field", "unknown key")
        .replace("unknown variant", "unknown value")
        .replace("missing field", "missing key")
        .replace('`', "\"")
}
