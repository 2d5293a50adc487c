//! Keeps policies of one priority in order by labels with gaps, so that a policy put between two others
//! leaves the others' ranks alone.

/// Distance between neighbours where there is room: 40 insertions at one place before all is relabelled.
const STEP: u64 = 1 << 40;

/// Where an element of a list stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Grows strictly along the list.
    pub(super) label: u64,
    /// Whether the order relative to the elements that did not move is another, or the element is new.
    pub(super) moved: bool,
}

/// Labels for a list in order, `old[i]` the label that element `i` had. As few elements as possible move,
/// and unless some gap is used up the others keep their labels.
pub(super) fn assign(old: &[Option<u64>]) -> Vec<Place> {
    let kept = keep_longest_ordered(old);
    let mut labels = kept.clone();
    if fill(&mut labels).is_none() {
        labels.fill(None);
        // With nothing kept there is room: a list has fewer than 2^64 / STEP elements.
        let _ = fill(&mut labels);
    }
    places(&labels, &kept)
}

/// Labels for the part of a list between two elements that stay, as [`assign`]. `None` when there is not
/// room enough.
pub(super) fn assign_between(
    below: Option<u64>,
    old: &[Option<u64>],
    above: Option<u64>,
) -> Option<Vec<Place>> {
    let fits = |l: &u64| below.is_none_or(|b| b < *l) && above.is_none_or(|a| *l < a);
    let old: Vec<_> = old.iter().map(|l| l.filter(fits)).collect();
    let kept = keep_longest_ordered(&old);
    let start = usize::from(below.is_some());
    let mut labels: Vec<_> = below.map(Some).into_iter().collect();
    labels.extend(&kept);
    labels.extend(above.map(Some));
    fill(&mut labels)?;
    Some(places(&labels[start..], &kept))
}

fn places(labels: &[Option<u64>], kept: &[Option<u64>]) -> Vec<Place> {
    let places = labels.iter().zip(kept).map(|(label, kept)| Place {
        label: label.unwrap_or(u64::MAX),
        moved: kept.is_none(),
    });
    places.collect()
}

/// Drops as few labels as possible so that the rest grows strictly.
fn keep_longest_ordered(old: &[Option<u64>]) -> Vec<Option<u64>> {
    let known = || old.iter().flatten();
    if known().zip(known().skip(1)).all(|(a, b)| a < b) {
        return old.to_vec();
    }
    // Patience sorting: tails[n] is the element with the smallest label that ends an ordered run of n + 1.
    let mut tails: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = vec![None; old.len()];
    for (i, label) in old.iter().enumerate() {
        if label.is_none() {
            continue;
        }
        let n = tails.partition_point(|&t| old[t] < *label);
        before[i] = n.checked_sub(1).map(|n| tails[n]);
        if n == tails.len() {
            tails.push(i);
        } else {
            tails[n] = i;
        }
    }
    let mut kept = vec![None; old.len()];
    let mut at = tails.last().copied();
    while let Some(i) = at {
        kept[i] = old[i];
        at = before[i];
    }
    kept
}

/// Gives labels to the elements without one; `None` when some gap is too narrow.
fn fill(labels: &mut [Option<u64>]) -> Option<()> {
    let mut i = 0;
    while i < labels.len() {
        if labels[i].is_some() {
            i += 1;
            continue;
        }
        let run = labels[i..].iter().take_while(|l| l.is_none()).count();
        let n = u64::try_from(run).ok()?;
        let below = i.checked_sub(1).and_then(|b| labels[b]);
        let above = labels.get(i + run).copied().flatten();
        let (first, step) = match (below, above) {
            (None, None) => (u64::MAX / 2 - n.checked_mul(STEP / 2)?, STEP),
            (Some(b), None) => {
                let step = STEP.min((u64::MAX - b) / (n + 1));
                (b + step, step)
            }
            (None, Some(a)) => {
                let step = STEP.min(a / (n + 1));
                (a - step * n, step)
            }
            (Some(b), Some(a)) => {
                let step = (a - b) / (n + 1);
                (b + step, step)
            }
        };
        if step == 0 {
            return None;
        }
        let mut next = first;
        for label in &mut labels[i..i + run] {
            *label = Some(next);
            next += step;
        }
        i += run;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(places: &[Place]) -> Vec<u64> {
        assert!(places.windows(2).all(|w| w[0].label < w[1].label));
        places.iter().map(|p| p.label).collect()
    }

    fn moved(places: &[Place]) -> Vec<usize> {
        (0..places.len()).filter(|&i| places[i].moved).collect()
    }

    #[test]
    fn labels_that_fit_the_order_stay() {
        let p = assign(&[None, Some(100), None, Some(200), None]);
        let l = labels(&p);
        assert_eq!((l[1], l[3]), (100, 200));
        assert_eq!(moved(&p), [0, 2, 4]);
    }

    #[test]
    fn one_moved_element_alone_gets_a_new_label() {
        let p = assign(&[Some(10), Some(50), Some(20), Some(30), Some(40)]);
        let l = labels(&p);
        assert_eq!((l[0], l[2], l[3], l[4]), (10, 20, 30, 40));
        assert_eq!(moved(&p), [1]);
    }

    #[test]
    fn a_gap_that_is_too_narrow_relabels_all_but_moves_only_the_new() {
        let p = assign(&[Some(10), None, Some(11)]);
        let l = labels(&p);
        assert_eq!(l[1] - l[0], STEP);
        assert_eq!(moved(&p), [1]);
    }

    #[test]
    fn a_part_is_labelled_between_its_neighbours_or_not_at_all() {
        let p = assign_between(Some(10), &[None, Some(15), Some(99)], Some(20)).expect("room");
        let l = labels(&p);
        assert!(l[0] > 10 && l[1] == 15 && l[2] > 15 && l[2] < 20);
        assert_eq!(moved(&p), [0, 2]);
        assert_eq!(assign_between(Some(10), &[None], Some(11)), None);
        assert_eq!(
            assign_between(None, &[None; 2], None).map(|p| p.len()),
            Some(2)
        );
    }

    #[test]
    fn appending_one_by_one_keeps_all_earlier_labels() {
        let mut l = labels(&assign(&[None; 3]));
        for _ in 0..1000 {
            let mut old: Vec<_> = l.iter().copied().map(Some).collect();
            old.push(None);
            let new = labels(&assign(&old));
            assert_eq!(new[..l.len()], l[..]);
            l = new;
        }
    }

    #[test]
    fn inserting_always_behind_the_first_stays_ordered() {
        let mut l = labels(&assign(&[None, None]));
        for _ in 0..200 {
            let mut old: Vec<_> = l.iter().copied().map(Some).collect();
            old.insert(1, None);
            l = labels(&assign(&old));
        }
    }
}
