"""Random `.taper` files of a given shape, for benchmarks and tests: python -m taper.testing.random_model
--help.

No quantiser runs: the planes are random bits, which is what the codes of a real model look like to the memory
system, and the scales keep the activations near one so that no kernel meets infinities.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from taper.config import ModelConfig, RopeConfig
from taper.errors import TaperError
from taper.formats.spec import (
    FINAL_NORM,
    Codebook,
    MatrixSpec,
    PlanedMatrix,
    TaperHeader,
    expected_matrices,
    parse_widths,
)
from taper.formats.writer import write_taper
from taper.kernels import pack_planes

U8 = npt.NDArray[np.uint8]

SHAPES = {
    # TinyLlama 1.1B, with room for the context depths that are measured
    "1.1b": ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=False,
    ),
    # SmolLM 135M, the same
    "135m": ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
    ),
    # Awkward on purpose: 96 and 80 are no multiples of 64, the rotation blocks are 32 and 16.
    "tiny": ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=96,
        intermediate_size=80,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=300,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(1,),
    ),
}


def write_random_model(
    path: str | Path,
    config: ModelConfig,
    min_bits: int = 2,
    max_bits: int = 8,
    seed: int = 0,
    tokenizer_json: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a file of this shape with random weights; the same arguments give the same bytes.

    Raises:
        DoesNotFitError, UsageError: as `write_taper`.
    """
    header = TaperHeader(
        config=config,
        min_bits=min_bits,
        max_bits=max_bits,
        codebook=gaussian_quantiles(min_bits, max_bits),
        tokenizer_json=tokenizer_json,
        chat_template=chat_template,
        provenance={"method": "random", "seed": seed},
    )
    norm = np.ones(config.hidden_size, dtype=np.float32)
    write_taper(path, header, lambda: _matrices(header, seed), {FINAL_NORM: norm})


def gaussian_quantiles(min_bits: int, max_bits: int) -> Codebook:
    """Equally likely values of the unit Gaussian at every width, as int8 steps."""
    values, level_scales = {}, {}
    for bits in range(min_bits, max_bits + 1):
        count = 2**bits
        reals = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
        level_scales[bits] = float(np.float32(reals[-1] / 127))
        values[bits] = np.rint(reals / reals[-1] * 127).astype(np.int8)
    return Codebook(values, level_scales)


def _matrices(header: TaperHeader, seed: int) -> Iterator[PlanedMatrix]:
    for index, spec in enumerate(expected_matrices(header.config)):
        generator = np.random.default_rng([seed, index])
        # Unit variance out of unit variance in; the residual stream grows to about sqrt(2) over all layers.
        residual = spec.name.endswith((".o", ".down"))
        scale = spec.in_features**-0.5 * ((2 * header.config.num_layers) ** -0.5 if residual else 1.0)
        scales = scale * generator.uniform(0.8, 1.25, (1, spec.out_features))
        signs = generator.choice(np.array([-1, 1], dtype=np.float32), spec.in_features)
        bias = generator.normal(0, 0.1, spec.out_features).astype(np.float32) if spec.has_bias else None
        planes = _RandomPlanes(spec, header.max_bits, [seed, index])
        yield PlanedMatrix(spec, planes, scales.astype(np.float16), bias, signs)


class _RandomPlanes(Sequence[U8]):
    """Planes made when asked for, so that the writer's passes hold one at a time."""

    def __init__(self, spec: MatrixSpec, num_planes: int, seed: list[int]) -> None:
        self._spec = spec
        self._num_planes = num_planes
        self._seed = seed

    def __len__(self) -> int:
        return self._num_planes

    def __getitem__(self, plane: int) -> U8:  # type: ignore[override]  # nothing slices it
        generator = np.random.default_rng([*self._seed, plane])
        spec = self._spec
        if spec.cols == spec.in_features:
            random = np.frombuffer(generator.bytes(spec.plane_bytes), dtype=np.uint8)
            return random.reshape(spec.out_features, spec.cols // 8)
        bits = generator.integers(0, 2, (spec.out_features, spec.in_features), dtype=np.uint8)
        return pack_planes(bits, 1)[0]


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a .taper file of random weights.")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--bits", default="2-8", metavar="MIN-MAX")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    try:
        min_bits, max_bits = parse_widths(arguments.bits)
        write_random_model(arguments.out, SHAPES[arguments.shape], min_bits, max_bits, arguments.seed)
    except TaperError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    size = Path(arguments.out).stat().st_size
    print(f"{arguments.out}: {size:,} bytes in {time.perf_counter() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
