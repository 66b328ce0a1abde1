"""From a Hugging Face checkpoint to a `.taper` file, resumable at every matrix."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import taper
from taper.errors import TaperError, UsageError
from taper.formats.huggingface import HfCheckpoint
from taper.formats.spec import FINAL_NORM, Codebook, MatrixSpec, PlanedMatrix, TaperHeader, expected_matrices
from taper.formats.text import read_text
from taper.formats.writer import write_taper
from taper.kernels import pack_planes, rotate
from taper.models.families import read_final_norm
from taper.quantize.background import Background
from taper.quantize.balance import Adjustment, balance_layer, balance_normed, width_offsets
from taper.quantize.calibrate import CalibrationRun, LayerReader, Moments, generate_tokens, sample_tokens
from taper.quantize.codebook import NestedCodebook
from taper.quantize.finish import finish
from taper.quantize.methods import MatrixProblem, QuantizedMatrix, quantize_matrix
from taper.quantize.options import QuantizeOptions
from taper.quantize.progress import Meter, Progress, row_work
from taper.quantize.shards import ShardFolder

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]


# Rows whose biases are found together: all of a head of 32,000 rows take 1 GB of indices and values.
_OFFSET_ROWS = 64
# All planes, in the shard folder, while their sensitivity is measured.
_WHOLE_FILE = "whole.taper"


class StoppedError(TaperError):
    """The user stopped the work; what is finished is kept."""

    exit_code = 130  # 128 + SIGINT, as shells report it


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What came out.

    Attributes:
        path: the file.
        calibration_tokens: tokens that were read.
        relative_errors: matrix name to the relative output error of each width, from the least width up.
        seconds: wall time of this run; a resumed run counts its own part.
    """

    path: Path
    calibration_tokens: int
    relative_errors: dict[str, list[float]]
    seconds: float


def quantize(
    hf_dir: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    options: QuantizeOptions | None = None,
    card: dict[str, Any] | None = None,
    policies: dict[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    after_write: Callable[[Path], None] | None = None,
) -> QuantizeReport:
    """Quantise a checkpoint to nested planes.

    Finished matrices are kept in `OUT.partial/` until the file is whole; the same call after a stop goes on
    from there and gives the same bytes.

    Args:
        hf_dir: folder of a Hugging Face checkpoint with safetensors and tokenizer.json.
        out: the `.taper` file to write; an old one is replaced once the new one is whole.
        calibration: text (.txt or .txt.xz) that resembles what the model will read; None lets the model write
            its own, which takes a decode step of the float model for each token.
        options: widths, seed and solver.
        card: the quality card to store.
        policies: named precision policies to store.
        progress: called after each piece of work.
        after_write: called with the written file while finished matrices are still kept, so that a stop in it
            costs only itself.

    Raises:
        UsageError: an option, a path or a text that cannot be used, or an unsupported model.
        CorruptFileError: a checkpoint with values that are not finite or that contradicts its configuration.
        StoppedError: on Ctrl-C; says where to go on.
    """
    begin = time.perf_counter()
    options = options or QuantizeOptions()
    out = _checked(Path(out), options)
    checkpoint = HfCheckpoint.open(hf_dir)
    codebook = options.method.build_codebook(options.bits)
    given = None
    if calibration is not None:
        given = sample_tokens(checkpoint, read_text(calibration), options.calibration_tokens)
    provenance = _provenance(checkpoint, given, options, codebook)
    shards = ShardFolder(out.with_name(f"{out.name}.partial"), provenance)
    meter = Meter(progress, expected_matrices(checkpoint.config))
    try:
        tokens = _own_tokens(checkpoint, options, shards, meter) if given is None else given
        job = _Job(checkpoint, tokens, codebook, options, shards, meter)
        job.run()
        whole = shards.path / _WHOLE_FILE if options.is_measured else out
        job.write(whole, provenance, card or {}, policies or {})
        if options.is_measured:
            text = "own text" if calibration is None else Path(calibration).name
            finish(whole, out, tokens, text, options.budget, shards, meter.measure)
        if after_write is not None:
            after_write(out)
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; finished matrices are kept in {shards.path}", hint="run the same command to go on"
        ) from None
    errors = {spec.name: shards.errors(spec.name) for spec in job.specs}
    shards.remove()
    return QuantizeReport(out, tokens.size, errors, time.perf_counter() - begin)


def _checked(out: Path, options: QuantizeOptions) -> Path:
    """Refuse before hours of work a file that cannot be written and what no allocation can give."""
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(
            f"{out} is a folder or lies in no folder", hint="name a file in a folder that exists"
        )
    asked = None if options.budget is None else options.budget.bits_per_weight
    low, high = options.bits
    if asked is not None and not low <= asked <= high:
        raise UsageError(
            f"{asked:g} bits per weight are outside {low}..{high}", hint="choose other bits, or other planes"
        )
    return out


def _own_tokens(
    checkpoint: HfCheckpoint, options: QuantizeOptions, shards: ShardFolder, meter: Meter
) -> Int32:
    """The model's own calibration tokens, kept so that a resumed run need not write them again."""
    if not shards.has_tokens():
        meter.advance("generate", "calibration text", 0)
        shards.save_tokens(generate_tokens(checkpoint, options.calibration_tokens, options.seed))
    return shards.tokens()


@dataclass(slots=True)
class _Job:
    checkpoint: HfCheckpoint
    tokens: Int32
    codebook: NestedCodebook
    options: QuantizeOptions
    shards: ShardFolder
    meter: Meter
    tables: frozenset[str] = field(init=False)
    specs: list[MatrixSpec] = field(init=False)
    read: LayerReader = field(init=False)
    finishing: Background = field(init=False)

    def __post_init__(self) -> None:
        method = self.options.method
        names = [spec.name for spec in expected_matrices(self.checkpoint.config)]
        self.tables = frozenset(names if method.has_tables else ())
        specs = expected_matrices(self.checkpoint.config, rotated=method.rotated, tables=self.tables)
        self.specs = [self._flagged(spec) for spec in specs]
        self.read = LayerReader(self.checkpoint)
        self.finishing = Background()

    def _flagged(self, spec: MatrixSpec) -> MatrixSpec:
        # A look-up has no input to scale or to centre; it shares a tied head's.
        known = spec.name != "embed" or self.checkpoint.config.tie_word_embeddings
        normed = not spec.name.endswith((".o", ".down"))
        return dataclasses.replace(
            spec, has_gain=self._balances and known and normed, has_offsets=self._centres and known
        )

    @property
    def _balances(self) -> bool:
        return self.options.method.is_adjusted and self.options.solver.balance

    @property
    def _centres(self) -> bool:
        return self.options.method.is_adjusted and self.options.solver.centre

    def run(self) -> None:
        """Solve every matrix that has no shard yet: layer by layer, then embedding and head."""
        for spec in self.specs:
            if self.shards.holds(spec.name):
                self.meter.find(spec)
        with self.finishing:
            self._run()

    def _run(self) -> None:
        walk = CalibrationRun(self.checkpoint, self.tokens, self.read)
        config = self.checkpoint.config
        head = "embed" if config.tie_word_embeddings else "head"
        if not config.tie_word_embeddings:
            # A look-up sees one column of the identity at a time: nothing is known but that all weights count
            # alike.
            self._solve_missing("embed", None, Adjustment())
        unfinished = [spec.name for spec in self.specs if not self.shards.holds(spec.name)]
        for index in range(config.num_layers):
            if not unfinished:
                return
            names = [name for name in unfinished if name.startswith(f"layers.{index}.")]
            self.meter.advance("calibrate", f"layers.{index}", 0)
            moments = walk.layer(index, observe=bool(names))
            balanced = balance_layer(config, index, moments, self._read) if names and self._balances else {}
            for name in names:
                self._solve_missing(name, moments[name], balanced.get(name, Adjustment()))
        if head in unfinished:
            last = walk.head()
            self._solve_missing(
                head, last, balance_normed(self._read(head), last) if self._balances else Adjustment()
            )

    def _read(self, name: str) -> Float32:
        return self.read(name)[0]

    def _moments(
        self, spec: MatrixSpec, moments: Moments | None, adjustment: Adjustment
    ) -> tuple[Float64, Float32]:
        """Second moments and mean of the matrix's inputs in the space of its weights."""
        if moments is None:
            return np.eye(spec.in_features), np.zeros(spec.in_features, dtype=np.float32)
        signs = self._signs(spec)
        second, mean = moments.rotated(signs, spec.block, adjustment.gain, self._centres)
        share = self.options.solver.lookup_share
        if spec.name == "embed" and share and (diagonal := float(np.mean(np.diag(second)))) > 0:
            gain = np.ones(spec.in_features, np.float32) if adjustment.gain is None else adjustment.gain
            energy = Moments(np.diag(np.square(gain, dtype=np.float64)), np.zeros(len(gain)), 1)
            lookup = energy.rotated(signs, spec.block)[0]
            second += lookup * (share * diagonal / float(np.mean(np.diag(lookup))))
        return second, mean

    def _solve_missing(self, name: str, moments: Moments | None, adjustment: Adjustment) -> None:
        spec = next(spec for spec in self.specs if spec.name == name)
        if self.shards.holds(name):
            return
        self.meter.advance("solve", name, 0)
        weights, bias = self.read(name)
        rotated = rotate(np.ascontiguousarray(adjustment.apply(weights)), self._signs(spec), spec.block)
        second, mean = self._moments(spec, moments, adjustment)
        before = 0

        def on_rows(rows: int) -> None:
            nonlocal before
            self.meter.advance("solve", name, (rows - before) * row_work(spec))
            before = rows

        fisher = self.options.fisher
        figures = None if fisher is None else fisher.matrix(self.read.sources[name])
        problem = MatrixProblem(rotated, second, figures)
        made = quantize_matrix(
            problem, self.codebook, self.options.method, self.options.solver, self.options.seed, on_rows
        )
        if bias is not None and adjustment.rows is not None:
            bias = bias * adjustment.rows
        self.finishing.submit(lambda: self._finish(spec, adjustment, rotated, mean, made, bias))

    def _finish(
        self,
        spec: MatrixSpec,
        adjustment: Adjustment,
        rotated: Float32,
        mean: Float32,
        made: QuantizedMatrix,
        bias: Float32 | None,
    ) -> None:
        """Keep a solved matrix."""
        planes = pack_planes(made.codes, self.codebook.max_bits)
        extras = made.extras()
        if spec.has_gain and adjustment.gain is not None:
            extras["gain"] = adjustment.gain
        if spec.has_offsets:
            extras["offsets"] = self._offsets(rotated, made, mean)
        if bias is not None:
            extras["bias"] = bias
        self.shards.save(spec.name, planes, made.scales, made.relative_errors, extras)

    def _offsets(self, weights: Float32, made: QuantizedMatrix, mean: Float32) -> NDArray[np.float16]:
        """The bias of each width, float16 (levels, out_features)."""
        offsets = np.empty(made.scales.shape, dtype=np.float16)
        every = np.arange(1 << self.codebook.max_bits)
        tables = [
            level.reals[every >> (self.codebook.max_bits - level.bits)] for level in self.codebook.levels
        ]
        for begin in range(0, len(weights), _OFFSET_ROWS):
            rows = slice(begin, begin + _OFFSET_ROWS)
            codes = made.codes[rows].astype(np.intp)
            coded = np.empty(codes.shape, dtype=np.float32)
            for row, table in enumerate(tables):
                table.take(codes, out=coded, mode="clip")  # no code is beyond the table; "raise" copies
                coded *= made.scales[row, rows].astype(np.float32)[:, None]
                np.subtract(weights[rows], coded, out=coded)
                offsets[row, rows] = width_offsets(coded, mean)
        return offsets

    def _signs(self, spec: MatrixSpec) -> Float32:
        if not self.options.method.rotated:
            return np.ones(spec.in_features, dtype=np.float32)
        index = next(i for i, other in enumerate(self.specs) if other.name == spec.name)
        generator = np.random.default_rng([self.options.seed, index])
        return generator.choice(np.array([-1, 1], dtype=np.float32), spec.in_features)

    def write(
        self, out: Path, provenance: dict[str, Any], card: dict[str, Any], policies: dict[str, str]
    ) -> None:
        """Write the file from the shards."""
        self.meter.advance("write", out.name, 0)
        levels = self.codebook.levels
        header = TaperHeader(
            config=self.checkpoint.config,
            min_bits=self.codebook.min_bits,
            max_bits=self.codebook.max_bits,
            codebook=Codebook(
                {l.bits: l.values for l in levels},
                {l.bits: l.scale for l in levels},
                {l.bits: l.activation_bits for l in levels},
            ),
            tokenizer_json=self.checkpoint.tokenizer_json,
            chat_template=self.checkpoint.chat_template,
            policies=policies,
            card=card,
            provenance=provenance,
            relative_errors={spec.name: self.shards.errors(spec.name) for spec in self.specs},
            rotated=self.options.method.rotated,
            tables=self.tables,
            gains=frozenset(spec.name for spec in self.specs if spec.has_gain),
            offsets=frozenset(spec.name for spec in self.specs if spec.has_offsets),
        )
        write_taper(out, header, self._matrices, {FINAL_NORM: read_final_norm(self.checkpoint)})

    def _matrices(self) -> Iterator[PlanedMatrix]:
        for spec in self.specs:
            yield PlanedMatrix(
                spec=spec,
                planes=self.shards.planes(spec.name, self.codebook.max_bits),
                scales=self.shards.scales(spec.name),
                bias=self.shards.extra(spec.name, "bias"),
                signs=self._signs(spec),
                outliers=self.shards.outliers(spec.name),
                tables=self.shards.extra(spec.name, "tables"),
                gain=self.shards.extra(spec.name, "gain"),
                offsets=self.shards.extra(spec.name, "offsets"),
            )


def _provenance(
    checkpoint: HfCheckpoint, tokens: Int32 | None, options: QuantizeOptions, codebook: NestedCodebook
) -> dict[str, Any]:
    """Everything that the codes depend on: unfinished work is only taken up when all of it agrees."""
    return {
        "codebook": options.method.codebook,
        "codebook_sha256": codebook.sha256,
        "method": options.method.resolved,
        "outliers": options.method.outliers,
        "fisher_sha256": options.fisher and options.fisher.sha256,
        "version": taper.__version__,
        "checkpoint_sha256": checkpoint.fingerprint,
        "bits": list(options.bits),
        "seed": options.seed,
        "calibration_tokens": options.calibration_tokens if tokens is None else int(tokens.size),
        "calibration_sha256": "own" if tokens is None else hashlib.sha256(tokens.tobytes()).hexdigest(),
        "solver": dataclasses.asdict(options.solver),
    }
