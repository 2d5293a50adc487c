//! Ethernet blocks of the EN7581: what their ports need, and who may share one.

use super::Checker;
use crate::config::engine::{DeviceAt, EngineConfig, EngineType};
use crate::config::port::{Airoha, PortConfig, PortKind};
use crate::config::port_table::PortTable;
use pmd::airoha::Gdm;

impl Checker<'_, '_> {
    pub(super) fn airoha_port(&mut self, at: &str, t: &PortTable) -> Option<PortKind> {
        let Some(a) = &t.airoha else {
            self.wrong(
                &["port", at],
                "an airoha port needs [port.airoha] with \"device\" and \"gdm\"",
            );
            return None;
        };
        let path = |key| ["port", at, "airoha", key];
        self.require(a.experimental, &path("experimental"), || {
            "no board has run this driver; allow it with experimental = true".into()
        });
        let place = match (&a.device, &a.socket) {
            (Some(device), None) => Some(DeviceAt::Platform {
                device: device.clone(),
                registers: None,
                no_iommu: a.no_iommu,
            }),
            (None, Some(socket)) => Some(DeviceAt::Socket(self.dir.join(socket))),
            _ => {
                self.wrong(
                    &path("device"),
                    "an airoha port has exactly one of \"device\", \"socket\"",
                );
                None
            }
        };
        self.require(!a.no_iommu || a.device.is_some(), &path("no_iommu"), || {
            "\"no_iommu\" needs \"device\"".into()
        });
        let gdm = Gdm::new(a.gdm);
        self.require(gdm.is_some(), &path("gdm"), || {
            format!("there is no GDM {}; they are 1 to 4", a.gdm)
        });
        self.require(a.qdma.is_none_or(|q| q < 2), &path("qdma"), || {
            "\"qdma\" is 0 or 1".into()
        });
        let workers = self.d.file.workers.number();
        self.require(usize::from(a.worker) < workers, &path("worker"), || {
            format!(
                "there is no worker {}; they are 0 to {}",
                a.worker,
                workers.saturating_sub(1)
            )
        });
        self.require(
            t.queues.is_none_or(|q| q == 1),
            &["port", at, "queues"],
            || "an airoha port has one queue: one worker owns the block".into(),
        );
        self.require(t.mac.is_some(), &["port", at], || {
            "an airoha port needs \"mac\": the address that the kernel gave it".into()
        });
        let gdm = gdm?;
        Some(PortKind::Airoha(Airoha {
            at: place?,
            gdm,
            instance: a.qdma.unwrap_or(gdm.usual_instance()),
            worker: usize::from(a.worker),
            mac: t.mac?,
        }))
    }

    /// A block is one device with one owner, however many ports and engines name it.
    pub(super) fn blocks(&mut self, ports: &[PortConfig], engines: &[EngineConfig]) {
        let blocks: Vec<(&str, &Airoha)> = ports
            .iter()
            .filter_map(|p| match &p.kind {
                PortKind::Airoha(a) => Some((p.name.as_str(), a)),
                _ => None,
            })
            .collect();
        for (n, (name, a)) in blocks.iter().enumerate() {
            let first = blocks.iter().take(n).find(|(_, b)| b.at.is_same(&a.at));
            if let Some((other, b)) = first {
                let who = format!("port \"{other}\"");
                let path = self.port_path(name);
                self.agree(
                    &path,
                    &a.at,
                    (a.worker, a.at.no_iommu()),
                    &who,
                    (b.worker, b.at.no_iommu()),
                );
            }
        }
        for (n, e) in engines.iter().enumerate() {
            let path = self.engine_path(&e.name);
            if let Some((other, b)) = blocks.iter().find(|(_, b)| b.at.is_same(&e.at)) {
                let who = format!("port \"{other}\"");
                if matches!(e.kind, EngineType::Eip93(_)) {
                    let what = format!("{} is the Ethernet block of {who}, no EIP-93", e.at);
                    self.wrong_at(&path, what);
                }
                self.agree(
                    &path,
                    &e.at,
                    (e.worker, e.at.no_iommu()),
                    &who,
                    (b.worker, b.at.no_iommu()),
                );
            }
            if let Some(other) = engines.iter().take(n).find(|o| o.at.is_same(&e.at)) {
                let what = format!("{} is already engine \"{}\"", e.at, other.name);
                self.wrong_at(&path, what);
            }
        }
    }

    /// Two users of a block agree about who owns it and what it may do.
    fn agree(
        &mut self,
        path: &[String],
        at: &DeviceAt,
        own: (usize, bool),
        who: &str,
        other: (usize, bool),
    ) {
        if own.0 != other.0 {
            let what = format!(
                "{at} belongs to worker {} by {who}, to worker {} here; a block has one owner",
                other.0, own.0
            );
            self.wrong_at(path, what);
        }
        if own.1 != other.1 {
            let what = format!("\"no_iommu\" of {at} is not what {who} says");
            self.wrong_at(path, what);
        }
    }

    fn wrong_at(&mut self, path: &[String], what: String) {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        self.wrong(&path, what);
    }

    fn port_path(&self, name: &str) -> Vec<String> {
        let n = self.d.file.port.iter().position(|p| p.name == name);
        vec!["port".into(), n.unwrap_or(0).to_string(), "airoha".into()]
    }

    fn engine_path(&self, name: &str) -> Vec<String> {
        let n = self.d.file.engine.iter().position(|e| e.name == name);
        vec!["engine".into(), n.unwrap_or(0).to_string()]
    }
}
