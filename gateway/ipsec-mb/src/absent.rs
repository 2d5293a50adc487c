//! Stands in for the C side where the library is not part of the build: contexts cannot be expanded, as no
//! `Library` exists to expand them with.

use std::marker::PhantomData;

use crate::Unavailable;

pub(crate) fn start() -> Result<(u32, bool), Unavailable> {
    Err(Unavailable::NotBuilt)
}

pub(crate) struct GcmContext;

impl GcmContext {
    pub(crate) const fn zeroed() -> Self {
        Self
    }

    pub(crate) const fn bytes(&self) -> &[u8] {
        &[]
    }

    pub(crate) fn expand(&mut self, _: &[u8], _: [u8; 4], _: u8, _: u8, _: bool) {}

    pub(crate) fn prefetch(&self) {}

    pub(crate) fn raw(&self, _: &[u8; 12], _: &[u8], _: &mut [u8], _: bool) -> Vec<u8> {
        Vec::new()
    }
}

pub(crate) fn gcm_one(_: &[u8], _: &mut [u8], _: u32, _: bool) -> bool {
    false
}

#[derive(Clone, Copy)]
#[expect(dead_code, reason = "written by `chain`, read by the C side only")]
pub(crate) struct Shape {
    pub(crate) salt: [u8; 4],
    pub(crate) cipher: u8,
    pub(crate) key_len: u8,
    pub(crate) mac: u8,
    pub(crate) iv_len: u8,
    pub(crate) icv_len: u8,
    pub(crate) esn: u8,
    pub(crate) outbound: u8,
}

pub(crate) struct ChainContext;

impl ChainContext {
    pub(crate) const fn zeroed() -> Self {
        Self
    }

    pub(crate) fn expand(&mut self, _: Shape, _: &[u8], _: &[u8]) -> bool {
        false
    }

    pub(crate) fn prefetch(&self) {}
}

pub(crate) struct Run<'a, C>(PhantomData<(&'a C, &'a mut [u8])>);

impl<'a, C> Run<'a, C> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }

    pub(crate) fn push(&mut self, _: &'a C, _: &'a mut [u8], _: u32) -> bool {
        false
    }
}

impl<'a> Run<'a, GcmContext> {
    pub(crate) fn push_block(&mut self, _: &'a [u8], _: &'a mut [u8], _: u32) -> bool {
        false
    }

    pub(crate) fn gcm_seal(&mut self) -> u64 {
        0
    }

    pub(crate) fn gcm_open(&mut self) -> u64 {
        0
    }
}

impl Run<'_, ChainContext> {
    pub(crate) fn chain(&mut self, _: bool) -> u64 {
        0
    }
}
