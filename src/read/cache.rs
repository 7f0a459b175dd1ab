//! A byte-budgeted LRU cache with single flight: concurrent requests for one key compute it once.
//!
//! The engine has two of them: decoded chunks, and rows of source tensors ([`super::source_rows`]).
//! The budget counts entries that are still being computed. They cannot be evicted; where they
//! alone exceed the budget, nothing else is kept. With a budget of 0 an entry is evicted as soon as
//! it is complete, and single flight still works.

use crate::tensor::to_u64;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::buffer::Buffer;

/// How a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The entry was in the cache.
    Hit,
    /// Another thread was computing the entry; this one waited for it.
    Waited,
    /// This thread computed the entry.
    Miss,
}

/// The bytes of an entry, shared by all who read them.
pub(super) type SharedBuffer = Arc<Buffer>;

/// One computation and those who wait for it. `E` is the error of the computation.
struct Flight<E> {
    result: Mutex<Option<Result<SharedBuffer, E>>>,
    done: Condvar,
}

enum Slot<E> {
    /// The bytes, and how much of them has not been consumed yet ([`Cache::consume`]).
    Ready(SharedBuffer, u64),
    InFlight(Arc<Flight<E>>),
}

struct CacheState<K: Hash + Eq, E> {
    slots: LruCache<K, Slot<E>>,
    /// Bytes of all slots, those in flight included.
    bytes: u64,
    /// Buffers of dropped entries, to be reused for new entries of the same size.
    spare: Vec<Buffer>,
}

/// Number of most recently dropped buffers to recycle; reuse avoids page faults. The source rows of
/// one plane take 8 to 16 buffers. These buffers are not counted in the budget.
const MAX_SPARE_BUFFERS: usize = 16;

/// An LRU cache with a byte budget and single flight.
pub(super) struct Cache<K: Hash + Eq + Copy, E: Clone> {
    state: Mutex<CacheState<K, E>>,
    budget: u64,
    allocate: fn(usize) -> Buffer,
}

/// A request for one entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheRequest<K> {
    /// The key.
    pub key: K,
    /// Size of the entry, in bytes.
    pub len: usize,
    /// How much of the entry can be consumed before it is dropped, in the unit of
    /// [`Cache::consume`].
    pub remaining: u64,
}

/// What the cache holds for a key.
enum Lookup<E> {
    Ready(SharedBuffer),
    /// Another thread is computing the entry.
    InFlight(Arc<Flight<E>>),
    /// The caller has to compute the entry, in this recycled buffer if there is one.
    Absent(Arc<Flight<E>>, Option<Buffer>),
}

/// Locks a mutex, poisoned or not: no caller's code runs under these locks, so a panic cannot leave
/// the state inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size(bytes: &[u8]) -> u64 {
    to_u64(bytes.len())
}

impl<K: Hash + Eq + Copy, E: Clone> Cache<K, E> {
    /// An empty cache that holds up to `budget` bytes, in buffers from `allocate`.
    pub(super) fn new(budget: u64, allocate: fn(usize) -> Buffer) -> Cache<K, E> {
        let state = CacheState { slots: LruCache::unbounded(), bytes: 0, spare: Vec::new() };
        Cache { state: Mutex::new(state), budget, allocate }
    }

    /// Bytes of all entries, those being computed included.
    pub(super) fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// Bytes that the cache may hold.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// Whether the entry is in the cache or being computed.
    pub(super) fn contains(&self, key: &K) -> bool {
        lock(&self.state).slots.peek(key).is_some()
    }

    /// Returns an entry; computes it with `compute` if it is absent.
    ///
    /// Requests for an entry that is being computed wait for it. They get the error if there is
    /// one; errors are not cached. If `compute` panics, they get `abandoned`.
    ///
    /// # Errors
    /// The error of `compute`.
    pub(super) fn get(
        &self,
        request: CacheRequest<K>,
        abandoned: E,
        compute: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(SharedBuffer, Outcome), E> {
        match self.lookup(request) {
            Lookup::Ready(bytes) => Ok((bytes, Outcome::Hit)),
            Lookup::InFlight(flight) => flight.wait().map(|bytes| (bytes, Outcome::Waited)),
            Lookup::Absent(flight, spare) => self
                .compute(request, &flight, spare, abandoned, compute)
                .map(|b| (b, Outcome::Miss)),
        }
    }

    /// As [`Cache::get`], but does not wait: `None` if another thread is computing the entry.
    ///
    /// # Errors
    /// The error of `compute`.
    pub(super) fn get_unless_in_flight(
        &self,
        request: CacheRequest<K>,
        abandoned: E,
        compute: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Option<(SharedBuffer, Outcome)>, E> {
        match self.lookup(request) {
            Lookup::Ready(bytes) => Ok(Some((bytes, Outcome::Hit))),
            Lookup::InFlight(_) => Ok(None),
            Lookup::Absent(flight, spare) => self
                .compute(request, &flight, spare, abandoned, compute)
                .map(|b| Some((b, Outcome::Miss))),
        }
    }

    /// Looks a key up. If it is absent, registers a flight that the caller has to complete.
    fn lookup(&self, CacheRequest { key, len, .. }: CacheRequest<K>) -> Lookup<E> {
        let mut state = lock(&self.state);
        match state.slots.get(&key) {
            Some(Slot::Ready(bytes, _)) => return Lookup::Ready(Arc::clone(bytes)),
            Some(Slot::InFlight(flight)) => return Lookup::InFlight(Arc::clone(flight)),
            None => {}
        }
        let flight = Arc::new(Flight { result: Mutex::new(None), done: Condvar::new() });
        state.slots.put(key, Slot::InFlight(Arc::clone(&flight)));
        state.bytes += to_u64(len);
        state.evict(self.budget);
        // The last buffer is the most likely to be in this core's cache.
        let spare = state.spare.iter().rposition(|b| b.len() == len);
        Lookup::Absent(flight, spare.map(|i| state.spare.remove(i)))
    }

    fn compute(
        &self,
        request: CacheRequest<K>,
        flight: &Flight<E>,
        spare: Option<Buffer>,
        abandoned: E,
        compute: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<SharedBuffer, E> {
        let mut guard = FlightGuard { cache: self, request, flight, result: Err(abandoned) };
        let mut bytes = spare.unwrap_or_else(|| (self.allocate)(request.len));
        guard.result = compute(&mut bytes).map(|()| Arc::new(bytes));
        guard.result.clone()
    }

    /// Notes that `amount` of an entry was consumed; the entry is dropped when nothing remains.
    ///
    /// A sequential reader behind the kernel's page cache needs every byte once. With this, its
    /// chunks use a few buffers that stay in a core's cache, instead of first touching a gigabyte
    /// of memory.
    pub(super) fn consume(&self, key: &K, amount: u64) {
        let mut state = lock(&self.state);
        if let Some(Slot::Ready(_, remaining)) = state.slots.peek_mut(key) {
            *remaining = remaining.saturating_sub(amount);
            if *remaining == 0
                && let Some(Slot::Ready(bytes, _)) = state.slots.pop(key)
            {
                state.recycle(bytes);
            }
        }
    }
}

impl<E: Clone> Flight<E> {
    fn wait(&self) -> Result<SharedBuffer, E> {
        let mut result = lock(&self.result);
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            result = self.done.wait(result).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Completes a flight when dropped, also when the computation panics.
struct FlightGuard<'a, K: Hash + Eq + Copy, E: Clone> {
    cache: &'a Cache<K, E>,
    request: CacheRequest<K>,
    flight: &'a Flight<E>,
    result: Result<SharedBuffer, E>,
}

impl<K: Hash + Eq + Copy, E: Clone> Drop for FlightGuard<'_, K, E> {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.cache.state);
            match &self.result {
                Ok(bytes) => {
                    let slot = Slot::Ready(Arc::clone(bytes), self.request.remaining);
                    state.slots.put(self.request.key, slot);
                }
                Err(_) => {
                    state.slots.pop(&self.request.key);
                    let len = u64::try_from(self.request.len);
                    state.bytes -= len.expect("a usize fits in 64 bits");
                }
            }
            state.evict(self.cache.budget);
        }
        *lock(&self.flight.result) = Some(self.result.clone());
        self.flight.done.notify_all();
    }
}

impl<K: Hash + Eq + Copy, E> CacheState<K, E> {
    /// Drops the least recently used complete entries until the budget is met.
    fn evict(&mut self, budget: u64) {
        let mut in_flight = Vec::new();
        while self.bytes > budget {
            match self.slots.pop_lru() {
                Some((_, Slot::Ready(bytes, _))) => self.recycle(bytes),
                Some((key, slot @ Slot::InFlight(_))) => in_flight.push((key, slot)),
                None => break,
            }
        }
        for (key, slot) in in_flight {
            self.slots.put(key, slot);
        }
    }

    /// Subtracts the bytes of a dropped entry; keeps its buffer for reuse if it has no reader left.
    fn recycle(&mut self, bytes: SharedBuffer) {
        self.bytes -= size(&bytes);
        if let Ok(buffer) = Arc::try_unwrap(bytes) {
            // The oldest buffer goes: its size may not be needed any more.
            if self.spare.len() == MAX_SPARE_BUFFERS {
                self.spare.remove(0);
            }
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

    fn cache(budget: u64) -> Cache<u64, String> {
        Cache::new(budget, Buffer::new)
    }

    /// A request for ten bytes that are read once.
    fn ten(key: u64) -> CacheRequest<u64> {
        CacheRequest { key, len: 10, remaining: 10 }
    }

    fn outcome(cache: &Cache<u64, String>, chunk: u64) -> Outcome {
        let value = u8::try_from(chunk).unwrap();
        let (bytes, outcome) = cache.get(ten(chunk), String::new(), fill(value)).unwrap();
        assert_eq!(**bytes, [value; 10]);
        outcome
    }

    /// Number of threads that wait for a chunk in flight, without the thread that computes it.
    fn waiting(cache: &Cache<u64, String>, chunk: u64) -> usize {
        match lock(&cache.state).slots.peek(&chunk) {
            // The slot and the computing thread have a reference too.
            Some(Slot::InFlight(flight)) => Arc::strong_count(flight) - 2,
            Some(Slot::Ready(..)) | None => 0,
        }
    }

    #[test]
    fn the_least_recently_used_chunk_is_evicted_first() {
        let cache = cache(30);
        for chunk in [1, 2, 3] {
            assert_eq!(outcome(&cache, chunk), Outcome::Miss);
        }
        assert_eq!(outcome(&cache, 1), Outcome::Hit);
        assert_eq!(outcome(&cache, 4), Outcome::Miss);
        assert_eq!(outcome(&cache, 1), Outcome::Hit);
        assert_eq!(outcome(&cache, 2), Outcome::Miss);
        assert_eq!(cache.bytes(), 30);
    }

    #[test]
    fn a_budget_of_zero_caches_nothing() {
        let cache = cache(0);
        assert_eq!(outcome(&cache, 1), Outcome::Miss);
        assert_eq!(outcome(&cache, 1), Outcome::Miss);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn concurrent_readers_decode_once() {
        let cache = cache(100);
        let decodings = AtomicU64::new(0);
        let outcomes = std::thread::scope(|scope| {
            let readers = [(); 8].map(|()| {
                scope.spawn(|| {
                    let decode = |out: &mut [u8]| {
                        decodings.fetch_add(1, Ordering::SeqCst);
                        // The first decodes until the seven others wait for it.
                        while waiting(&cache, 1) < 7 && decodings.load(Ordering::SeqCst) == 1 {
                            std::thread::yield_now();
                        }
                        out.fill(7);
                        Ok(())
                    };
                    let (bytes, outcome) = cache.get(ten(1), String::new(), decode).unwrap();
                    assert_eq!(**bytes, [7; 10]);
                    outcome
                })
            });
            readers.map(|reader| reader.join().unwrap())
        });
        assert_eq!(decodings.load(Ordering::SeqCst), 1);
        assert_eq!(outcomes.iter().filter(|o| **o == Outcome::Waited).count(), 7);
    }

    #[test]
    fn a_chunk_is_dropped_when_all_its_bytes_were_consumed() {
        let cache = cache(30);
        for n in [4, 6] {
            assert_eq!(outcome(&cache, 1), if n == 4 { Outcome::Miss } else { Outcome::Hit });
            cache.consume(&1, n);
        }
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Miss);
        cache.consume(&2, 10);
        assert_eq!(cache.bytes(), 10);
    }

    #[test]
    fn get_unless_in_flight_does_not_wait() {
        let cache = cache(30);
        let (bytes, outcome) = cache
            .get(ten(1), String::new(), |_| {
                assert!(cache.contains(&1));
                let busy = cache.get_unless_in_flight(ten(1), String::new(), fill(2)).unwrap();
                assert!(busy.is_none());
                Ok(())
            })
            .unwrap();
        assert_eq!((bytes.len(), outcome), (10, Outcome::Miss));
        let ready = cache.get_unless_in_flight(ten(1), String::new(), fill(2)).unwrap();
        assert_eq!(ready.map(|(_, outcome)| outcome), Some(Outcome::Hit));
        let computed = cache.get_unless_in_flight(ten(2), String::new(), fill(2)).unwrap();
        assert_eq!(computed.map(|(bytes, outcome)| (bytes[0], outcome)), Some((2, Outcome::Miss)));
    }

    #[test]
    fn errors_are_not_cached() {
        let cache = cache(100);
        let failed = cache.get(ten(1), String::new(), |_| Err("no".to_owned()));
        assert_eq!(failed.unwrap_err(), "no");
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Miss);
    }

    #[test]
    fn a_panic_frees_the_slot_and_fails_the_waiters() {
        let cache = cache(100);
        let decoding = Barrier::new(2);
        std::thread::scope(|scope| {
            let dying = scope.spawn(|| {
                let _ = cache.get(ten(1), "abandoned".to_owned(), |_| {
                    decoding.wait();
                    while waiting(&cache, 1) < 1 {
                        std::thread::yield_now();
                    }
                    panic!("a bug in a decoder");
                });
            });
            decoding.wait();
            let waited = cache.get(ten(1), String::new(), fill(1));
            assert!(dying.join().is_err());
            assert_eq!(waited.unwrap_err(), "abandoned");
        });
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Miss);
    }
}
