//! What the kernel tells of SAs and policies, in this project's terms. Behind this module nobody sees netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_xfrm::policy::ModifyMessage as PolicyMessage;
use netlink_packet_xfrm::state::ModifyMessage as SaMessage;
use netlink_packet_xfrm::{
    Address, LifetimeConfig, Mark, ReplayEsn, Selector as KernelSelector, XfrmAttrs, XfrmMessage,
};
use sa_store::import::{KernelAlgorithms, kernel_suite};
use sa_store::policy::{AddrRange, Ports, Selector};
use sa_store::sa::{Direction, IfId, Limits, Mode, SaKeys, Spi, UdpEncap};
use sa_store::suite::Suite;
use zeroize::{Zeroize, Zeroizing};

/// What identifies an ESP SA in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SaKey {
    pub(super) dst: IpAddr,
    pub(super) spi: u32,
    /// Value and mask.
    pub(super) mark: (u32, u32),
}

/// An ESP SA of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KernelSa {
    pub(super) key: SaKey,
    pub(super) src: IpAddr,
    pub(super) reqid: u32,
    pub(super) mode: Option<Mode>,
    /// Or why we cannot do it.
    pub(super) crypto: Result<(Suite, SaKeys), String>,
    pub(super) encap: Option<UdpEncap>,
    /// An encapsulation that is not RFC 3948's.
    pub(super) odd_encap: bool,
    pub(super) esn: bool,
    pub(super) window: u32,
    /// Words of the replay bitmap, as an update must give them again.
    pub(super) bitmap_words: Option<u32>,
    /// The last number that was sent with it.
    pub(super) sent: u64,
    /// The highest number that was received with it.
    pub(super) received: u64,
    pub(super) soft: Limits,
    pub(super) hard: Limits,
    /// Packets and bytes that the kernel counts; seconds since 1970 of its making and of its first use.
    pub(super) carried: Carried,
    pub(super) ecn: bool,
    pub(super) copy_dscp: bool,
    pub(super) set_df: bool,
    pub(super) tfc: u32,
    pub(super) if_id: IfId,
    /// `XFRM_OFFLOAD_…` flags and the interface, when the daemon asked for offload.
    pub(super) offload: Option<(i32, u8)>,
    /// Traffic that it may carry, when limited.
    pub(super) selector: Option<Selector>,
    /// What the kernel itself says of the direction (Linux 6.10).
    pub(super) direction: Option<Direction>,
}

/// `xfrm_lifetime_cur`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Carried {
    pub(super) packets: u64,
    pub(super) bytes: u64,
    pub(super) add_time: u64,
    pub(super) use_time: u64,
}

/// Direction of a policy of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Way {
    In,
    Out,
    Forward,
}

/// What identifies a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PolicyKey {
    pub(super) way: Way,
    pub(super) selector: Selector,
    /// Interface that the traffic must use, 0 for any.
    pub(super) interface: i32,
    pub(super) mark: (u32, u32),
    pub(super) if_id: IfId,
}

/// A policy of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KernelPolicy {
    pub(super) key: PolicyKey,
    pub(super) priority: u32,
    pub(super) action: KernelAction,
}

/// What a policy asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KernelAction {
    Allow,
    Block,
    Protect(Template),
    /// What only the kernel can do, in words.
    Other(&'static str),
}

/// The SA that a policy asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Template {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) reqid: u32,
    pub(super) mode: Mode,
}

/// A piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Sa(Box<KernelSa>),
    SaGone(SaKey),
    /// Its hard limit is over. The message names no mark.
    SaExpired {
        dst: IpAddr,
        spi: u32,
    },
    SasFlushed,
    Policy(Box<KernelPolicy>),
    PolicyGone(PolicyKey),
    PoliciesFlushed,
}

const ESP: u8 = 50;
/// `linux/xfrm.h`.
mod flag {
    pub(super) const NOECN: u8 = 1;
    pub(super) const NOPMTUDISC: u8 = 4;
    pub(super) const ESN: u8 = 128;
    pub(super) const DONT_ENCAP_DSCP: u32 = 1;
    pub(super) const MODE_TRANSPORT: u8 = 0;
    pub(super) const MODE_TUNNEL: u8 = 1;
    pub(super) const ACTION_BLOCK: u8 = 1;
    pub(super) const ENCAP_ESPINUDP: u16 = 2;
    pub(super) const SA_DIR: u16 = 33;
}

/// Whether a message of this type is long enough for its fixed part; the decoder takes that for granted.
pub(super) fn is_whole(kind: u16, payload: &[u8]) -> bool {
    use netlink_packet_xfrm::constants as c;
    let least = match kind {
        c::XFRM_MSG_NEWSA | c::XFRM_MSG_UPDSA => 224,
        c::XFRM_MSG_DELSA | c::XFRM_MSG_GETSA => 24,
        c::XFRM_MSG_NEWPOLICY | c::XFRM_MSG_UPDPOLICY => 168,
        c::XFRM_MSG_DELPOLICY | c::XFRM_MSG_GETPOLICY => 64,
        c::XFRM_MSG_EXPIRE => 232,
        c::XFRM_MSG_POLEXPIRE => 176,
        c::XFRM_MSG_NEWAE | c::XFRM_MSG_GETAE => 48,
        c::XFRM_MSG_FLUSHSA => 1,
        // What else there is, nobody looks into.
        c::XFRM_MSG_FLUSHPOLICY => 0,
        _ => return false,
    };
    payload.len() >= least
}

/// What a message tells, if it concerns ESP. The keys in the message are wiped.
pub(super) fn change(message: XfrmMessage) -> Option<Change> {
    match message {
        XfrmMessage::AddSa(m) | XfrmMessage::UpdateSa(m) => sa(m).map(|s| Change::Sa(Box::new(s))),
        XfrmMessage::DeleteSa(m) => {
            let id = &m.user_sa_id;
            let key = SaKey {
                dst: address(&id.daddr, id.family)?,
                spi: id.spi,
                mark: mark(&m.nlas),
            };
            wipe(m.nlas);
            (id.proto == ESP).then_some(Change::SaGone(key))
        }
        XfrmMessage::Expire(m) if m.expire.hard != 0 => {
            let s = &m.expire.state;
            let dst = address(&s.id.daddr, s.family)?;
            let spi = s.id.spi;
            (s.id.proto == ESP).then_some(Change::SaExpired { dst, spi })
        }
        XfrmMessage::FlushSa(m) => {
            matches!(m.protocol, 0 | ESP | 255).then_some(Change::SasFlushed)
        }
        XfrmMessage::AddPolicy(m) | XfrmMessage::UpdatePolicy(m) => {
            policy(&m).map(|p| Change::Policy(Box::new(p)))
        }
        XfrmMessage::DeletePolicy(m) => {
            let id = &m.user_policy_id;
            let body = m.nlas.iter().find_map(|a| match a {
                XfrmAttrs::PolicyInfo(p) => Some(p),
                _ => None,
            });
            let (chosen, direction) =
                body.map_or((&id.selector, id.direction), |p| (&p.selector, p.direction));
            policy_key(chosen, direction, &m.nlas).map(Change::PolicyGone)
        }
        XfrmMessage::PolicyExpire(m) if m.expire.hard != 0 => {
            let p = &m.expire.pol;
            policy_key(&p.selector, p.direction, &m.nlas).map(Change::PolicyGone)
        }
        XfrmMessage::FlushPolicy(_) => Some(Change::PoliciesFlushed),
        _ => None,
    }
}

fn sa(m: SaMessage) -> Option<KernelSa> {
    let info = m.user_sa_info;
    let known = (info.id.proto == ESP && Spi::new(info.id.spi).is_some())
        .then(|| {
            Some((
                address(&info.id.daddr, info.family)?,
                address(&info.saddr, info.family)?,
            ))
        })
        .flatten();
    let Some((dst, src)) = known else {
        wipe(m.nlas);
        return None;
    };
    let key = SaKey {
        dst,
        spi: info.id.spi,
        mark: mark(&m.nlas),
    };
    let mut sa = KernelSa {
        key,
        src,
        reqid: info.reqid,
        mode: mode(info.mode),
        crypto: Err("it has no algorithms".into()),
        encap: None,
        odd_encap: false,
        esn: info.flags & flag::ESN != 0,
        window: info.replay_window.into(),
        bitmap_words: None,
        sent: 0,
        received: 0,
        soft: limits(&info.lifetime_cfg, false),
        hard: limits(&info.lifetime_cfg, true),
        carried: Carried {
            packets: info.lifetime_cur.packets,
            bytes: info.lifetime_cur.bytes,
            add_time: info.lifetime_cur.add_time,
            use_time: info.lifetime_cur.use_time,
        },
        ecn: info.flags & flag::NOECN == 0,
        copy_dscp: true,
        set_df: info.flags & flag::NOPMTUDISC == 0,
        tfc: 0,
        if_id: IfId(0),
        offload: None,
        selector: selector(&info.selector).filter(|s| !is_any(s)),
        direction: None,
    };
    let mut algorithms = Algorithms::default();
    for a in m.nlas {
        match a {
            XfrmAttrs::EncapsulationTemplate(e) => {
                sa.odd_encap = e.encap_type != flag::ENCAP_ESPINUDP;
                sa.encap = Some(UdpEncap {
                    sport: e.encap_sport,
                    dport: e.encap_dport,
                });
            }
            XfrmAttrs::ReplayState(r) => {
                sa.sent = sa.sent.max(r.oseq.into());
                sa.received = sa.received.max(r.seq.into());
            }
            XfrmAttrs::ReplayStateEsn(r) => {
                sa.window = r.replay_window;
                sa.bitmap_words = Some(r.bmp_len);
                (sa.sent, sa.received) = numbers(&r);
            }
            XfrmAttrs::ExtraFlags(f) => sa.copy_dscp = f & flag::DONT_ENCAP_DSCP == 0,
            XfrmAttrs::TfcPadding(n) => sa.tfc = n,
            XfrmAttrs::IfId(n) => sa.if_id = IfId(n),
            XfrmAttrs::OffloadDevice(d) => sa.offload = Some((d.ifindex, d.flags)),
            XfrmAttrs::Other(a) if netlink_packet_core::Nla::kind(&a) == flag::SA_DIR => {
                let mut value = [0];
                if netlink_packet_core::Nla::value_len(&a) == 1 {
                    netlink_packet_core::Nla::emit_value(&a, &mut value);
                }
                sa.direction = match value {
                    [1] => Some(Direction::In),
                    [2] => Some(Direction::Out),
                    _ => None,
                };
            }
            other => algorithms.take(other),
        }
    }
    sa.crypto = algorithms.suite();
    Some(sa)
}

/// Algorithms of one SA, as attributes bring them.
#[derive(Default)]
struct Algorithms {
    aead: Option<(String, u32, Zeroizing<Vec<u8>>)>,
    enc: Option<(String, Zeroizing<Vec<u8>>)>,
    auth: Option<(String, Option<u32>, Zeroizing<Vec<u8>>)>,
}

impl Algorithms {
    fn take(&mut self, attribute: XfrmAttrs) {
        match attribute {
            XfrmAttrs::EncryptionAlgAead(a) => {
                self.aead = Some((name(&a.alg_name), a.alg_icv_len, Zeroizing::new(a.alg_key)));
            }
            XfrmAttrs::EncryptionAlg(a) => {
                self.enc = Some((name(&a.alg_name), Zeroizing::new(a.alg_key)));
            }
            // Both are given for one algorithm; this one says more.
            XfrmAttrs::AuthenticationAlgTrunc(a) => {
                let key = Zeroizing::new(a.alg_key);
                self.auth = Some((name(&a.alg_name), Some(a.alg_trunc_len), key));
            }
            XfrmAttrs::AuthenticationAlg(a) => {
                let key = Zeroizing::new(a.alg_key);
                if self.auth.is_none() {
                    self.auth = Some((name(&a.alg_name), None, key));
                }
            }
            _ => {}
        }
    }

    fn suite(self) -> Result<(Suite, SaKeys), String> {
        let (suite, keys) = match (self.aead, self.enc, self.auth) {
            (Some((alg, icv, enc)), None, None) => {
                let suite = kernel_suite(KernelAlgorithms::Aead(&alg, icv), enc.len())?;
                let auth = Zeroizing::default();
                (suite, SaKeys { enc, auth })
            }
            (None, Some((cipher, enc)), Some((auth, bits, key))) => {
                let bits = bits.unwrap_or(96);
                let both = KernelAlgorithms::Pair(&cipher, &auth, bits);
                let suite = kernel_suite(both, enc.len())?;
                (suite, SaKeys { enc, auth: key })
            }
            (None, Some(_), None) => return Err("its cipher has no authentication".into()),
            (None, None, Some(_)) => return Err("it has an authenticator and no cipher".into()),
            (None, None, None) => return Err("it has no algorithms".into()),
            _ => return Err("it has an AEAD and other algorithms".into()),
        };
        if keys.enc.len() != suite.enc_key_len() || keys.auth.len() != suite.auth_key_len() {
            return Err(format!("keys of {suite} have another length"));
        }
        Ok((suite, keys))
    }
}

/// Wipes the keys in attributes that nobody wants.
fn wipe(attributes: Vec<XfrmAttrs>) {
    for a in attributes {
        match a {
            XfrmAttrs::EncryptionAlgAead(mut a) => a.alg_key.zeroize(),
            XfrmAttrs::EncryptionAlg(mut a) | XfrmAttrs::AuthenticationAlg(mut a) => {
                a.alg_key.zeroize();
            }
            XfrmAttrs::AuthenticationAlgTrunc(mut a) => a.alg_key.zeroize(),
            _ => {}
        }
    }
}

/// An algorithm's name: up to the first zero byte.
fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn numbers(r: &ReplayEsn) -> (u64, u64) {
    let wide = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    (wide(r.oseq_hi, r.oseq), wide(r.seq_hi, r.seq))
}

fn policy(m: &PolicyMessage) -> Option<KernelPolicy> {
    let info = &m.user_policy_info;
    let key = policy_key(&info.selector, info.direction, &m.nlas)?;
    let templates = m.nlas.iter().find_map(|a| match a {
        XfrmAttrs::Template(t) => Some(t.as_slice()),
        _ => None,
    });
    let action = match (info.action, templates.unwrap_or_default()) {
        (flag::ACTION_BLOCK, _) => KernelAction::Block,
        (_, []) => KernelAction::Allow,
        (_, [t]) if t.id.proto == ESP && t.optional == 0 => {
            match (
                mode(t.mode),
                address(&t.saddr, t.family),
                address(&t.id.daddr, t.family),
            ) {
                (Some(mode), Some(src), Some(dst)) => KernelAction::Protect(Template {
                    src,
                    dst,
                    reqid: t.reqid,
                    mode,
                }),
                _ => KernelAction::Other("its template has a mode or a family of another kind"),
            }
        }
        (_, [t]) if t.id.proto == ESP => KernelAction::Other("its protection is optional"),
        _ => KernelAction::Other("it asks for more than one ESP SA"),
    };
    Some(KernelPolicy {
        key,
        priority: info.priority,
        action,
    })
}

/// `None` for policies of sockets and such as no packet can match.
fn policy_key(s: &KernelSelector, direction: u8, attributes: &[XfrmAttrs]) -> Option<PolicyKey> {
    let way = match direction {
        0 => Way::In,
        1 => Way::Out,
        2 => Way::Forward,
        _ => return None,
    };
    let if_id = attributes.iter().find_map(|a| match a {
        XfrmAttrs::IfId(n) => Some(*n),
        _ => None,
    });
    Some(PolicyKey {
        way,
        selector: selector(s)?,
        interface: s.ifindex,
        mark: mark(attributes),
        if_id: IfId(if_id.unwrap_or(0)),
    })
}

fn mark(attributes: &[XfrmAttrs]) -> (u32, u32) {
    let found = attributes.iter().find_map(|a| match a {
        XfrmAttrs::Mark(Mark { value, mask }) => Some((*value, *mask)),
        _ => None,
    });
    found.unwrap_or((0, 0))
}

fn mode(m: u8) -> Option<Mode> {
    match m {
        flag::MODE_TRANSPORT => Some(Mode::Transport),
        flag::MODE_TUNNEL => Some(Mode::Tunnel),
        _ => None,
    }
}

/// Families as Linux numbers them.
fn address(a: &Address, family: u16) -> Option<IpAddr> {
    match family {
        2 => Some(Ipv4Addr::from([a.addr[0], a.addr[1], a.addr[2], a.addr[3]]).into()),
        10 => Some(Ipv6Addr::from(a.addr).into()),
        _ => None,
    }
}

/// Packets and bytes. Seconds are the kernel's own business: it has the timers, and tells when they are over.
fn limits(c: &LifetimeConfig, hard: bool) -> Limits {
    let some = |n: u64| (n != 0 && n != u64::MAX).then_some(n);
    let (packets, bytes) = if hard {
        (c.hard_packet_limit, c.hard_byte_limit)
    } else {
        (c.soft_packet_limit, c.soft_byte_limit)
    };
    Limits {
        packets: some(packets),
        bytes: some(bytes),
        seconds: None,
    }
}

fn selector(s: &KernelSelector) -> Option<Selector> {
    let range = |a, len| AddrRange::prefix(address(a, s.family)?, len);
    let src = range(&s.saddr, s.prefixlen_s)?;
    let dst = range(&s.daddr, s.prefixlen_d)?;
    let ports = match (s.proto, s.sport_mask, s.dport_mask) {
        (_, 0, 0) => Ports::Any,
        // Type and code stand in the places of the ports.
        (1 | 58, kind, code) => {
            let byte = |v: u16, mask| match mask {
                0 => Some(0..=u8::MAX),
                _ => u8::try_from(v).ok().map(|v| v..=v),
            };
            Ports::Icmp {
                kind: byte(s.sport, kind)?,
                code: byte(s.dport, code)?,
            }
        }
        (_, src, dst) => Ports::Range {
            src: masked(s.sport, src)?,
            dst: masked(s.dport, dst)?,
        },
    };
    Some(Selector {
        src,
        dst,
        proto: (s.proto != 0).then_some(s.proto),
        ports,
    })
}

/// `None` for a mask with holes.
fn masked(value: u16, mask: u16) -> Option<std::ops::RangeInclusive<u16>> {
    let low = value & mask;
    (mask.leading_ones() + mask.trailing_zeros() >= 16).then_some(low..=low | !mask)
}

fn is_any(s: &Selector) -> bool {
    let all = |r: AddrRange| {
        let none: IpAddr = match r.first() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Some(r) == AddrRange::prefix(none, 0)
    };
    all(s.src) && all(s.dst) && s.proto.is_none() && s.ports == Ports::Any
}
