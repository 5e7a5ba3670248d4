"""Headers are read right, and a file that lies is refused with ModelError and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.limits import SAFETENSORS_HEADER_BYTES_MAX
from cluster.models.safetensors_header import TensorEntry, parse_header, read_header
from cluster.types import DType
from tests.allocations import allocating_at_most
from tests.safetensors_files import file_of, header_of, write_safetensors

SEEDED = settings(max_examples=250)

TWO = {"a": (DType.F32, (2, 3)), "b": (DType.BF16, (4,))}
GOOD = file_of(header_of(TWO), 32)


def parse(data: bytes) -> dict[str, TensorEntry]:
    return parse_header(data, len(data), "x.safetensors")


def refusal(data: bytes) -> str:
    with pytest.raises(ModelError) as caught:
        parse(data)
    return str(caught.value)


def header_with(**changes: object) -> bytes:
    """The good file, with fields of tensor `b` changed."""
    header = header_of(TWO)
    header["b"] = {**header["b"], **changes}  # type: ignore[dict-item]
    return file_of(header, 32)


def test_entries_have_absolute_offsets(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", TWO)
    begin = (tmp_path / "x.safetensors").stat().st_size - 32
    assert read_header(tmp_path / "x.safetensors") == {
        "a": TensorEntry("a", DType.F32, (2, 3), begin, begin + 24),
        "b": TensorEntry("b", DType.BF16, (4,), begin + 24, begin + 32),
    }


def test_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    numpy_writer = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.safetensors"
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.array(7, dtype=np.int64)}
    tensors["empty"] = np.zeros((0, 5), dtype=np.float16)
    numpy_writer.save_file(tensors, path, metadata={"format": "pt"})
    entries = read_header(path)
    data = path.read_bytes()
    assert set(entries) == set(tensors)
    for name, array in tensors.items():
        entry = entries[name]
        assert (entry.shape, data[entry.begin : entry.end]) == (array.shape, array.tobytes())


def test_padding_and_metadata_are_part_of_the_format() -> None:
    assert set(parse(file_of({"__metadata__": {"format": "pt"}, **header_of(TWO)}, 32, pad=5))) == {"a", "b"}
    assert set(parse(file_of({"__metadata__": None, **header_of(TWO)}, 32))) == {"a", "b"}


def test_refuses_a_length_above_the_limit_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((SAFETENSORS_HEADER_BYTES_MAX + 1).to_bytes(8, "little"))
        file.truncate(SAFETENSORS_HEADER_BYTES_MAX * 2)  # sparse: long enough to hold what is claimed
    with pytest.raises(ModelError, match=r"claims 100\.0 MiB, and at most 100\.0 MiB are allowed"):
        read_header(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found only 0 bytes"),
        (GOOD[:7], "found only 7 bytes"),
        (GOOD[:40], "but the file ends after 40"),
        (GOOD[:-1], "is cut short"),
        (GOOD + b"\0", "goes on"),
        (file_of(b"\xff\xfe{}", 0), "expected UTF-8 text, found byte 0xff at 0"),
        (file_of(b"{", 0), "expected JSON"),
        (file_of(b"[]", 0), "expected a JSON object, found list"),
        (file_of(b"[" * 200_000, 0), "expected JSON"),
        (file_of(b'{"a": ' + b"9" * 10_000 + b"}", 0), "expected JSON"),
        (file_of(b'{"a": 1, "a": 2}', 0), "the key 'a' appears twice"),
        (file_of(b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0), "the key 'dtype' appears twice"),
        (file_of({"__metadata__": {"n": 1}}, 0), "expected __metadata__ to map text to text"),
        (file_of({"a": 3}, 0), "expected dtype, shape and data_offsets, found int"),
        (file_of({"a\0": {}}, 0), "expected a printable name"),
        (file_of(b'{"\\ud800": {}}', 0), "expected a printable name"),
    ],
)
def test_refuses_a_file_that_is_not_whole(data: bytes, message: str) -> None:
    assert message in refusal(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "F4"}, "has the element type 'F4', which Potluck does not read"),
        ({"dtype": ["F32"]}, "which Potluck does not read"),
        ({"dtype": None}, "which Potluck does not read"),
        ({"shape": [5]}, "BF16 of shape [5] takes 10 bytes, but its data_offsets span 8"),
        ({"shape": [-4]}, "expected whole numbers from 0, found -4"),
        ({"shape": [4.0]}, "expected whole numbers from 0, found 4.0"),
        ({"shape": [True, 4]}, "expected whole numbers from 0, found True"),
        ({"shape": "4"}, "expected a list"),
        ({"shape": [1] * 65}, "expected a list of at most 64"),
        ({"shape": [1 << 63, 0]}, "expected whole numbers from 0"),
        ({"data_offsets": [-8, 0]}, "expected whole numbers from 0, found -8"),
        ({"data_offsets": [32, 24]}, "expected data_offsets [begin, end], found [32, 24]"),
        ({"data_offsets": [24]}, "expected data_offsets [begin, end]"),
        ({"data_offsets": [20, 28]}, "overlap"),
        ({"data_offsets": [0, 8]}, "overlap"),
        ({"data_offsets": [26, 34]}, "leave a hole"),
        ({"shape": [2], "data_offsets": [24, 28]}, "goes on at"),
        ({"shape": [1 << 20], "data_offsets": [24, 24 + (2 << 20)]}, "is cut short"),
    ],
)
def test_refuses_a_tensor_that_lies(changes: dict[str, object], message: str) -> None:
    assert message in refusal(header_with(**changes))


def test_says_what_to_do_next() -> None:
    assert "download it again" in refusal(GOOD[:-1])


@SEEDED
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits_give_entries_inside_the_file_or_model_error(flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(GOOD)
    for position, bit in flips:
        damaged[position] ^= 1 << bit
    check_survives(bytes(damaged))


@SEEDED
@given(length=st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_refused(length: int) -> None:
    refusal(GOOD[:length])


@SEEDED
@given(claimed=st.integers(0, (1 << 64) - 1) | st.integers(0, 2 * len(GOOD)))
def test_a_claimed_length_is_never_allocated(claimed: int) -> None:
    check_survives(claimed.to_bytes(8, "little") + GOOD[8:])


@pytest.mark.parametrize("claimed", [SAFETENSORS_HEADER_BYTES_MAX + 1, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_claimed_length_above_the_limit_is_not_read(claimed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(claimed.to_bytes(8, "little"))
        file.truncate(min(2 * claimed, 1 << 42))  # sparse: mostly long enough to hold what is claimed
    with allocating_at_most(1 << 20), pytest.raises(ModelError):
        read_header(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*DType]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
OFFSETS = st.lists(st.integers(-2, 40) | st.sampled_from([1 << 31, 1 << 40, 1 << 62]), min_size=1, max_size=3)
ALMOST_TENSORS = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DType]) | JSON_VALUES, "shape": OFFSETS | JSON_VALUES, "data_offsets": OFFSETS}
)


@SEEDED
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ALMOST_TENSORS | JSON_VALUES, max_size=3),
    data_bytes=st.integers(0, 40),
)
def test_any_json_gives_entries_inside_the_file_or_model_error(header: dict[str, object], data_bytes: int) -> None:
    check_survives(file_of(json.dumps(header).encode("utf-8", "surrogatepass"), data_bytes))


def check_survives(data: bytes) -> None:
    """Entries that tile the file after its header, or ModelError; and no more memory than so many bytes may take."""
    with allocating_at_most((128 << 10) + 64 * len(data)):
        try:
            entries = parse(data)
        except ModelError as error:
            str(error).encode()  # fit to be shown: no stray surrogates
            return
    covered = 8 + int.from_bytes(data[:8], "little")
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        assert entry.begin == covered
        covered = entry.end
    assert covered == len(data)
