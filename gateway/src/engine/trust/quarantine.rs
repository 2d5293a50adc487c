//! Out of service and back.

use std::time::Duration;

use pmd::engine::{EngineDead, EspEngine, EspJob, JobStatus};
use sa_store::runtime::SaEntry;
use sa_store::snapshot::Snapshot;

use super::recovery::{Courier, Gone, give_back};
use super::sas::Carrier;
use super::state::{EngineState, Reason};
use super::{Trusted, nanos};

/// A loss rate is judged over this time, nanoseconds,
const JUDGED_OVER: u64 = 1_000_000_000;
/// and over at least so many jobs.
const JUDGED_FROM: u64 = 100;
/// A job that is away for so many deadlines is fetched back by a reset.
const MOST_DEADLINES: u64 = 8;
/// How long somebody who waits for a reset waits.
const RESET: Duration = Duration::from_secs(30);
/// How long the end of a reset is waited for at the end.
const FAREWELL: Duration = Duration::from_secs(2);

/// Where the engine is.
enum Post {
    Serving(Box<dyn EspEngine>),
    /// With the thread that resets it.
    Away,
    /// Here, until its pause is over; then it serves if it was `proven`, else it is reset again.
    Resting {
        engine: Box<dyn EspEngine>,
        until: u64,
        proven: bool,
    },
    /// For good. Frames that it may still write to stay in it.
    Dead {
        _engine: Option<Box<dyn EspEngine>>,
    },
}

/// The engine and its record.
pub(super) struct Service {
    post: Post,
    failures: u32,
    /// When it was last taken into service.
    since: u64,
    /// It may not serve before.
    not_before: u64,
}

impl Service {
    pub(super) fn new(engine: Box<dyn EspEngine>) -> Service {
        Service {
            post: Post::Serving(engine),
            failures: 0,
            since: 0,
            not_before: 0,
        }
    }

    #[inline]
    pub(super) fn is_serving(&self) -> bool {
        matches!(self.post, Post::Serving(_))
    }

    /// The engine while it serves.
    #[inline]
    pub(super) fn engine(&mut self) -> Option<&mut dyn EspEngine> {
        match &mut self.post {
            Post::Serving(engine) => Some(&mut **engine),
            _ => None,
        }
    }

    /// Likewise, to look at.
    pub(super) fn peek(&self) -> Option<&dyn EspEngine> {
        match &self.post {
            Post::Serving(engine) => Some(&**engine),
            _ => None,
        }
    }
}

/// How many jobs were lost lately, and when anything came back.
#[derive(Debug)]
pub(super) struct Losses {
    since: u64,
    ended: u64,
    lost: u64,
    progress: u64,
}

impl Losses {
    pub(super) fn new(now: u64) -> Losses {
        Losses {
            since: now,
            ended: 0,
            lost: 0,
            progress: now,
        }
    }

    #[inline]
    pub(super) fn ended(&mut self, lost: bool) {
        self.ended += 1;
        self.lost += u64::from(lost);
    }

    /// Something came back, or went into an empty engine.
    #[inline]
    pub(super) fn progress(&mut self, now: u64) {
        self.progress = now;
    }

    /// Whether more than `most` in 10 000 were lost, once a second.
    fn are_too_many(&mut self, now: u64, most: u64) -> bool {
        if now.saturating_sub(self.since) < JUDGED_OVER {
            return false;
        }
        let bad = self.ended >= JUDGED_FROM && self.lost * 10_000 > self.ended * most;
        (self.since, self.ended, self.lost) = (now, 0, 0);
        bad
    }
}

impl Trusted {
    /// Deadlines, loss rate, the driver's own opinion.
    pub(super) fn watch_time(&mut self, now: u64) {
        let deadline = nanos(self.config.deadline);
        let overdue = self.tickets.overdue(now, deadline);
        for _ in 0..overdue.newly {
            self.losses.ended(true);
        }
        self.trust.lost.add(overdue.newly);
        let still = now.saturating_sub(self.losses.progress) > deadline;
        let reason = if self.service.peek().is_some_and(|e| !e.is_healthy()) {
            Some(Reason::Driver)
        } else if overdue.oldest > deadline
            && (still || overdue.oldest > deadline.saturating_mul(MOST_DEADLINES))
        {
            Some(Reason::Deadline)
        } else if self.losses.are_too_many(now, self.config.most_lost) {
            Some(Reason::Loss)
        } else {
            None
        };
        if let Some(reason) = reason {
            self.suspect.get_or_insert(reason);
        }
    }

    /// Takes the engine out of service and sends it to be reset.
    pub(super) fn quarantine(&mut self, reason: Reason, now: u64) {
        let post = std::mem::replace(&mut self.service.post, Post::Away);
        let Post::Serving(engine) = post else {
            self.service.post = post;
            return;
        };
        self.trust.set_reason(reason);
        self.trust.quarantines.add(1);
        let proven_itself = now.saturating_sub(self.service.since) > nanos(self.config.probation);
        // Without the first probation: a known answer that fails at once is a failure.
        if proven_itself && reason != Reason::KnownAnswer {
            self.service.failures = 0;
        }
        self.service.failures += 1;
        tracing::error!(
            engine = %self.config.name,
            reason = reason.name(),
            in_flight = self.tickets.jobs(),
            failures = self.service.failures,
            "out of service"
        );
        self.gone.extend(self.canaries.disband());
        self.sas.suspend(self.caps.renumbers, false);
        // The first attempt counts at once, the others after a pause.
        self.service.not_before = now + self.pause(self.service.failures - 1);
        self.dispatch(engine);
    }

    /// The pause behind so many failures.
    fn pause(&self, failures: u32) -> u64 {
        if failures == 0 {
            return 0;
        }
        let longest = nanos(self.config.longest_pause);
        let doubled = 1u64.checked_shl(failures - 1).unwrap_or(u64::MAX);
        nanos(self.config.pause)
            .saturating_mul(doubled)
            .min(longest)
    }

    fn dispatch(&mut self, engine: Box<dyn EspEngine>) {
        self.trust.resets.add(1);
        self.trust.set_state(EngineState::Recovering);
        self.service.post = Post::Away;
        if let Err(engine) = self.workshop.send(engine, std::mem::take(&mut self.gone)) {
            self.give_up(Some(engine), "there is no thread to reset it");
        }
    }

    fn give_up(&mut self, engine: Option<Box<dyn EspEngine>>, why: &str) {
        tracing::error!(engine = %self.config.name, failures = self.service.failures, why, "out of service for good");
        self.service.post = Post::Dead { _engine: engine };
        self.trust.set_state(EngineState::Dead);
        self.sas.suspend(self.caps.renumbers, true);
        self.gone.clear();
    }

    /// Looks after an engine that is out of service.
    #[inline]
    pub(super) fn attend(&mut self, now: u64, done: &mut Vec<EspJob>) {
        if !self.service.is_serving() {
            self.attend_absent(now, done);
        }
    }

    #[cold]
    fn attend_absent(&mut self, now: u64, done: &mut Vec<EspJob>) {
        match &self.service.post {
            Post::Away => match self.workshop.returned() {
                Ok(Some(courier)) => self.welcome(courier, now, done),
                Ok(None) => {}
                Err(Gone) => self.give_up(None, "the thread that reset it has ended"),
            },
            Post::Resting { until, .. } if now >= *until => {
                let post = std::mem::replace(&mut self.service.post, Post::Away);
                if let Post::Resting { engine, proven, .. } = post {
                    if proven {
                        self.resume(engine, now);
                    } else {
                        self.dispatch(engine);
                    }
                }
            }
            Post::Resting { .. } | Post::Serving(_) | Post::Dead { .. } => {}
        }
    }

    /// The engine has come back from its reset.
    fn welcome(&mut self, courier: Courier, now: u64, done: &mut Vec<EspJob>) {
        let Courier {
            engine,
            jobs,
            outcome,
            mut gone,
            anew,
        } = courier;
        // Nobody removes them when the reset fails.
        self.gone.append(&mut gone);
        if anew {
            self.sas.reinstall();
            self.gone.clear();
        }
        for mut job in jobs {
            let ticket = self.tickets.take(job.tag).filter(|t| t.canary.is_none());
            let Some(ticket) = ticket else {
                // A canary, or a known answer that came too late.
                self.pool.put(job.frame);
                continue;
            };
            ticket.restore(&mut job);
            job.status = JobStatus::Failed;
            self.samples.drop(ticket.sample);
            self.sas.landed(ticket.sa);
            self.trust.lost.add(u64::from(!ticket.is_overdue()));
            done.push(job);
        }
        match outcome {
            Ok(()) => {
                self.write_off(done);
                if now >= self.service.not_before {
                    self.resume(engine, now);
                } else {
                    self.rest(engine, self.service.not_before, true);
                }
            }
            Err(why) => {
                self.trust.resets_failed.add(1);
                self.service.failures += 1;
                let failures = self.service.failures;
                if failures > self.config.most_failures {
                    self.give_up(Some(engine), &why);
                    return;
                }
                tracing::error!(engine = %self.config.name, failures, why, "still out of service");
                self.rest(engine, now + self.pause(failures - 1), false);
            }
        }
    }

    fn rest(&mut self, engine: Box<dyn EspEngine>, until: u64, proven: bool) {
        // An engine that is proven but fails again and again stays out, too.
        if self.service.failures > self.config.most_failures {
            self.give_up(Some(engine), "it failed too often");
            return;
        }
        self.trust.set_state(EngineState::Quarantined);
        self.service.post = Post::Resting {
            engine,
            until,
            proven,
        };
    }

    /// Jobs that a reset which is proven did not bring back: their frames are lost, the jobs go back with others.
    fn write_off(&mut self, done: &mut Vec<EspJob>) {
        if self.tickets.all() == 0 {
            return;
        }
        let Trusted {
            tickets,
            samples,
            sas,
            pool,
            config,
            ..
        } = self;
        let mut missing = 0_u32;
        tickets.clear(|ticket| {
            samples.drop(ticket.sample);
            if ticket.canary.is_some() {
                return;
            }
            sas.landed(ticket.sa);
            missing += 1;
            if let Some(frame) = pool.get() {
                done.push(ticket.failed(frame));
            }
        });
        if missing != 0 {
            tracing::error!(engine = %config.name, missing, "frames did not come back from the engine: they stay away");
        }
    }

    /// Back in service.
    fn resume(&mut self, mut engine: Box<dyn EspEngine>, now: u64) {
        for id in self.gone.drain(..) {
            engine.remove(id);
        }
        // It may have been opened anew.
        self.stats = engine.stats().cloned();
        self.drivers.add(self.stats.as_ref());
        self.service.post = Post::Serving(engine);
        self.service.since = now;
        self.suspect = None;
        self.losses = Losses::new(now);
        self.canaries.hurry(now);
        self.trust.set_state(EngineState::Serving);
        tracing::info!(engine = %self.config.name, failures = self.service.failures, "back in service");
    }

    /// Brings SAs in line with the engine's state: those that are lost are told, those that wait are installed.
    pub(super) fn follow(&mut self, view: &Snapshot) {
        let mut engine = self.service.engine();
        let install = engine.as_mut().map(|engine| {
            |entry: &SaEntry| match engine.install(entry) {
                Ok(()) => Carrier::Engine,
                Err(refusal) => {
                    tracing::info!(%refusal, "the CPU carries it to its end");
                    Carrier::Cpu
                }
            }
        });
        self.sas.follow(view, install);
    }

    /// A reset that somebody asked for.
    pub(super) fn reset_now(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        let now = self.clock.now();
        self.quarantine(Reason::Asked, now);
        let dead = |reason: &str| EngineDead {
            engine: self.caps.name,
            reason: reason.into(),
        };
        if matches!(self.service.post, Post::Away) {
            let Ok(courier) = self.workshop.wait(RESET) else {
                return Err(dead("the reset takes too long"));
            };
            let why = courier.outcome.clone();
            self.welcome(courier, now, done);
            if let Err(why) = why {
                return Err(EngineDead {
                    engine: self.caps.name,
                    reason: why,
                });
            }
            return Ok(());
        }
        Err(dead("it is out of service"))
    }
}

impl Drop for Trusted {
    fn drop(&mut self) {
        if matches!(self.service.post, Post::Away)
            && let Ok(courier) = self.workshop.wait(FAREWELL)
        {
            give_back(courier);
        }
    }
}
