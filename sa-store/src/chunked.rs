//! A vector of shared chunks: a new version that differs in one place copies one chunk.

use std::sync::Arc;

const CHUNK: usize = 256;

/// Persistent vector. Cloning costs one pointer per 256 elements; [`set`](Chunked::set) copies one chunk when
/// an older version still shares it.
#[derive(Debug)]
pub struct Chunked<T> {
    chunks: Vec<Arc<Vec<T>>>,
    fill: T,
}

impl<T: Clone> Chunked<T> {
    /// Empty; places never written read as `fill`.
    pub fn new(fill: T) -> Self {
        Self {
            chunks: Vec::new(),
            fill,
        }
    }

    /// Number of places that exist, a multiple of the chunk size.
    pub fn capacity(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    /// The element, or the filler.
    #[inline]
    pub fn at(&self, index: u32) -> &T {
        let i = index as usize;
        self.chunks
            .get(i / CHUNK)
            .map_or(&self.fill, |c| &c[i % CHUNK])
    }

    /// Writes one place, growing as needed.
    pub fn set(&mut self, index: u32, value: T) {
        let i = index as usize;
        while self.capacity() <= i {
            self.chunks.push(Arc::new(vec![self.fill.clone(); CHUNK]));
        }
        Arc::make_mut(&mut self.chunks[i / CHUNK])[i % CHUNK] = value;
    }

    /// All places in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flat_map(|c| c.iter())
    }
}

impl<T: Clone> Clone for Chunked<T> {
    fn clone(&self) -> Self {
        Self {
            chunks: self.chunks.clone(),
            fill: self.fill.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_do_not_see_each_other() {
        let mut a = Chunked::new(0_u32);
        a.set(1000, 7);
        let mut b = a.clone();
        b.set(1000, 8);
        b.set(3, 9);
        assert_eq!((*a.at(1000), *a.at(3), *a.at(99_999)), (7, 0, 0));
        assert_eq!((*b.at(1000), *b.at(3)), (8, 9));
        assert!(
            Arc::ptr_eq(&a.chunks[1], &b.chunks[1]),
            "untouched chunks stay shared"
        );
    }
}
