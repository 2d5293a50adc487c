//! Whole gateways, as their configuration files say, whose ports are those of EN7581 blocks (models): frames go through the
//! block's rings, with the block's secure offload engine beside them and without it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use esplanade_model::soe::{Line, Soe, Switches, Wire};
use esplanade_model::{KnobArgs, Knobs, Running, Server};
use gateway::app::Service;
use gateway::config;

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Packets each way.
const PACKETS: u32 = 2000;
/// Under way at most: fewer than the rings hold.
const UNDER_WAY: u32 = 100;

/// One gateway: its model, its host's end of the cable.
struct Site {
    service: Service,
    host: Line,
    model: Running,
    got: u32,
}

/// What stands in a gateway's file beside its ports.
fn engine(dir: &Path) -> String {
    format!(
        "[[engine]]\nname = \"soe0\"\nkind = \"soe\"\nsocket = \"{}\"\nverify = 1.0\n",
        dir.join("block").display()
    )
}

fn tunnel(left: bool, on_engine: bool) -> String {
    let (own, far) = if left {
        ("192.0.2.1", "192.0.2.2")
    } else {
        ("192.0.2.2", "192.0.2.1")
    };
    let mut text = format!(
        "[[tunnel]]\nname = \"t\"\nlocal = \"{own}\"\nremote = \"{far}\"\n\
         suite = \"aes-128-cbc+hmac-sha2-256-128\"\nesn = false\nwindow = 64\ndf = \"clear\"\n"
    );
    if on_engine {
        text += "offload = \"packet\"\nengine = \"soe0\"\n";
    }
    for n in 0..2_u8 {
        let out = (n == 0) == left;
        text += &format!(
            "[[tunnel.sa]]\ndirection = \"{}\"\nspi = {}\nkey = \"{}\"\nauth_key = \"{}\"\nfirst_use = true\n",
            if out { "out" } else { "in" },
            0x3000 + u32::from(n),
            key(n, 16),
            key(n + 2, 32),
        );
    }
    let (own, far) = if left { (1, 2) } else { (2, 1) };
    for (direction, src, dst) in [("out", own, far), ("in", far, own)] {
        text += &format!(
            "[[policy]]\nname = \"{direction}\"\ndirection = \"{direction}\"\npriority = 1\naction = \"protect\"\n\
             tunnel = \"t\"\nsrc = \"10.{src}.0.0/16\"\ndst = \"10.{dst}.0.0/16\"\n"
        );
    }
    text
}

fn key(which: u8, len: u8) -> String {
    (0..len)
        .map(|i| format!("{:02x}", 64 * which + i))
        .collect()
}

fn ports(dir: &Path, left: bool) -> String {
    let (own, far) = if left { (1, 2) } else { (2, 1) };
    let block = dir.join("block");
    let port = |name: &str, side: &str, address: &str, gdm: u8| {
        format!(
            "[[port]]\nname = \"{name}\"\nkind = \"airoha\"\nside = \"{side}\"\naddresses = [\"{address}\"]\n\
             mac = \"02:00:00:00:{gdm:02}:{own:02}\"\n[port.airoha]\nsocket = \"{}\"\ngdm = {gdm}\nexperimental = true\n",
            block.display()
        )
    };
    port("lan", "inside", &format!("10.{own}.0.254/16"), 1)
        + &port("wan", "outside", &format!("192.0.2.{own}/24"), 2)
        + &format!(
            "[[route]]\nto = \"10.{far}.0.0/16\"\nvia = \"192.0.2.{far}\"\n\
             [[neighbour]]\nip = \"192.0.2.{far}\"\nmac = \"02:00:00:00:02:{far:02}\"\nport = \"wan\"\n\
             [[neighbour]]\nip = \"10.{own}.0.1\"\nmac = \"02:00:00:00:00:01\"\nport = \"lan\"\n"
        )
}

fn site(dir: &Path, left: bool, wan: Line, on_engine: bool) -> Site {
    let (host, lan) = Line::pair().unwrap();
    let mut model = Soe::new(Switches::default(), Knobs::new(&KnobArgs::default()));
    assert!(model.plug(1, Box::new(lan)) && model.plug(2, Box::new(wan)));
    assert!(!model.plug(5, Box::new(Line::pair().unwrap().0)));
    let model = Server::bind(&dir.join("block"))
        .unwrap()
        .spawn(Box::new(model))
        .unwrap();
    std::fs::write(dir.join("sa.toml"), tunnel(left, on_engine)).unwrap();
    // It holds keys.
    let private = Permissions::from_mode(0o600);
    std::fs::set_permissions(dir.join("sa.toml"), private).unwrap();
    let engine = if on_engine {
        engine(dir)
    } else {
        String::new()
    };
    let text = format!(
        "sa_files = [\"sa.toml\"]\n[workers]\ncount = 1\n[memory]\nframes = 8192\nhuge = \"never\"\nlock = false\n\
         [leases]\npath = \"leases\"\n[metrics]\nenabled = false\n[api]\nenabled = false\n[crypto]\nprovider = \"rustcrypto\"\n{}{engine}",
        ports(dir, left)
    );
    let config = config::parse(&text, &dir.join("gateway.toml")).unwrap_or_else(|p| panic!("{p}"));
    Site {
        service: Service::start(&config).unwrap_or_else(|e| panic!("{e}")),
        host,
        model,
        got: 0,
    }
}

fn packet(from: u8, to: u8, number: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    let lan = [2, 0, 0, 0, 1, from];
    let fill = vec![number.to_le_bytes()[0]; usize::try_from(number % 37 * 36).unwrap()];
    let payload: Vec<u8> = number.to_be_bytes().into_iter().chain(fill).collect();
    etherparse::PacketBuilder::ethernet2(HOST, lan)
        .ipv4([10, from, 0, 1], [10, to, 0, 1], 64)
        .udp(1000, 2000)
        .write(&mut frame, &payload)
        .unwrap();
    frame
}

impl Site {
    /// What came for the host: it is the next packet of the other one.
    fn take(&mut self, from: u8, to: u8) -> bool {
        let Some(frame) = self.host.receive() else {
            return false;
        };
        let sent = packet(from, to, self.got);
        let whole = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        // Addresses of the link and the hop limit are the gateways'.
        assert_eq!(
            frame[26..whole],
            sent[26..],
            "packet {} of {from}",
            self.got
        );
        self.got += 1;
        true
    }
}

fn cross(on_engine: [bool; 2]) {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (a, b) = Line::pair().unwrap();
    let mut left = site(dirs[0].path(), true, a, on_engine[0]);
    let mut right = site(dirs[1].path(), false, b, on_engine[1]);
    let end = Instant::now() + Duration::from_secs(120);
    let mut sent = 0;
    while left.got < PACKETS || right.got < PACKETS {
        if sent < PACKETS && sent - left.got.min(right.got) < UNDER_WAY {
            left.host.send(&packet(1, 2, sent));
            right.host.send(&packet(2, 1, sent));
            sent += 1;
        } else if !(left.take(2, 1) | right.take(1, 2)) {
            std::thread::sleep(Duration::from_micros(100));
            assert!(
                Instant::now() < end,
                "{sent} sent, {} and {} came",
                left.got,
                right.got
            );
        }
    }
    for (site, engine) in [(left, on_engine[0]), (right, on_engine[1])] {
        let balance = site.service.stop().unwrap();
        assert!(balance.holds() && balance.inside == 0, "{balance:?}");
        let rules = site.model.log().take();
        assert!(rules.is_empty(), "with an engine {engine}: {rules:?}");
    }
}

#[test]
fn ports_of_a_block_carry_what_the_cpu_seals() {
    cross([false, false]);
}

#[test]
fn ports_and_the_engine_of_one_block_share_its_rings() {
    cross([true, false]);
    cross([true, true]);
}
