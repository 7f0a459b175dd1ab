//! Work that is done before a reader asks for it, by threads of its own.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

/// Jobs that wait at most: what a reader asks for itself meanwhile is no use any more.
const WAITING: usize = 64;

/// Does jobs in the order in which they came. The first job starts the threads; dropped, it waits
/// until those under way are done.
pub(super) struct Ahead<J: Send + 'static> {
    queue: Arc<Queue<J>>,
    threads: usize,
    work: Arc<dyn Fn(J) + Send + Sync>,
    workers: OnceLock<Vec<JoinHandle<()>>>,
}

struct Queue<J> {
    state: Mutex<State<J>>,
    changed: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    closed: bool,
}

impl<J> Queue<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        // Whole between two calls: no job runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job, once there is one; `None` when there will be no more.
    fn next(&self) -> Option<J> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J: Send + 'static> Ahead<J> {
    /// Jobs that `threads` threads do by `work`.
    pub(super) fn new(threads: usize, work: impl Fn(J) + Send + Sync + 'static) -> Ahead<J> {
        let state = Mutex::new(State { jobs: VecDeque::new(), closed: false });
        let queue = Arc::new(Queue { state, changed: Condvar::new() });
        Ahead { queue, threads, work: Arc::new(work), workers: OnceLock::new() }
    }

    /// Adds jobs. Where too many wait, the oldest are forgotten.
    pub(super) fn push(&self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.queue.lock();
        let before = state.jobs.len();
        state.jobs.extend(jobs);
        let added = state.jobs.len() > before;
        let surplus = state.jobs.len().saturating_sub(WAITING);
        state.jobs.drain(..surplus);
        drop(state);
        if added {
            self.workers.get_or_init(|| self.start());
            self.queue.changed.notify_all();
        }
    }

    fn start(&self) -> Vec<JoinHandle<()>> {
        let spawn = |_| {
            let (queue, work) = (Arc::clone(&self.queue), Arc::clone(&self.work));
            let run = move || {
                while let Some(job) = queue.next() {
                    // A panic is a bug that the reader of the same bytes will meet and tell of.
                    let _ = panic::catch_unwind(AssertUnwindSafe(|| work(job)));
                }
            };
            // Without threads, readers do everything themselves.
            thread::Builder::new().name("ahead".to_owned()).spawn(run).ok()
        };
        (0..self.threads).filter_map(spawn).collect()
    }
}

impl<J: Send + 'static> Drop for Ahead<J> {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
        for worker in self.workers.take().into_iter().flatten() {
            // Panics were caught.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_are_done_in_order_and_a_panic_is_not_the_end() {
        let (send, done) = mpsc::channel();
        let ahead = Ahead::new(1, move |job: u32| {
            assert_ne!(job, 2, "a bug in a job");
            send.send(job).unwrap();
        });
        ahead.push([1, 2, 3]);
        assert_eq!([done.recv(), done.recv()], [Ok(1), Ok(3)]);
        ahead.push([4]);
        assert_eq!(done.recv(), Ok(4));
    }

    #[test]
    fn the_oldest_are_forgotten_and_the_end_does_not_wait_for_the_rest() {
        let (go, started) = (Arc::new(Mutex::new(())), mpsc::channel());
        let (held, (send, running)) = (Arc::clone(&go), started);
        let ahead = Ahead::new(1, move |job: usize| {
            let _ = send.send(job);
            drop(held.lock());
        });
        let gate = go.lock().unwrap();
        ahead.push([0]);
        assert_eq!(running.recv(), Ok(0));
        ahead.push(1..WAITING + 11);
        assert_eq!(ahead.queue.lock().jobs.front(), Some(&11));
        drop(gate);
        assert_eq!(running.recv(), Ok(11));
        drop(ahead);
        assert!(running.iter().all(|job| job > 11), "its threads have ended");
    }
}
