"""The reader: what it gives, what it refuses, what it still opens when the file is cut off."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from taper.errors import CorruptFileError, ModelNotFoundError, TaperError
from taper.formats.container import TaperFile, unpack_signs
from taper.formats.safetensors_header import read_header
from taper.formats.spec import expected_matrices
from taper.formats.writer import pack_signs
from taper.testing.random_model import write_random_model
from taper.testing.tiny import tiny_config, tiny_taper, tiny_tokenizer_json


def header_length(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_safetensors_library_reads_the_same_tensors(taper_file):
    file = TaperFile.open(taper_file)
    with safe_open(taper_file, "np") as other:
        assert other.metadata()["format"] == "taper/1"
        names = list(other.keys())
        assert {"embed.plane3", "layers.0.down.bias", "head.signs", "norm.final"} <= set(names)
        for name in names:
            np.testing.assert_array_equal(other.get_tensor(name), file.tensor(name))


def test_header_comes_back(taper_file):
    file = TaperFile.open(taper_file, verify=True)
    assert (file.min_bits, file.max_bits, file.total_bits) == (2, 4, 4)
    assert (file.config.num_layers, file.config.qkv_bias, file.config.eos_token_ids) == (1, True, (1,))
    assert file.tokenizer_json == tiny_tokenizer_json()
    assert "add_generation_prompt" in (file.chat_template or "")
    assert file.provenance == {"method": "random", "seed": 0}
    assert sorted(file.codebook.values) == [2, 3, 4]
    assert not file.is_truncated
    assert file.notice() is None


def test_planes_lie_most_significant_first_and_aligned(taper_file):
    frame = read_header(taper_file)
    planes = [entry for name, entry in frame.entries.items() if ".plane" in name]
    numbers = [int(entry.name[-1]) for entry in planes]
    assert numbers == sorted(numbers)
    assert all((frame.data_begin + entry.begin) % 64 == 0 for entry in planes)
    names = [entry.name.rpartition(".")[0] for entry in planes[: len(planes) // 4]]
    assert names == [spec.name for spec in expected_matrices(TaperFile.open(taper_file).config)]


def test_matrix_has_its_arrays(taper_file):
    file = TaperFile.open(taper_file)
    matrix = file.matrix("layers.0.down")
    assert [plane.shape for plane in matrix.planes] == [(96, 16)] * 4
    assert (matrix.spec.in_features, matrix.spec.cols, matrix.block) == (80, 128, 16)
    assert matrix.scales.dtype == np.float16
    assert matrix.bias is not None
    assert set(np.unique(matrix.signs)) == {-1.0, 1.0}
    assert not matrix.planes[0].flags.writeable
    assert file.matrix("embed").bias is None
    with pytest.raises(KeyError):
        file.matrix("layers.1.down")


def test_signs_are_little_endian_bits_and_one_means_minus():
    signs = np.ones(10, dtype=np.float32)
    signs[[0, 9]] = -1
    assert pack_signs(signs).tolist() == [0b00000001, 0b00000010]
    np.testing.assert_array_equal(unpack_signs(pack_signs(signs), 10), signs)


@pytest.mark.parametrize("planes", [2, 3])
def test_cut_off_file_opens_with_its_whole_planes(taper_file, tmp_path, planes):
    whole = TaperFile.open(taper_file)
    cut = tmp_path / "cut.taper"
    cut.write_bytes(taper_file.read_bytes()[: whole.bytes_at(planes + 1) - 1])
    file = TaperFile.open(cut, verify=True)
    assert (file.max_bits, file.total_bits, file.is_truncated) == (planes, 4, True)
    assert file.notice() == (
        f"file is cut off at {cut.stat().st_size:,} of {taper_file.stat().st_size:,} bytes: "
        f"{planes} of 4 planes are whole; running at up to {planes} bits"
    )
    assert max(file.codebook.values) == max(file.codebook.level_scales) == planes
    for name in ("embed", "head"):
        planes_read = file.matrix(name).planes
        assert len(planes_read) == planes
        for got, wanted in zip(planes_read, whole.matrix(name).planes, strict=False):
            np.testing.assert_array_equal(got, wanted)
    with pytest.raises(KeyError):
        file.tensor(f"head.plane{planes}")


def test_file_cut_exactly_at_a_plane_keeps_it(taper_file, tmp_path):
    cut = tmp_path / "cut.taper"
    cut.write_bytes(taper_file.read_bytes()[: TaperFile.open(taper_file).bytes_at(3)])
    assert TaperFile.open(cut).max_bits == 3


def test_too_few_planes_is_corrupt(taper_file, tmp_path):
    cut = tmp_path / "cut.taper"
    cut.write_bytes(taper_file.read_bytes()[: TaperFile.open(taper_file).bytes_at(2) - 1])
    with pytest.raises(CorruptFileError, match="1 of 4 planes are whole, at least 2"):
        TaperFile.open(cut)


def test_every_flipped_byte_of_the_header_is_refused(tmp_path):
    path = tmp_path / "flipped.taper"
    write_random_model(path, tiny_config(num_layers=1), 2, 2)
    original = path.read_bytes()
    rng = random.Random(0)
    with path.open("r+b", buffering=0) as file:
        for position in range(header_length(path)):
            file.seek(position)
            file.write(bytes([original[position] ^ rng.randrange(1, 256)]))
            with pytest.raises(TaperError):
                TaperFile.open(path)
            file.seek(position)
            file.write(original[position : position + 1])
    assert TaperFile.open(path).verify() == []


def test_flipped_bytes_of_the_data_are_named(tmp_path):
    path = tiny_taper(tmp_path / "tiny.taper", 2, 3, num_layers=1)
    frame = read_header(path)
    file = TaperFile.open(path)
    original = path.read_bytes()
    assert any(name.startswith("pad.") for name in frame.entries)
    for entry in frame.entries.values():
        for position in {entry.begin, (entry.begin + entry.end) // 2, entry.end - 1}:
            damaged = bytearray(original)
            damaged[frame.data_begin + position] ^= 1
            path.write_bytes(damaged)
            assert file.verify() == [entry.name]
    path.write_bytes(damaged)
    with pytest.raises(CorruptFileError, match=entry.name):
        TaperFile.open(path, verify=True)


def test_trailing_bytes_are_refused(taper_file, tmp_path):
    longer = tmp_path / "longer.taper"
    longer.write_bytes(taper_file.read_bytes() + b"\0")
    with pytest.raises(CorruptFileError, match="describes only"):
        TaperFile.open(longer)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100])
def test_stumps_are_refused(taper_file, tmp_path, length):
    stump = tmp_path / "stump.taper"
    stump.write_bytes(taper_file.read_bytes()[:length])
    with pytest.raises(TaperError):
        TaperFile.open(stump)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\0\0\0" + bytes(64), "looks like a GGUF file"),
        (b"PK\x03\x04" + bytes(64), "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"Once upon a time there was", "does not begin with a safetensors header"),
        ((2**40).to_bytes(8, "little") + b"{}", "does not begin with a safetensors header"),
    ],
)
def test_other_formats_are_named(tmp_path, content, message):
    path = tmp_path / "other.taper"
    path.write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        TaperFile.open(path)
    assert "taper quantize" in caught.value.hint


def test_plain_safetensors_is_no_taper_file(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match="plain safetensors"):
        TaperFile.open(tmp_path / "model.safetensors")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        TaperFile.open(tmp_path / "none.taper")
    with pytest.raises(ModelNotFoundError, match="is a folder"):
        TaperFile.open(tmp_path)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without huge pages"
)
def test_mapping_asks_for_huge_pages(taper_file):
    file = TaperFile.open(taper_file)
    mapped = Path("/proc/self/smaps").read_text().partition(str(taper_file))[2]
    assert file.max_bits
    assert "hg" in mapped.partition("VmFlags:")[2].partition("\n")[0].split()


def test_newer_format_is_named(taper_file, tmp_path):
    path = tmp_path / "newer.taper"
    path.write_bytes(taper_file.read_bytes().replace(b'"taper/1"', b'"taper/2"'))
    with pytest.raises(ModelNotFoundError, match="taper/2"):
        TaperFile.open(path)


def test_tied_model_has_no_head_and_counts_the_embedding_once(tmp_path):
    file = TaperFile.open(tiny_taper(tmp_path / "tied.taper"))
    config = tiny_config()
    layer = 96 * (96 + 2 * 32) + 96 * 96 + 3 * 80 * 96
    assert file.num_weights == 300 * 96 + config.num_layers * layer
    assert "head" not in [spec.name for spec in file.matrices]
    assert json.dumps(file.config.to_dict())
    assert file.bytes_at(8) == file.file_bytes == file.total_bytes
