"""Checks of everything that a file says about itself, before any of it is believed."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from taper.config import ModelConfig, RopeConfig
from taper.errors import CorruptFileError, ModelNotFoundError
from taper.formats.activations import MAX_ACTIVATION_BITS, ActivationBits
from taper.formats.learned import LearnedScheduler
from taper.formats.safetensors_header import SafetensorsHeader, TensorEntry
from taper.formats.sensitivity import Sensitivity, checked_figures
from taper.formats.spec import (
    ACTIVATION_BITS,
    ALIGNMENT,
    DIGEST_DIGITS,
    FORMAT,
    LEAST_WIDE_BITS,
    MAX_BITS,
    NARROW_VALUE,
    WIDE_VALUE,
    Codebook,
    MatrixSpec,
    TaperHeader,
    expected_matrices,
    layout,
)

_HASH_FIELD = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
# No model is near these; they bound the work that a forged header can cause.
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 100_000
# Of a matrix in the metadata, true or absent.
_FLAGS = ("tables", "gain", "offsets")


def validate(path: Path, frame: SafetensorsHeader) -> TaperHeader:
    """Check a file's whole description: hash, configuration, codebook, matrices, tensors, digests.

    Raises:
        ModelNotFoundError: a safetensors file that is no `.taper` file, or one of a newer format.
        CorruptFileError: naming the first thing that contradicts docs/format.md.
    """
    _check_format(path, frame)
    if not header_hash_matches(frame.raw):
        raise CorruptFileError(
            f"{path}: the header's checksum does not match its bytes", hint="copy or download the file again"
        )
    try:
        header = _header(frame.metadata)
        _check_tensors(frame, header)
        _check_digests(frame)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CorruptFileError(f"{path}: {reason}", hint="copy or download the file again") from error
    return header


def header_hash_matches(raw: bytes) -> bool:
    """Whether the SHA-256 in the header is that of length field and header with its digits as zeros."""
    found = find_header_hash(raw)
    if found is None:
        return False
    blanked = raw[: found.start(1)] + b"0" * 64 + raw[found.end(1) :]
    return hashlib.sha256(blanked).hexdigest().encode() == found.group(1)


def find_header_hash(raw: bytes) -> re.Match[bytes] | None:
    """The place of the 64 digits; a quote inside another value is escaped, so no other text can look like
    it."""
    return _HASH_FIELD.search(raw)


def check_config(config: ModelConfig) -> None:
    """Refuse sizes that no decoder of this family has.

    Raises:
        TypeError: a value of another type.
        ValueError: a value outside its range.
    """
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "vocab_size", "max_position_embeddings"):  # fmt: skip
        _integer(name, getattr(config, name), 1, _MAX_LAYERS if name == "num_layers" else _MAX_SIZE)
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} is odd; rotary embedding needs pairs")
    _positive("rms_norm_eps", config.rms_norm_eps)
    for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} {getattr(config, name)!r} is not true or false")
    if not isinstance(config.architecture, str):
        raise TypeError(f"architecture {config.architecture!r} is not a string")
    _check_rope(config.rope)
    tokens = (*config.eos_token_ids, *([] if config.bos_token_id is None else [config.bos_token_id]))
    for token in tokens:
        _integer("bos or eos token id", token, 0, config.vocab_size - 1)


def _check_rope(rope: RopeConfig) -> None:
    _positive("rope theta", rope.theta)
    if not isinstance(rope.variant, str) or not isinstance(rope.parameters, dict):
        raise TypeError(f"rope variant {rope.variant!r} with parameters {rope.parameters!r}")


def _check_format(path: Path, frame: SafetensorsHeader) -> None:
    text = frame.metadata.get("format", "")
    if text == FORMAT:
        return
    if text.startswith("taper/"):
        raise ModelNotFoundError(
            f"{path} has format {text!r}; this version reads {FORMAT!r}", hint="update Taper"
        )
    raise ModelNotFoundError(
        f"{path} is not a .taper file: looks like plain safetensors weights",
        hint="make one from the folder that holds them: taper quantize FOLDER -o FILE.taper",
    )


def _header(metadata: dict[str, str]) -> TaperHeader:
    config = ModelConfig.from_dict(_json(metadata, "config", dict))
    check_config(config)
    min_bits, max_bits = (int(metadata[key]) for key in ("min_bits", "max_bits"))
    if not 1 <= min_bits <= max_bits <= MAX_BITS:
        raise ValueError(f"widths {min_bits}..{max_bits}; the rule is 1 <= min <= max <= {MAX_BITS}")
    matrices = _json(metadata, "matrices", list)
    rotated = not all(isinstance(matrix, dict) and matrix.get("block") == 1 for matrix in matrices)
    planes = _ceilings(matrices, config, range(min_bits, max_bits + 1), rotated)
    levels = range(min_bits, max_bits + 1)
    policies = _json(metadata, "policies", dict)
    if not all(isinstance(text, str) for text in policies.values()):
        raise TypeError("policies hold something that is no text")
    return TaperHeader(
        config=config,
        min_bits=min_bits,
        max_bits=max_bits,
        codebook=_codebook(_json(metadata, "codebook", dict), min_bits, max_bits),
        tokenizer_json=metadata.get("tokenizer"),
        chat_template=metadata.get("chat_template"),
        policies=policies,
        card=_json(metadata, "card", dict),
        provenance=_json(metadata, "provenance", dict),
        planes=planes,
        rotated=rotated,
        tables=_flagged(matrices, "tables"),
        gains=_flagged(matrices, "gain"),
        offsets=_flagged(matrices, "offsets"),
        learned=_learned(metadata, config),
        activations=_activations(metadata, config),
        **_measurements(
            metadata, {spec.name: spec for spec in expected_matrices(config, planes, rotated)}, levels
        ),
    )


def _codebook(raw: dict[str, Any], min_bits: int, max_bits: int) -> Codebook:
    levels = raw["levels"]
    wanted = {str(bits) for bits in range(min_bits, max_bits + 1)}
    if not isinstance(levels, dict) or set(levels) != wanted:
        raise ValueError(f"codebook levels must be those of {min_bits}..{max_bits} bits")
    for bits, level in levels.items():
        values = level["values"]
        _positive(f"codebook scale of {bits} bits", level["scale"])
        if not isinstance(values, list) or len(values) != 2 ** int(bits):
            raise ValueError(f"codebook of {bits} bits needs {2 ** int(bits)} values")
        most = WIDE_VALUE if int(bits) >= LEAST_WIDE_BITS else NARROW_VALUE
        for value in values:
            _integer(f"codebook value of {bits} bits", value, -most, most)
        _integer(
            f"activation_bits of {bits} bits",
            level.get("activation_bits", ACTIVATION_BITS),
            1,
            MAX_ACTIVATION_BITS,
        )
        if values != sorted(values):
            raise ValueError(f"codebook values of {bits} bits are not in ascending order")
    return Codebook.from_levels(levels)


def _ceilings(matrices: list[Any], config: ModelConfig, levels: range, rotated: bool) -> dict[str, int]:
    """Compare with the configuration, and return the planes of the matrices that hold fewer than the file.

    The list's length is compared first, so that a forged layer count costs nothing.
    """
    expected_length = 4 * config.num_layers + (1 if config.tie_word_embeddings else 2)
    if len(matrices) != expected_length:
        raise ValueError(f"{len(matrices)} matrices; the configuration has {expected_length}")
    planes = {}
    for written, spec in zip(matrices, expected_matrices(config, rotated=rotated), strict=True):
        ceiling = written.get("planes") if isinstance(written, dict) else None
        if ceiling is not None:
            _integer(f"planes of {spec.name}", ceiling, levels[0], levels[-1] - 1)
            planes[spec.name] = ceiling
        found = {flag for flag in _FLAGS if isinstance(written, dict) and written.get(flag) is True}
        flagged = replace(
            spec,
            planes=ceiling,
            has_tables="tables" in found,
            has_gain="gain" in found,
            has_offsets="offsets" in found,
        )
        if flagged.has_gain and spec.name.endswith((".o", ".down")):
            raise ValueError(f"{spec.name} has a gain, but no norm before it to apply it")
        if written != flagged.to_dict():
            raise ValueError(f"matrix {written}, but the configuration has {spec.to_dict()}")
    if len(planes) == len(matrices):
        raise ValueError(f"no matrix has the {levels[-1]} planes of the file")
    return planes


def _activations(metadata: dict[str, str], config: ModelConfig) -> ActivationBits:
    if "activations" not in metadata:
        return ActivationBits()
    return ActivationBits.from_dict(_json(metadata, "activations", dict), config.num_layers)


def _learned(metadata: dict[str, str], config: ModelConfig) -> LearnedScheduler | None:
    if "learned" not in metadata:
        return None
    return LearnedScheduler.from_dict(_json(metadata, "learned", dict), config)


def _flagged(matrices: list[dict[str, Any]], flag: str) -> frozenset[str]:
    return frozenset(matrix["name"] for matrix in matrices if flag in matrix)


def _measurements(metadata: dict[str, str], specs: dict[str, MatrixSpec], levels: range) -> dict[str, Any]:
    """What the file says about the cost of its widths; both entries may be absent."""
    num_widths = {name: spec.width_at(levels[-1]) - levels[0] + 1 for name, spec in specs.items()}
    found: dict[str, Any] = {}
    if "sensitivity" in metadata:
        found["sensitivity"] = Sensitivity.from_dict(_json(metadata, "sensitivity", dict), num_widths)
    if "relative_errors" in metadata:
        found["relative_errors"] = checked_figures(
            "relative_errors", _json(metadata, "relative_errors", dict), num_widths
        )
    return found


def _check_tensors(frame: SafetensorsHeader, header: TaperHeader) -> None:
    """The table of tensors is the one that the writer makes; only the rows of the scales and the
    number of outliers are the file's choice."""
    if frame.data_begin % ALIGNMENT:
        raise ValueError(f"data begins at {frame.data_begin:,}, not a multiple of {ALIGNMENT}")
    scale_rows, num_outliers = {}, {}
    for spec in header.matrices:
        levels = spec.width_at(header.max_bits) - header.min_bits + 1
        shape = frame.entries[f"{spec.name}.scales"].shape
        if len(shape) != 2 or shape[0] not in (1, levels):
            raise ValueError(f"{spec.name}.scales has shape {list(shape)}; it needs 1 or {levels} rows")
        scale_rows[spec.name] = shape[0]
        if f"{spec.name}.outliers.columns" in frame.entries:
            num_outliers[spec.name] = math.prod(frame.entries[f"{spec.name}.outliers.columns"].shape)
    expected = layout(header, scale_rows, num_outliers)
    for wanted in expected:
        entry = frame.entries[wanted.name]
        if entry != wanted:
            raise ValueError(f"tensor {wanted.name} is {_describe(entry)}, expected {_describe(wanted)}")
    unknown = set(frame.entries) - {wanted.name for wanted in expected}
    if unknown:
        raise ValueError(f"unknown tensors: {', '.join(sorted(unknown)[:5])}")


def _describe(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)} at {entry.begin:,}"


def _check_digests(frame: SafetensorsHeader) -> None:
    digests = _json(frame.metadata, "digests", dict)
    if set(digests) != set(frame.entries):
        raise ValueError("digests are not those of the tensors in the file")
    for name, digest in digests.items():
        if not isinstance(digest, str) or not re.fullmatch(rf"[0-9a-f]{{{DIGEST_DIGITS}}}", digest):
            raise ValueError(f"digest of {name} is not {DIGEST_DIGITS} hex digits")


def _json(metadata: dict[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise TypeError(f"{key} is not a JSON {'object' if kind is dict else 'list'}")
    return value


def _integer(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} {value!r} is not an integer")
    if not least <= value <= most:
        raise ValueError(f"{name} {value} is outside {least}..{most}")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} {value!r} is not a number")
    if not (math.isfinite(cast("float", value)) and value > 0):
        raise ValueError(f"{name} {value} is not a finite number above 0")
