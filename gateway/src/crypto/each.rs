//! Adapter for providers that cipher one packet at a time.

use std::any::Any;

use sa_store::cipher::{CipherJob, SaCipher};
use sa_store::prefetch::read_lines;

/// A keyed algorithm that handles one packet. The packet runs from SPI to ICV.
pub(super) trait OnePacket: Send + Sync + 'static {
    /// Encrypts in place and writes the ICV; false when the packet is malformed.
    fn seal_one(&self, esp: &mut [u8], seq_hi: u32) -> bool;
    /// Authenticates, then decrypts in place; false when the ICV is wrong or the packet malformed.
    fn open_one(&self, esp: &mut [u8], seq_hi: u32) -> bool;
}

/// Cache lines of a context to ask for: more would push out what others asked for.
const MOST_LINES: usize = 10;

/// [`SaCipher`] over a [`OnePacket`]. Equal lanes must mean equal `C`.
pub(super) struct Each<C> {
    lane: u16,
    inner: C,
}

impl<C: OnePacket> Each<C> {
    pub(super) fn boxed(lane: u16, inner: C) -> Box<dyn SaCipher> {
        Box::new(Self { lane, inner })
    }

    fn run(&self, jobs: &mut [CipherJob<'_>], f: impl Fn(&C, &mut [u8], u32) -> bool) {
        for job in jobs {
            // A context of another type in the batch breaks the lane rule; refusing it is safe.
            let of_lane = job.ctx.as_any().downcast_ref::<Self>();
            job.ok = of_lane.is_some_and(|c| f(&c.inner, job.esp, job.seq_hi));
        }
    }
}

impl<C: OnePacket> SaCipher for Each<C> {
    fn lane(&self) -> u16 {
        self.lane
    }

    fn prefetch(&self) {
        read_lines(&self.inner, size_of::<C>().div_ceil(64).min(MOST_LINES));
    }

    fn seal(&self, jobs: &mut [CipherJob<'_>]) {
        self.run(jobs, C::seal_one);
    }

    fn open(&self, jobs: &mut [CipherJob<'_>]) {
        self.run(jobs, C::open_one);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
