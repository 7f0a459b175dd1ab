//! Bytes that were made once: least recently used go first, and no two readers make the same.
//!
//! The budget counts what is being made as well as what lies ready. Where it is smaller than what
//! is being made, nothing is kept: a budget of 0 is a cache of nothing.

use std::hash::Hash;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// How a reader came by its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// They lay ready.
    Hit,
    /// Another reader was making them.
    Waited,
    /// This reader made them.
    Made,
}

/// Bytes that start at a page: decoding into a buffer 16 bytes off a cache line takes twice as long.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    const PAGE: usize = 4096;

    fn new(len: usize) -> Buffer {
        let bytes = vec![0; len + Buffer::PAGE];
        let start = bytes.as_ptr().align_offset(Buffer::PAGE).min(Buffer::PAGE);
        Buffer { bytes, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

type Bytes = Arc<Buffer>;

/// What is being made while others wait for it. `E` is what making it fails with.
struct Flight<E> {
    result: Mutex<Option<Result<Bytes, E>>>,
    landed: Condvar,
}

enum Slot<E> {
    /// The bytes, and how many of them readers were given.
    Ready(Bytes, u64),
    Making(Arc<Flight<E>>),
}

struct State<K: Hash + Eq, E> {
    slots: LruCache<K, Slot<E>>,
    bytes: u64,
    /// Buffers that were evicted, for the next of their sizes.
    spare: Vec<Buffer>,
}

/// Evicted buffers that are kept for reuse: their pages are there already.
const SPARES: usize = 8;

/// A cache with a byte budget.
pub struct Cache<K: Hash + Eq + Copy, E: Clone> {
    state: Mutex<State<K, E>>,
    budget: u64,
}

/// A panic elsewhere cannot leave the state half changed: no user code runs under the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("a usize fits in 64 bits")
}

impl<K: Hash + Eq + Copy, E: Clone> Cache<K, E> {
    /// An empty cache that holds up to `budget` bytes.
    pub fn new(budget: u64) -> Cache<K, E> {
        let state = State { slots: LruCache::unbounded(), bytes: 0, spare: Vec::new() };
        Cache { state: Mutex::new(state), budget }
    }

    /// Bytes that lie ready or are being made.
    pub fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// Bytes that the cache may hold.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// The bytes of `key`, made by `make` in a buffer of `len` bytes where they are not there.
    ///
    /// While one reader makes them, others who ask for the same wait. A failure reaches all who
    /// waited and is not kept. `abandoned` is what they get where `make` panics.
    ///
    /// # Errors
    /// What `make` fails with.
    pub fn get(
        &self,
        key: K,
        len: usize,
        abandoned: E,
        make: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(Bytes, Outcome), E> {
        let (flight, mut buffer) = {
            let mut state = lock(&self.state);
            match state.slots.get(&key) {
                Some(Slot::Ready(bytes, _)) => return Ok((Arc::clone(bytes), Outcome::Hit)),
                Some(Slot::Making(flight)) => {
                    let flight = Arc::clone(flight);
                    drop(state);
                    return flight.wait().map(|bytes| (bytes, Outcome::Waited));
                }
                None => {}
            }
            let flight = Arc::new(Flight { result: Mutex::new(None), landed: Condvar::new() });
            state.slots.put(key, Slot::Making(Arc::clone(&flight)));
            state.bytes += u64::try_from(len).expect("a usize fits in 64 bits");
            state.evict(self.budget);
            let spare = state.spare.iter().position(|b| b.len() == len);
            (flight, spare.map(|i| state.spare.swap_remove(i)))
        };
        let mut landing =
            Landing { cache: self, key, len, flight: &flight, result: Err(abandoned) };
        let mut bytes = buffer.take().unwrap_or_else(|| Buffer::new(len));
        landing.result = make(&mut bytes).map(|()| Arc::new(bytes));
        let result = landing.result.clone();
        drop(landing);
        result.map(|bytes| (bytes, Outcome::Made))
    }
}

impl<K: Hash + Eq + Copy, E: Clone> Cache<K, E> {
    /// Notes that a reader was given `n` of the bytes of `key`; they go once as many were given
    /// as there are.
    ///
    /// A reader that takes everything once, whose bytes the kernel keeps, so works in a few buffers
    /// that stay in a core's cache instead of first touching a gigabyte.
    pub fn given(&self, key: &K, n: u64) {
        let mut state = lock(&self.state);
        if let Some(Slot::Ready(bytes, given)) = state.slots.peek_mut(key) {
            *given += n;
            if *given >= size(bytes)
                && let Some(Slot::Ready(bytes, _)) = state.slots.pop(key)
            {
                state.recycle(bytes);
            }
        }
    }
}

impl<E: Clone> Flight<E> {
    fn wait(&self) -> Result<Bytes, E> {
        let mut result = lock(&self.result);
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            result = self.landed.wait(result).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Ends a flight, also when making the bytes panics.
struct Landing<'a, K: Hash + Eq + Copy, E: Clone> {
    cache: &'a Cache<K, E>,
    key: K,
    len: usize,
    flight: &'a Flight<E>,
    result: Result<Bytes, E>,
}

impl<K: Hash + Eq + Copy, E: Clone> Drop for Landing<'_, K, E> {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.cache.state);
            match &self.result {
                Ok(bytes) => {
                    state.slots.put(self.key, Slot::Ready(Arc::clone(bytes), 0));
                }
                Err(_) => {
                    state.slots.pop(&self.key);
                    state.bytes -= u64::try_from(self.len).expect("a usize fits in 64 bits");
                }
            }
            state.evict(self.cache.budget);
        }
        *lock(&self.flight.result) = Some(self.result.clone());
        self.flight.landed.notify_all();
    }
}

impl<K: Hash + Eq + Copy, E> State<K, E> {
    /// Lets the least recently used that lie ready go until the budget is kept.
    fn evict(&mut self, budget: u64) {
        let mut busy = Vec::new();
        while self.bytes > budget {
            match self.slots.pop_lru() {
                Some((_, Slot::Ready(bytes, _))) => self.recycle(bytes),
                Some((key, making @ Slot::Making(_))) => busy.push((key, making)),
                None => break,
            }
        }
        for (key, slot) in busy {
            self.slots.put(key, slot);
        }
    }

    /// Keeps a buffer that nobody reads any more for the next of its size.
    fn recycle(&mut self, bytes: Bytes) {
        self.bytes -= size(&bytes);
        if self.spare.len() < SPARES
            && let Ok(buffer) = Arc::try_unwrap(bytes)
        {
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn fill(value: u8) -> impl FnOnce(&mut [u8]) -> Result<(), String> {
        move |out| {
            out.fill(value);
            Ok(())
        }
    }

    fn outcome(cache: &Cache<u64, String>, chunk: u64) -> Outcome {
        let value = u8::try_from(chunk).unwrap();
        let (bytes, outcome) = cache.get(chunk, 10, String::new(), fill(value)).unwrap();
        assert_eq!(**bytes, [value; 10]);
        outcome
    }

    #[test]
    fn least_recently_used_go_first() {
        let cache = Cache::new(30);
        for chunk in [1, 2, 3] {
            assert_eq!(outcome(&cache, chunk), Outcome::Made);
        }
        assert_eq!(outcome(&cache, 1), Outcome::Hit);
        assert_eq!(outcome(&cache, 4), Outcome::Made);
        assert_eq!(outcome(&cache, 1), Outcome::Hit);
        assert_eq!(outcome(&cache, 2), Outcome::Made);
        assert_eq!(cache.bytes(), 30);
    }

    #[test]
    fn a_budget_of_nothing_keeps_nothing() {
        let cache = Cache::new(0);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn many_readers_decode_once() {
        let cache = Cache::<u64, String>::new(100);
        let (decodings, start) = (AtomicU64::new(0), Barrier::new(8));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    let decode = |out: &mut [u8]| {
                        decodings.fetch_add(1, Ordering::SeqCst);
                        // Others ask while this one decodes.
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        out.fill(7);
                        Ok(())
                    };
                    let (bytes, _) = cache.get(1, 10, String::new(), decode).unwrap();
                    assert_eq!(**bytes, [7; 10]);
                });
            }
        });
        assert_eq!(decodings.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_was_given_whole_goes() {
        let cache = Cache::new(30);
        for n in [4, 6] {
            assert_eq!(outcome(&cache, 1), if n == 4 { Outcome::Made } else { Outcome::Hit });
            cache.given(&1, n);
        }
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
        cache.given(&2, 10);
        assert_eq!(cache.bytes(), 10);
    }

    #[test]
    fn buffers_start_at_a_page() {
        for len in [0, 1, 4096, 100_000] {
            let buffer = Buffer::new(len);
            assert_eq!((buffer.len(), buffer.as_ptr().align_offset(4096)), (len, 0));
        }
    }

    #[test]
    fn failures_are_not_kept() {
        let cache = Cache::<u64, String>::new(100);
        let failed = cache.get(1, 10, String::new(), |_| Err("no".to_owned()));
        assert_eq!(failed.unwrap_err(), "no");
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
    }

    #[test]
    fn a_panic_frees_the_chunk_and_tells_who_waits() {
        let cache = Cache::<u64, String>::new(100);
        let decoding = Barrier::new(2);
        std::thread::scope(|scope| {
            let dying = scope.spawn(|| {
                let _ = cache.get(1, 10, "abandoned".to_owned(), |_| {
                    decoding.wait();
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    panic!("a bug in a decoder");
                });
            });
            decoding.wait();
            let waited = cache.get(1, 10, String::new(), fill(1));
            assert!(dying.join().is_err());
            // Whoever came in time was told; whoever came late decoded anew.
            assert!(waited.is_ok() || waited.is_err_and(|e| e == "abandoned"));
        });
        let kept = if cache.bytes() > 0 { Outcome::Hit } else { Outcome::Made };
        assert_eq!(outcome(&cache, 1), kept);
    }
}
