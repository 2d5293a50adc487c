//! `ip xfrm`: what it prints and the commands it takes. Both name their attributes alike.

mod algorithm;
mod policy;
mod state;

use std::path::Path;

use crate::file::fault::{Fault, Location, Problems};
use crate::file::fields::At;
use crate::file::value::shown;

use super::draft::{Draft, check_sa};
use super::words::{End, Word, Words, number, statements};

pub use algorithm::{KernelAlgorithms, kernel_suite};
use policy::policy;
use state::state;

type Fail = (Location, Fault);

pub(super) fn read(text: &str, name: &Path, draft: &mut Draft, problems: &mut Problems) {
    for mut w in statements(text, name, End::Indent, problems) {
        let what = match kind(&mut w) {
            Ok(k) => k,
            Err((at, fault)) => {
                problems.push(&at, fault);
                continue;
            }
        };
        let done = match what {
            Kind::State => state(&mut w).map(|sa| {
                check_sa(&sa, problems);
                draft.sas.push(sa);
            }),
            Kind::Policy => policy(&mut w).map(|p| draft.policies.push(p)),
        };
        if let Err((at, fault)) = done {
            problems.push(&at, fault);
        }
    }
}

enum Kind {
    State,
    Policy,
}

fn kind(w: &mut Words<'_>) -> Result<Kind, Fail> {
    let at = w.at.clone();
    let first = w.peek().map_or("", |f| f.text);
    if first == "src" {
        // Policies are printed with prefix lengths, states with plain addresses.
        let mut ahead = w.clone();
        let _ = ahead.next();
        let policy = ahead.next().is_some_and(|a| a.text.contains('/'));
        return Ok(if policy { Kind::Policy } else { Kind::State });
    }
    if first != "ip" && !first.ends_with("/ip") {
        let text = "a line starts with \"ip xfrm …\" or with \"src\", as ip prints it";
        return Err((at, Fault::Syntax(text.into())));
    }
    let _ = w.next();
    while w.peek().is_some_and(|o| o.text.starts_with('-')) {
        let _ = w.next();
    }
    let object = w.value("\"xfrm\"")?;
    if !matches!(object.text, "xfrm" | "x" | "xf" | "xfr") {
        return Err((
            object.at,
            Fault::Syntax("\"ip xfrm\" is understood here".into()),
        ));
    }
    let object = w.value("\"state\" or \"policy\"")?;
    let command = w.value("\"add\"")?;
    if !matches!(command.text, "add" | "a" | "update") {
        return Err((
            command.at,
            Fault::Unsupported(format!(
                "\"{}\" changes a running system; only \"add\" describes what there is to be",
                shown(command.text)
            )),
        ));
    }
    match object.text {
        "state" | "s" | "st" => Ok(Kind::State),
        "policy" | "p" | "pol" => Ok(Kind::Policy),
        _ => Err((
            object.at,
            Fault::Syntax("\"state\" or \"policy\" comes here".into()),
        )),
    }
}

/// A number as ip prints it: with a comma behind, or the same in another base in parentheses.
fn printed<T: TryFrom<u64>>(w: &mut Words<'_>, what: &str) -> Result<At<T>, Fail> {
    w.parsed(what, |what, s| {
        let s = s.split('(').next().unwrap_or(s);
        number(what, s.trim_end_matches(','))
    })
}

fn unsupported(w: &Word<'_>, why: &str) -> Fail {
    let text = format!("\"{}\" cannot be imported: {why}", shown(w.text));
    (w.at.clone(), Fault::Unsupported(text))
}

fn lacking(at: &Location, what: &str) -> Fail {
    (at.clone(), Fault::Syntax(format!("{what} is lacking")))
}
