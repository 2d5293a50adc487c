//! Metrics in the Prometheus text format. A scrape sums the workers' own counters; nothing is counted twice.

mod collect;
mod families;
mod table;

use std::sync::{Arc, Mutex};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Encoder, Registry, TextEncoder};

pub use table::{ALL, Metric};

use crate::core::Control;

/// Serves scrapes.
pub struct Exporter {
    registry: Registry,
}

impl Exporter {
    /// An exporter of the control thread's state.
    ///
    /// # Errors
    /// Two metrics of one name: a fault of ours.
    pub fn new(control: Arc<Mutex<Control>>) -> prometheus::Result<Self> {
        let descs = ALL
            .iter()
            .map(|m| {
                let labels = m.labels.iter().map(ToString::to_string).collect();
                Desc::new(m.name.into(), m.help.into(), labels, Default::default())
            })
            .collect::<prometheus::Result<_>>()?;
        let registry = Registry::new();
        registry.register(Box::new(Source { control, descs }))?;
        Ok(Self { registry })
    }

    /// The text of a scrape.
    ///
    /// # Errors
    /// The encoder refused: a fault of ours.
    pub fn scrape(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    /// Content type of [`scrape`](Self::scrape).
    pub fn content_type() -> &'static str {
        prometheus::TEXT_FORMAT
    }
}

struct Source {
    control: Arc<Mutex<Control>>,
    descs: Vec<Desc>,
}

impl Collector for Source {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // A panic elsewhere left the state readable.
        let control = self
            .control
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        collect::all(&control)
    }
}
