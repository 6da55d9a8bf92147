"""Records as bytes and back; files that are torn, damaged or foreign."""

import random
import struct
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gateway.capture.reading import CaptureError, Reading
from gateway.capture.record import HEAD_LINE, MARK, array_of, framed, kept, pack, unpack
from gateway.errors import TensorError
from gateway.tensors import BFLOAT16, DTYPES
from registry.signature import TensorSpec
from tests.gateway.capture.records import frames, record, write

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """A datatype and an array of it, of any shape and any values."""
    kind = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    if kind == "BYTES":
        flat = draw(st.lists(TEXTS, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(flat), object)
        array[:] = flat
        return kind, array.reshape(shape)
    if kind == "BF16":
        return kind, draw(hnp.arrays(np.uint16, shape)).view(BFLOAT16)
    return kind, draw(hnp.arrays(DTYPES[kind], shape))


@settings(max_examples=150, deadline=None)
@given(given=st.lists(tensors(), min_size=1, max_size=3), time=st.floats(0, 2e9))
def test_every_datatype_comes_back_bit_by_bit(
    given: list[tuple[str, np.ndarray]], time: float
) -> None:
    """Also NaN with payloads, empty tensors, tensors without axes, texts of any script."""
    specs = [TensorSpec(f"t{k}", kind, ()) for k, (kind, _) in enumerate(given)]
    made = record(inputs=kept(specs, [array for _, array in given]), time=time)

    back = unpack(pack(made))

    assert back == made
    for tensor, (kind, array) in zip(back.inputs, given, strict=True):
        found = array_of(tensor)
        assert (tensor.datatype, found.dtype, found.shape) == (kind, array.dtype, array.shape)
        if kind == "BYTES":
            assert found.tolist() == array.tolist()
        else:
            assert found.tobytes() == array.tobytes()


def test_a_file_can_be_read_by_its_description_alone(tmp_path: Path) -> None:
    """A second reader, written from docs/decisions: a line, then frames of MessagePack."""
    file = write(tmp_path / "1.capture", record(1, bucket=17), record(2))
    data = file.read_bytes()
    assert data.startswith(b"driftgate capture 1\n")
    at, found = len(b"driftgate capture 1\n"), []
    while at < len(data):
        mark, length, checksum, own = struct.unpack_from("<4sIII", data, at)
        assert mark == b"\xd5DGc"
        assert own == zlib.crc32(data[at : at + 12])
        content = data[at + 16 : at + 16 + length]
        assert checksum == zlib.crc32(content)
        found.append(msgpack.unpackb(content))
        at += 16 + length

    assert [each["id"] for each in found] == ["r-1", "r-2"]
    assert (found[0]["bucket"], found[0]["version"], found[0]["reason"]) == (17, 7, "SPLIT")


def test_a_file_cut_anywhere_gives_its_whole_records(tmp_path: Path) -> None:
    """Every prefix: what was complete is read, the rest is counted, nothing is raised."""
    made = [record(k) for k in range(3)]
    data = write(tmp_path / "1.capture", *made).read_bytes()
    ends = [len(HEAD_LINE) + len(frames(*made[:k])) for k in range(4)]
    file = tmp_path / "cut.capture"
    for n in range(len(data) + 1):
        file.write_bytes(data[:n])

        reading = Reading([file])
        found = list(reading)

        whole = sum(end <= n for end in ends[1:])
        assert found == made[:whole]
        assert (reading.torn, reading.skipped) == (int(n not in ends), 0), n


def test_one_bit_costs_one_record(tmp_path: Path) -> None:
    """Wherever it flips: every other record is read as it was written, and the loss is counted."""
    made = [record(k, n_bytes=40) for k in range(6)]
    data = bytearray(write(tmp_path / "1.capture", *made).read_bytes())
    draw = random.Random(5)
    file = tmp_path / "flipped.capture"
    for bit in draw.sample(range(8 * len(data)), 600):
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8

        reading = Reading([file])
        if bit // 8 < len(HEAD_LINE):
            with pytest.raises(CaptureError, match=r"no capture|later release"):
                list(reading)
            continue
        found = list(reading)

        assert len(found) == 5
        assert all(each in made for each in found)
        assert reading.skipped + reading.torn == 1


def test_a_length_that_was_changed_hides_nothing_behind_it(tmp_path: Path) -> None:
    """A head says itself whether it is whole; the next one is looked for."""
    first, rest = frames(record(0)), frames(record(1), record(2))
    broken = first[:4] + (1 << 30).to_bytes(4, "little") + first[8:]
    file = tmp_path / "1.capture"
    file.write_bytes(HEAD_LINE + broken + rest)

    reading = Reading([file])

    assert [each.id for each in reading] == ["r-1", "r-2"]
    assert reading.skipped == 1


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"PK\x03\x04 a zip", "is no capture of driftgate"),
        (bytes(4096), "is no capture of driftgate"),
        (b"driftgate counts\0\0\0\0", "is no capture of driftgate"),
        (b"driftgate capture 2\n" + frames(record()), "later release \\(format 2"),
        (b"driftgate capture one\n", "is no capture of driftgate"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, data: bytes, sentence: str) -> None:
    """Foreign bytes and later formats get a sentence; among other files, a line of the report."""
    file = tmp_path / "other.capture"
    file.write_bytes(data)
    with pytest.raises(CaptureError, match=f"other.capture: .*{sentence}"):
        list(Reading([file]))

    reading = Reading([file, write(tmp_path / "good.capture", record(4))])
    assert [each.id for each in reading] == ["r-4"]
    assert "other.capture" in reading.said()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb({"id": "a"}), b"\x91" * 50_000],
)
def test_content_that_is_no_record_is_skipped(tmp_path: Path, content: bytes) -> None:
    """A whole frame with something else in it: counted, and the next one is read."""
    file = tmp_path / "1.capture"
    file.write_bytes(HEAD_LINE + framed(content) + frames(record(9)))

    reading = Reading([file])

    assert [each.id for each in reading] == ["r-9"]
    assert reading.skipped == 1


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.binary(max_size=40)
        | st.sampled_from([MARK, frames(record(1)), frames(record(2))[:-3], HEAD_LINE]),
        max_size=8,
    )
)
def test_no_bytes_make_a_reader_fail(
    pieces: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Anything between and around frames: whole ones are found again, nothing else is raised."""
    file = tmp_path_factory.getbasetemp() / "any.capture"
    file.write_bytes(HEAD_LINE + b"".join(pieces))

    reading = Reading([file])
    found = list(reading)

    assert len(found) <= sum(piece == frames(record(1)) for piece in pieces)
    assert all(each == record(1) for each in found)
    assert reading.done_bytes <= reading.n_bytes
    if any(pieces) and not found:
        assert reading.said()


@pytest.mark.parametrize(
    ("kind", "shape", "data"),
    [
        ("FP32", (2,), b"1234567"),
        ("FP33", (1,), b"1234"),
        ("BOOL", (1,), b"\x02"),
        ("BYTES", (1,), b"\xff\xff\xff\xff"),
        ("INT8", (-1,), b"1"),
    ],
)
def test_bytes_that_are_no_tensor_get_a_sentence(
    kind: str, shape: tuple[int, ...], data: bytes
) -> None:
    """A checksum that holds says nothing about sense."""
    made = record(inputs=(("x", kind, shape, data),))
    tensor = unpack(pack(made)).inputs[0]
    with pytest.raises(TensorError, match="x"):
        array_of(tensor)
