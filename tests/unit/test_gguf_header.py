"""GGUF headers are read right, and a file that lies is refused with ModelError and nothing else."""

from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.limits import GGUF_HEADER_BYTES_MAX, GGUF_ITEMS_MAX
from cluster.models.gguf_header import GgufHeader, GgufTensor, parse_gguf_header, read_gguf_header
from cluster.models.gguf_types import GgmlType
from tests.gguf_blocks import stored
from tests.gguf_files import Stored, gguf_bytes

SEEDED = settings(max_examples=250, derandomize=True, deadline=None, database=None)

METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "é", ""],
    "tokenizer.ggml.scores": [0.0, -1.5, -2.0],
    "tokenizer.ggml.token_type": [3, 1, 1],
}
TWO: dict[str, Stored] = {
    "a": stored(np.ones((2, 3), np.float32), "F32"),
    "b": stored(np.ones((4, 64), np.float32), "Q8_0"),
}
GOOD = gguf_bytes(METADATA, TWO)
COUNTS = 8  # where the two counts stand, behind magic and version
ENTRIES = 24  # where the first metadata entry begins


def parse(data: bytes) -> GgufHeader:
    return parse_gguf_header(io.BytesIO(data), len(data), "x.gguf")


def refusal(data: bytes) -> str:
    with pytest.raises(ModelError) as caught:
        parse(data)
    return str(caught.value)


def with_number(data: bytes, at: int, code: str, number: int) -> bytes:
    return data[:at] + struct.pack(f"<{code}", number) + data[at + struct.calcsize(code) :]


def tensor_at(name: bytes) -> int:
    """Where the rank of the tensor called `name` stands."""
    return GOOD.index(struct.pack("<Q", len(name)) + name + struct.pack("<I", 2)) + 8 + len(name)


def test_metadata_and_absolute_offsets_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(GOOD)
    header = read_gguf_header(tmp_path / "x.gguf")
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in METADATA.items()}
    assert dict(header.metadata) == expected
    begin = len(GOOD) - 32 - 4 * 2 * 34
    assert header.tensors == {
        "a": GgufTensor("a", GgmlType.F32, (2, 3), begin, begin + 24),
        "b": GgufTensor("b", GgmlType.Q8_0, (4, 64), begin + 32, len(GOOD)),
    }


def test_version_2_is_read_and_others_are_not() -> None:
    assert parse(gguf_bytes(METADATA, TWO, version=2)) == parse(GOOD)
    assert "expected GGUF version 2 or 3, found 1" in refusal(gguf_bytes(METADATA, TWO, version=1))
    assert "big-endian" in refusal(gguf_bytes(METADATA, TWO, version=3 << 24))


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04" + bytes(64)])
def test_another_file_is_named_as_such(data: bytes) -> None:
    assert "expected a GGUF file" in refusal(data)


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf_header(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("at", [COUNTS, COUNTS + 8, ENTRIES], ids=["tensors", "entries", "text"])
@pytest.mark.parametrize("number", [1 << 62, 1 << 33, 100_000])
def test_a_count_beyond_the_file_allocates_nothing(at: int, number: int) -> None:
    data = with_number(GOOD, at, "Q", number)
    tracemalloc.start()
    message = refusal(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "but the file ends before" in message or "appears twice" in message
    assert peak_bytes < 4 * 1024 * 1024


def test_a_list_may_not_be_longer_than_the_file() -> None:
    at = GOOD.index(struct.pack("<II", 9, 8)) + 8
    assert "items of 'tokenizer.ggml.tokens'" in refusal(with_number(GOOD, at, "Q", 1 << 40))


def test_lists_together_have_a_limit() -> None:
    count = GGUF_ITEMS_MAX // 2 + 1
    entries = [b"\x01\0\0\0\0\0\0\0" + key + struct.pack("<IIQ", 9, 0, count) + bytes(count) for key in (b"x", b"y")]
    assert "lists more than" in refusal(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + b"".join(entries))


def test_a_header_has_a_limit_even_in_a_large_file() -> None:
    claim = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x" + struct.pack("<IQ", 8, 1 << 40)
    with pytest.raises(ModelError, match="that are read of a header"):
        parse_gguf_header(io.BytesIO(claim), GGUF_HEADER_BYTES_MAX * 8, "x.gguf")


def test_lists_of_lists_are_refused() -> None:
    at = GOOD.index(struct.pack("<II", 9, 8)) + 4
    assert "list of lists" in refusal(with_number(GOOD, at, "I", 9))


def test_an_unknown_kind_of_value_is_refused() -> None:
    at = GOOD.index(struct.pack("<II", 4, 2))
    assert "is of kind 13" in refusal(with_number(GOOD, at, "I", 13))


def test_a_key_or_tensor_may_appear_once() -> None:
    double = gguf_bytes({"ka": 1, "kb": 2}, TWO).replace(b"kb", b"ka")
    assert "the metadata key 'ka' appears twice" in refusal(double)
    both = gguf_bytes(METADATA, {"first": TWO["a"], "other": TWO["b"]}).replace(b"other", b"first")
    assert "the tensor 'first' appears twice" in refusal(both)


def test_an_unread_type_is_named() -> None:
    message = refusal(gguf_bytes(METADATA, {"w": ("Q2_K", (1, 256), bytes(84))}))
    assert "is stored as Q2_K, which Potluck does not read; it reads F32, F16, Q4_0" in message


@pytest.mark.parametrize(
    ("offset", "code", "number", "said"),
    [
        (0, "I", 5, "expected 1 to 4 axes, found 5"),
        (0, "I", 0, "expected 1 to 4 axes, found 0"),
        (4, "Q", 0, "is impossible"),
        (4, "Q", 1 << 63, "is impossible"),
        (4, "Q", 65, "do not divide into blocks of 32"),
        (12, "Q", 1 << 39, "but the file ends after"),
        (20, "I", 99, "is stored as number 99"),
        (24, "Q", 33, "no multiple of 32"),
        (24, "Q", 0, "overlap"),
        (24, "Q", 1 << 63, "no multiple of 32"),
        (24, "Q", 64, "but the file ends after"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(offset: int, code: str, number: int, said: str) -> None:
    assert said in refusal(with_number(GOOD, tensor_at(b"b") + offset, code, number))


@pytest.mark.parametrize("alignment", [0, 7, 48, 1 << 20])
def test_an_odd_alignment_is_refused(alignment: int) -> None:
    assert "general.alignment" in refusal(gguf_bytes({"general.alignment": alignment}, TWO))


@pytest.mark.parametrize("kept", [4, 30, 100, len(GOOD) - 1])
def test_a_file_that_was_cut_short_says_so(kept: int) -> None:
    assert "the file ends" in refusal(GOOD[:kept])


@SEEDED
@given(st.binary(max_size=400))
def test_any_bytes_give_an_error_or_a_header(data: bytes) -> None:
    try:
        parse(b"GGUF\x03\0\0\0" + data)
    except ModelError:
        return


@SEEDED
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_an_error_or_tensors_inside_the_file(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, byte in changes:
        data[at] = byte
    try:
        header = parse(bytes(data))
    except ModelError:
        return
    assert all(0 < tensor.begin < tensor.end <= len(data) for tensor in header.tensors.values())
