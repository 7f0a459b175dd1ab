"""Compares the experts of an F32 view with those of the quickstart's checkpoint, decoded here with numpy.

python read_quickstart.py CHECKPOINT VIEW

safetensors reads both; the view must be `--to native --dtype f32` of the checkpoint.
"""

import sys
from pathlib import Path

import numpy
from safetensors import deserialize, safe_open

BLOCK = 128
EXPERTS = "model.layers.1.mlp.experts"


def e4m3(codes: numpy.ndarray) -> numpy.ndarray:
    """Decodes OCP FP8 E4M3: sign, exponent with bias 7, mantissa of 3 bits. NaN is not handled."""
    sign = numpy.where(codes >> 7, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), codes & 7
    fraction = numpy.where(exponent > 0, 8 + mantissa, mantissa)
    return (sign * fraction * 2.0 ** (numpy.maximum(exponent, 1) - 10)).astype("<f4")


def main(checkpoint: Path, view: Path) -> None:
    published = {}
    for shard in checkpoint.glob("*.safetensors"):
        published.update(deserialize(shard.read_bytes()))

    def decoded(name: str) -> numpy.ndarray:
        weight, scales = published[f"{name}.weight"], published[f"{name}.weight_scale_inv"]
        assert (weight["dtype"], scales["dtype"]) == ("F8_E4M3", "F32"), (weight, scales)
        rows, columns = weight["shape"]
        scales = numpy.frombuffer(bytes(scales["data"]), "<f4").reshape(scales["shape"])
        scales = scales.repeat(BLOCK, 0).repeat(BLOCK, 1)[:rows, :columns]
        codes = numpy.frombuffer(bytes(weight["data"]), "u1").reshape(rows, columns)
        assert not numpy.any(codes & 127 == 127), f"{name} has NaN"
        return e4m3(codes) * scales

    def expert(number: int) -> numpy.ndarray:
        name = f"{EXPERTS}.{number}"
        # [hidden, 2 * intermediate]: gate and up transposed, gate first.
        return numpy.concatenate([decoded(f"{name}.{gate}_proj").T for gate in ("gate", "up")], 1)

    count = sum(name.startswith(EXPERTS) and "up_proj.weight_" in name for name in published)
    expected = numpy.stack([expert(number) for number in range(count)])
    tensors, compared = 0, 0
    for shard in view.glob("*.safetensors"):
        with safe_open(shard, "numpy") as opened:
            tensors += len(opened.keys())
            if f"{EXPERTS}.gate_and_up_projs" in opened.keys():
                got = opened.get_tensor(f"{EXPERTS}.gate_and_up_projs")
                numpy.testing.assert_array_equal(got, expected)
                compared += got.size
    assert compared == expected.size > 0, "the experts are not in the view"
    print(f"{tensors} tensors in the view; {compared} elements as numpy decodes them")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
