//! Messages of the vhost-user protocol: bytes to values and back. Nothing here has state.
//!
//! ```text
//! request 4 | flags 4: version 1 in bits 0-1, reply 2, need-reply 3 | size 4 | payload
//! ```

use std::os::fd::OwnedFd;

use super::memory::{MAX_REGIONS, RegionSpec};

/// Bytes of a message's header.
pub const HEADER: usize = 12;
/// Largest payload that any known message has: a full memory table.
pub const MAX_PAYLOAD: usize = 8 + 32 * MAX_REGIONS;
/// Most files that come with a message.
pub const MAX_FDS: usize = MAX_REGIONS;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// In the payload of kick, call and err: no file comes with it.
const NO_FD: u64 = 1 << 8;

/// Protocol features that we offer.
pub mod protocol {
    /// Several queue pairs.
    pub const MQ: u64 = 1 << 0;
    /// Any request can ask for an answer.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The peer tells the MTU.
    pub const MTU: u64 = 1 << 4;
    /// The peer tells the device status.
    pub const STATUS: u64 = 1 << 16;
    /// All of them.
    pub const OFFERED: u64 = MQ | REPLY_ACK | MTU | STATUS;
}

/// Addresses of a ring, in the peer's own address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddr {
    /// Ring.
    pub ring: u32,
    /// Descriptor area.
    pub descriptors: u64,
    /// Device area.
    pub device: u64,
    /// Driver area.
    pub driver: u64,
}

/// A request of the peer.
#[derive(Debug)]
#[allow(missing_docs, reason = "named as in the protocol's own text")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionSpec, OwnedFd)>),
    SetVringNum { ring: u32, num: u32 },
    SetVringAddr(RingAddr),
    SetVringBase { ring: u32, base: u32 },
    GetVringBase { ring: u32 },
    SetVringKick { ring: u32, fd: Option<OwnedFd> },
    SetVringCall { ring: u32, fd: Option<OwnedFd> },
    SetVringErr { ring: u32, fd: Option<OwnedFd> },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { ring: u32, on: bool },
    SendRarp,
    NetSetMtu(u64),
    SetStatus(u64),
    GetStatus,
}

/// A request, and what it asks for beside.
#[derive(Debug)]
pub struct Message {
    /// Number of the request, for the answer.
    pub number: u32,
    /// An answer is wanted to a request that has none.
    pub need_reply: bool,
    /// The request.
    pub request: Request,
}

/// A rule of the protocol that the peer broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Version or direction bits are wrong.
    #[error("flags {0:#x} are not those of a request of version 1")]
    Flags(u32),
    /// Longer than any message that we know.
    #[error("a payload of {0} bytes")]
    TooLong(u32),
    /// A request that we did not offer.
    #[error("request {0} is not one that was agreed on")]
    Unknown(u32),
    /// The payload has another size than the request needs.
    #[error("request {number} with a payload of {len} bytes")]
    Size {
        /// Request.
        number: u32,
        /// Bytes.
        len: usize,
    },
    /// More or fewer files than the request says.
    #[error("request {number} came with {fds} files")]
    Fds {
        /// Request.
        number: u32,
        /// Files.
        fds: usize,
    },
    /// A value that it cannot have.
    #[error("request {number}: {rule}")]
    Value {
        /// Request.
        number: u32,
        /// Rule broken.
        rule: &'static str,
    },
}

/// A message's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    number: u32,
    need_reply: bool,
    /// Bytes of the payload, at most [`MAX_PAYLOAD`].
    pub size: usize,
}

impl Header {
    /// Reads a request's header.
    ///
    /// # Errors
    /// `Flags`, `TooLong`.
    pub fn parse(bytes: [u8; HEADER]) -> Result<Header, MessageError> {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        let flags = u32::from_le_bytes([e, f, g, h]);
        let size = u32::from_le_bytes([i, j, k, l]);
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(MessageError::Flags(flags));
        }
        if size as usize > MAX_PAYLOAD {
            return Err(MessageError::TooLong(size));
        }
        Ok(Header {
            number: u32::from_le_bytes([a, b, c, d]),
            need_reply: flags & NEED_REPLY != 0,
            size: size as usize,
        })
    }
}

impl Message {
    /// Reads the rest of a request. Files that it may not have are closed.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(
        header: Header,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Message, MessageError> {
        let p = Payload {
            number: header.number,
            bytes: payload,
        };
        let takes_fds = matches!(header.number, 5 | 12 | 13 | 14);
        if !takes_fds && !fds.is_empty() {
            return Err(p.fds(fds.len()));
        }
        let request = match header.number {
            1 => p.none(Request::GetFeatures)?,
            2 => Request::SetFeatures(p.word()?),
            3 => p.none(Request::SetOwner)?,
            4 => p.none(Request::ResetOwner)?,
            5 => Request::SetMemTable(p.memory(fds)?),
            8 => p.state(|ring, num| Request::SetVringNum { ring, num })?,
            9 => Request::SetVringAddr(p.addresses()?),
            10 => p.state(|ring, base| Request::SetVringBase { ring, base })?,
            11 => p.state(|ring, _| Request::GetVringBase { ring })?,
            12 => p.file(fds, |ring, fd| Request::SetVringKick { ring, fd })?,
            13 => p.file(fds, |ring, fd| Request::SetVringCall { ring, fd })?,
            14 => p.file(fds, |ring, fd| Request::SetVringErr { ring, fd })?,
            15 => p.none(Request::GetProtocolFeatures)?,
            16 => Request::SetProtocolFeatures(p.word()?),
            17 => p.none(Request::GetQueueNum)?,
            18 => p.state(|ring, on| Request::SetVringEnable { ring, on: on != 0 })?,
            19 => p.word().map(|_| Request::SendRarp)?,
            20 => Request::NetSetMtu(p.word()?),
            39 => Request::SetStatus(p.word()?),
            40 => p.none(Request::GetStatus)?,
            number => return Err(MessageError::Unknown(number)),
        };
        Ok(Message {
            number: header.number,
            need_reply: header.need_reply,
            request,
        })
    }
}

/// The answer to request `number`.
pub fn reply(number: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [number, VERSION | REPLY, size] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

struct Payload<'a> {
    number: u32,
    bytes: &'a [u8],
}

impl Payload<'_> {
    fn size(&self) -> MessageError {
        MessageError::Size {
            number: self.number,
            len: self.bytes.len(),
        }
    }

    fn fds(&self, fds: usize) -> MessageError {
        MessageError::Fds {
            number: self.number,
            fds,
        }
    }

    fn value(&self, rule: &'static str) -> MessageError {
        MessageError::Value {
            number: self.number,
            rule,
        }
    }

    /// Some peers send a word of padding with requests that have no payload.
    fn none(&self, request: Request) -> Result<Request, MessageError> {
        if self.bytes.len() > 8 {
            return Err(self.size());
        }
        Ok(request)
    }

    fn word(&self) -> Result<u64, MessageError> {
        let bytes: [u8; 8] = self.bytes.try_into().map_err(|_| self.size())?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn state(&self, make: impl FnOnce(u32, u32) -> Request) -> Result<Request, MessageError> {
        let [a, b, c, d, e, f, g, h] = self.word()?.to_le_bytes();
        Ok(make(
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        ))
    }

    fn addresses(&self) -> Result<RingAddr, MessageError> {
        let (words, rest) = self.bytes.as_chunks::<8>();
        let ([first, descriptors, device, driver, _log], []) = (words, rest) else {
            return Err(self.size());
        };
        let [a, b, c, d, flags, ..] = *first;
        if flags & 1 != 0 {
            return Err(self.value("logging of writes was not agreed on"));
        }
        Ok(RingAddr {
            ring: u32::from_le_bytes([a, b, c, d]),
            descriptors: u64::from_le_bytes(*descriptors),
            device: u64::from_le_bytes(*device),
            driver: u64::from_le_bytes(*driver),
        })
    }

    fn memory(&self, fds: Vec<OwnedFd>) -> Result<Vec<(RegionSpec, OwnedFd)>, MessageError> {
        let (words, rest) = self.bytes.as_chunks::<8>();
        let (Some((first, regions)), []) = (words.split_first(), rest) else {
            return Err(self.size());
        };
        let [a, b, c, d, ..] = *first;
        let n = u32::from_le_bytes([a, b, c, d]) as usize;
        if n == 0 || n > MAX_REGIONS {
            return Err(self.value("the number of memory regions is not 1 to 8"));
        }
        // Some peers send the whole table, whatever is used of it.
        if regions.len() < 4 * n {
            return Err(self.size());
        }
        if fds.len() != n {
            return Err(self.fds(fds.len()));
        }
        let (regions, _) = regions.as_chunks::<4>();
        Ok(regions
            .iter()
            .map(|r| {
                let [guest, size, user, offset] = r.map(u64::from_le_bytes);
                RegionSpec {
                    guest,
                    size,
                    user,
                    offset,
                }
            })
            .zip(fds)
            .collect())
    }

    fn file(
        &self,
        fds: Vec<OwnedFd>,
        make: impl FnOnce(u32, Option<OwnedFd>) -> Request,
    ) -> Result<Request, MessageError> {
        let word = self.word()?;
        let wanted = usize::from(word & NO_FD == 0);
        if fds.len() != wanted {
            return Err(self.fds(fds.len()));
        }
        let [ring, ..] = word.to_le_bytes();
        Ok(make(ring.into(), fds.into_iter().next()))
    }
}
