//! Builds metric families by hand: the values live in counters of our own.

use std::collections::BTreeMap;

use prometheus::proto;
use prometheus::proto::{Bucket, LabelPair, MetricFamily, MetricType};
use sa_store::ledger::Histogram;

use super::table::Metric;

/// Families under construction.
#[derive(Default)]
pub(super) struct Families(BTreeMap<&'static str, MetricFamily>);

impl Families {
    /// Adds a sample of a counter or gauge.
    #[allow(clippy::cast_precision_loss, reason = "Prometheus samples are doubles")]
    pub(super) fn add(&mut self, m: &Metric, labels: &[&str], value: u64) {
        self.add_f64(m, labels, value as f64);
    }

    /// Likewise, with a fraction.
    pub(super) fn add_f64(&mut self, m: &Metric, labels: &[&str], value: f64) {
        let mut sample = Self::sample(m, labels);
        if m.kind == MetricType::COUNTER {
            let mut c = proto::Counter::default();
            c.set_value(value);
            sample.set_counter(c);
        } else {
            let mut g = proto::Gauge::default();
            g.set_value(value);
            sample.set_gauge(g);
        }
        self.push(m, sample);
    }

    /// Adds a histogram of nanoseconds as one of seconds.
    #[allow(clippy::cast_precision_loss, reason = "Prometheus samples are doubles")]
    pub(super) fn add_histogram(&mut self, m: &Metric, labels: &[&str], from: &Histogram) {
        let mut h = proto::Histogram::default();
        let mut total = 0;
        let mut buckets = Vec::with_capacity(Histogram::BUCKETS);
        for (bound, n) in from.buckets() {
            total += n;
            if let Some(bound) = bound {
                let mut b = Bucket::default();
                b.set_cumulative_count(total);
                b.set_upper_bound(bound as f64 / 1e9);
                buckets.push(b);
            }
        }
        h.set_bucket(buckets);
        h.set_sample_count(total);
        h.set_sample_sum(from.sum() as f64 / 1e9);
        let mut sample = Self::sample(m, labels);
        sample.set_histogram(h);
        self.push(m, sample);
    }

    /// All families with samples.
    pub(super) fn finish(self) -> Vec<MetricFamily> {
        self.0.into_values().collect()
    }

    fn sample(m: &Metric, labels: &[&str]) -> proto::Metric {
        debug_assert_eq!(m.labels.len(), labels.len(), "{}", m.name);
        let pairs = m
            .labels
            .iter()
            .zip(labels)
            .map(|(name, value)| {
                let mut pair = LabelPair::default();
                pair.set_name((*name).into());
                pair.set_value((*value).into());
                pair
            })
            .collect();
        proto::Metric::from_label(pairs)
    }

    fn push(&mut self, m: &Metric, sample: proto::Metric) {
        let family = self.0.entry(m.name).or_insert_with(|| {
            let mut f = MetricFamily::default();
            f.set_name(m.name.into());
            f.set_help(m.help.into());
            f.set_field_type(m.kind);
            f
        });
        family.mut_metric().push(sample);
    }
}
