//! The JSON schema of SA files, for editors and other programs. These types describe; `decode` reads,
//! because it must give every error its place. A test holds the two to the same keys.

use schemars::JsonSchema;

/// Esplanade SA file.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct SaFile {
    /// Tunnels: what the SAs of one pair of gateways have in common. Rekeys keep the tunnel.
    #[serde(default)]
    tunnel: Vec<TunnelTable>,
    /// SAs that are not written inside their tunnel.
    #[serde(default)]
    sa: Vec<SaTable>,
    /// Policies (SPD entries). Traffic that none matches is discarded.
    #[serde(default)]
    policy: Vec<PolicyTable>,
}

/// One pair of gateways.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct TunnelTable {
    /// Unique name; policies, metrics and logs use it.
    name: String,
    /// Our address.
    local: String,
    /// The peer's address, of the same family.
    remote: String,
    /// "tunnel" (default) or "transport".
    mode: Option<Mode>,
    /// VRF of the outer packets; 0 by default.
    vrf: Option<u16>,
    /// Interface id of a route-based tunnel; 0, the default, is policy-based.
    if_id: Option<u32>,
    /// SAs of this tunnel.
    #[serde(default)]
    sa: Vec<NestedSaTable>,
    #[serde(flatten)]
    settings: SettingsKeys,
}

/// One SA, naming its tunnel.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct SaTable {
    /// Name of the tunnel that it belongs to.
    tunnel: String,
    #[serde(flatten)]
    sa: SaKeysTable,
    #[serde(flatten)]
    settings: SettingsKeys,
}

/// One SA inside its tunnel.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct NestedSaTable {
    #[serde(flatten)]
    sa: SaKeysTable,
    #[serde(flatten)]
    settings: SettingsKeys,
}

#[derive(JsonSchema)]
#[expect(dead_code, reason = "only described, never built")]
struct SaKeysTable {
    /// Unique name; `<tunnel>-<in|out>-<spi>` by default.
    name: Option<String>,
    /// "out": we encrypt; "in": we decrypt.
    direction: Direction,
    /// SPI, 0x100 or above; a number or a string such as "0xc0ffee01".
    spi: NumberOrText,
    /// Encryption key in hexadecimal, with its 4-byte salt or nonce behind it where the suite has one.
    key: Option<String>,
    /// File with that key, mode 0600, ours or root's; a relative path starts at this file's directory.
    key_file: Option<String>,
    /// Integrity key in hexadecimal, for suites with an HMAC.
    auth_key: Option<String>,
    /// File with that key.
    auth_key_file: Option<String>,
    /// The key was never used, neither for sending nor for receiving: a missing lease record is then no error.
    /// Remove it after the first start: with it, a lost lease store would repeat nonces and admit replays.
    first_use: Option<bool>,
}

/// Settings of a tunnel, inherited by its SAs, each of which may override them.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only described, never built")]
struct SettingsKeys {
    /// aes-{128,192,256}-gcm-{8,12,16}, aes-{128,192,256}-gmac, chacha20-poly1305, or
    /// {null,aes-N-cbc,aes-N-ctr}+hmac-{sha1-96,sha2-256-128,sha2-384-192,sha2-512-256}.
    #[schemars(extend("enum" = suite_names()))]
    suite: Option<String>,
    /// 64-bit sequence numbers; both ends must agree. false by default.
    esn: Option<bool>,
    /// Replay window in packets: a power of two of 32 to 1048576, or 0 for none (weak). 1024 by default.
    window: Option<u32>,
    /// An event is raised at the first of these.
    soft: Option<LimitsTable>,
    /// The first packet beyond one of these is dropped.
    hard: Option<LimitsTable>,
    /// UDP encapsulation (RFC 3948): true for ports 4500, or the ports.
    nat_t: Option<NatT>,
    /// Outer DSCP: "copy" (default), 0 to 63, or a name such as "ef", "cs6", "af41".
    dscp: Option<NumberOrText>,
    /// Outer DF: "copy" (default), "set" or "clear".
    df: Option<Df>,
    /// Carry ECN across the tunnel (RFC 6040); true by default.
    ecn: Option<bool>,
    /// Outer TTL or hop limit; 64 by default.
    #[schemars(range(min = 1))]
    ttl: Option<u8>,
    /// Path MTU of outer packets in bytes, or "auto" (default): that of the egress port.
    pmtu: Option<NumberOrText>,
    /// Pad inner packets to this many bytes (traffic-flow confidentiality), or "off" (default).
    tfc: Option<NumberOrText>,
    /// Dummy packets to send each second while the tunnel is up (tunnel mode); 0 by default.
    #[schemars(range(max = 10_000))]
    dummies: Option<u16>,
    /// Clamp the TCP MSS to the tunnel's MTU; false by default.
    mss_clamp: Option<bool>,
    /// "software" (default), "crypto" (an engine ciphers) or "packet" (an engine does all of ESP).
    offload: Option<Offload>,
    /// Engine by name, or "auto" (default).
    engine: Option<String>,
    /// Inner traffic that the SA may carry; by default what the tunnel's policies say.
    selectors: Option<Vec<SidedSelector>>,
    /// Accept settings that give less protection than expected; false by default.
    allow_weak: Option<bool>,
}

/// Limits; an absent one does not limit. The whole table replaces an inherited one.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct LimitsTable {
    /// Packets.
    #[schemars(range(min = 1))]
    packets: Option<u64>,
    /// Bytes: a number or an amount such as "100GiB".
    bytes: Option<NumberOrText>,
    /// Time since installation: seconds or a duration such as "8h", "1h30m".
    time: Option<NumberOrText>,
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only described, never built")]
enum NatT {
    /// On, ports 4500; or off.
    Switch(bool),
    /// On, with these ports.
    Ports(NatTPorts),
}

#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct NatTPorts {
    /// Our UDP port; 4500 by default.
    #[schemars(range(min = 1))]
    local_port: Option<u16>,
    /// The peer's UDP port; 4500 by default.
    #[schemars(range(min = 1))]
    remote_port: Option<u16>,
}

/// Traffic seen from our side.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct SidedSelector {
    /// Addresses behind us: a prefix, an address or a range "a-b".
    local: String,
    /// Addresses behind the peer.
    remote: String,
    /// Ports behind us: a number or "a-b"; needs proto.
    local_port: Option<NumberOrText>,
    /// Ports behind the peer.
    remote_port: Option<NumberOrText>,
    #[serde(flatten)]
    upper: UpperKeys,
}

/// Traffic in the direction of travel.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct TravelSelector {
    #[serde(flatten)]
    travel: TravelKeys,
}

#[derive(JsonSchema)]
#[expect(dead_code, reason = "only described, never built")]
struct TravelKeys {
    /// Source: a prefix, an address or a range "a-b".
    src: String,
    /// Destination, of the same family.
    dst: String,
    #[serde(flatten)]
    upper: UpperKeys,
    #[serde(flatten)]
    ports: TravelPorts,
}

#[derive(JsonSchema)]
#[expect(dead_code, reason = "only described, never built")]
struct TravelPorts {
    /// Source port: a number or "a-b"; needs proto.
    src_port: Option<NumberOrText>,
    /// Destination port.
    dst_port: Option<NumberOrText>,
}

#[derive(JsonSchema)]
#[expect(dead_code, reason = "only described, never built")]
struct UpperKeys {
    /// Upper-layer protocol: a number or a name such as "tcp", "udp", "icmp", "icmpv6"; any by default.
    proto: Option<NumberOrText>,
    /// ICMP type: a number or "a-b".
    icmp_type: Option<NumberOrText>,
    /// ICMP code: a number or "a-b".
    icmp_code: Option<NumberOrText>,
    /// "any" (default), or "opaque": only packets whose ports cannot be seen, that is later fragments.
    ports: Option<PortsWord>,
}

/// One SPD entry. Give one selector as keys of the policy, or several as `selectors`.
#[derive(JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only described, never built")]
struct PolicyTable {
    /// Unique name.
    name: String,
    /// "out": before encryption; "in": after decryption.
    direction: Direction,
    /// Lower is looked at first; ties are broken by order.
    priority: u32,
    /// "protect" (needs tunnel), "bypass" or "discard".
    action: PolicyAction,
    /// Tunnel that protects.
    tunnel: Option<String>,
    /// VRF of the inner packets; 0 by default.
    vrf: Option<u16>,
    /// Only traffic routed to this interface id, when not 0.
    if_id: Option<u32>,
    /// Several selectors: traffic that any of them matches.
    selectors: Option<Vec<TravelSelector>>,
    /// Source: a prefix, an address or a range "a-b".
    src: Option<String>,
    /// Destination, of the same family.
    dst: Option<String>,
    #[serde(flatten)]
    upper: UpperKeys,
    #[serde(flatten)]
    ports: TravelPorts,
}

macro_rules! words {
    ($name:ident: $($word:ident)*) => {
        #[derive(JsonSchema)]
        #[serde(rename_all = "lowercase")]
        #[expect(dead_code, reason = "only described, never built")]
        enum $name { $($word),* }
    };
}

words!(Mode: Tunnel Transport);
words!(Direction: In Out);
words!(Df: Copy Set Clear);
words!(Offload: Software Crypto Packet);
words!(PolicyAction: Protect Bypass Discard);
words!(PortsWord: Any Opaque);

#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only described, never built")]
enum NumberOrText {
    Number(u64),
    Text(String),
}

fn suite_names() -> Vec<String> {
    let all = crate::suite::Suite::all();
    all.iter().map(ToString::to_string).collect()
}

/// The schema as pretty-printed JSON with a final newline.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(SaFile);
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::super::{decode, selector};
    use super::*;
    use std::collections::BTreeSet;

    const PATH: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/schema/sa-file.schema.json"
    );

    /// `UPDATE_SCHEMA=1 cargo test -p sa-store schema` rewrites it.
    #[test]
    fn the_schema_in_deploy_is_current() {
        let now = json_schema();
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            std::fs::write(PATH, &now).unwrap();
        }
        let there = std::fs::read_to_string(PATH).unwrap();
        assert!(
            there == now,
            "the schema has changed: write it anew with UPDATE_SCHEMA=1"
        );
    }

    #[test]
    fn the_schema_and_the_reader_know_the_same_keys() {
        let s: serde_json::Value = serde_json::from_str(&json_schema()).unwrap();
        let keys = |v: &serde_json::Value| -> BTreeSet<String> {
            assert_eq!(v["additionalProperties"], false, "unknown keys are refused");
            v["properties"]
                .as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect()
        };
        let known =
            |k: &[&str]| -> BTreeSet<String> { k.iter().map(|s| (*s).to_owned()).collect() };
        assert_eq!(keys(&s), known(decode::FILE_KEYS));
        let pairs: [(&str, &[&str]); 8] = [
            ("TunnelTable", decode::TUNNEL_KEYS),
            ("SaTable", decode::SA_KEYS),
            ("NestedSaTable", decode::NESTED_SA_KEYS),
            ("PolicyTable", decode::POLICY_KEYS),
            ("LimitsTable", decode::LIMIT_KEYS),
            ("NatTPorts", decode::NAT_T_KEYS),
            ("SidedSelector", selector::SIDED_KEYS),
            ("TravelSelector", selector::TRAVEL_KEYS),
        ];
        for (name, k) in pairs {
            assert_eq!(keys(&s["$defs"][name]), known(k), "{name}");
        }
    }
}
