//! Why the store did not do it.

use std::io;
use std::path::PathBuf;

/// Why the store did not do it. Numbers that were not committed must not be used.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The operating system refused. The operator is to look at disk and permissions.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another gateway runs with this store.
    #[error("lease store {} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// Others could set the counters back.
    #[error("lease store {} (mode {mode:04o}, user {uid}) must be a directory of ours or root's that nobody else can write", .path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
    },
    /// Not a store, or damaged beyond what a power cut can do. The operator is to restore nothing: give all
    /// SAs new keys and start a new store.
    #[error("lease store {}: {what}; give all SAs new keys, then remove it", .path.display())]
    Damaged {
        /// The store.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// No record: the store was lost or changed, or the key is new and the operator did not say so.
    #[error(
        "no lease record for the key of SA \"{sa}\": give it a new key, or write first_use = true if it never sent or received a packet"
    )]
    NoRecord {
        /// The SA.
        sa: String,
    },
    /// The key was out of use for so long that it was retired; its numbers are forgotten.
    #[error(
        "the key of SA \"{sa}\" was used before and was retired, or looks like one that was: give it a new key"
    )]
    Retired {
        /// The SA.
        sa: String,
    },
    /// Two SAs of one key.
    #[error("the key of SA \"{sa}\" is in use by another SA")]
    InUse {
        /// The SA.
        sa: String,
    },
    /// The handle was released or retired. A fault of ours.
    #[error("the lease handle has ended")]
    Ended,
    /// An exact number above what was committed. A fault of ours.
    #[error("a number was used that no lease covered")]
    Overrun,
    /// A write or sync failed before; what is on disk is not known any more. The operator is to restart
    /// the gateway on a disk that works.
    #[error("the lease store failed earlier and takes no more changes")]
    Failed,
    /// The thread that writes is gone.
    #[error("the lease writer has stopped")]
    Stopped,
}
