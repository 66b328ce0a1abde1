"""Forged headers: each contradiction is named, and none is believed far enough to allocate anything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from taper.errors import CorruptFileError
from taper.formats.container import TaperFile
from taper.formats.validate import find_header_hash


def forge(source: Path, target: Path, change) -> None:
    """Write `source` with its header changed by `change(header)` and its hash made right again."""
    raw = source.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    header["__metadata__"]["header_sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    framed = len(text).to_bytes(8, "little") + text
    place = find_header_hash(framed)
    framed = framed[: place.start(1)] + hashlib.sha256(framed).hexdigest().encode() + framed[place.end(1) :]
    target.write_bytes(framed + raw[8 + length :])


def inside(key: str, change):
    """Change a JSON value that lies as text in the metadata."""

    def apply(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"][key])
        change(value)
        header["__metadata__"][key] = json.dumps(value)

    return apply


def put(table, key, value):
    table[key] = value


FORGERIES = {
    "hidden_size": (inside("config", lambda c: put(c, "hidden_size", 128)), "matrix"),
    "heads": (inside("config", lambda c: put(c, "num_kv_heads", 4)), "num_heads 6 is not a multiple"),
    "text size": (
        inside("config", lambda c: put(c, "hidden_size", "96")),
        "'96' is not an integer",
    ),
    "huge layers": (
        inside("config", lambda c: put(c, "num_layers", 10**9)),
        "num_layers 1000000000",
    ),
    "eps": (inside("config", lambda c: put(c, "rms_norm_eps", float("nan"))), "rms_norm_eps nan"),
    "eos": (inside("config", lambda c: put(c, "eos_token_ids", [300])), "300 is outside 0..299"),
    "extra key": (inside("config", lambda c: put(c, "surprise", 1)), "surprise"),
    "missing key": (inside("config", lambda c: c.pop("rope")), "'rope' is missing"),
    "min above max": (lambda h: put(h["__metadata__"], "min_bits", "5"), "widths 5..4"),
    "max 9": (lambda h: put(h["__metadata__"], "max_bits", "9"), "widths 2..9"),
    "no number": (lambda h: put(h["__metadata__"], "max_bits", "four"), "four"),
    "fewer planes": (
        lambda h: (
            put(h["__metadata__"], "max_bits", "3"),
            inside("codebook", lambda c: c["levels"].pop("4"))(h),
        ),
        "needs 1 or 2 rows|unknown tensors",
    ),
    "codebook size": (inside("codebook", lambda c: c["levels"]["2"]["values"].pop()), "needs 4 values"),
    "codebook range": (
        inside("codebook", lambda c: put(c["levels"]["2"]["values"], 3, 128)),
        "-127..127",
    ),
    "tables without a tensor": (
        inside("matrices", lambda m: put(m[0], "tables", True)),
        "'embed.tables' is missing",
    ),
    "tables as a number": (inside("matrices", lambda m: put(m[0], "tables", 1)), "but the configuration has"),
    "activation bits": (
        inside("codebook", lambda c: put(c["levels"]["2"], "activation_bits", 16)),
        "activation_bits of 2 bits 16 is outside 1..15",
    ),
    "activation bits as text": (
        inside("codebook", lambda c: put(c["levels"]["2"], "activation_bits", "7")),
        "activation_bits of 2 bits '7' is not an integer",
    ),
    "codebook order": (inside("codebook", lambda c: c["levels"]["2"]["values"].reverse()), "ascending"),
    "codebook scale": (inside("codebook", lambda c: put(c["levels"]["3"], "scale", 0)), "above 0"),
    "codebook level": (inside("codebook", lambda c: c["levels"].pop("3")), "levels must be those of 2..4"),
    "matrix list": (inside("matrices", lambda m: m.pop()), "5 matrices; the configuration has 6"),
    "matrix cols": (inside("matrices", lambda m: put(m[0], "cols", 192)), "but the configuration has"),
    "matrix block": (inside("matrices", lambda m: put(m[0], "block", 96)), "but the configuration has"),
    "dtype": (lambda h: put(h["norm.final"], "dtype", "I64"), "dtype 'I64'"),
    "bytes": (lambda h: put(h["norm.final"], "shape", [97]), r"shape \[97\]"),
    "overflow": (lambda h: put(h["norm.final"], "shape", [2**62, 2**3]), "spans 384 bytes"),
    "negative": (lambda h: put(h["norm.final"], "data_offsets", [-4, 380]), "data_offsets"),
    "true as number": (lambda h: put(h["norm.final"], "shape", [True]), "shape"),
    "overlap": (lambda h: put(h["layers.0.o.scales"], "data_offsets", [0, 192]), "begins at"),
    "missing tensor": (lambda h: h["__metadata__"] and h.pop(list(h)[-1]), "describes only"),
    "renamed tensor": (lambda h: put(h, "layers.9.signs", h.pop("head.signs")), "'head.signs' is missing"),
    "swapped tensors": (
        lambda h: h.update({"head.signs": h["embed.signs"], "embed.signs": h["head.signs"]}),
        "tensor .* is U8",
    ),
    "odd entry": (lambda h: h["norm.final"].pop("dtype"), "exactly dtype, shape and data_offsets"),
    "digest missing": (inside("digests", lambda d: d.pop("norm.final")), "digests are not those"),
    "digest form": (inside("digests", lambda d: put(d, "norm.final", "zz")), "32 hex digits"),
    "metadata type": (lambda h: put(h["__metadata__"], "card", {}), "table of strings"),
    "card": (lambda h: put(h["__metadata__"], "card", "[]"), "card is not a JSON object"),
    "no json": (lambda h: put(h["__metadata__"], "config", "{"), "config is not valid JSON"),
    "no config": (lambda h: h["__metadata__"].pop("config"), "'config' is missing"),
    "policy": (inside("policies", lambda p: put(p, "x", 1)), "policies"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_contradiction_is_named(taper_file, tmp_path, name):
    change, message = FORGERIES[name]
    path = tmp_path / "forged.taper"
    forge(taper_file, path, change)
    with pytest.raises(CorruptFileError, match=message):
        TaperFile.open(path)


def test_unchanged_forgery_opens(taper_file, tmp_path):
    path = tmp_path / "forged.taper"
    forge(taper_file, path, lambda header: None)
    assert TaperFile.open(path).verify() == []


def test_repeated_key_is_refused(taper_file, tmp_path):
    raw = taper_file.read_bytes()
    path = tmp_path / "repeated.taper"
    path.write_bytes(raw.replace(b'"max_bits":"4"', b'"min_bits":"4"', 1))
    with pytest.raises(CorruptFileError, match="a key occurs twice"):
        TaperFile.open(path)


def test_scale_that_is_not_finite_is_named(taper_file, tmp_path):
    file = TaperFile.open(taper_file)
    raw = bytearray(taper_file.read_bytes())
    position = bytes(raw).index(file.tensor("layers.0.o.scales").tobytes())
    raw[position + 6 : position + 8] = b"\x00\x7c"  # float16 infinity in row 3
    path = tmp_path / "infinite.taper"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"layers\.0\.o\.scales at \[0, 3\] is inf"):
        TaperFile.open(path)
