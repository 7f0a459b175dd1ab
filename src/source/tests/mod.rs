//! Tests of the room as a whole.

use super::testing::Dir;
use crate::tensor::DType;

#[test]
fn a_tensor_is_read_from_its_shard() {
    let dir = Dir::new()
        .shard("a.safetensors", &[("x", DType::U8, &[4], vec![1, 2, 3, 4])])
        .shard("b.safetensors", &[("y", DType::BF16, &[2], vec![5, 6, 7, 8])]);
    let checkpoint = dir.open();
    let id = checkpoint.find("y").expect("stored");
    let mut out = [0; 3];
    checkpoint.read(id, 1, &mut out).expect("readable");
    assert_eq!(out, [6, 7, 8]);
}
