//! What the SA files ask for, read as a whole.

use std::collections::HashMap;
use std::path::PathBuf;

use sa_store::file::{self, Config, Fault, Problem, Problems};

/// Loads every file and directory as if they were one file.
///
/// # Errors
/// All problems of all files.
pub fn load(paths: &[PathBuf]) -> Result<Config, Problems> {
    let mut all = Config::default();
    let mut problems = Vec::new();
    for path in paths {
        match file::load(path) {
            Ok(one) => merge(&mut all, one),
            Err(p) => problems.extend(p.iter().cloned()),
        }
    }
    // Names that repeat within one path were found when it was read.
    if paths.len() > 1 && problems.is_empty() {
        problems = duplicates(&all);
    }
    let mut list = Problems::default();
    for p in problems {
        list.push(&p.at, p.fault);
    }
    list.or(all)
}

/// SAs whose lifetime is over before a successor like them sends, each with its place and the reason.
pub fn too_short(config: &Config, rekey: &crate::rekey::Config) -> Vec<String> {
    let mut short = Vec::new();
    for (i, sa) in config.sas.iter().enumerate() {
        if let Err(why) = rekey.check(sa) {
            let at = config.origins.sas.get(i);
            let at = at.map(|a| format!("{a}: ")).unwrap_or_default();
            short.push(format!("{at}SA \"{}\": {why}", sa.name));
        }
    }
    short
}

fn merge(all: &mut Config, one: Config) {
    all.tunnels.extend(one.tunnels);
    all.sas.extend(one.sas);
    all.policies.extend(one.policies);
    all.origins.tunnels.extend(one.origins.tunnels);
    all.origins.sas.extend(one.origins.sas);
    all.origins.policies.extend(one.origins.policies);
}

fn duplicates(all: &Config) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut seen = HashMap::new();
    let mut spis = HashMap::new();
    let named = (all
        .tunnels
        .iter()
        .map(|t| &t.name)
        .zip(&all.origins.tunnels)
        .map(|(n, at)| ("tunnel", n, at)))
    .chain(
        all.sas
            .iter()
            .map(|s| &s.name)
            .zip(&all.origins.sas)
            .map(|(n, at)| ("SA", n, at)),
    )
    .chain(
        all.policies
            .iter()
            .map(|p| &p.name)
            .zip(&all.origins.policies)
            .map(|(n, at)| ("policy", n, at)),
    );
    for (kind, name, at) in named {
        if let Some(first) = seen.insert((kind, name), at) {
            let fault = Fault::DuplicateName {
                kind,
                name: name.clone(),
                first: first.clone(),
            };
            problems.push(Problem {
                at: at.clone(),
                fault,
            });
        }
    }
    for (sa, at) in all.sas.iter().zip(&all.origins.sas) {
        if let Some(first) = spis.insert((sa.direction, sa.spi, sa.dst, sa.vrf), at) {
            let fault = Fault::DuplicateSpi {
                spi: sa.spi,
                dst: sa.dst,
                first: first.clone(),
            };
            problems.push(Problem {
                at: at.clone(),
                fault,
            });
        }
    }
    problems
}
