//! What ships in `deploy` says the same as the program.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use control::metrics::ALL;
use prometheus::proto::MetricType;
use sa_store::drops::DropReason;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("deploy/{name}: {e}"))
}

fn table() -> String {
    let mut text = String::from(
        "# Metrics\n\nServed on `metrics.listen` at `/metrics`. A name never changes its meaning. Units are base units.\n\n\
         | name | type | labels | meaning |\n|---|---|---|---|\n",
    );
    for m in ALL {
        let kind = match m.kind {
            MetricType::COUNTER => "counter",
            MetricType::HISTOGRAM => "histogram",
            _ => "gauge",
        };
        let labels: Vec<_> = m.labels.iter().map(|l| format!("`{l}`")).collect();
        let _ = writeln!(
            text,
            "| `{}` | {kind} | {} | {} |",
            m.name,
            labels.join(", "),
            m.help
        );
    }
    text
}

#[test]
fn the_table_of_metrics_is_current() {
    if std::env::var_os("ESPLANADE_UPDATE").is_some() {
        std::fs::write(path("metrics.md"), table()).unwrap();
    }
    assert!(
        read("metrics.md") == table(),
        "stale: run ESPLANADE_UPDATE=1 cargo test -p control --test deploy"
    );
}

#[test]
fn names_of_metrics_follow_the_conventions() {
    for m in ALL {
        assert!(m.name.starts_with("esplanade_"), "{}", m.name);
        assert_eq!(
            m.name.ends_with("_total"),
            m.kind == MetricType::COUNTER,
            "{}",
            m.name
        );
        assert!(!m.help.is_empty(), "{}", m.name);
    }
    let names: BTreeSet<_> = ALL.iter().map(|m| m.name).collect();
    assert_eq!(names.len(), ALL.len());
}

/// Every word of the text that looks like one of our metrics.
fn mentioned(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|w| w.starts_with("esplanade_"))
        .collect()
}

#[test]
fn alerts_and_dashboard_use_metrics_that_exist() {
    for file in ["prometheus/alerts.yml", "grafana/esplanade.json"] {
        let text = read(file);
        let words = mentioned(&text);
        assert!(words.len() > 5, "{file} uses {} metrics", words.len());
        for word in words {
            let known = ALL.iter().any(|m| {
                let histogram = m.kind == MetricType::HISTOGRAM;
                word == m.name || (histogram && word.strip_suffix("_bucket") == Some(m.name))
            });
            assert!(known, "{file}: there is no metric {word}");
        }
    }
}

#[test]
fn the_dashboard_is_json_with_panels() {
    let json: serde_json::Value = serde_json::from_str(&read("grafana/esplanade.json")).unwrap();
    let panels = json["panels"].as_array().unwrap();
    assert!(panels.len() > 10);
    let ids: BTreeSet<_> = panels.iter().map(|p| p["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn labels_in_alerts_are_those_of_the_reasons_and_events() {
    let text = read("prometheus/alerts.yml");
    let mut matched = 0;
    for (label, known) in [
        (
            "reason",
            DropReason::ALL
                .iter()
                .map(|r| r.name())
                .collect::<BTreeSet<_>>(),
        ),
        ("event", sa_store::runtime::event::names(u32::MAX).collect()),
    ] {
        for part in text.split(&format!("{label}=~\"")).skip(1) {
            for name in part.split('"').next().unwrap_or("").split('|') {
                assert!(known.contains(name), "{label} {name}");
                matched += 1;
            }
        }
    }
    assert!(matched > 5);
}

#[test]
fn every_drop_reason_is_described_and_none_is_invented() {
    let text = read("drop-reasons.md");
    let (ours, foreign) = text.split_once("## Linux").expect("the mapping");
    let described: Vec<_> = ours
        .lines()
        .filter_map(|l| l.strip_prefix("| `")?.split('`').next())
        .collect();
    let known: Vec<_> = DropReason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(described, known);
    // The right-hand column names our reasons only.
    for line in foreign.lines().filter(|l| l.starts_with("| `")) {
        let right = line.split('|').nth(2).unwrap_or("");
        let names: Vec<_> = right.split('`').skip(1).step_by(2).collect();
        for name in &names {
            let ok =
                known.contains(name) || name.starts_with("esplanade_") || name.starts_with("Xfrm");
            assert!(ok, "{name} in {line}");
        }
        assert!(
            !names.is_empty() || right.contains("cannot happen"),
            "{line}"
        );
    }
}
