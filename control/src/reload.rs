//! Changes of the running gateway. While SA files are read and the disk takes leases in, control goes on with everything
//! else: the kernel's news, rekeys, packets that wait for a neighbour.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sa_store::lease::LeaseError;

use crate::core::{Control, lock};
use crate::desired;
use crate::mirrored::{Mirrored, PartId};
use crate::origins::Reload;

/// Between two looks at whether the leases are durable.
const LOOK: Duration = Duration::from_millis(1);

/// Reads the SA files and makes them the running state, as [`Control::reload`] does, which waits.
pub(crate) async fn reload(control: &Arc<Mutex<Control>>) -> Reload {
    let turns = Arc::clone(&lock(control).reload_turns);
    // One at a time, each with what the files say when its turn comes.
    let _turn = turns.lock().await;
    let began = Instant::now();
    let files = lock(control).sa_files.clone();
    let config = match tokio::task::spawn_blocking(move || desired::load(&files)).await {
        Ok(Ok(config)) => config,
        Ok(Err(p)) => {
            let problems = p.iter().map(ToString::to_string).collect();
            return lock(control).refused(problems, began).clone();
        }
        Err(e) => {
            let problem = format!("reading the SA files failed: {e}");
            return lock(control).refused(vec![problem], began).clone();
        }
    };
    lock(control).claim_for_files(&config);
    until(control, |c| c.rosters.files.is_ready()).await;
    lock(control).apply_since(config, began).clone()
}

/// Claims the leases that parts of the mirror will want, and waits until the disk has them.
pub(crate) async fn ready_for(control: &Arc<Mutex<Control>>, parts: &[(PartId, Mirrored)]) {
    lock(control).claim_for_mirror(parts);
    until(control, |c| c.rosters.mirror.is_ready()).await;
}

async fn until(control: &Arc<Mutex<Control>>, is_so: impl Fn(&Control) -> bool) {
    while !is_so(&lock(control)) {
        tokio::time::sleep(LOOK).await;
    }
}

impl Control {
    fn claim_for_files(&mut self, config: &sa_store::file::Config) {
        // It will be refused.
        if !desired::too_short(config, &self.rekeys.config).is_empty() {
            return;
        }
        let files = &mut self.rosters.files;
        let done = files.claim_ahead(config.sas.iter(), &self.leases);
        self.claimed(done);
    }

    fn claim_for_mirror(&mut self, parts: &[(PartId, Mirrored)]) {
        let sas = parts.iter().flat_map(|(_, m)| &m.config.sas);
        let done = self.rosters.mirror.claim_ahead(sas, &self.leases);
        self.claimed(done);
    }

    fn claimed(&mut self, done: Result<(), LeaseError>) {
        if let Err(e) = done {
            self.lease_trouble(&e);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sa_store::file::{Config, parse};
    use sa_store::lease::{LeaseStore, LeaseWriter};
    use sa_store::sa::Direction;

    use super::*;
    use crate::common::{Plane, control, sa_file, write_private};

    fn config(salt: u8) -> Config {
        let text = sa_file(3, 3, salt);
        parse(&text, Path::new("sa.toml")).unwrap_or_else(|p| panic!("{p}"))
    }

    fn added(c: &mut Control, config: Config) -> usize {
        let outcome = c.apply(config);
        assert!(outcome.ok, "{:?}", outcome.problems);
        outcome.added
    }

    fn wait(c: &Control) {
        let began = Instant::now();
        while !c.rosters.files.is_ready() {
            assert!(began.elapsed() < Duration::from_secs(60));
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn what_was_claimed_ahead_is_what_runs_and_the_rest_is_given_back() {
        let mut c = control(&Arc::default(), Vec::new());
        assert!(c.apply(config(0)).ok);
        c.claim_for_files(&config(1));
        wait(&c);
        // Meanwhile the files have changed again: the keys of before are free.
        c.claim_for_files(&config(2));
        assert_eq!(added(&mut c, config(2)), 6);
        assert_eq!(added(&mut c, config(1)), 6);
        // Keys that run, or are not wanted in the end, are not claimed for good either.
        c.claim_for_files(&config(1));
        c.claim_for_files(&config(3));
        assert_eq!(c.apply(Config::default()).removed, 6);
        assert_eq!(added(&mut c, config(3)), 6);
    }

    #[test]
    fn tunnels_go_to_the_workers_in_the_order_of_the_files() {
        let mut c = control(&Arc::default(), Vec::new());
        let text = sa_file(40, 0, 0);
        let wanted = parse(&text, Path::new("sa.toml")).unwrap_or_else(|p| panic!("{p}"));
        assert!(c.apply(wanted).ok);
        let names = c.store.tunnels().iter().map(|t| t.name.as_str());
        assert!(names.eq((0..40).map(|n| format!("t{n}"))));
    }

    #[test]
    fn the_other_origin_has_what_it_claimed_while_the_files_change() {
        let mut c = control(&Arc::default(), Vec::new());
        let wanted = Mirrored {
            config: config(4),
            ..Mirrored::default()
        };
        c.claim_for_mirror(&[(PartId(1), wanted)]);
        assert!(c.apply(config(0)).ok);
        c.claim_for_files(&config(4));
        let outcome = c.apply(config(4)).clone();
        let problem = outcome.problems.first().expect("the mirror's keys");
        assert!(problem.contains("in use"), "{problem}");
    }

    #[test]
    fn an_end_while_a_change_waits_for_the_disk_costs_its_sas_no_number() {
        let dir = tempfile::tempdir().unwrap();
        let open = || LeaseStore::open(dir.path()).unwrap();
        let mut c = control(&Arc::default(), Vec::new());
        c.leases = LeaseWriter::start(open(), Box::new(|e| panic!("{e}"))).unwrap();
        let wanted = config(0);
        c.claim_for_files(&wanted);
        wait(&c);
        c.finish(true).unwrap();
        let mut store = open();
        for sa in &wanted.sas {
            let first = u64::from(sa.direction == Direction::Out);
            assert_eq!(store.claim(sa).unwrap().value, first, "{}", sa.name);
        }
    }

    #[tokio::test]
    async fn reloads_that_are_asked_for_at_once_each_take_what_the_files_say() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sa.toml");
        write_private(&path, &sa_file(3, 0, 0));
        let plane: Arc<Plane> = Arc::default();
        let control = Arc::new(Mutex::new(control(&plane, vec![path.clone()])));
        let first = reload(&control).await;
        assert_eq!((first.ok, first.added), (true, 6), "{:?}", first.problems);
        write_private(&path, &sa_file(3, 3, 9));
        let (a, b) = tokio::join!(reload(&control), reload(&control));
        assert_eq!((a.ok, a.added, b.added, b.kept), (true, 6, 0, 6));
        write_private(&path, "[[tunnel]]\n");
        let bad = reload(&control).await;
        assert!(!bad.ok && !bad.problems.is_empty());
        assert_eq!(bad.epoch, b.epoch);
    }
}
