//! Times a provider on batches of packets, for the choice at start and for the benchmarks.

use std::time::{Duration, Instant};

use sa_store::cipher::{CipherError, CipherJob, SaCipher};
use sa_store::sa::Direction;
use sa_store::suite::Suite;

use super::differential::{clear_packet, keys};
use super::provider::Provider;

/// Packets in a batch.
pub const BATCH: usize = 32;

/// Both ends of some SAs of one suite in one provider, and one batch of packets.
pub struct Rig {
    out: Vec<Box<dyn SaCipher>>,
    inn: Vec<Box<dyn SaCipher>>,
    /// The order in which SAs are met: every one once, far from its neighbour.
    step: usize,
    at: usize,
    /// Buffers of `stride` bytes with a packet of `len` bytes in each.
    memory: Vec<u8>,
    stride: usize,
    len: usize,
}

/// Where a packet starts in its buffer: behind Ethernet and IPv4 headers, as in life.
const HEADROOM: usize = 128 + 14 + 20;

impl Rig {
    /// `sas` SAs and packets of `body` bytes. Fails when the provider does not offer the suite.
    pub fn new(
        provider: &dyn Provider,
        suite: Suite,
        sas: usize,
        body: usize,
    ) -> Result<Self, CipherError> {
        let make = |n: usize, direction| {
            let seed = u8::try_from(n % 251).unwrap_or(0);
            provider
                .make(suite, &keys(suite, seed), false, direction)
                .ok_or(CipherError::Unsupported(suite))
        };
        let sas = sas.max(1);
        let (mut out, mut inn) = (Vec::with_capacity(sas), Vec::with_capacity(sas));
        for n in 0..sas {
            out.push(make(n, Direction::Out)?);
        }
        for n in 0..sas {
            inn.push(make(n, Direction::In)?);
        }
        let packet = clear_packet(suite, body, 77);
        // As far apart as frames are, and not a power of two.
        let stride = (HEADROOM + packet.len()).next_multiple_of(2048) + 128;
        let mut memory = vec![0; BATCH * stride];
        for buffer in memory.chunks_mut(stride) {
            buffer[HEADROOM..][..packet.len()].copy_from_slice(&packet);
        }
        Ok(Self {
            out,
            inn,
            step: coprime_step(sas),
            at: 0,
            memory,
            stride,
            len: packet.len(),
        })
    }

    /// Seals the batch with the next SAs and opens it again, key contexts prefetched first as workers do
    /// it. The two times, or `None` when a packet was refused.
    pub fn round_trip(&mut self) -> Option<(Duration, Duration)> {
        let sealed = self.run(Direction::Out)?;
        let opened = self.run(Direction::In)?;
        self.at = (self.at + BATCH * self.step) % self.out.len();
        Some((sealed, opened))
    }

    fn run(&mut self, direction: Direction) -> Option<Duration> {
        let contexts = match direction {
            Direction::Out => &self.out,
            Direction::In => &self.inn,
        };
        let mut at = self.at;
        let mut jobs: Vec<CipherJob<'_>> = Vec::with_capacity(BATCH);
        for buffer in self.memory.chunks_mut(self.stride) {
            let esp = buffer.get_mut(HEADROOM..)?.get_mut(..self.len)?;
            jobs.push(CipherJob {
                ctx: &**contexts.get(at)?,
                esp,
                seq_hi: 0,
                ok: false,
            });
            at = (at + self.step) % contexts.len();
        }
        let start = Instant::now();
        for job in &jobs {
            job.ctx.prefetch();
        }
        let first = jobs.first()?.ctx;
        match direction {
            Direction::Out => first.seal(&mut jobs),
            Direction::In => first.open(&mut jobs),
        }
        let took = start.elapsed();
        jobs.iter().all(|job| job.ok).then_some(took)
    }
}

/// A step that visits all of `n` and leaps far each time.
fn coprime_step(n: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut step = n * 5 / 13 + 1;
    while gcd(step, n) != 1 {
        step += 1;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::super::rustcrypto::RustCrypto;
    use super::*;

    #[test]
    fn a_rig_visits_every_sa_and_its_packets_survive() {
        for sas in [1, 2, 33, 100] {
            let mut seen = vec![false; sas];
            let step = coprime_step(sas);
            (0..sas).for_each(|i| seen[i * step % sas] = true);
            assert!(seen.iter().all(|s| *s));

            let suite: Suite = "aes-128-cbc+hmac-sha1-96".parse().expect("a suite");
            let mut rig = Rig::new(&RustCrypto, suite, sas, 64).expect("offered");
            let packets = |rig: &Rig| -> Vec<Vec<u8>> {
                let all = rig.memory.chunks(rig.stride);
                all.map(|b| b[HEADROOM..][..rig.len - suite.icv_len()].to_vec())
                    .collect()
            };
            let before = packets(&rig);
            for _ in 0..3 {
                assert!(rig.round_trip().is_some());
            }
            assert_eq!(packets(&rig), before);
        }
    }
}
