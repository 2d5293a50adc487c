mod properties;

use super::*;
use crate::policy::{Action, AddrRange, Ports, Selector};
use crate::sa::{Direction, Dscp, Mode, Tfc};

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples/sa.toml");

const KEY: &str = "000102030405060708090a0b0c0d0e0f10111213";

fn one(text: &str) -> Result<Config, Problems> {
    parse(text, Path::new("t.toml"))
}

/// A tunnel with one SA; `tunnel` and `sa` are further lines of each.
fn with(tunnel: &str, sa: &str) -> String {
    format!(
        "[[tunnel]]\nname = \"t\"\nlocal = \"192.0.2.1\"\nremote = \"192.0.2.2\"\n{tunnel}\n\
         [[tunnel.sa]]\n{sa}"
    )
}

fn good_sa() -> String {
    format!("direction = \"out\"\nspi = 0x1001\nsuite = \"aes-128-gcm-16\"\nkey = \"{KEY}\"\n")
}

/// The only problem of the text, as `line:column` and fault.
fn fault_of(text: &str) -> (String, Fault) {
    let problems = one(text).unwrap_err();
    assert_eq!(problems.len(), 1, "{problems}");
    let p = problems.iter().next().unwrap();
    (format!("{}:{}", p.at.line, p.at.column), p.fault.clone())
}

#[test]
fn the_example_in_deploy_parses_and_round_trips() {
    let text = std::fs::read_to_string(EXAMPLE).unwrap();
    let config = parse(&text, Path::new(EXAMPLE)).unwrap_or_else(|p| panic!("{p}"));
    assert!(config.tunnels.len() >= 3 && config.sas.len() >= 4 && config.policies.len() >= 4);
    let again = one(&to_toml(&config).unwrap()).unwrap_or_else(|p| panic!("{p}"));
    assert_eq!(again, config);
}

#[test]
fn the_example_shows_every_key() {
    let text = std::fs::read_to_string(EXAMPLE).unwrap();
    let keys = [
        decode::FILE_KEYS,
        decode::TUNNEL_KEYS,
        decode::SA_KEYS,
        decode::POLICY_KEYS,
        decode::LIMIT_KEYS,
        decode::NAT_T_KEYS,
        selector::SIDED_KEYS,
        selector::TRAVEL_KEYS,
    ];
    for key in keys.concat() {
        assert!(
            text.contains(&format!("{key} = ")) || text.contains(&format!("{key}]]")),
            "{key}"
        );
    }
}

#[test]
fn an_sa_inherits_from_its_tunnel_and_overrides_it() {
    let c = one(&with(
        "esn = true\nwindow = 64\nttl = 9\nselectors = [{ local = \"10.1.0.0/16\", remote = \"10.2.0.0/16\", proto = \"tcp\", remote_port = 443 }]\nnat_t = { local_port = 4500, remote_port = 5555 }",
        &format!("direction = \"in\"\nspi = 0x1001\nsuite = \"aes-128-gcm-16\"\nkey = \"{KEY}\"\nwindow = 128\ndscp = \"ef\"\ntfc = 1400"),
    ))
    .unwrap();
    let sa = &c.sas[0];
    assert_eq!(sa.name, "t-in-00001001");
    assert_eq!((sa.esn, sa.replay_window, sa.ttl), (true, 128, 9));
    assert_eq!((sa.dscp, sa.tfc), (Dscp::Fixed(46), Tfc::PadTo(1400)));
    assert_eq!(
        (sa.src.to_string(), sa.dst.to_string()),
        ("192.0.2.2".into(), "192.0.2.1".into())
    );
    let encap = sa.encap.unwrap();
    assert_eq!((encap.sport, encap.dport), (5555, 4500));
    assert_eq!(sa.selectors[0].src.first().to_string(), "10.2.0.0");
    assert_eq!(
        sa.selectors[0].ports,
        Ports::Range {
            src: 443..=443,
            dst: 0..=65535
        }
    );
    assert_eq!(c.origins.sas[0].line, 10);
}

#[test]
fn every_problem_is_reported_at_once_with_its_place() {
    let text = "[[tunnel]]\nname = \"t\"\nlocal = \"192.0.2.1\"\nremote = \"2001:db8::1\"\nwindwo = 64\n\
                [[sa]]\ntunnel = \"t\"\ndirection = \"both\"\nspi = 7\nttl = 0\n\
                [[policy]]\nname = \"p\"\n";
    let all = one(text).unwrap_err().to_string();
    for needle in [
        "t.toml:4:10: 192.0.2.1 and 2001:db8::1 are of different address families",
        "t.toml:5:1: [tunnel] has no key \"windwo\"; did you mean \"window\"?",
        "t.toml:8:13: \"direction\" does not take \"both\"",
        "t.toml:9:7: SPI 7 is reserved",
        "t.toml:10:7: \"ttl\" is 0; it must lie in 1 to 255",
        "t.toml:11:1: [policy] lacks \"action\"",
        "t.toml:11:1: [policy] lacks \"src\"",
    ] {
        assert!(all.contains(needle), "{needle}\nnot in\n{all}");
    }
}

#[test]
fn keys_of_the_wrong_length_name_the_length_and_never_the_key() {
    let sa = good_sa().replace(KEY, &KEY[..32]);
    let (at, fault) = fault_of(&with("", &sa));
    assert_eq!(at, "10:7");
    assert!(matches!(
        fault,
        Fault::KeyLength {
            want: 20,
            got: 16,
            ..
        }
    ));
    assert!(
        fault.to_string().contains("salt, which is lacking"),
        "{fault}"
    );
    let sa = good_sa().replace(KEY, "00112233zz");
    let text = one(&with("", &sa)).unwrap_err().to_string();
    assert!(
        text.contains("at its character 9") && !text.contains("0011"),
        "{text}"
    );
    let sa = good_sa().replace(KEY, &format!("\\u0030{}", &KEY[1..]));
    assert_eq!(fault_of(&with("", &sa)).1, Fault::KeyEscaped("key"));
}

#[test]
fn a_syntax_error_does_not_repeat_the_line() {
    let text = with("", &good_sa()).replace("key = \"", "key = \"\u{7}");
    let problems = one(&text).unwrap_err().to_string();
    assert!(!problems.contains("0001020304"), "{problems}");
}

#[test]
fn suites_and_integrity_keys_must_fit_together() {
    let sa = good_sa() + "auth_key = \"00\"";
    assert!(matches!(
        fault_of(&with("", &sa)).1,
        Fault::KeyUnwanted {
            key: "auth_key",
            ..
        }
    ));
    let sa = good_sa().replace("aes-128-gcm-16", "aes-128-cbc+hmac-sha2-256-128");
    let problems = one(&with("", &sa)).unwrap_err().to_string();
    assert!(
        problems.contains("lacks \"auth_key\"") && problems.contains("takes 16"),
        "{problems}"
    );
    let sa = good_sa().replace("aes-128-gcm-16", "aes-128-cbc");
    assert!(matches!(fault_of(&with("", &sa)).1, Fault::NoIntegrity(_)));
    let sa = good_sa().replace("suite = \"aes-128-gcm-16\"\n", "");
    assert!(matches!(
        fault_of(&with("", &sa)).1,
        Fault::Missing { key: "suite", .. }
    ));
}

#[test]
fn weak_settings_need_consent() {
    let constant = good_sa().replace(KEY, &"00".repeat(20));
    let icv = good_sa().replace("gcm-16", "gcm-8");
    let no_replay = good_sa().replace("\"out\"", "\"in\"") + "window = 0";
    let shared = good_sa()
        .replace("aes-128-gcm-16", "aes-128-cbc+hmac-sha1-96")
        .replace(KEY, &KEY[..32])
        + &format!("auth_key = \"{KEY}\"");
    for (sa, weakness) in [
        (constant, Weakness::ConstantKey),
        (icv, Weakness::ShortIcv),
        (no_replay, Weakness::NoAntiReplay),
        (shared, Weakness::SharedKey),
    ] {
        assert_eq!(fault_of(&with("", &sa)).1, Fault::Weak(weakness));
        one(&with("", &(sa.clone() + "\nallow_weak = true"))).unwrap();
        let config = one(&with("allow_weak = true", &sa)).unwrap();
        assert_eq!(one(&to_toml(&config).unwrap()).unwrap(), config);
    }
}

#[test]
fn windows_are_powers_of_two_and_esn_needs_one() {
    let (at, fault) = fault_of(&with("window = 100", &good_sa()));
    assert_eq!(at, "5:10");
    assert!(fault.to_string().contains("use 64 or 128"), "{fault}");
    assert!(matches!(
        fault_of(&with("window = 2097152", &good_sa())).1,
        Fault::OutOfRange { max: 1_048_576, .. }
    ));
    let sa = good_sa().replace("\"out\"", "\"in\"") + "esn = true\nwindow = 0\nallow_weak = true";
    assert_eq!(fault_of(&with("", &sa)).1, Fault::EsnNeedsWindow);
}

#[test]
fn hard_limits_may_not_come_before_soft_ones() {
    let limits =
        "soft = { packets = 10, time = \"2h\" }\nhard = { packets = 20, time = \"1h30m\" }";
    assert_eq!(
        fault_of(&with("", &(good_sa() + limits))).1,
        Fault::HardBelowSoft {
            what: "time",
            hard: 5400,
            soft: 7200
        }
    );
}

#[test]
fn duplicates_name_the_first_use() {
    let second = format!("[[tunnel.sa]]\n{}", good_sa().replace("0x1001", "0x1002"));
    let text = with("", &good_sa()) + &second;
    let (at, fault) = fault_of(&text);
    assert_eq!(at, "15:7");
    assert!(
        matches!(&fault, Fault::KeyReused { first, .. } if first.line == 10),
        "{fault}"
    );

    let text = with("", &good_sa()) + &second.replace("0x1002", "0x1001").replace("0001", "ff01");
    let problems = one(&text).unwrap_err().to_string();
    assert!(
        problems.contains("SPI 0x00001001 to 192.0.2.2 is already used at t.toml:8:7"),
        "{problems}"
    );

    let tunnel = "[[tunnel]]\nname = \"t\"\nlocal = \"192.0.2.3\"\nremote = \"192.0.2.2\"\n";
    let (at, fault) = fault_of(&(with("", &good_sa()) + tunnel));
    assert_eq!(at, "12:8");
    assert!(matches!(fault, Fault::DuplicateName { kind: "tunnel", .. }));
}

#[test]
fn one_spi_may_serve_two_destinations_and_two_vrfs() {
    let other = |vrf: &str| {
        with(vrf, &good_sa())
            .replace("name = \"t\"", "name = \"u\"")
            .replace("0001", "ff01")
    };
    one(&(with("", &good_sa()) + &other("vrf = 1"))).unwrap();
    one(&(with("", &good_sa()) + &other("").replace("192.0.2.2", "192.0.2.9"))).unwrap();
    assert!(one(&(with("", &good_sa()) + &other(""))).is_err());
}

fn policy(lines: &str) -> String {
    with("", &good_sa()) + "[[policy]]\nname = \"p\"\ndirection = \"out\"\npriority = 5\n" + lines
}

#[test]
fn policies_read_prefixes_ranges_ports_and_icmp() {
    let c = one(&policy(
        "action = \"protect\"\ntunnel = \"t\"\nselectors = [\n\
         { src = \"10.0.0.1-10.0.0.9\", dst = \"10.2.0.0/16\", proto = \"udp\", dst_port = \"53-54\" },\n\
         { src = \"::/0\", dst = \"2001:db8::/32\", proto = \"icmpv6\", icmp_type = 128 },\n\
         { src = \"0.0.0.0/0\", dst = \"10.0.0.0/8\", ports = \"opaque\" }]",
    ))
    .unwrap();
    let p = &c.policies[0];
    assert_eq!(p.action, Action::Protect { tunnel: "t".into() });
    assert_eq!(
        p.selectors[0].ports,
        Ports::Range {
            src: 0..=65535,
            dst: 53..=54
        }
    );
    assert_eq!(
        p.selectors[1].ports,
        Ports::Icmp {
            kind: 128..=128,
            code: 0..=255
        }
    );
    assert_eq!(p.selectors[2].ports, Ports::Opaque);
    assert_eq!(one(&to_toml(&c).unwrap()).unwrap(), c);
}

#[test]
fn policies_that_make_no_sense_are_refused() {
    let any = "src = \"0.0.0.0/0\"\ndst = \"0.0.0.0/0\"\n";
    type Case = (&'static str, fn(&Fault) -> bool);
    let cases: [Case; 7] = [
        (
            "action = \"protect\"\ntunnel = \"u\"\n",
            |f| matches!(f, Fault::UnknownTunnel { suggestion: Some(s), .. } if s == "t"),
        ),
        ("action = \"protect\"\n", |f| {
            matches!(f, Fault::Missing { key: "tunnel", .. })
        }),
        ("action = \"bypass\"\ntunnel = \"t\"\n", |f| {
            matches!(f, Fault::Needs { key: "tunnel", .. })
        }),
        (
            "action = \"discrad\"\n",
            |f| matches!(f, Fault::BadValue { suggestion: Some(s), .. } if s == "discard"),
        ),
        ("action = \"bypass\"\ndst_port = 5\n", |f| {
            matches!(
                f,
                Fault::Needs {
                    key: "dst_port",
                    ..
                }
            )
        }),
        ("action = \"bypass\"\nicmp_type = 5\nproto = 6\n", |f| {
            matches!(
                f,
                Fault::Needs {
                    key: "icmp_type",
                    ..
                }
            )
        }),
        ("action = \"bypass\"\nselectors = []\n", |f| {
            matches!(f, Fault::Conflict { .. } | Fault::Needs { .. })
        }),
    ];
    for (lines, expected) in cases {
        let problems = one(&policy(&(any.to_owned() + lines))).unwrap_err();
        assert!(
            problems.iter().any(|p| expected(&p.fault)),
            "{lines}: {problems}"
        );
    }
    let mixed = "action = \"bypass\"\nsrc = \"10.0.0.0/8\"\ndst = \"::/0\"\n";
    assert!(matches!(
        fault_of(&policy(mixed)).1,
        Fault::FamilyMismatch { .. }
    ));
}

#[test]
fn a_file_that_is_renamed_while_its_directory_is_read_is_neither_missed_nor_missing() {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    let dir = tempfile::tempdir().unwrap();
    let names = ["10.toml", "30.toml"].map(|n| dir.path().join(n));
    let between = dir.path().join("20.toml");
    for (file, text) in [(&names[0], with("", &good_sa())), (&between, String::new())] {
        std::fs::write(file, text).unwrap();
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (from, to) in [(0, 1), (1, 0)] {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    std::fs::rename(&names[from], &names[to]).unwrap();
                }
            }
        });
        let found = (0..3000).map(|_| load(dir.path()).map(|c| c.sas.len()));
        let wrong = found.filter(|n| *n != Ok(1)).take(3).collect::<Vec<_>>();
        over.store(true, Ordering::Relaxed);
        assert_eq!(wrong, []);
    });
}

#[test]
fn a_directory_is_read_as_one_file_and_names_the_file_of_each_problem() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str, mode: u32| {
        let p = dir.path().join(name);
        std::fs::write(&p, text).unwrap();
        std::fs::set_permissions(&p, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    assert!(matches!(
        load(dir.path()).unwrap_err().iter().next().unwrap().fault,
        Fault::NoFiles
    ));
    put("10-tunnels.toml", &with("", &good_sa()), 0o600);
    put(
        "20-more.toml",
        "[[sa]]\ntunnel = \"t\"\ndirection = \"in\"\nspi = 0x2001\nsuite = \"aes-128-gcm-16\"\nkey_file = \"k\"\n",
        0o644,
    );
    put("k", "ffeeddccbbaa99887766554433221100aabbccdd\n", 0o600);
    put("notes.txt", "not TOML", 0o644);
    put(".20-more.toml.swp.toml", "not TOML", 0o644);
    let c = load(dir.path()).unwrap_or_else(|p| panic!("{p}"));
    assert_eq!(c.sas.len(), 2);
    assert!(c.origins.sas[1].file.ends_with("20-more.toml"));

    put("10-tunnels.toml", &with("", &good_sa()), 0o640);
    let problems = load(dir.path()).unwrap_err();
    let p = problems.iter().next().unwrap();
    assert!(
        matches!(
            p.fault,
            Fault::Permissions {
                who: "its group",
                verb: "read",
                ..
            }
        ),
        "{p}"
    );
    put("10-tunnels.toml", &with("", &good_sa()), 0o600);
    put("20-more.toml", "", 0o666);
    let problems = load(dir.path()).unwrap_err().to_string();
    assert!(problems.contains("lets everybody change it"), "{problems}");
}

#[test]
fn a_configuration_that_no_file_could_say_is_not_written() {
    let mut c = one(&with("", &good_sa())).unwrap();
    c.sas[0].dst = "192.0.2.77".parse().unwrap();
    assert!(matches!(to_toml(&c), Err(WriteError::NotOfTunnel(_))));
    c.sas[0].tunnel = "u".into();
    assert!(matches!(to_toml(&c), Err(WriteError::NoTunnel(_))));
}

#[test]
fn a_hundred_thousand_sas_load_in_seconds() {
    use std::fmt::Write;
    let mut text = with("suite = \"aes-128-gcm-16\"", &good_sa());
    for i in 1..100_000u32 {
        let spi = 0x2000 + i;
        write!(
            text,
            "[[tunnel.sa]]\ndirection = \"out\"\nspi = {spi}\nkey = \"0123{spi:036x}\"\n"
        )
        .unwrap();
    }
    let start = std::time::Instant::now();
    let config = one(&text).unwrap_or_else(|p| panic!("{p}"));
    assert_eq!(config.sas.len(), 100_000);
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
