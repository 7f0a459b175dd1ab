//! Tests of reading, also from shards that change after they were opened.

use std::fs::{self, OpenOptions};
use std::time::Instant;

use proptest::prelude::*;

use crate::source::testing::{Dir, safetensors};
use crate::source::{Checkpoint, SourceId, SourceReadError};
use crate::tensor::DType;

/// Pseudorandom bytes, so that a wrong offset shows.
fn noise(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

/// A checkpoint of the tensors `before` and `x`, and the bytes of `x`.
fn checkpoint(n: usize) -> (Dir, Checkpoint, SourceId, Vec<u8>) {
    let bytes = noise(n);
    let dir = Dir::new().shard(
        "model.safetensors",
        &[
            ("before", DType::U8, &[7], vec![0xee; 7]),
            ("x", DType::U8, &[n as u64], bytes.clone()),
            ("y", DType::U8, &[5], vec![0xdd; 5]),
        ],
    );
    let checkpoint = dir.open();
    let id = checkpoint.find("x").expect("stored");
    (dir, checkpoint, id, bytes)
}

#[test]
fn reads_beyond_the_tensor_are_refused() {
    let (_dir, checkpoint, id, bytes) = checkpoint(100);
    let mut out = [0; 30];
    checkpoint.read(id, 70, &mut out).expect("the last bytes");
    assert_eq!(out, bytes[70..]);
    checkpoint.read(id, 100, &mut []).expect("nothing at the end");
    for (at, expected) in [
        (71, "`x` has 100 bytes: cannot read up to byte 101"),
        (u64::MAX, "`x` has 100 bytes: cannot read up to byte 2^64"),
    ] {
        let got = checkpoint.read(id, at, &mut out).expect_err("out of range");
        assert_eq!(got.to_string(), expected);
    }
    let got = checkpoint.read_rows(id, 0, 1, u64::MAX, 3, &mut out, 1).expect_err("out of range");
    assert_eq!(got.to_string(), "`x` has 100 bytes: cannot read up to byte 2^64");
    checkpoint.read_rows(id, 0, 10, 46, 2, &mut out, 10).expect("46 + 10 is within");
    checkpoint.read_rows(id, 0, 10, 91, 2, &mut out, 10).expect_err("91 + 10 is not");
    checkpoint.read_rows(id, 1 << 40, 0, 8, 9, &mut [], 0).expect("no byte is wanted");
    checkpoint.will_need(id, 0, u64::MAX);
    checkpoint.will_need(id, u64::MAX, 1);
}

#[test]
fn a_truncated_shard_is_an_error_that_names_it() {
    let (dir, checkpoint, id, bytes) = checkpoint(300_000);
    let path = dir.join("model.safetensors");
    let t = checkpoint.tensor(id).clone();
    let file = OpenOptions::new().write(true).open(&path).expect("writable");
    file.set_len(t.offset + 1000).expect("shorter");
    let mut out = vec![0; 1000];
    checkpoint.read(id, 0, &mut out).expect("what is left");
    assert_eq!(out, bytes[..1000]);

    let got = checkpoint.read(id, 500, &mut out).expect_err("cut off");
    assert!(matches!(got, SourceReadError::Truncated { wanted: 1000, .. }));
    let expected = format!(
        "shard `{}` was truncated after it was opened: expected 1000 bytes of `x` at offset {}, \
         got a file of {} bytes",
        checkpoint.shard(t.shard).path().display(),
        t.offset + 500,
        t.offset + 1000
    );
    assert_eq!(got.to_string(), expected);
    for stride in [100, 40_000] {
        let got = checkpoint.read_rows(id, 950, 50, stride, 5, &mut out, 50).expect_err("cut off");
        assert!(matches!(got, SourceReadError::Truncated { .. }), "{got}");
    }
}

#[test]
fn a_replaced_shard_is_read_as_it_was() {
    let (dir, checkpoint, id, bytes) = checkpoint(64);
    let new = dir.join("new");
    fs::write(&new, safetensors(&[("x", DType::U8, &[1], vec![1])])).expect("writable");
    fs::rename(&new, dir.join("model.safetensors")).expect("replaced");
    let mut out = [0; 64];
    checkpoint.read(id, 0, &mut out).expect("the old file is still open");
    assert_eq!(out, bytes[..]);
}

#[test]
fn read_rows_equals_reading_each_row() {
    let (_dir, checkpoint, id, bytes) = checkpoint(1 << 20);
    let width = prop_oneof![0usize..40, 1000usize..9000, 60_000usize..70_000];
    let gap = prop_oneof![Just(0usize), 0usize..40, 1500usize..6000];
    proptest!(|(
        at in 0usize..5000,
        (width, gap) in (width, gap),
        rows in 0usize..60,
        spare in 0usize..20,
        overlap in any::<bool>(),
    )| {
        let stride = if overlap { width.saturating_sub(gap) } else { width + gap };
        let fits = (bytes.len() - at - width).checked_div(stride).map_or(rows, |n| n + 1);
        let rows = rows.min(fits);
        let out_stride = width + spare;
        let mut expected = vec![0xaa; rows * out_stride];
        for r in 0..rows {
            expected[r * out_stride..][..width].copy_from_slice(&bytes[at + r * stride..][..width]);
        }
        // The buffer may end with the last row, without the spare bytes after it.
        for end in [expected.len(), expected.len().saturating_sub(spare)] {
            let mut out = vec![0xaa; end];
            checkpoint
                .read_rows(id, at as u64, width, stride as u64, rows, &mut out, out_stride)
                .expect("within the tensor");
            prop_assert!(out == expected[..end]);
        }
    });
}

#[test]
#[ignore = "measures; see `CHEAP_GAP_BYTES`"]
fn cost_of_a_run() {
    let (_dir, checkpoint, id, bytes) = checkpoint(64 << 20);
    for stride in [512, 1024, 2048, 3584, 7168, 14336] {
        for width in [64, 256, 1024, 4096].into_iter().filter(|&w| w < stride) {
            let rows = (bytes.len() / stride).min(4096);
            let mut out = vec![0; rows * width];
            let best = (0..7)
                .map(|_| {
                    let start = Instant::now();
                    checkpoint
                        .read_rows(id, 0, width, stride as u64, rows, &mut out, width)
                        .expect("within the tensor");
                    start.elapsed()
                })
                .min()
                .expect("seven of them");
            println!("stride {stride}, width {width}: {} ns a run", best.as_nanos() / rows as u128);
        }
    }
}
