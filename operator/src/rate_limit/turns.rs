//! Turns for tenants' questions: some are put at once, few of one namespace, and namespaces take turns. So a hundred slow queries of one
//! delay nobody else's by more than a question.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

/// Questions at once: a Prometheus of its own default answers 20.
/// <https://prometheus.io/docs/prometheus/latest/command-line/prometheus/>
pub(super) const AT_ONCE: usize = 8;
/// Of one namespace.
pub(super) const OF_NAMESPACE: usize = 2;

#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// How many are under way, of each namespace that has any.
    under_way: BTreeMap<String, usize>,
    all_under_way: usize,
    /// Those that wait, in their order.
    waiting: BTreeMap<String, VecDeque<oneshot::Sender<Turn>>>,
    /// The namespace that had its turn last.
    last: String,
}

/// A turn; it is over once this is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Turns,
    namespace: String,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.end(&self.namespace);
    }
}

impl State {
    fn may_ask(&self, namespace: &str) -> bool {
        self.under_way.get(namespace).copied().unwrap_or_default() < OF_NAMESPACE
    }

    /// The namespace whose turn is next, of those that wait and may ask.
    fn next(&self) -> Option<String> {
        if self.all_under_way >= AT_ONCE {
            return None;
        }
        let after = (Excluded(self.last.clone()), Unbounded);
        let in_turn = self.waiting.range(after).chain(self.waiting.iter());
        let mut may_ask = in_turn.filter(|(namespace, _)| self.may_ask(namespace));
        may_ask.next().map(|(namespace, _)| namespace.clone())
    }

    fn pop(&mut self, namespace: &str) -> Option<oneshot::Sender<Turn>> {
        let queue = self.waiting.get_mut(namespace)?;
        let first = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(namespace);
        }
        first
    }
}

impl Turns {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn of `namespace`.
    pub(super) async fn wait(&self, namespace: &str) -> Option<Turn> {
        let given = self.queue(namespace);
        self.give();
        given.await.ok()
    }

    fn queue(&self, namespace: &str) -> oneshot::Receiver<Turn> {
        let (give, given) = oneshot::channel();
        let mut state = self.lock();
        let queue = state.waiting.entry(namespace.to_owned()).or_default();
        queue.push_back(give);
        given
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting.values().map(VecDeque::len).sum()
    }

    /// Gives whatever turns there are.
    fn give(&self) {
        loop {
            let mut state = self.lock();
            let Some(namespace) = state.next() else {
                return;
            };
            let Some(waits) = state.pop(&namespace) else {
                return;
            };
            // Nobody may wait any more.
            if waits.is_closed() {
                continue;
            }
            state.last.clone_from(&namespace);
            state.all_under_way += 1;
            *state.under_way.entry(namespace.clone()).or_default() += 1;
            drop(state);
            let turns = self.clone();
            // A turn that nobody takes ends as it is dropped.
            let _ = waits.send(Turn { turns, namespace });
        }
    }

    fn end(&self, namespace: &str) {
        let mut state = self.lock();
        state.all_under_way -= 1;
        if let Some(count) = state.under_way.get_mut(namespace) {
            *count -= 1;
            if *count == 0 {
                state.under_way.remove(namespace);
            }
        }
        drop(state);
        self.give();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Questions that are never answered.
    fn slow(turns: &Turns, namespace: &str, count: usize) -> Vec<tokio::task::JoinHandle<()>> {
        let ask = |_| {
            let (turns, namespace) = (turns.clone(), namespace.to_owned());
            tokio::spawn(async move {
                let _turn = turns.wait(&namespace).await;
                std::future::pending::<()>().await;
            })
        };
        (0..count).map(ask).collect()
    }

    async fn settle() {
        for _ in 0..500 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_hundred_slow_questions_of_one_namespace_delay_nobody_elses() {
        let turns = Turns::default();
        let evil = slow(&turns, "evil", 100);
        settle().await;
        let under_way = turns.lock().all_under_way;
        assert_eq!((under_way, turns.waiting()), (OF_NAMESPACE, 98));
        let shop = tokio::time::timeout(Duration::from_secs(5), turns.wait("shop"));
        drop(shop.await.unwrap().unwrap());
        evil.iter().for_each(tokio::task::JoinHandle::abort);
        settle().await;
        let state = turns.lock();
        assert_eq!(
            state.all_under_way, 0,
            "what is given up gives its turn back"
        );
        assert!(state.under_way.is_empty() && state.waiting.is_empty());
    }

    #[tokio::test]
    async fn namespaces_take_turns_and_so_many_are_asked_at_once() {
        let turns = Turns::default();
        let all: Vec<_> = ["a", "b", "c", "d", "e"]
            .iter()
            .flat_map(|namespace| slow(&turns, namespace, 50))
            .collect();
        settle().await;
        assert_eq!(turns.lock().all_under_way, AT_ONCE);
        // One turn ends: whoever waits in a namespace that has less under way is next, not the 48 others of `a`.
        let (waits, wait) = (
            turns.clone(),
            tokio::spawn({
                let turns = turns.clone();
                async move { turns.wait("z").await.is_some() }
            }),
        );
        settle().await;
        assert_eq!(waits.waiting(), 250 - AT_ONCE + 1);
        all[0].abort();
        settle().await;
        all[1].abort();
        settle().await;
        all[2].abort();
        settle().await;
        assert!(wait.is_finished() && wait.await.unwrap());
        assert!(
            turns
                .lock()
                .under_way
                .values()
                .all(|count| *count <= OF_NAMESPACE)
        );
    }
}
