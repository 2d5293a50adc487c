//! A dump of the kernel's tables beside the news, a page at a time: among thousands of SAs it takes longer than anything else
//! may wait.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use netlink_packet_xfrm::XfrmMessage;
use netlink_packet_xfrm::policy::DelGetMessage as PolicyGet;
use netlink_packet_xfrm::state::GetDumpMessage;

use super::message::{Change, KernelPolicy, KernelSa, PolicyKey, SaKey, change};
use super::socket::Asker;

/// Requests for everything.
pub(super) fn dumps() -> [XfrmMessage; 2] {
    [
        XfrmMessage::GetDumpSa(GetDumpMessage::default()),
        XfrmMessage::GetPolicy(PolicyGet::default()),
    ]
}

/// Puts a dumped message where it belongs.
pub(super) fn sort_in(m: XfrmMessage, sas: &mut Vec<KernelSa>, policies: &mut Vec<KernelPolicy>) {
    match change(m) {
        Some(Change::Sa(s)) => sas.push(*s),
        Some(Change::Policy(p)) => policies.push(*p),
        _ => {}
    }
}

/// What the kernel holds.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) sas: Vec<KernelSa>,
    pub(super) policies: Vec<KernelPolicy>,
    /// What was told of while it was read: the news are newer.
    pub(super) meanwhile: Meanwhile,
}

impl Found {
    /// Whether something was told of the SA while the dump was read.
    pub(super) fn is_older_than_news(&self, key: &SaKey) -> bool {
        self.meanwhile.of_sa(key)
    }
}

/// News that came while something was read, be they new or not: what is replaced by its like changes its place in a dump, too.
#[derive(Debug, Default)]
pub(super) struct Meanwhile {
    /// By destination and SPI, as some news name no mark.
    sas: HashSet<(IpAddr, u32)>,
    policies: HashSet<PolicyKey>,
    /// Everything ended.
    flushed: [bool; 2],
}

impl Meanwhile {
    pub(super) fn of_sa(&self, key: &SaKey) -> bool {
        self.flushed[0] || self.sas.contains(&(key.dst, key.spi))
    }

    pub(super) fn of_policy(&self, key: &PolicyKey) -> bool {
        self.flushed[1] || self.policies.contains(key)
    }

    pub(super) fn hear(&mut self, change: &Change) {
        match change {
            Change::Sa(sa) => {
                self.sas.insert((sa.key.dst, sa.key.spi));
            }
            Change::SaGone(key) => {
                self.sas.insert((key.dst, key.spi));
            }
            Change::SaExpired { dst, spi } => {
                self.sas.insert((*dst, *spi));
            }
            Change::SasFlushed => self.flushed[0] = true,
            Change::Policy(p) => {
                self.policies.insert(p.key.clone());
            }
            Change::PolicyGone(key) => {
                self.policies.insert(key.clone());
            }
            Change::PoliciesFlushed => self.flushed[1] = true,
        }
    }
}

/// Dumps, with a socket of its own: what others ask is not to wait for a dump's end.
#[derive(Debug)]
pub(super) struct Auditor {
    asker: Asker,
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    found: Found,
    /// Dumps that are to be asked for yet, the next one last.
    ahead: Vec<XfrmMessage>,
    asked: bool,
    whole: bool,
    /// Of no use any more; but the kernel begins no other dump before this one is read.
    void: bool,
}

impl Auditor {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            asker: Asker::open()?,
            under_way: None,
        })
    }

    /// Begins, unless one is under way.
    pub(super) fn begin(&mut self) {
        self.under_way.get_or_insert_with(|| UnderWay {
            found: Found::default(),
            ahead: dumps().into_iter().rev().collect(),
            asked: false,
            whole: false,
            void: false,
        });
    }

    /// What is under way is of no use any more.
    pub(super) fn give_up(&mut self) {
        if let Some(u) = &mut self.under_way {
            u.void = true;
            u.ahead.clear();
        }
    }

    /// This was told.
    pub(super) fn heard(&mut self, change: &Change) {
        if let Some(u) = &mut self.under_way {
            u.found.meanwhile.hear(change);
        }
    }

    /// Goes on by a page. Whether all is read, and [`take`](Self::take) has it.
    pub(super) fn step(&mut self) -> io::Result<bool> {
        let Some(u) = &mut self.under_way else {
            return Ok(false);
        };
        if let Err(e) = page(&mut self.asker, u) {
            self.under_way = None;
            self.asker = Asker::open()?;
            return Err(e);
        }
        if u.whole && u.void {
            self.under_way = None;
        }
        Ok(self.under_way.as_ref().is_some_and(|u| u.whole))
    }

    /// What was found, when all is read.
    pub(super) fn take(&mut self) -> Option<Found> {
        self.under_way.take_if(|u| u.whole).map(|u| u.found)
    }
}

fn page(asker: &mut Asker, u: &mut UnderWay) -> io::Result<()> {
    if !u.asked {
        let Some(what) = u.ahead.pop() else {
            u.whole = true;
            return Ok(());
        };
        asker.begin_dump(what)?;
        u.asked = true;
    }
    let (messages, ended) = asker.hear()?;
    for m in messages {
        sort_in(m, &mut u.found.sas, &mut u.found.policies);
    }
    u.asked = !ended;
    u.whole = ended && u.ahead.is_empty();
    Ok(())
}
