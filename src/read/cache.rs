//! Decoded chunks: least recently used go first, and a chunk is decoded by one reader at a time.
//!
//! The budget counts chunks that are being decoded as well as those that lie ready. Where it is
//! smaller than what is being decoded, nothing is kept: a budget of 0 is a cache of nothing.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// Which chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkKey {
    /// Position of the tensor in the plan.
    pub tensor: u32,
    /// Chunk of the tensor's grid.
    pub chunk: u64,
}

/// How a reader came by a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It lay ready.
    Hit,
    /// Another reader was decoding it.
    Waited,
    /// This reader decoded it.
    Decoded,
}

type Bytes = Arc<Vec<u8>>;

/// The decoding of a chunk that others wait for. `E` is what a decoding fails with.
struct Flight<E> {
    result: Mutex<Option<Result<Bytes, E>>>,
    landed: Condvar,
}

enum Slot<E> {
    Ready(Bytes),
    Decoding(Arc<Flight<E>>),
}

struct State<E> {
    slots: LruCache<ChunkKey, Slot<E>>,
    bytes: u64,
    /// Buffers that were evicted, for the next chunks of their sizes.
    spare: Vec<Vec<u8>>,
}

/// Evicted buffers that are kept for reuse: their pages are there already.
const SPARES: usize = 4;

/// A cache of decoded chunks with a byte budget.
pub struct ChunkCache<E> {
    state: Mutex<State<E>>,
    budget: u64,
}

/// A panic elsewhere cannot leave the state half changed: no user code runs under the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("a usize fits in 64 bits")
}

impl<E: Clone> ChunkCache<E> {
    /// An empty cache that holds up to `budget` bytes.
    pub fn new(budget: u64) -> ChunkCache<E> {
        let state = State { slots: LruCache::unbounded(), bytes: 0, spare: Vec::new() };
        ChunkCache { state: Mutex::new(state), budget }
    }

    /// Bytes that lie ready or are being decoded.
    pub fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// Bytes that the cache may hold.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// The chunk, decoded by `decode` into a buffer of `len` bytes where it is not there.
    ///
    /// While one reader decodes, others who ask for the same chunk wait for it. A failure reaches
    /// all who waited and is not kept. `abandoned` is what they get where the decoder panics.
    ///
    /// # Errors
    /// What `decode` fails with.
    pub fn get(
        &self,
        key: ChunkKey,
        len: usize,
        abandoned: E,
        decode: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(Bytes, Outcome), E> {
        let (flight, mut buffer) = {
            let mut state = lock(&self.state);
            match state.slots.get(&key) {
                Some(Slot::Ready(bytes)) => return Ok((Arc::clone(bytes), Outcome::Hit)),
                Some(Slot::Decoding(flight)) => {
                    let flight = Arc::clone(flight);
                    drop(state);
                    return flight.wait().map(|bytes| (bytes, Outcome::Waited));
                }
                None => {}
            }
            let flight = Arc::new(Flight { result: Mutex::new(None), landed: Condvar::new() });
            state.slots.put(key, Slot::Decoding(Arc::clone(&flight)));
            state.bytes += u64::try_from(len).expect("a usize fits in 64 bits");
            state.evict(self.budget);
            let spare = state.spare.iter().position(|b| b.len() == len);
            (flight, spare.map(|i| state.spare.swap_remove(i)))
        };
        let mut landing =
            Landing { cache: self, key, len, flight: &flight, result: Err(abandoned) };
        let mut bytes = buffer.take().unwrap_or_else(|| vec![0; len]);
        landing.result = decode(&mut bytes).map(|()| Arc::new(bytes));
        let result = landing.result.clone();
        drop(landing);
        result.map(|bytes| (bytes, Outcome::Decoded))
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

/// Ends a flight, also when the decoder panics.
struct Landing<'a, E: Clone> {
    cache: &'a ChunkCache<E>,
    key: ChunkKey,
    len: usize,
    flight: &'a Flight<E>,
    result: Result<Bytes, E>,
}

impl<E: Clone> Drop for Landing<'_, E> {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.cache.state);
            match &self.result {
                Ok(bytes) => {
                    state.slots.put(self.key, Slot::Ready(Arc::clone(bytes)));
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

impl<E> State<E> {
    /// Lets the least recently used ready chunks go until the budget is kept.
    fn evict(&mut self, budget: u64) {
        let mut busy = Vec::new();
        while self.bytes > budget {
            match self.slots.pop_lru() {
                Some((_, Slot::Ready(bytes))) => {
                    self.bytes -= size(&bytes);
                    if self.spare.len() < SPARES
                        && let Ok(buffer) = Arc::try_unwrap(bytes)
                    {
                        self.spare.push(buffer);
                    }
                }
                Some((key, decoding @ Slot::Decoding(_))) => busy.push((key, decoding)),
                None => break,
            }
        }
        for (key, slot) in busy {
            self.slots.put(key, slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn key(chunk: u64) -> ChunkKey {
        ChunkKey { tensor: 0, chunk }
    }

    fn fill(value: u8) -> impl FnOnce(&mut [u8]) -> Result<(), String> {
        move |out| {
            out.fill(value);
            Ok(())
        }
    }

    fn outcome(cache: &ChunkCache<String>, chunk: u64) -> Outcome {
        let value = u8::try_from(chunk).unwrap();
        let (bytes, outcome) = cache.get(key(chunk), 10, String::new(), fill(value)).unwrap();
        assert_eq!(*bytes, vec![value; 10]);
        outcome
    }

    #[test]
    fn least_recently_used_go_first() {
        let cache = ChunkCache::new(30);
        for chunk in [1, 2, 3] {
            assert_eq!(outcome(&cache, chunk), Outcome::Decoded);
        }
        assert_eq!(outcome(&cache, 1), Outcome::Hit);
        assert_eq!(outcome(&cache, 4), Outcome::Decoded);
        assert_eq!(outcome(&cache, 1), Outcome::Hit);
        assert_eq!(outcome(&cache, 2), Outcome::Decoded);
        assert_eq!(cache.bytes(), 30);
    }

    #[test]
    fn a_budget_of_nothing_keeps_nothing() {
        let cache = ChunkCache::new(0);
        assert_eq!(outcome(&cache, 1), Outcome::Decoded);
        assert_eq!(outcome(&cache, 1), Outcome::Decoded);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn many_readers_decode_once() {
        let cache = ChunkCache::<String>::new(100);
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
                    let (bytes, _) = cache.get(key(1), 10, String::new(), decode).unwrap();
                    assert_eq!(*bytes, [7; 10]);
                });
            }
        });
        assert_eq!(decodings.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn failures_are_not_kept() {
        let cache = ChunkCache::<String>::new(100);
        let failed = cache.get(key(1), 10, String::new(), |_| Err("no".to_owned()));
        assert_eq!(failed.unwrap_err(), "no");
        assert_eq!(cache.bytes(), 0);
        assert_eq!(outcome(&cache, 1), Outcome::Decoded);
    }

    #[test]
    fn a_panic_frees_the_chunk_and_tells_who_waits() {
        let cache = ChunkCache::<String>::new(100);
        let decoding = Barrier::new(2);
        std::thread::scope(|scope| {
            let dying = scope.spawn(|| {
                let _ = cache.get(key(1), 10, "abandoned".to_owned(), |_| {
                    decoding.wait();
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    panic!("a bug in a decoder");
                });
            });
            decoding.wait();
            let waited = cache.get(key(1), 10, String::new(), fill(1));
            assert!(dying.join().is_err());
            // Whoever came in time was told; whoever came late decoded anew.
            assert!(waited.is_ok() || waited.is_err_and(|e| e == "abandoned"));
        });
        let kept = if cache.bytes() > 0 { Outcome::Hit } else { Outcome::Decoded };
        assert_eq!(outcome(&cache, 1), kept);
    }
}
