"""Our reader and writer against the safetensors library, and hostile files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxstack.models.safetensors_file import MAX_HEADER_BYTES, TensorToWrite, read_header, write_file
from jaxstack.runtime.errors import UserError

ARRAYS = {
    "a.f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.f16": np.linspace(-2, 2, 5).astype(np.float16),
    "c.f64": np.array(3.5),
    "d.empty": np.zeros((0, 4), np.float32),
    "e.ünïcode": np.ones((1, 1, 2), np.float32),
}


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(ARRAYS | {"ids": np.arange(3)}, tmp_path / "x", metadata={"format": "pt"})
    tensors = read_header(tmp_path / "x")
    assert tensors.keys() == ARRAYS.keys() | {"ids"}
    for name, array in ARRAYS.items():
        found = tensors[name].read()
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    with pytest.raises(UserError, match="ids: found dtype I64, expected one of F64, F32, F16, BF16"):
        tensors["ids"].read()


def test_the_library_reads_what_we_write(tmp_path):
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.float64): "F64"}
    brain = np.array([[1.0, -2.5], [0.1, 3e38]], ml_dtypes.bfloat16)
    writes = [TensorToWrite(n, a.shape, names[a.dtype], lambda a=a: a) for n, a in ARRAYS.items()]
    # Cast and made contiguous on the way.
    writes.append(TensorToWrite("bf16", (2, 2), "BF16", lambda: brain.astype(np.float32).T))
    write_file(tmp_path / "x", writes)
    with safetensors.safe_open(tmp_path / "x", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    np.testing.assert_array_equal(read_header(tmp_path / "x")["bf16"].read(), brain.T)


def raw_file(path, header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"{}", b"", MAX_HEADER_BYTES + 1, "found a header of 100000001 bytes, expected at most 100000000"),
        (b"{}", b"", 2**64 - 1, "found a header of 18446744073709551615 bytes"),
        (b"{}", b"", 50_000, "found a header of 50000 bytes in a file of 10"),
        (b"{}", b"", 0, "found a header of 0 bytes"),
        (b"{oops", b"", None, "header is not a JSON object"),
        (b"\xff\xff", b"", None, "header is not a JSON object"),
        (b"[" * 50_000, b"", None, "header is not a JSON object"),
        (b"[1]", b"", None, "header: found a JSON list"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", None, "a key appears twice"),
        ({"a": 1}, b"", None, "a: expected an entry with dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", None, "a: expected an entry"),
        ({"a": entry(0, 4, dtype="PICKLE")}, bytes(4), None, "a: dtype: found 'PICKLE'"),
        ({"a": entry(0, 4, dtype=["F32"])}, bytes(4), None, "a: dtype: found ['F32']"),
        ({"a": entry(0, 4, shape=[-1])}, bytes(4), None, "a: shape: found [-1]"),
        ({"a": entry(0, 4, shape=[1.0])}, bytes(4), None, "a: shape: found [1.0]"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, bytes(4), None, "a: data_offsets: found [0]"),
        ({"a": entry(0, 4) | {"data_offsets": [False, 4]}}, bytes(4), None, "a: data_offsets: found [False, 4]"),
        ({"a": entry(-4, 0)}, bytes(4), None, "a: data_offsets: found [-4, 0]"),
        ({"a": entry(4, 0)}, bytes(4), None, "a: data_offsets: found [4, 0], expected them inside"),
        ({"a": entry(0, 8, shape=[2])}, bytes(4), None, "a: data_offsets: found [0, 8], expected them inside 4 bytes"),
        ({"a": entry(0, 4, shape=[2])}, bytes(4), None, "a: found 4 bytes, expected 8 for F32 [2]"),
        ({"a": entry(0, 4, shape=[2**62, 2**62])}, bytes(4), None, "a: found 4 bytes, expected"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8)}, bytes(8), None, "b: data_offsets: found [4, 8], which overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), None, "b: data_offsets: found [8, 12], which leaves a gap"),
        ({"a": entry(0, 4)}, bytes(5), None, "found 5 bytes of data, expected 4"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, header, data, length, message):
    with pytest.raises(UserError) as caught:
        read_header(raw_file(tmp_path / "x", header, data, length))
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert message in str(caught.value)


def test_short_missing_and_shrunken_files(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(UserError, match="in a file of 3"):
        read_header(tmp_path / "short")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_header(tmp_path / "missing")
    path = raw_file(tmp_path / "x", {"a": entry(0, 4)}, bytes(4))
    tensor = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="a: found 0 of 1 values; the file was cut off"):
        tensor.read()
