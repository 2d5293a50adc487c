use std::path::Path;

use super::*;

const MINIMAL: &str = r#"
[[port]]
name = "in"
kind = "pcap"
side = "inside"
addresses = ["10.0.0.1/24"]
"#;

fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn problems(text: &str) -> Vec<String> {
    let Err(p) = parse(text, Path::new("g.toml")) else {
        return Vec::new();
    };
    p.iter().map(ToString::to_string).collect()
}

#[test]
fn the_shipped_example_is_valid_and_shows_every_key() {
    let path = repo("deploy/examples/gateway.toml");
    let config = load(&path).unwrap_or_else(|p| panic!("{p}"));
    assert_eq!(config.ports.len(), 2);
    let text = std::fs::read_to_string(path).unwrap();
    let schema = json_schema();
    let mut tables = vec![&schema];
    tables.extend(schema["$defs"].as_object().unwrap().values());
    for table in tables {
        let Some(keys) = table["properties"].as_object() else {
            continue;
        };
        for key in keys.keys() {
            assert!(
                text.contains(key.as_str()),
                "deploy/examples/gateway.toml does not show \"{key}\""
            );
        }
    }
}

#[test]
fn the_shipped_schema_is_current() {
    let path = repo("deploy/schema/gateway.schema.json");
    let want = format!("{:#}\n", json_schema());
    if std::env::var_os("ESPLANADE_UPDATE").is_some() {
        std::fs::write(&path, &want).unwrap();
    }
    let shipped = std::fs::read_to_string(path).unwrap();
    assert!(
        shipped == want,
        "stale: run ESPLANADE_UPDATE=1 cargo test -p gateway the_shipped_schema"
    );
}

fn airoha(name: &str, more: &str) -> String {
    format!(
        "[[port]]\nname = \"{name}\"\nkind = \"airoha\"\nside = \"inside\"\nmac = \"02:00:00:00:00:01\"\n[port.airoha]\n{more}\n"
    )
}

#[test]
fn ports_and_engine_of_a_block_share_its_device() {
    let block = "device = \"1fb50000.ethernet\"\nexperimental = true\nno_iommu = true\nworker = 1";
    let text = format!(
        "[workers]\ncount = 2\n{}{}[[engine]]\nname = \"soe0\"\nkind = \"soe\"\ndevice = \"1fb50000.ethernet\"\n\
         registers = \"1fbfa000.soe\"\nno_iommu = true\nworker = 1\n",
        airoha("lan", &format!("{block}\ngdm = 1")),
        airoha("wan", &format!("{block}\ngdm = 2"))
    );
    let c = parse(&text, Path::new("g.toml")).unwrap_or_else(|p| panic!("{p}"));
    let instances: Vec<_> = c
        .ports
        .iter()
        .map(|p| match &p.kind {
            PortKind::Airoha(a) => (a.instance, a.at.is_same(&c.engines[0].at)),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(instances, [(0, true), (1, true)]);
}

#[test]
fn what_a_block_cannot_share_is_refused() {
    let text = [
        airoha("a", "socket = \"s\"\ngdm = 1\nexperimental = true"),
        airoha(
            "b",
            "socket = \"s\"\ngdm = 2\nexperimental = true\nworker = 1",
        ),
        airoha("c", "socket = \"s\"\ngdm = 1\nexperimental = true"),
        "[[engine]]\nname = \"e\"\nkind = \"eip93\"\nsocket = \"s\"\nworker = 1\n".into(),
        "[[engine]]\nname = \"f\"\nkind = \"soe\"\nsocket = \"s\"\n".into(),
        "[workers]\ncount = 2\n".into(),
    ];
    let all = problems(&text.concat());
    for want in [
        "s belongs to worker 0 by port \"a\", to worker 1 here; a block has one owner",
        "interface GDM 1 of s is already port \"a\"",
        "s is the Ethernet block of port \"a\", no EIP-93",
        "s belongs to worker 0 by port \"a\", to worker 1 here",
        "s is already engine \"e\"",
    ] {
        assert!(
            all.iter().any(|p| p.contains(want)),
            "{want} is not in {all:#?}"
        );
    }
    assert_eq!(all.len(), 5, "{all:#?}");
    let bare = airoha("a", "gdm = 5\nqdma = 2\nworker = 3\nno_iommu = true");
    let all = problems(&bare.replace("mac = \"02:00:00:00:00:01\"", "queues = 2"));
    for want in [
        "no board has run this driver",
        "exactly one of \"device\", \"socket\"",
        "there is no GDM 5",
        "\"qdma\" is 0 or 1",
        "there is no worker 3",
        "\"no_iommu\" needs \"device\"",
        "has one queue",
        "needs \"mac\"",
    ] {
        assert!(
            all.iter().any(|p| p.contains(want)),
            "{want} is not in {all:#?}"
        );
    }
    assert_eq!(all.len(), 8, "{all:#?}");
    let all = problems("[[port]]\nname = \"a\"\nkind = \"airoha\"\nside = \"inside\"\n");
    assert!(all[0].contains("needs [port.airoha]"), "{all:?}");
}

#[test]
fn a_minimal_file_gets_the_documented_defaults() {
    let c = parse(MINIMAL, Path::new("/etc/esplanade/g.toml")).unwrap();
    assert_eq!(c.workers.number(), 1);
    assert_eq!(c.metrics.unwrap().to_string(), "127.0.0.1:9550");
    assert_eq!(c.leases.path, Path::new("/var/lib/esplanade/leases"));
    assert!(c.reassembly.enabled);
}

#[test]
fn every_problem_is_reported_with_its_place() {
    let text = "wrokers = 1\n[memory]\nframes = 1\nstrode = 3\nlock = \"yes\"\n[[port]]\nname = \"a\"\nkind = \"pcpa\"\nside = \"inside\"\nmtu = -1\n";
    let all = problems(text);
    for want in [
        "g.toml:1:1: unknown key \"wrokers\"",
        "g.toml:4:1: unknown key \"strode\"",
        "g.toml:5:8: ",
        "g.toml:8:8: unknown value \"pcpa\"",
        "g.toml:10:7: ",
    ] {
        assert!(
            all.iter().any(|p| p.starts_with(want)),
            "{want} is not in {all:#?}"
        );
    }
    assert_eq!(all.len(), 5, "{all:#?}");
}

#[test]
fn a_key_that_is_missing_is_named() {
    let all = problems("[[port]]\nname = \"a\"\nkind = \"tap\"\n");
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(all[0].contains("missing key \"side\""), "{all:?}");
}

#[test]
fn names_must_refer_to_something() {
    let text = format!(
        "{MINIMAL}[[route]]\nto = \"10.9.0.0/16\"\nport = \"out\"\n[[route]]\nto = \"10.8.0.0/16\"\nvia = \"172.16.0.1\"\n\
         [[neighbour]]\nip = \"10.0.0.2\"\nmac = \"02:00:00:00:00:01\"\nport = \"no\"\n"
    );
    let all = problems(&text);
    assert_eq!(all.len(), 3, "{all:#?}");
    assert!(
        all[0].contains("g.toml:9:8: there is no port \"out\"; the ports are in"),
        "{all:#?}"
    );
    assert!(
        all[1].contains("172.16.0.1 is in no network of a port"),
        "{all:#?}"
    );
    assert!(all[2].contains("there is no port \"no\""), "{all:#?}");
}

#[test]
fn a_router_s_port_is_found_by_its_network() {
    let c = parse(
        &format!("{MINIMAL}[[route]]\nto = \"0.0.0.0/0\"\nvia = \"10.0.0.254\"\n"),
        Path::new("g.toml"),
    )
    .unwrap();
    assert_eq!(
        c.routes[0].next,
        NextHop::Port {
            port: 0,
            via: Some("10.0.0.254".parse().unwrap())
        }
    );
}

#[test]
fn a_seed_is_refused_with_live_ports() {
    let text = "[[port]]\nname = \"a\"\nkind = \"tap\"\nside = \"inside\"\n[test]\nseed = 7\n";
    let all = problems(text);
    assert!(
        all[0].starts_with("g.toml:6:8: a seed makes nonces repeat"),
        "{all:?}"
    );
    assert!(parse(&format!("{MINIMAL}[test]\nseed = 7\n"), Path::new("g.toml")).is_ok());
}

#[test]
fn memory_ports_must_name_each_other() {
    let port = |name: &str, peer: &str| {
        format!(
            "[[port]]\nname = \"{name}\"\nkind = \"memory\"\nside = \"inside\"\nmemory = {{ peer = \"{peer}\" }}\n"
        )
    };
    assert_eq!(
        problems(&(port("a", "b") + &port("b", "a"))),
        Vec::<String>::new()
    );
    assert_eq!(problems(&(port("a", "a"))).len(), 1);
    assert_eq!(problems(&(port("a", "b") + &port("b", "b"))).len(), 2);
}

#[test]
fn interfaces_are_shared_only_by_tag() {
    let port = |name: &str, vlan: &str| {
        format!(
            "[[port]]\nname = \"{name}\"\nkind = \"af_xdp\"\nside = \"inside\"\ninterface = \"eth0\"\n{vlan}\n"
        )
    };
    assert_eq!(
        problems(&(port("a", "vlan = 1") + &port("b", "vlan = 2"))),
        Vec::<String>::new()
    );
    assert_eq!(
        problems(&(port("a", "vlan = 1") + &port("b", "vlan = 1"))).len(),
        1
    );
}

#[test]
fn text_that_is_not_toml_is_refused_with_its_line() {
    let all = problems("[memory]\nframes = \n");
    assert!(all[0].starts_with("g.toml:2:"), "{all:?}");
}

#[test]
fn fuzz_entry_accepts_any_bytes() {
    for seed in [
        &b"\xff\xfe"[..],
        b"[[port]]\n[[port]]",
        b"port = 3",
        b"[port]\n",
        b"[workers]\ncpus=[1,1]",
        b"a.b.c = 1\n[a]\n",
    ] {
        fuzz_config(seed);
    }
}

#[test]
fn a_vfio_port_names_its_device() {
    let with = |table: &str| {
        let port = "[[port]]\nname = \"nic\"\nkind = \"vfio\"\nside = \"outside\"\n";
        format!("{MINIMAL}{port}{table}")
    };
    let good = with("mac = \"02:00:00:00:00:01\"\nvfio = { device = \"1:0.0\", rx_ring = 256 }");
    let config = parse(&good, Path::new("g.toml")).unwrap();
    let PortKind::Vfio(nic) = &config.ports[1].kind else {
        panic!("another kind");
    };
    assert_eq!(nic.device, "0000:01:00.0");
    assert!(nic.promiscuous && !nic.no_iommu && !nic.experimental);
    for (table, what) in [
        ("", "needs [port.vfio]"),
        ("vfio = { device = \"eth0\" }", "no PCI address"),
        (
            "vfio = { device = \"1:0.0\", tx_ring = 48 }",
            "power of two",
        ),
        (
            "interface = \"eth0\"\nvfio = { device = \"1:0.0\" }",
            "for af_xdp and tap",
        ),
        (
            "vfio = { device = \"1:0.0\" }\n[test]\nseed = 1",
            "refused with live ports",
        ),
    ] {
        let found = problems(&with(table));
        assert!(found.iter().any(|p| p.contains(what)), "{table}: {found:?}");
    }
}

#[test]
fn the_kernel_table_says_what_is_wrong_with_it() {
    let with = |kernel: &str| problems(&format!("{MINIMAL}\n[kernel]\n{kernel}\n"));
    assert!(with("routes = true\ntables = [100, 254]\nvrfs = { blue = 1 }").is_empty());
    for (text, what) in [
        ("tables = [255]", "always used"),
        ("tables = [100, 100]", "twice"),
        ("receive_buffer = 100", "2048 to"),
        (
            "vrfs = { a-name-that-is-too-long = 1 }",
            "no name of a device",
        ),
        ("foreign = \"accept\"", "accept"),
        ("routes = true\n[test]\nseed = 1", "repeated"),
    ] {
        let found = with(text);
        assert!(found.iter().any(|p| p.contains(what)), "{text}: {found:?}");
    }
}
