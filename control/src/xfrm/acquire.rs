//! Makes the kernel ask its daemon for an SA.
//!
//! Only a packet of the kernel's own raises an acquire. So one is sent that has the header of the packet that found no SA, from that
//! packet's source, and nothing else: the kernel's trap policy takes it. It may travel one hop at most, should the policy be
//! gone.

use std::io;
use std::net::{IpAddr, SocketAddr};

use sa_store::report::Flow;
use socket2::{Domain, Protocol, Socket, Type};

/// `IPPROTO_RAW`: whole IP packets.
const RAW: i32 = 255;

/// Lets the kernel meet a packet of this flow. Needs CAP_NET_RAW.
pub(super) fn provoke(flow: &Flow) -> io::Result<()> {
    let packet = packet(flow).ok_or(io::ErrorKind::InvalidInput)?;
    let socket = open(flow.source().is_ipv4())?;
    // The policy is looked up by the socket's source, which is not the gateway's.
    if flow.source().is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_freebind_v6(true)?;
    }
    socket.bind(&SocketAddr::new(flow.source(), 0).into())?;
    let to = SocketAddr::new(flow.destination(), 0).into();
    match socket.send_to(&packet, &to) {
        // How the kernel says that the packet waits for its SA, and that it does not.
        Err(e)
            if !matches!(
                e.raw_os_error(),
                Some(nix::libc::EAGAIN | nix::libc::EREMOTE)
            ) =>
        {
            Err(e)
        }
        _ => Ok(()),
    }
}

/// Whether acquires can be provoked.
///
/// # Errors
/// CAP_NET_RAW is lacking.
pub(super) fn try_out() -> io::Result<()> {
    open(true).map(drop)
}

fn open(v4: bool) -> io::Result<Socket> {
    let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Header and ports of the flow.
fn packet(flow: &Flow) -> Option<Vec<u8>> {
    match (flow.source(), flow.destination()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut p = vec![0; 28];
            // Length, ID and checksum are the kernel's to fill in.
            p[0] = 0x45;
            p[8] = 1;
            p[9] = flow.proto;
            p[12..16].copy_from_slice(&src.octets());
            p[16..20].copy_from_slice(&dst.octets());
            Some(ports(p, 20, flow))
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut p = vec![0; 48];
            p[0] = 0x60;
            p[5] = 8;
            p[6] = flow.proto;
            p[7] = 1;
            p[8..24].copy_from_slice(&src.octets());
            p[24..40].copy_from_slice(&dst.octets());
            Some(ports(p, 40, flow))
        }
        _ => None,
    }
}

fn ports(mut packet: Vec<u8>, at: usize, flow: &Flow) -> Vec<u8> {
    // ICMP has type and code there.
    let bytes: [u8; 4] = match flow.proto {
        1 | 58 => [
            flow.sport.to_be_bytes()[1],
            flow.dport.to_be_bytes()[1],
            0,
            0,
        ],
        _ => {
            let ([a, b], [c, d]) = (flow.sport.to_be_bytes(), flow.dport.to_be_bytes());
            [a, b, c, d]
        }
    };
    packet[at..at + 4].copy_from_slice(&bytes);
    packet
}
