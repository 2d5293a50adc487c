//! Becoming an ordinary user once everything that needs rights is open.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, Group, Uid, User, geteuid, setgid, setgroups, setuid};

use crate::config::Privileges;

/// Why the gateway cannot become the user that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// No such user.
    #[error("privileges.user: there is no user \"{0}\"")]
    NoUser(String),
    /// No such group.
    #[error("there is no group \"{0}\"")]
    NoGroup(String),
    /// Only root can become somebody else.
    #[error("privileges.user is \"{0}\", but only root can change the user")]
    NotRoot(String),
    /// The system refused.
    #[error("capabilities: {0}")]
    Caps(#[from] CapsError),
    /// The system refused.
    #[error("cannot {step}: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: nix::Error,
    },
}

/// Group id of a group's name.
pub(super) fn group_id(name: &str) -> Result<Gid, PrivilegeError> {
    let found = Group::from_name(name).map_err(|source| PrivilegeError::System {
        step: "look the group up",
        source,
    })?;
    found
        .map(|g| g.gid)
        .ok_or_else(|| PrivilegeError::NoGroup(name.into()))
}

/// Keeps this thread's capabilities from programs that it or its threads start, above all the hook of `[rekey]`: a service
/// manager gives a service that is not root ambient ones, which a program would be born with.
pub(super) fn keep_from_programs() -> Result<(), PrivilegeError> {
    caps::clear(None, CapSet::Inheritable)?;
    caps::clear(None, CapSet::Ambient)?;
    Ok(())
}

/// Changes to the configured user, with no supplementary groups and no capabilities but those `kept`, which this thread and those
/// that it starts have.
pub(super) fn drop_to(p: &Privileges, kept: &[Capability]) -> Result<(), PrivilegeError> {
    let Some(name) = &p.user else {
        if geteuid().is_root() {
            tracing::warn!(
                "running as root; set privileges.user, or start as a user with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF"
            );
        }
        return Ok(());
    };
    let user = User::from_name(name).map_err(|source| PrivilegeError::System {
        step: "look the user up",
        source,
    })?;
    let user = user.ok_or_else(|| PrivilegeError::NoUser(name.clone()))?;
    let gid = match &p.group {
        Some(g) => group_id(g)?,
        None => user.gid,
    };
    if geteuid() == user.uid {
        return Ok(());
    }
    if !geteuid().is_root() {
        return Err(PrivilegeError::NotRoot(name.clone()));
    }
    let system = |step| move |source| PrivilegeError::System { step, source };
    if !kept.is_empty() {
        caps::securebits::set_keepcaps(true)?;
    }
    setgroups(&[gid]).map_err(system("leave root's groups"))?;
    setgid(gid).map_err(system("change the group"))?;
    // For all threads; it takes every capability with it.
    setuid(user.uid).map_err(system("change the user"))?;
    if setuid(Uid::from_raw(0)).is_ok() {
        return Err(PrivilegeError::System {
            step: "give up root for good",
            source: nix::Error::EPERM,
        });
    }
    if !kept.is_empty() {
        let kept: CapsHashSet = kept.iter().copied().collect();
        caps::set(None, CapSet::Effective, &CapsHashSet::new())?;
        caps::set(None, CapSet::Permitted, &kept)?;
        caps::set(None, CapSet::Effective, &kept)?;
    }
    tracing::info!(user = %name, "privileges dropped");
    Ok(())
}

/// Gives up in this thread what [`drop_to`] kept.
pub(super) fn drop_kept(p: &Privileges, kept: &[Capability]) -> Result<(), PrivilegeError> {
    if p.user.is_some() && !kept.is_empty() && !geteuid().is_root() {
        caps::clear(None, CapSet::Effective)?;
        caps::clear(None, CapSet::Permitted)?;
    }
    Ok(())
}
