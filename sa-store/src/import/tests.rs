use super::*;
use crate::file::{parse, to_toml};
use crate::policy::{Action, Ports};
use crate::sa::{Direction, Mode, SaSpec, UdpEncap};
use proptest::prelude::*;

const STATES: &str = "\
src 192.0.2.1 dst 198.51.100.7
\tproto esp spi 0xc0ffee01(3237998081) reqid 1(0x00000001) mode tunnel
\treplay-window 0 seq 0x00000000 flag af-unspec (0x00100000)
\taead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128
\tencap type espinudp sport 4500 dport 4600 addr 0.0.0.0
\tlifetime config:
\t  limit: soft (INF)(bytes), hard (INF)(bytes)
\t  limit: soft 1000(packets), hard 2000(packets)
\t  expire add: soft 3000(sec), hard 3600(sec)
\t  expire use: soft 0(sec), hard 0(sec)
\tlifetime current:
\t  0(bytes), 0(packets)
\t  add 2026-11-21 10:00:00 use -
\tstats:
\t  replay-window 0 replay 0 failed 0
\tanti-replay context: seq 0x0, oseq 0x0, bitmap 0x00000000
src 198.51.100.7 dst 192.0.2.1
\tproto esp spi 0xc0ffee02 reqid 1 mode tunnel
\treplay-window 0 seq 0x00000000 flag af-unspec esn
\tauth-trunc hmac(sha256) 0x1102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20 128
\tenc cbc(aes) 0x2102030405060708090a0b0c0d0e0f10
\tlastused 2026-11-21 10:10:10
\tanti-replay esn context:
\t seq-hi 0x0, seq 0x2d, oseq-hi 0x0, oseq 0x0
\t replay_window 128, bitmap-length 4
\t 00000000 00000000 00000000 00000000 
\tsel src 0.0.0.0/0 dst 0.0.0.0/0 
";

const POLICIES: &str = "\
src 10.1.0.0/16 dst 10.2.0.0/16 proto tcp dport 443 
\tdir out priority 371327 ptype main 
\ttmpl src 192.0.2.1 dst 198.51.100.7
\t\tproto esp spi 0xc0ffee01 reqid 1 mode tunnel
src 10.2.0.0/16 dst 10.1.0.0/16 uid 0
\tdir fwd action allow index 50 priority 371327 ptype main share any flag  (0x00000000)
\tlifetime config:
\t  limit: soft (INF)(bytes), hard (INF)(bytes)
\t  limit: soft (INF)(packets), hard (INF)(packets)
\t  expire add: soft 0(sec), hard 0(sec)
\t  expire use: soft 0(sec), hard 0(sec)
\tlifetime current:
\t  0(bytes), 0(packets)
\t  add 2026-11-21 10:00:00 use -
\ttmpl src 198.51.100.7 dst 192.0.2.1
\t\tproto esp spi 0x00000000(0) reqid 1(0x00000001) mode tunnel
\t\tlevel required share any 
\t\tenc-mask ffffffff auth-mask ffffffff comp-mask ffffffff
src 10.2.0.0/16 dst 10.1.0.0/16 
\tdir in priority 371327 ptype main 
\ttmpl src 198.51.100.7 dst 192.0.2.1
\t\tproto esp reqid 1 mode tunnel
src fe80::/10 dst ff02::/16 proto ipv6-icmp type 135 
\tdir out action block priority 5 
";

const COMMANDS: &str = r#"#!/bin/sh
ip xfrm state add src 2001:db8::1 dst 2001:db8::2 proto esp spi 0x1001 reqid 7 mode transport \
    enc 'rfc3686(ctr(aes))' 0x3102030405060708090a0b0c0d0e0f1011121314 \
    auth-trunc 'hmac(sha512)' 0x41000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000042 256 \
    flag noecn nopmtudisc if_id 0x9 limit byte-hard 5000 dir out
ip -6 x p a dir out src 2001:db8::1/128 dst 2001:db8::2/128 proto udp sport 53 if_id 9 tmpl proto esp reqid 7 mode transport
ip xfrm policy add dir in src 10.0.0.0/8 dst 10.0.0.0/8 priority 9 action allow
"#;

const SECGW: &str = "\
#SP IPv4 rules
sp ipv4 out esp protect 1005 pri 1 dst 192.168.105.0/24 sport 0:65535 dport 0:65535
sp ipv4 out esp bypass pri 1 dst 192.168.240.0/24 proto 6/0xff dport 80:90
sp ipv4 in esp protect 1105 pri 2 dst 192.168.115.0/24 sport 0:65535 dport 0:65535
#SA rules
sa out 5005 aead_algo aes-128-gcm aead_key de:ad:be:ef:de:ad:be:ef:de:ad:be:ef:de:ad:be:ef:de:ad:be:ef mode ipv4-tunnel src 172.16.1.6 dst 172.16.2.6
sa out 1005 cipher_algo aes-128-cbc cipher_key a0:a1:2:3:4:5:6:7:8:9:a:b:c:d:e:f auth_algo sha1-hmac \\
auth_key b0:1:2:3:4:5:6:7:8:9:a:b:c:d:e:f:10:11:12:13 mode ipv4-tunnel src 172.16.1.5 dst 172.16.2.5
sa in 1105 cipher_algo null auth_algo sha1-hmac auth_key c0:1:2:3:4:5:6:7:8:9:a:b:c:d:e:f:10:11:12:13 \\
mode ipv4-tunnel src 172.16.2.5 dst 172.16.1.5
rt ipv4 dst 172.16.2.5/32 port 0
neigh port 0 de:ad:be:ef:01:02
";

const SETKEY: &str = "\
#!/usr/sbin/setkey -f
flush; spdflush;
add 192.0.2.1 198.51.100.7 esp 0x2001 -m tunnel -u 3 -r 16 -ls 3000 -lh 3600
    -E aes-gcm-16 0x5102030405060708090a0b0c0d0e0f1011121314;
add 198.51.100.7[4500] 192.0.2.1[4600] esp-udp 8194 -m tunnel -u 3 -r 16
    -E rijndael-cbc 0x6102030405060708090a0b0c0d0e0f10
    -A hmac-sha256 \"thirty-two characters of a key!!\";
spdadd 10.1.0.0/16[any] 10.2.0.0/16[443] tcp -P out ipsec
    esp/tunnel/192.0.2.1-198.51.100.7/unique:3;
spdadd 10.2.0.0/16 10.1.0.0/16 any -P in ipsec esp/tunnel/198.51.100.7-192.0.2.1/unique:3;
spdadd ::/0 ::/0 icmp6 135,0 -P in none;
spdadd 0.0.0.0/0 0.0.0.0/0 any -P out discard;
";

fn take(text: &str, format: Format) -> Imported {
    let options = Options::default();
    let i = import(text, Path::new("t"), format, &options).unwrap_or_else(|p| panic!("{p}"));
    let again = parse(&to_toml(&i.config).unwrap(), Path::new("again.toml"));
    assert_eq!(again.unwrap_or_else(|p| panic!("{p}")), i.config);
    i
}

fn refused(text: &str, format: Format) -> String {
    import(text, Path::new("t"), format, &Options::default())
        .unwrap_err()
        .to_string()
}

fn suite(sa: &SaSpec) -> String {
    sa.suite.to_string()
}

#[test]
fn printed_states_and_policies_become_one_tunnel() {
    let c = take(&(STATES.to_owned() + POLICIES), Format::Xfrm).config;
    assert_eq!(c.tunnels.len(), 1);
    assert_eq!(c.tunnels[0].name, "reqid-1");
    let [out, inn] = c.sas.as_slice() else {
        panic!("{c:?}")
    };
    assert_eq!(
        (out.direction, inn.direction),
        (Direction::Out, Direction::In)
    );
    assert_eq!(
        (suite(out), suite(inn)),
        (
            "aes-128-gcm-16".into(),
            "aes-128-cbc+hmac-sha2-256-128".into()
        )
    );
    assert_eq!(out.name, "reqid-1-out-c0ffee01");
    assert_eq!(
        out.encap,
        Some(UdpEncap {
            sport: 4500,
            dport: 4600
        })
    );
    assert_eq!(
        (out.soft.packets, out.hard.packets),
        (Some(1000), Some(2000))
    );
    assert_eq!(
        (out.soft.seconds, out.hard.seconds),
        (Some(3000), Some(3600))
    );
    assert_eq!((inn.esn, inn.replay_window), (true, 128));
    assert!(inn.selectors.is_empty());
    let names: Vec<_> = c.policies.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["reqid-1-out", "reqid-1-in", "discard-out"]);
    assert_eq!(
        c.policies[0].selectors[0].ports,
        Ports::Range {
            src: 0..=65535,
            dst: 443..=443
        }
    );
    assert_eq!(c.policies[0].priority, 371_327);
    assert_eq!(
        c.policies[2].selectors[0].ports,
        Ports::Icmp {
            kind: 135..=135,
            code: 0..=255
        }
    );
}

#[test]
fn ip_commands_are_read_with_their_abbreviations() {
    let c = take(COMMANDS, Format::Xfrm).config;
    let sa = &c.sas[0];
    assert_eq!(suite(sa), "aes-128-ctr+hmac-sha2-512-256");
    assert_eq!((sa.mode, sa.ecn, sa.if_id.0), (Mode::Transport, false, 9));
    assert_eq!(sa.hard.bytes, Some(5000));
    assert_eq!(
        c.policies[0].action,
        Action::Protect {
            tunnel: "reqid-7".into()
        }
    );
    assert_eq!(c.policies[1].action, Action::Bypass);
}

#[test]
fn secgw_rules_become_tunnels_and_routes_become_remarks() {
    let i = take(SECGW, Format::Secgw);
    let c = &i.config;
    assert_eq!(c.tunnels.len(), 2);
    let tunnels: Vec<_> = c.sas.iter().map(|s| s.tunnel.as_str()).collect();
    assert_eq!(tunnels, ["tunnel-5005", "tunnel-1005", "tunnel-1005"]);
    assert_eq!(suite(&c.sas[2]), "null+hmac-sha1-96");
    assert_eq!(c.sas[1].keys.enc[..4], [0xa0, 0xa1, 2, 3]);
    assert_eq!(
        c.policies[0].action,
        Action::Protect {
            tunnel: "tunnel-1005".into()
        }
    );
    assert!(
        c.policies[2].priority < c.policies[0].priority,
        "the higher number wins in ipsec-secgw"
    );
    assert_eq!(i.remarks.len(), 2);
    assert_eq!(i.remarks[0].at.line, 11);
    assert!(
        i.remarks[0]
            .text
            .contains("gateway.toml: rt ipv4 dst 172.16.2.5/32")
    );
}

#[test]
fn setkey_rules_are_read() {
    let c = take(SETKEY, Format::Setkey).config;
    assert_eq!(c.tunnels.len(), 1);
    assert_eq!(c.sas[0].spi.value(), 0x2001);
    assert_eq!(c.sas[1].replay_window, 128, "-r counts bytes");
    assert_eq!(
        c.sas[1].keys.auth.as_slice(),
        b"thirty-two characters of a key!!"
    );
    assert_eq!(
        c.sas[1].encap,
        Some(UdpEncap {
            sport: 4500,
            dport: 4600
        })
    );
    assert_eq!(c.policies.len(), 4);
    assert_eq!(c.policies[3].action, Action::Discard);
}

#[test]
fn formats_are_recognised() {
    for (text, format) in [
        (STATES, Format::Xfrm),
        (POLICIES, Format::Xfrm),
        (COMMANDS, Format::Xfrm),
        (SECGW, Format::Secgw),
        (SETKEY, Format::Setkey),
    ] {
        assert_eq!(detect(text), Some(format));
    }
    assert_eq!(detect("[[tunnel]]"), None);
    assert_eq!(detect(""), None);
}

#[test]
fn what_the_gateway_cannot_do_is_refused_with_its_place() {
    let with = |line: &str| STATES.replace("\tlastused", &format!("\t{line}\n\tlastused"));
    for (line, needle) in [
        ("mark 0x1/0xff", "t:22:2: \"mark\" cannot be imported"),
        (
            "crypto offload parameters: dev eth0 dir in mode packet",
            "t:22:2: \"crypto\"",
        ),
        ("output-mark 0x1", "marks"),
        ("tfcpad 100", "not known here"),
        ("flag decap-dscp", "does not do this"),
        ("mode beet", "modes are"),
        ("proto ah", "only ESP"),
        (
            "encap type espintcp sport 1 dport 1 addr 0.0.0.0",
            "espinudp",
        ),
        (
            "encap type espinudp sport 4500 dport 0 addr 0.0.0.0",
            "never 0",
        ),
        ("limit packet-hard 0", "a limit of 0"),
    ] {
        let text = refused(&(with(line) + POLICIES), Format::Xfrm);
        assert!(text.contains(needle), "{line}: {text}");
    }
    for (from, to, needle) in [
        ("hmac(sha256)", "hmac(md5)", "one of hmac(sha1)"),
        ("cbc(aes)", "cbc(des3_ede)", "one of cbc(aes)"),
        ("10 128\n\tenc", "10 96\n\tenc", "truncated to 96 bits"),
        ("0x000102", "0x0001zz", "not hexadecimal at its character 7"),
        ("dport 443", "dport 443 dev eth0", "interface id"),
        ("level required", "level use", "never optional"),
        ("soft (INF)(packets)", "soft 0(packets)", "a limit of 0"),
        ("dir in priority", "socket in priority", "one socket"),
    ] {
        let text = (STATES.to_owned() + POLICIES).replace("1e1f20 128", "1e1f10 128");
        let text = text.replace(from, to);
        let said = refused(&text, Format::Xfrm);
        assert!(said.contains(needle), "{from} -> {to}: {said}");
    }
    let said = refused("ip xfrm state flush", Format::Xfrm);
    assert!(said.contains("t:1:15: \"flush\""), "{said}");
    let said = refused(&SECGW.replace("1005", "5"), Format::Secgw);
    assert!(said.contains("t:7:8: SPI 5 is reserved"), "{said}");
    let said = refused(&SECGW.replace("sha1-hmac", "null"), Format::Secgw);
    assert!(said.contains("without authentication"), "{said}");
    let said = refused(
        &SECGW.replace("protect 1105", "protect 1106"),
        Format::Secgw,
    );
    assert!(said.contains("t:4:24: no \"sa\" line"), "{said}");
    let said = refused(&SETKEY.replace("unique:3", "use"), Format::Setkey);
    assert!(said.contains("level must be require"), "{said}");
    let said = refused(&SETKEY.replace("-m tunnel", ""), Format::Setkey);
    assert!(said.contains("say -m tunnel"), "{said}");
}

#[test]
fn an_sa_that_has_sent_is_not_taken_over() {
    let used = STATES.replace("0(bytes), 0(packets)", "840(bytes), 10(packets)");
    let said = refused(&(used + POLICIES), Format::Xfrm);
    assert!(said.contains("t:12:16: 10 packets were sent"), "{said}");
    let used = STATES.replace("oseq 0x0, bitmap", "oseq 0x17, bitmap");
    let said = refused(&(used + POLICIES), Format::Xfrm);
    assert!(said.contains("23 packets were sent"), "{said}");
}

#[test]
fn directions_come_from_policies_or_from_our_addresses_and_are_not_guessed() {
    let said = refused(STATES, Format::Xfrm);
    assert!(said.contains("t:1:1: nothing tells whether"), "{said}");
    let options = Options {
        local: vec!["198.51.100.7".parse().unwrap()],
        first_use: true,
        ..Options::default()
    };
    let text = STATES.replace(
        "replay-window 0 seq 0x00000000 flag af-unspec (",
        "replay-window 64 seq 0x0 flag (",
    );
    let i = import(&text, Path::new("t"), Format::Xfrm, &options).unwrap_or_else(|p| panic!("{p}"));
    assert_eq!(i.config.sas[0].direction, Direction::In);
    assert!(i.config.sas[0].first_use);
}

#[test]
fn weak_settings_need_consent_here_too() {
    let text = COMMANDS.replace("dir out\nip", "dir in replay-window 0\nip");
    let said = refused(&text, Format::Xfrm);
    assert!(said.contains("window = 0 turns anti-replay off"), "{said}");
    let options = Options {
        allow_weak: true,
        ..Options::default()
    };
    import(&text, Path::new("t"), Format::Xfrm, &options).unwrap_or_else(|p| panic!("{p}"));
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "(\\PC|\n|\t){0,200}") {
        fuzz_import(text.as_bytes());
    }

    #[test]
    fn shuffled_words_never_panic(
        words in prop::collection::vec(prop::sample::select(vocabulary()), 0..60)
    ) {
        fuzz_import(words.join("").as_bytes());
    }

    #[test]
    fn damaged_texts_never_panic(
        which in 0usize..4,
        at in any::<prop::sample::Index>(),
        len in 0usize..12,
        with in "\\PC{0,3}",
    ) {
        let text = [STATES.to_owned() + POLICIES, COMMANDS.into(), SECGW.into(), SETKEY.into()][which].clone();
        let from = at.index(text.len());
        let to = (from + len).min(text.len());
        fuzz_import(format!("{}{with}{}", &text[..from], &text[to..]).as_bytes());
    }
}

fn vocabulary() -> Vec<String> {
    let all = [STATES, POLICIES, COMMANDS, SECGW, SETKEY].join("\n");
    let mut words: Vec<String> = all
        .split_inclusive([' ', '\n', '\t'])
        .map(str::to_owned)
        .collect();
    words.sort();
    words.dedup();
    words
}
