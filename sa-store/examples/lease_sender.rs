//! Uses sequence numbers under leases as fast as the store allows and tells each one to an outside observer.
//!
//! `lease_sender STORE OUTPUT` is what the power-cut test bed (gateway/tests/powercut) runs in its guest. A
//! record of 12 bytes is `0xe5, key, 0, key ^ 0xff, number (8, little-endian)`; writing it is the use.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::file::{SaIdentity, Settings, Tunnel};
use sa_store::lease::policy::{Blocks, Renewal, end_of_numbers};
use sa_store::lease::{Lease, LeaseStore, LeaseWriter};
use sa_store::sa::{Direction, SaKeys, SaSpec, Spi};

/// Keys 0 to 5 send, 6 and 7 receive.
const KEYS: u8 = 8;
/// Records of a key in one write.
const BURST: usize = 16;
/// Small blocks, so that a power cut seldom finds the disk idle.
const BLOCKS: Blocks = Blocks {
    min: 64,
    first: 64,
    resumed: 64,
    max: 1024,
    target: Duration::from_millis(20),
};

type Failure = Box<dyn std::error::Error>;

struct Key {
    lease: Arc<Lease>,
    renewal: Renewal,
    out: bool,
    next: u64,
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args_os().skip(1);
    let (Some(store), Some(output)) = (args.next(), args.next()) else {
        return Err("usage: lease_sender STORE OUTPUT".into());
    };
    let mut output = OpenOptions::new().write(true).open(output)?;
    let fail = Box::new(|e: &_| {
        eprintln!("lease_sender: {e}");
        std::process::exit(1);
    });
    let writer = LeaseWriter::start(LeaseStore::open(Path::new(&store))?, fail)?;
    let specs = (0..KEYS).map(spec).collect::<Result<Vec<_>, _>>()?;
    let mut keys = Vec::new();
    for (lease, sa) in writer.claim(specs.clone()).into_iter().zip(specs) {
        let lease = lease?;
        let out = sa.direction == Direction::Out;
        keys.push(Key {
            next: lease.resume() + u64::from(!out),
            renewal: Renewal::new(BLOCKS, end_of_numbers(sa.direction, true), true),
            lease,
            out,
        });
    }
    let start = Instant::now();
    loop {
        let mut burst = Vec::with_capacity(usize::from(KEYS) * BURST * 12);
        for (number, k) in (0u8..).zip(&mut keys) {
            let limit = k.lease.limit();
            for _ in 0..BURST {
                let covered = if k.out {
                    k.next < limit
                } else {
                    k.next <= limit
                };
                if !covered {
                    break;
                }
                burst.extend([0xe5, number, 0, number ^ 0xff]);
                burst.extend(k.next.to_le_bytes());
                k.next += 1;
            }
            let used = if k.out { k.next } else { k.next - 1 };
            if let Some(more) = k.renewal.poll(used, limit, start.elapsed()) {
                writer.advance(&k.lease, more)?;
            }
        }
        if burst.is_empty() {
            std::thread::sleep(Duration::from_micros(200));
        } else {
            output.write_all(&burst)?;
        }
    }
}

/// The SA says `first_use` at every start, as a careless operator would leave it.
fn spec(n: u8) -> Result<SaSpec, Failure> {
    let t = Tunnel::new("t", [192, 0, 2, 1].into(), [192, 0, 2, 2].into());
    let id = SaIdentity {
        name: format!("sa-{n}"),
        direction: if n < 6 { Direction::Out } else { Direction::In },
        spi: Spi::new(0x100 + u32::from(n)).ok_or("a reserved SPI")?,
        suite: "aes-128-gcm-16".parse()?,
        keys: SaKeys {
            enc: vec![n + 1; 20].into(),
            auth: Vec::new().into(),
        },
        first_use: true,
    };
    let settings = Settings {
        esn: true,
        ..Settings::default()
    };
    Ok(t.sa(id, &settings))
}
