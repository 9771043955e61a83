//! Work whose length a tenant's input decides runs off the threads that everybody shares, and is not waited for longer than [`DEADLINE`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Plans take milliseconds, on a busy machine some hundred.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// So many threads may be lost to evaluations that nobody waits for; with more of them nothing is evaluated, and the task that asks
/// stalls, so that the process is begun anew.
pub const LOST: usize = 8;

/// Evaluations that nobody waits for any more and that go on all the same.
static OVERDUE: AtomicUsize = AtomicUsize::new(0);

/// An evaluation was not done in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("took more than {} s", DEADLINE.as_secs())]
pub struct TooLong;

/// Counts a thread as lost from when nobody waits for it until it is done.
#[derive(Default)]
struct Waited(AtomicUsize);

impl Waited {
    const GIVEN_UP: usize = 1;
    const DONE: usize = 2;

    fn give_up(&self) {
        if self.0.swap(Self::GIVEN_UP, Ordering::SeqCst) != Self::DONE {
            OVERDUE.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn done(&self) {
        if self.0.swap(Self::DONE, Ordering::SeqCst) == Self::GIVEN_UP {
            OVERDUE.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Evaluates something.
///
/// # Errors
/// Fails when it takes too long. It goes on on its thread, since nothing can stop it, and its result is dropped.
///
/// # Panics
/// Where the evaluation does.
pub async fn within_deadline<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TooLong> {
    within(DEADLINE, work).await
}

async fn within<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TooLong> {
    if OVERDUE.load(Ordering::SeqCst) >= LOST {
        // On this thread, which the watchdog sees.
        return Ok(work());
    }
    let waited = std::sync::Arc::new(Waited::default());
    let of_thread = std::sync::Arc::clone(&waited);
    let task = tokio::task::spawn_blocking(move || {
        let result = work();
        of_thread.done();
        result
    });
    match tokio::time::timeout(deadline, task).await {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(error)) => std::panic::resume_unwind(error.into_panic()),
        Err(_) => {
            waited.give_up();
            Err(TooLong)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_takes_too_long_is_not_waited_for_and_what_does_not_is_done() {
        assert_eq!(within_deadline(|| 7).await, Ok(7));
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let short = Duration::from_millis(20);
        let long = within(short, move || ended.recv().is_ok());
        assert_eq!(long.await, Err(TooLong));
        assert_eq!(OVERDUE.load(Ordering::SeqCst), 1);
        end.send(()).unwrap();
        while OVERDUE.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        assert_eq!(within_deadline(|| 8).await, Ok(8));
    }
}
