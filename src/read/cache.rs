//! Bytes that were made once: least recently used go first, and no two readers make the same.
//!
//! The budget counts what is being made as well as what lies ready. Where it is smaller than what
//! is being made, nothing is kept: a budget of 0 is a cache of nothing.

use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::buffer::Buffer;

/// How a reader came by its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// They lay ready.
    Hit,
    /// Another reader was making them.
    Waited,
    /// This reader made them.
    Made,
}

/// Bytes that were made, shared by all who read them.
pub(super) type Bytes = Arc<Buffer>;

/// What is being made while others wait for it. `E` is what making it fails with.
struct Flight<E> {
    result: Mutex<Option<Result<Bytes, E>>>,
    landed: Condvar,
}

enum Slot<E> {
    /// The bytes, and how much use is left in them.
    Ready(Bytes, u64),
    Making(Arc<Flight<E>>),
}

struct State<K: Hash + Eq, E> {
    slots: LruCache<K, Slot<E>>,
    bytes: u64,
    /// Buffers that were evicted, for the next of their sizes.
    spare: Vec<Buffer>,
}

/// Evicted buffers that are kept for reuse, the last ones: their pages are there already. A plane of
/// stored rows is 8 to 16.
const SPARES: usize = 16;

/// A cache with a byte budget.
pub(super) struct Cache<K: Hash + Eq + Copy, E: Clone> {
    state: Mutex<State<K, E>>,
    budget: u64,
    allocate: fn(usize) -> Buffer,
}

/// What is asked of a cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<K> {
    /// The key.
    pub key: K,
    /// How many bytes it has.
    pub len: usize,
    /// How much use they are, in the unit of [`Cache::given`].
    pub uses: u64,
}

/// What a reader finds.
enum Found<E> {
    Ready(Bytes),
    /// Another reader makes it.
    Busy(Arc<Flight<E>>),
    /// This reader makes it; a buffer of its size may lie around.
    Absent(Arc<Flight<E>>, Option<Buffer>),
}

/// A panic elsewhere cannot leave the state half changed: no user code runs under the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("a usize fits in 64 bits")
}

impl<K: Hash + Eq + Copy, E: Clone> Cache<K, E> {
    /// An empty cache that holds up to `budget` bytes in buffers that `allocate` makes.
    pub(super) fn new(budget: u64, allocate: fn(usize) -> Buffer) -> Cache<K, E> {
        let state = State { slots: LruCache::unbounded(), bytes: 0, spare: Vec::new() };
        Cache { state: Mutex::new(state), budget, allocate }
    }

    /// Bytes that lie ready or are being made.
    pub(super) fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// Bytes that the cache may hold.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// Whether somebody made or makes the bytes of `key`.
    pub(super) fn has(&self, key: &K) -> bool {
        lock(&self.state).slots.peek(key).is_some()
    }

    /// The bytes of a key, made by `make` where they are not there.
    ///
    /// While one reader makes them, others who ask for the same wait. A failure reaches all who
    /// waited and is not kept. `abandoned` is what they get where `make` panics.
    ///
    /// # Errors
    /// What `make` fails with.
    pub(super) fn get(
        &self,
        wanted: Wanted<K>,
        abandoned: E,
        make: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(Bytes, Outcome), E> {
        match self.find(wanted) {
            Found::Ready(bytes) => Ok((bytes, Outcome::Hit)),
            Found::Busy(flight) => flight.wait().map(|bytes| (bytes, Outcome::Waited)),
            Found::Absent(flight, spare) => {
                self.make(wanted, &flight, spare, abandoned, make).map(|b| (b, Outcome::Made))
            }
        }
    }

    /// As [`Cache::get`], but `None` where another reader makes the bytes just now.
    ///
    /// # Errors
    /// What `make` fails with.
    pub(super) fn get_unless_busy(
        &self,
        wanted: Wanted<K>,
        abandoned: E,
        make: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Option<(Bytes, Outcome)>, E> {
        match self.find(wanted) {
            Found::Ready(bytes) => Ok(Some((bytes, Outcome::Hit))),
            Found::Busy(_) => Ok(None),
            Found::Absent(flight, spare) => {
                self.make(wanted, &flight, spare, abandoned, make).map(|b| Some((b, Outcome::Made)))
            }
        }
    }

    fn find(&self, Wanted { key, len, .. }: Wanted<K>) -> Found<E> {
        let mut state = lock(&self.state);
        match state.slots.get(&key) {
            Some(Slot::Ready(bytes, _)) => return Found::Ready(Arc::clone(bytes)),
            Some(Slot::Making(flight)) => return Found::Busy(Arc::clone(flight)),
            None => {}
        }
        let flight = Arc::new(Flight { result: Mutex::new(None), landed: Condvar::new() });
        state.slots.put(key, Slot::Making(Arc::clone(&flight)));
        state.bytes += u64::try_from(len).expect("a usize fits in 64 bits");
        state.evict(self.budget);
        // The last one is most likely to be in the core's cache.
        let spare = state.spare.iter().rposition(|b| b.len() == len);
        Found::Absent(flight, spare.map(|i| state.spare.remove(i)))
    }

    fn make(
        &self,
        wanted: Wanted<K>,
        flight: &Flight<E>,
        spare: Option<Buffer>,
        abandoned: E,
        make: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Bytes, E> {
        let mut landing = Landing { cache: self, wanted, flight, result: Err(abandoned) };
        let mut bytes = spare.unwrap_or_else(|| (self.allocate)(wanted.len));
        landing.result = make(&mut bytes).map(|()| Arc::new(bytes));
        landing.result.clone()
    }

    /// Notes that so much use was made of the bytes of `key`; they go once none is left.
    ///
    /// A reader that takes everything once, whose bytes the kernel keeps, so works in a few buffers
    /// that stay in a core's cache instead of first touching a gigabyte.
    pub(super) fn given(&self, key: &K, uses: u64) {
        let mut state = lock(&self.state);
        if let Some(Slot::Ready(_, left)) = state.slots.peek_mut(key) {
            *left = left.saturating_sub(uses);
            if *left == 0
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
    wanted: Wanted<K>,
    flight: &'a Flight<E>,
    result: Result<Bytes, E>,
}

impl<K: Hash + Eq + Copy, E: Clone> Drop for Landing<'_, K, E> {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.cache.state);
            match &self.result {
                Ok(bytes) => {
                    let slot = Slot::Ready(Arc::clone(bytes), self.wanted.uses);
                    state.slots.put(self.wanted.key, slot);
                }
                Err(_) => {
                    state.slots.pop(&self.wanted.key);
                    let len = u64::try_from(self.wanted.len);
                    state.bytes -= len.expect("a usize fits in 64 bits");
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
        if let Ok(buffer) = Arc::try_unwrap(bytes) {
            // The oldest may be of a size that nobody wants any more.
            if self.spare.len() == SPARES {
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

    /// Ten bytes that are read once.
    fn ten(key: u64) -> Wanted<u64> {
        Wanted { key, len: 10, uses: 10 }
    }

    fn outcome(cache: &Cache<u64, String>, chunk: u64) -> Outcome {
        let value = u8::try_from(chunk).unwrap();
        let (bytes, outcome) = cache.get(ten(chunk), String::new(), fill(value)).unwrap();
        assert_eq!(**bytes, [value; 10]);
        outcome
    }

    /// How many wait for a chunk that is being made, beside its maker.
    fn waiting(cache: &Cache<u64, String>, chunk: u64) -> usize {
        match lock(&cache.state).slots.peek(&chunk) {
            // The slot and the maker hold it too.
            Some(Slot::Making(flight)) => Arc::strong_count(flight) - 2,
            Some(Slot::Ready(..)) | None => 0,
        }
    }

    #[test]
    fn least_recently_used_go_first() {
        let cache = cache(30);
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
        let cache = cache(0);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn many_readers_decode_once() {
        let cache = cache(100);
        let decodings = AtomicU64::new(0);
        let outcomes = std::thread::scope(|scope| {
            let readers = [(); 8].map(|()| {
                scope.spawn(|| {
                    let decode = |out: &mut [u8]| {
                        decodings.fetch_add(1, Ordering::SeqCst);
                        // All others ask while this one decodes.
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
    fn what_was_given_whole_goes() {
        let cache = cache(30);
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
    fn who_does_not_wait_is_told_that_it_is_busy() {
        let cache = cache(30);
        let (bytes, outcome) = cache
            .get(ten(1), String::new(), |_| {
                assert!(cache.has(&1));
                let busy = cache.get_unless_busy(ten(1), String::new(), fill(2)).unwrap();
                assert!(busy.is_none());
                Ok(())
            })
            .unwrap();
        assert_eq!((bytes.len(), outcome), (10, Outcome::Made));
        let ready = cache.get_unless_busy(ten(1), String::new(), fill(2)).unwrap();
        assert_eq!(ready.map(|(_, outcome)| outcome), Some(Outcome::Hit));
        let made = cache.get_unless_busy(ten(2), String::new(), fill(2)).unwrap();
        assert_eq!(made.map(|(bytes, outcome)| (bytes[0], outcome)), Some((2, Outcome::Made)));
    }

    #[test]
    fn failures_are_not_kept() {
        let cache = cache(100);
        let failed = cache.get(ten(1), String::new(), |_| Err("no".to_owned()));
        assert_eq!(failed.unwrap_err(), "no");
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Made);
    }

    #[test]
    fn a_panic_frees_the_chunk_and_tells_who_waits() {
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
        assert_eq!(outcome(&cache, 1), Outcome::Made);
    }
}
