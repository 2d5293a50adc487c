//! VICI on the wire: packets behind their lengths, and messages of nested sections. Everything here comes from outside.
//!
//! ```text
//!   stream    length (4, big-endian) packet …
//!   packet    type (1) [name: length (1), bytes] message
//!   message   element …                          sections may nest, lists may not
//!   element   type (1) [name] [value: length (2, big-endian), bytes]
//! ```

use thiserror::Error;

/// Longest packet that daemons send, bytes.
pub(super) const LONGEST: usize = 512 * 1024;
/// Deepest nesting of sections that is followed; daemons use four.
const DEEPEST: usize = 16;

/// Which rule the daemon has broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum WireError {
    /// The stream is out of step, or this is no VICI.
    #[error("a packet of {0} bytes")]
    Length(u32),
    /// A type that a daemon does not send.
    #[error("a packet of type {0}")]
    Packet(u8),
    /// A length within the packet goes beyond its end.
    #[error("a packet that is cut short")]
    CutShort,
    /// A type that messages do not have.
    #[error("a message with an element of type {0}")]
    Element(u8),
    /// Sections and lists do not close each other.
    #[error("a message whose sections do not close each other")]
    Unbalanced,
    /// More sections within each other than anything needs.
    #[error("a message of more than {DEEPEST} levels")]
    TooDeep,
}

/// What a daemon sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet<'p> {
    /// The command is done.
    Done,
    /// There is no such command.
    UnknownCommand,
    /// The events will come.
    Registered,
    /// There are no such events.
    UnknownEvent,
    /// An event.
    Event { name: &'p [u8], message: &'p [u8] },
}

/// Cuts the stream into packets.
#[derive(Debug, Default)]
pub(super) struct Framer {
    /// What has come and was not taken begins at `at`; never more than a packet and one [`push`](Self::push).
    heard: Vec<u8>,
    at: usize,
}

impl Framer {
    /// Takes in what was read.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.heard.drain(..self.at);
        self.at = 0;
        self.heard.extend_from_slice(bytes);
    }

    /// Whether a packet is complete.
    pub(super) fn is_ready(&self) -> Result<bool, WireError> {
        Ok(self.waiting()?.is_some())
    }

    /// The next packet, if it is complete.
    pub(super) fn next(&mut self) -> Result<Option<Packet<'_>>, WireError> {
        let Some(length) = self.waiting()? else {
            return Ok(None);
        };
        let start = self.at + 4;
        self.at = start + length;
        self.heard
            .get(start..self.at)
            .map(Packet::parse)
            .transpose()
    }

    /// Length of the packet that has come as a whole.
    fn waiting(&self) -> Result<Option<usize>, WireError> {
        let rest = self.heard.get(self.at..).unwrap_or_default();
        let Some((length, rest)) = rest.split_first_chunk() else {
            return Ok(None);
        };
        let announced = u32::from_be_bytes(*length);
        let length = usize::try_from(announced)
            .ok()
            .filter(|l| (1..=LONGEST).contains(l))
            .ok_or(WireError::Length(announced))?;
        Ok((rest.len() >= length).then_some(length))
    }
}

impl<'p> Packet<'p> {
    /// Without its length. What follows answers is not looked at: nothing here asks for it.
    pub(super) fn parse(packet: &'p [u8]) -> Result<Self, WireError> {
        let mut rest = Cursor(packet);
        Ok(match rest.byte()? {
            1 => Self::Done,
            2 => Self::UnknownCommand,
            5 => Self::Registered,
            6 => Self::UnknownEvent,
            7 => Self::Event {
                name: rest.name()?,
                message: rest.0,
            },
            other => return Err(WireError::Packet(other)),
        })
    }
}

/// A piece of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element<'m> {
    /// A section begins.
    Section(&'m [u8]),
    /// The latest section ends.
    End,
    /// A key and its value.
    Value(&'m [u8], &'m [u8]),
    /// A list begins.
    List(&'m [u8]),
    /// One of its items.
    Item(&'m [u8]),
    /// It ends.
    ListEnd,
}

/// Goes through a message. After an error it is over.
#[derive(Debug)]
pub(super) struct Elements<'m> {
    rest: Cursor<'m>,
    depth: usize,
    in_list: bool,
    failed: bool,
}

impl<'m> Elements<'m> {
    pub(super) fn of(message: &'m [u8]) -> Self {
        Self {
            rest: Cursor(message),
            depth: 0,
            in_list: false,
            failed: false,
        }
    }

    fn element(&mut self) -> Result<Element<'m>, WireError> {
        let kind = self.rest.byte()?;
        // Items and the end are within lists, all else is not.
        if (1..=6).contains(&kind) && self.in_list != matches!(kind, 5 | 6) {
            return Err(WireError::Unbalanced);
        }
        Ok(match kind {
            1 => {
                self.depth += 1;
                if self.depth > DEEPEST {
                    return Err(WireError::TooDeep);
                }
                Element::Section(self.rest.name()?)
            }
            2 => {
                self.depth = self.depth.checked_sub(1).ok_or(WireError::Unbalanced)?;
                Element::End
            }
            3 => Element::Value(self.rest.name()?, self.rest.value()?),
            4 => {
                self.in_list = true;
                Element::List(self.rest.name()?)
            }
            5 => Element::Item(self.rest.value()?),
            6 => {
                self.in_list = false;
                Element::ListEnd
            }
            other => return Err(WireError::Element(other)),
        })
    }
}

impl<'m> Iterator for Elements<'m> {
    type Item = Result<Element<'m>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        if self.rest.0.is_empty() {
            let open = self.depth != 0 || self.in_list;
            self.failed = true;
            return open.then_some(Err(WireError::Unbalanced));
        }
        let element = self.element();
        self.failed = element.is_err();
        Some(element)
    }
}

/// Reads, never beyond the end.
#[derive(Clone, Copy, Debug)]
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn byte(&mut self) -> Result<u8, WireError> {
        let (byte, rest) = self.0.split_first().ok_or(WireError::CutShort)?;
        self.0 = rest;
        Ok(*byte)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(WireError::CutShort)?;
        self.0 = rest;
        Ok(taken)
    }

    fn name(&mut self) -> Result<&'a [u8], WireError> {
        let length = self.byte()?;
        self.take(usize::from(length))
    }

    fn value(&mut self) -> Result<&'a [u8], WireError> {
        let length = u16::from_be_bytes([self.byte()?, self.byte()?]);
        self.take(usize::from(length))
    }
}

/// Asks to be told of events.
pub(super) fn register(event: &'static str) -> Vec<u8> {
    framed(3, event, &[])
}

/// A command with arguments.
pub(super) fn command(name: &'static str, arguments: &[(&'static str, &'static str)]) -> Vec<u8> {
    framed(0, name, arguments)
}

/// Names and values are ours, and short.
fn framed(kind: u8, name: &str, arguments: &[(&str, &str)]) -> Vec<u8> {
    let short = |s: &str| u8::try_from(s.len()).unwrap_or(u8::MAX);
    let mut packet = vec![kind, short(name)];
    packet.extend(name.bytes());
    for (key, value) in arguments {
        packet.extend([3, short(key)]);
        packet.extend(key.bytes());
        packet.extend([0, short(value)]);
        packet.extend(value.bytes());
    }
    let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &packet].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example of the protocol's description.
    const EXAMPLE: &[u8] = b"\x03\x04key1\x00\x06value1\x01\x08section1\x01\x0bsub-section\x03\x04key2\x00\x06value2\x02\
        \x04\x05list1\x05\x00\x05item1\x05\x00\x05item2\x06\x02";

    fn all(message: &[u8]) -> Result<Vec<Element<'_>>, WireError> {
        Elements::of(message).collect()
    }

    #[test]
    fn a_message_is_its_elements() {
        let expected = [
            Element::Value(b"key1", b"value1"),
            Element::Section(b"section1"),
            Element::Section(b"sub-section"),
            Element::Value(b"key2", b"value2"),
            Element::End,
            Element::List(b"list1"),
            Element::Item(b"item1"),
            Element::Item(b"item2"),
            Element::ListEnd,
            Element::End,
        ];
        assert_eq!(all(EXAMPLE), Ok(expected.to_vec()));
        assert_eq!(all(b""), Ok(Vec::new()));
    }

    #[test]
    fn each_broken_rule_has_its_error() {
        let deep = b"\x01\x00".repeat(DEEPEST + 1);
        for (message, rule) in [
            (&b"\x02"[..], WireError::Unbalanced),
            (b"\x01\x01a", WireError::Unbalanced),
            (b"\x04\x01a", WireError::Unbalanced),
            (b"\x05\x00\x00", WireError::Unbalanced),
            (b"\x06", WireError::Unbalanced),
            (b"\x04\x01a\x04\x01b\x06\x06", WireError::Unbalanced),
            (b"\x04\x01a\x03\x01b\x00\x00\x06", WireError::Unbalanced),
            (b"\x01\x05a", WireError::CutShort),
            (b"\x03\x01a", WireError::CutShort),
            (b"\x03\x01a\x00", WireError::CutShort),
            (b"\x03\x01a\x01\x00b", WireError::CutShort),
            (b"\x00", WireError::Element(0)),
            (b"\x07", WireError::Element(7)),
            (&deep, WireError::TooDeep),
        ] {
            assert_eq!(all(message), Err(rule), "{message:?}");
        }
        for (packet, rule) in [
            (&b""[..], WireError::CutShort),
            (b"\x07", WireError::CutShort),
            (b"\x07\x02a", WireError::CutShort),
            (b"\x00\x01a", WireError::Packet(0)),
            (b"\x03\x01a", WireError::Packet(3)),
            (b"\xff", WireError::Packet(255)),
        ] {
            assert_eq!(Packet::parse(packet), Err(rule), "{packet:?}");
        }
    }

    #[test]
    fn lengths_that_no_daemon_sends_end_the_stream() {
        let most = u32::try_from(LONGEST).unwrap();
        for length in [0, most + 1, u32::MAX] {
            let mut framer = Framer::default();
            framer.push(&length.to_be_bytes());
            assert_eq!(framer.next(), Err(WireError::Length(length)));
        }
        let mut framer = Framer::default();
        framer.push(&most.to_be_bytes());
        assert_eq!(framer.next(), Ok(None));
    }

    #[test]
    fn requests_are_framed() {
        assert_eq!(register("ab"), b"\0\0\0\x04\x03\x02ab");
        let asked = command("list-sas", &[("noblock", "yes")]);
        assert_eq!(
            asked,
            b"\0\0\0\x18\x00\x08list-sas\x03\x07noblock\x00\x03yes"
        );
    }

    #[derive(Clone, Debug)]
    enum Tree {
        Value(Vec<u8>, Vec<u8>),
        List(Vec<u8>, Vec<Vec<u8>>),
        Section(Vec<u8>, Vec<Tree>),
    }

    impl Tree {
        fn write(&self, to: &mut Vec<u8>) {
            let name = |to: &mut Vec<u8>, n: &[u8]| {
                to.push(u8::try_from(n.len()).unwrap());
                to.extend(n);
            };
            let value = |to: &mut Vec<u8>, v: &[u8]| {
                to.extend(u16::try_from(v.len()).unwrap().to_be_bytes());
                to.extend(v);
            };
            match self {
                Self::Value(n, v) => {
                    to.push(3);
                    name(to, n);
                    value(to, v);
                }
                Self::List(n, items) => {
                    to.push(4);
                    name(to, n);
                    for i in items {
                        to.push(5);
                        value(to, i);
                    }
                    to.push(6);
                }
                Self::Section(n, inner) => {
                    to.push(1);
                    name(to, n);
                    inner.iter().for_each(|t| t.write(to));
                    to.push(2);
                }
            }
        }

        fn elements<'t>(&'t self, to: &mut Vec<Element<'t>>) {
            match self {
                Self::Value(n, v) => to.push(Element::Value(n, v)),
                Self::List(n, items) => {
                    to.push(Element::List(n));
                    to.extend(items.iter().map(|i| Element::Item(i)));
                    to.push(Element::ListEnd);
                }
                Self::Section(n, inner) => {
                    to.push(Element::Section(n));
                    inner.iter().for_each(|t| t.elements(to));
                    to.push(Element::End);
                }
            }
        }
    }

    fn trees() -> impl Strategy<Value = Vec<Tree>> {
        let name = || prop::collection::vec(any::<u8>(), 0..12);
        let value = || prop::collection::vec(any::<u8>(), 0..300);
        let leaf = prop_oneof![
            (name(), value()).prop_map(|(n, v)| Tree::Value(n, v)),
            (name(), prop::collection::vec(value(), 0..4)).prop_map(|(n, i)| Tree::List(n, i)),
        ];
        let tree = leaf.prop_recursive(4, 32, 4, move |inner| {
            (name(), prop::collection::vec(inner, 0..4)).prop_map(|(n, t)| Tree::Section(n, t))
        });
        prop::collection::vec(tree, 0..4)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(trees in trees()) {
            let (mut bytes, mut expected) = (Vec::new(), Vec::new());
            for t in &trees {
                t.write(&mut bytes);
                t.elements(&mut expected);
            }
            prop_assert_eq!(all(&bytes), Ok(expected));
        }

        #[test]
        fn messages_cut_short_are_refused_or_shorter(trees in trees(), cut in any::<prop::sample::Index>()) {
            let mut bytes = Vec::new();
            trees.iter().for_each(|t| t.write(&mut bytes));
            let whole = all(&bytes).unwrap();
            let part = Elements::of(&bytes[..cut.index(bytes.len() + 1)]);
            let part: Vec<_> = part.map_while(Result::ok).collect();
            prop_assert_eq!(&part[..], &whole[..part.len()]);
        }

        #[test]
        fn packets_are_the_same_wherever_the_stream_is_cut(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..6),
            cuts in prop::collection::vec(1_usize..40, 1..20),
        ) {
            let mut stream = Vec::new();
            for m in &messages {
                let packet = [b"\x07\x01e", &m[..]].concat();
                stream.extend(u32::try_from(packet.len()).unwrap().to_be_bytes());
                stream.extend(packet);
            }
            let (mut framer, mut got) = (Framer::default(), Vec::new());
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                framer.push(now);
                while let Some(p) = framer.next().unwrap() {
                    let Packet::Event { name: b"e", message } = p else { panic!("{p:?}") };
                    got.push(message.to_vec());
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, messages);
        }
    }
}
