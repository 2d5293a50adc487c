//! What messages about SAs say of names: `list-sa`, `child-updown`, `child-rekey` and `ike-update`.
//!
//! ```text
//!   CONNECTION { local-host = …  remote-host = …
//!     child-sas { SECTION { name = CHILD  protocol = ESP  spi-in = …  spi-out = … } } }
//!                 SECTION { old { … }  new { … } }                    in child-rekey
//! ```

use std::net::IpAddr;

use super::wire::{Element, Elements, WireError};

/// A pair of SAs and the names that it has in the daemon's configuration, as the daemon wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Child<'m> {
    pub(super) ike: &'m [u8],
    pub(super) child: &'m [u8],
    /// Destination and SPI of the inbound and of the outbound SA, where they are said.
    pub(super) sas: [Option<(IpAddr, u32)>; 2],
}

/// All pairs of a message.
pub(super) fn children(message: &[u8]) -> Result<Vec<Child<'_>>, WireError> {
    let mut reader = Reader::default();
    for element in Elements::of(message) {
        match element? {
            Element::Section(name) => reader.begin(name),
            Element::End => reader.end(),
            Element::Value(key, value) => reader.value(key, value),
            Element::List(_) | Element::Item(_) | Element::ListEnd => {}
        }
    }
    Ok(reader.found)
}

/// Where in the message it is, and what it knows there.
#[derive(Default)]
struct Reader<'m> {
    path: Vec<&'m [u8]>,
    local: Option<IpAddr>,
    remote: Option<IpAddr>,
    /// The pair that is being told of, `old` and `new` apart.
    pair: Pair<'m>,
    /// Pairs of this connection: its addresses may come behind them.
    pairs: Vec<Pair<'m>>,
    found: Vec<Child<'m>>,
}

#[derive(Clone, Copy, Default)]
struct Pair<'m> {
    name: &'m [u8],
    other_protocol: bool,
    spi_in: Option<u32>,
    spi_out: Option<u32>,
}

impl<'m> Reader<'m> {
    fn begin(&mut self, name: &'m [u8]) {
        self.path.push(name);
        match self.path.len() {
            1 => (self.local, self.remote) = (None, None),
            3 | 4 if self.in_child() => {
                // Old daemons say the name by the section alone.
                let name = self.path.get(2).copied().unwrap_or_default();
                self.pair = Pair {
                    name,
                    ..Pair::default()
                };
            }
            _ => {}
        }
    }

    fn end(&mut self) {
        match self.path.len() {
            1 => self.tell(),
            3 | 4 if self.in_child() => {
                let pair = std::mem::take(&mut self.pair);
                if !pair.other_protocol && (pair.spi_in.is_some() || pair.spi_out.is_some()) {
                    self.pairs.push(pair);
                }
            }
            _ => {}
        }
        self.path.pop();
    }

    fn value(&mut self, key: &[u8], value: &'m [u8]) {
        match (self.path.len(), key) {
            (1, b"local-host") => self.local = address(value),
            (1, b"remote-host") => self.remote = address(value),
            (3 | 4, _) if self.in_child() => match key {
                b"name" => self.pair.name = value,
                b"protocol" => self.pair.other_protocol = value != b"ESP",
                b"spi-in" => self.pair.spi_in = spi(value),
                b"spi-out" => self.pair.spi_out = spi(value),
                _ => {}
            },
            _ => {}
        }
    }

    fn in_child(&self) -> bool {
        self.path.get(1).is_some_and(|s| *s == b"child-sas")
    }

    fn tell(&mut self) {
        let ike = self.path.first().copied().unwrap_or_default();
        let (local, remote) = (self.local, self.remote);
        let children = self.pairs.drain(..).map(|p| Child {
            ike,
            child: p.name,
            sas: [local.zip(p.spi_in), remote.zip(p.spi_out)],
        });
        self.found.extend(children);
    }
}

fn address(text: &[u8]) -> Option<IpAddr> {
    let address: IpAddr = str::from_utf8(text).ok()?.parse().ok()?;
    Some(address.to_canonical())
}

/// Hexadecimal; 0 is none yet.
fn spi(text: &[u8]) -> Option<u32> {
    let spi = u32::from_str_radix(str::from_utf8(text).ok()?, 16).ok()?;
    (spi != 0).then_some(spi)
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Framer, Packet};
    use super::*;

    /// What charon 5.9.8 sent to a client that registered for the four events and then asked for `list-sas`, while one child
    /// was up, another came up, each was rekeyed, one by the peer, and one was terminated.
    const RECORDED: &[u8] = include_bytes!("recorded-5.9.8.bin");

    /// Event, names, SPI to us, SPI to the peer; the SPIs are those that `swanctl --list-sas` showed.
    const EXPECTED: [(&str, &str, u32, u32); 7] = [
        ("list-sa", "branch-office/lan", 0x8667_6e39, 0x4328_d5a4),
        (
            "child-updown",
            "branch-office/voice",
            0xa62c_5fd1,
            0x86cd_2eec,
        ),
        ("child-rekey", "branch-office/lan", 0x8667_6e39, 0x4328_d5a4),
        ("child-rekey", "branch-office/lan", 0xa5f6_41ca, 0x6074_b305),
        (
            "child-rekey",
            "branch-office/voice",
            0xa62c_5fd1,
            0x86cd_2eec,
        ),
        (
            "child-rekey",
            "branch-office/voice",
            0xa94c_fbd9,
            0x473e_4b82,
        ),
        (
            "child-updown",
            "branch-office/lan",
            0xa5f6_41ca,
            0x6074_b305,
        ),
    ];

    fn written(elements: &[Element<'_>]) -> Vec<u8> {
        let mut to = Vec::new();
        let name = |to: &mut Vec<u8>, n: &[u8]| {
            to.push(u8::try_from(n.len()).unwrap());
            to.extend(n);
        };
        for e in elements {
            match e {
                Element::Section(n) => {
                    to.push(1);
                    name(&mut to, n);
                }
                Element::End => to.push(2),
                Element::Value(n, v) => {
                    to.push(3);
                    name(&mut to, n);
                    to.extend(u16::try_from(v.len()).unwrap().to_be_bytes());
                    to.extend(*v);
                }
                _ => panic!("not needed here"),
            }
        }
        to
    }

    #[test]
    fn a_recorded_exchange_names_every_sa() {
        let mut framer = Framer::default();
        let mut told = Vec::new();
        let mut others = Vec::new();
        for part in RECORDED.chunks(100) {
            framer.push(part);
            while let Some(packet) = framer.next().unwrap() {
                let Packet::Event { name, message } = packet else {
                    others.push(format!("{packet:?}"));
                    continue;
                };
                for c in children(message).unwrap() {
                    let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
                    let [to_us, to_peer] = c.sas.map(Option::unwrap);
                    assert_eq!(to_us.0, IpAddr::from([192, 0, 2, 1]));
                    assert_eq!(to_peer.0, IpAddr::from([192, 0, 2, 2]));
                    let names = format!("{}/{}", text(c.ike), text(c.child));
                    told.push((text(name), names, to_us.1, to_peer.1));
                }
            }
        }
        assert_eq!(
            others,
            ["Registered"; 4]
                .into_iter()
                .chain(["Done"])
                .collect::<Vec<_>>()
        );
        let expected =
            EXPECTED.map(|(event, names, a, b)| (event.to_owned(), names.to_owned(), a, b));
        assert_eq!(told, expected);
    }

    #[test]
    fn strange_values_are_left_out() {
        use Element::{End, Section, Value};
        let message = written(&[
            Value(b"up", b"yes"),
            Section(b"gw"),
            Section(b"child-sas"),
            // No name but the section's; another protocol; no SPI yet; not a number.
            Section(b"old"),
            Value(b"spi-in", b"c0000001"),
            Value(b"spi-out", b"zz"),
            End,
            Section(b"ah"),
            Value(b"protocol", b"AH"),
            Value(b"spi-in", b"c0000002"),
            End,
            Section(b"none"),
            Value(b"spi-in", b"00000000"),
            End,
            Section(b"x"),
            Value(b"spi-out", b"c0000003"),
            End,
            End,
            // Not about children.
            Section(b"tasks"),
            Section(b"y"),
            Value(b"spi-in", b"c0000004"),
            End,
            End,
            Value(b"local-host", b"::ffff:192.0.2.1"),
            Value(b"remote-host", b"%any"),
            End,
        ]);
        let us = IpAddr::from([192, 0, 2, 1]);
        let child = |child, sas| Child {
            ike: b"gw",
            child,
            sas,
        };
        assert_eq!(
            children(&message),
            Ok(vec![
                child(b"old", [Some((us, 0xc000_0001)), None]),
                child(b"x", [None, None]),
            ])
        );
    }
}
