//! Clears the memory of a value when it is dropped.

use std::mem::MaybeUninit;
use std::ops::Deref;

use zeroize::Zeroize;

/// Owns a `T` and overwrites its memory, padding included, after dropping it. For key contexts of libraries that
/// do not wipe; what `T` keeps on the heap is its own affair, as are copies made before it came here.
pub struct Wiped<T>(MaybeUninit<T>);

impl<T> Wiped<T> {
    /// Takes `value`.
    pub const fn new(value: T) -> Self {
        Self(MaybeUninit::new(value))
    }
}

impl<T> Deref for Wiped<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: initialized by `new`, the only constructor; uninitialized again only in `drop`.
        unsafe { self.0.assume_init_ref() }
    }
}

impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        // SAFETY: initialized, see `deref`; nobody uses it after this.
        unsafe { self.0.assume_init_drop() };
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_after_the_drop() {
        let mut place = MaybeUninit::new(Wiped::new([0xa5_u64; 32]));
        // SAFETY: initialized above and not used as a `Wiped` again; afterwards only its bytes are read, all of
        // which the drop wrote.
        let bytes = unsafe {
            assert_eq!(place.assume_init_ref()[31], 0xa5);
            place.assume_init_drop();
            std::slice::from_raw_parts(place.as_ptr().cast::<u8>(), size_of::<[u64; 32]>())
        };
        assert!(bytes.iter().all(|b| *b == 0));
    }

    #[test]
    fn the_value_is_dropped_once() {
        let shared = std::rc::Rc::new(());
        let wiped = Wiped::new(shared.clone());
        assert_eq!(std::rc::Rc::strong_count(&wiped), 2);
        drop(wiped);
        assert_eq!(std::rc::Rc::strong_count(&shared), 1);
    }
}
