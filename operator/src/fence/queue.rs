//! Which fences are worked on next. What was learnt, or has arrived at a proxy, goes at once: somebody waits for it. What a
//! change of the whole mesh concerns goes a few at a time, so that the others need not queue behind thousands.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Mutex, PoisonError};

use fenceline_crds::ServiceFence;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc;

use crate::world::Key;

/// How many fences that nobody waits for are under way at any moment.
const UNDER_WAY: usize = 24;
/// A change that concerns no more than these is for them.
const FEW: usize = 32;

/// Requests for the controller.
#[derive(Debug)]
pub(super) struct Queue {
    requests: mpsc::UnboundedSender<ObjectRef<ServiceFence>>,
    patient: Mutex<Patient>,
}

#[derive(Debug, Default)]
struct Patient {
    waiting: BTreeSet<Key>,
    under_way: HashSet<Key>,
}

impl Queue {
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<ObjectRef<ServiceFence>>) {
        let (requests, queue) = mpsc::unbounded_channel();
        let patient = Mutex::default();
        (Self { requests, patient }, queue)
    }

    /// Puts fences in: those that a change is about, and others that it may concern.
    pub(super) fn put(&self, about: BTreeSet<Key>, others: BTreeSet<Key>) {
        if about.len() <= FEW {
            about.iter().for_each(|fence| self.request(fence));
            self.patient().waiting.extend(others);
        } else {
            self.patient()
                .waiting
                .extend(about.into_iter().chain(others));
        }
        self.feed();
    }

    /// A fence was worked on, or is gone.
    pub(super) fn done(&self, fence: &Key) {
        if self.patient().under_way.remove(fence) {
            self.feed();
        }
    }

    fn patient(&self) -> std::sync::MutexGuard<'_, Patient> {
        self.patient.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self) {
        let mut patient = self.patient();
        while patient.under_way.len() < UNDER_WAY
            && let Some(fence) = patient.waiting.pop_first()
        {
            self.request(&fence);
            patient.under_way.insert(fence);
        }
    }

    fn request(&self, fence: &Key) {
        let fence = ObjectRef::new(&fence.name).within(&fence.namespace);
        // Nobody works on it once this replica no longer leads.
        let _ = self.requests.send(fence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(count: usize) -> BTreeSet<Key> {
        let key = |number| Key::new("shop", format!("fence-{number:04}"));
        (0..count).map(key).collect()
    }

    #[test]
    fn many_wait_and_few_do_not() {
        let (queue, mut requests) = Queue::new();
        queue.put(BTreeSet::new(), keys(1000));
        let mut sent = Vec::new();
        while let Ok(fence) = requests.try_recv() {
            sent.push(fence.name);
        }
        assert_eq!(sent.len(), UNDER_WAY);
        queue.put([Key::new("shop", "learnt")].into(), BTreeSet::new());
        assert_eq!(requests.try_recv().unwrap().name, "learnt");
        assert!(requests.try_recv().is_err(), "the others wait");
        for done in 0..1000 {
            queue.done(&Key::new("shop", format!("fence-{done:04}")));
        }
        let mut rest = 0;
        while requests.try_recv().is_ok() {
            rest += 1;
        }
        assert_eq!(sent.len() + rest, 1000);
        assert!(queue.patient().under_way.is_empty());
    }
}
