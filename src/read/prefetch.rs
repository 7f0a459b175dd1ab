//! The prefetch threads and their queue of jobs.
//!
//! Prefetching is optional work: jobs may be dropped, and a reader that comes first does the work
//! itself.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

/// Most jobs in the queue; older ones are dropped. By the time they would run, the reader has
/// probably decoded those bytes itself.
const MAX_QUEUED_JOBS: usize = 64;

/// A pool of threads that run jobs in the order in which they were queued.
///
/// The first job starts the threads. Dropping the pool discards queued jobs and waits for those
/// that are running.
pub(super) struct PrefetchPool<J: Send + 'static> {
    queue: Arc<Queue<J>>,
    threads: usize,
    work: Arc<dyn Fn(J) + Send + Sync>,
    workers: OnceLock<Vec<JoinHandle<()>>>,
}

struct Queue<J> {
    state: Mutex<QueueState<J>>,
    changed: Condvar,
}

struct QueueState<J> {
    jobs: VecDeque<J>,
    closed: bool,
}

impl<J> Queue<J> {
    fn lock(&self) -> MutexGuard<'_, QueueState<J>> {
        // Poisoning does not matter: no job runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a job and takes it; `None` once the pool is closed.
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

impl<J: Send + 'static> PrefetchPool<J> {
    /// A pool of `threads` threads that run each job with `work`.
    pub(super) fn new(threads: usize, work: impl Fn(J) + Send + Sync + 'static) -> PrefetchPool<J> {
        let state = Mutex::new(QueueState { jobs: VecDeque::new(), closed: false });
        let queue = Arc::new(Queue { state, changed: Condvar::new() });
        PrefetchPool { queue, threads, work: Arc::new(work), workers: OnceLock::new() }
    }

    /// Queues jobs. If the queue is full, the oldest jobs are dropped.
    pub(super) fn push(&self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.queue.lock();
        let before = state.jobs.len();
        state.jobs.extend(jobs);
        let added = state.jobs.len() > before;
        let excess = state.jobs.len().saturating_sub(MAX_QUEUED_JOBS);
        state.jobs.drain(..excess);
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
                    // A panic is a bug; the reader of these bytes hits it again and reports it.
                    let _ = panic::catch_unwind(AssertUnwindSafe(|| work(job)));
                }
            };
            // If no thread can be started, readers do all the work themselves.
            thread::Builder::new().name("prefetch".to_owned()).spawn(run).ok()
        };
        (0..self.threads).filter_map(spawn).collect()
    }
}

impl<J: Send + 'static> Drop for PrefetchPool<J> {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
        for worker in self.workers.take().into_iter().flatten() {
            // Cannot fail: the thread catches the panics of its jobs.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_in_order_and_a_panic_does_not_stop_the_pool() {
        let (send, done) = mpsc::channel();
        let pool = PrefetchPool::new(1, move |job: u32| {
            assert_ne!(job, 2, "a bug in a job");
            send.send(job).unwrap();
        });
        pool.push([1, 2, 3]);
        assert_eq!([done.recv(), done.recv()], [Ok(1), Ok(3)]);
        pool.push([4]);
        assert_eq!(done.recv(), Ok(4));
    }

    #[test]
    fn a_full_queue_drops_the_oldest_jobs_and_drop_discards_the_rest() {
        let (go, started) = (Arc::new(Mutex::new(())), mpsc::channel());
        let (held, (send, running)) = (Arc::clone(&go), started);
        let pool = PrefetchPool::new(1, move |job: usize| {
            let _ = send.send(job);
            drop(held.lock());
        });
        let gate = go.lock().unwrap();
        pool.push([0]);
        assert_eq!(running.recv(), Ok(0));
        pool.push(1..MAX_QUEUED_JOBS + 11);
        assert_eq!(pool.queue.lock().jobs.front(), Some(&11));
        drop(gate);
        assert_eq!(running.recv(), Ok(11));
        drop(pool);
        // The iteration ends because the threads have ended and dropped the sender.
        assert!(running.iter().all(|job| job > 11), "a dropped job ran");
    }
}
