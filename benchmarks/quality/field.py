"""Quality per byte beside llama.cpp: its formats and one .taper file, against the same float checkpoint.

    python benchmarks/quality/field.py HF_DIR --taper FILE --text TEXT --calibration TEXT

Every side is read at the same blocks of the text and measured by `taper.evaluate`. For each of llama.cpp's
files, the reading of the .taper file with the largest budget of at most its bytes is measured beside it. It
prints a table in markdown; the last line of the output is JSON. README.md in this folder says what is
counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama_cpp"))

from ablation import evenly_spaced
from build import Peer, ensure_peer
from common import BenchmarkError, default_dir
from field_report import Point, Row, plot, row_json, rows, summary, table
from gguf_models import optional_package
from logits import PeerDecoder, build_logits
from machine import processor
from peer_models import FORMATS, PeerFile, PeerModels
from readings import OurFile, OurReading

from taper.errors import TaperError
from taper.evaluate import Blocks, PerplexityReport, Reader, WidthResult, cut, measure_blocks
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.text import read_text
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS
from taper.quantize import QuantizeOptions
from taper.quantize.calibrate import sample_tokens
from taper.tokenizer import Tokenizer

# llama.cpp's F32 model must be ours: sums of another order give 1e-9 nats, a wrong head order gives 1.
MAX_FLOAT_KL = 1e-7
# At a KL of 5e-12 one position in 8,000 had its two likeliest tokens within the rounding of float32.
LEAST_FLOAT_TOP1 = 0.999
PROTOCOL = "llama.cpp"


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that one run found.

    Attributes:
        peer: the built llama.cpp.
        label: the protocol with its true numbers.
        num_blocks, num_scored: blocks and scored tokens.
        reference: perplexity of the float checkpoint.
        float_check: llama.cpp's F32 model with a float32 cache against ours.
        rows: theirs beside ours.
        ours: all readings measured, ascending.
    """

    peer: Peer
    label: str
    num_blocks: int
    num_scored: int
    reference: WidthResult
    float_check: WidthResult
    rows: list[Row]
    ours: list[Point]


def measure(arguments: argparse.Namespace) -> Measured:
    """Make what is missing, read every block with every model, and pair the results."""
    for package in ("gguf", *(("matplotlib",) if arguments.plot else ())):
        optional_package(package)
    checkpoint = HfCheckpoint.open(arguments.hf_dir)
    reference = Decoder.from_hf(checkpoint)
    our_file = OurFile(TaperFile.open(arguments.taper))
    check_source(our_file.file, checkpoint)
    blocks = text_blocks(arguments, checkpoint, reference)
    peer = ensure_peer(arguments.peers, jobs=arguments.threads)
    models = PeerModels(checkpoint, peer, arguments.peers / "field")
    tokens = sample_tokens(checkpoint, read_text(arguments.calibration), arguments.calibration_tokens)
    files = models.quantized(arguments.formats, models.imatrix(tokens, Path(arguments.calibration).name))
    fitting = [our_file.fitting(file.num_bytes) for file in files]
    readings = all_readings(our_file, fitting)
    with peer_readers(arguments, peer, models, files, blocks.tokens.shape[1]) as theirs:
        ours = [Reader(reading.decoder, reading.decoder.max_bits) for reading in readings]
        report = measure_blocks([Reader(reference, FLOAT_BITS), *theirs, *ours], blocks, True, _progress)
    print(file=sys.stderr)
    return paired(peer, report, our_file.file.num_weights, files, fitting, readings)


def check_source(file: TaperFile, checkpoint: HfCheckpoint) -> None:
    """Refuse a file that was made from another checkpoint: its divergence would say nothing."""
    made_from = file.provenance.get("checkpoint_sha256")
    if made_from != checkpoint.fingerprint:
        raise BenchmarkError(
            f"{file.path} was made from the checkpoint {made_from}, {checkpoint.folder} is "
            f"{checkpoint.fingerprint}; quantize that folder, or name the other"
        )


def text_blocks(arguments: argparse.Namespace, checkpoint: HfCheckpoint, reference: Decoder) -> Blocks:
    """Blocks from all over the test text."""
    if checkpoint.tokenizer_json is None:
        raise BenchmarkError(f"{checkpoint.folder} has no tokenizer.json, so text cannot be read; add it")
    tokenizer = Tokenizer(checkpoint.tokenizer_json)
    blocks = cut(read_text(arguments.text), tokenizer, reference.context_length, PROTOCOL)
    return evenly_spaced(blocks, arguments.blocks)


def all_readings(our_file: OurFile, fitting: list[OurReading | None]) -> list[OurReading]:
    """The fitting readings and every whole width, each once, ascending in bytes."""
    whole = [
        our_file.reading(float(bits)) for bits in range(our_file.file.min_bits, our_file.file.max_bits + 1)
    ]
    unique = {id(reading): reading for reading in (*whole, *fitting) if reading is not None}
    return sorted(unique.values(), key=lambda reading: reading.num_bytes)


@contextmanager
def peer_readers(
    arguments: argparse.Namespace, peer: Peer, models: PeerModels, files: list[PeerFile], context_tokens: int
) -> Iterator[list[Reader]]:
    """Readers of the F32 file (float32 cache), then of every quantised file; their processes end with it."""
    program = build_logits(peer, arguments.peers / "field")
    with ExitStack() as stack:

        def reader(path: Path, kv_type: str, bits: float) -> Reader:
            decoder = PeerDecoder(
                program, path, context_tokens=context_tokens, threads=arguments.threads, kv_type=kv_type
            )
            return Reader(stack.enter_context(decoder), bits)  # type: ignore[arg-type]

        exact = reader(models.float_file(), "f32", FLOAT_BITS)
        yield [exact, *(reader(file.path, "f16", 0.0) for file in files)]


def paired(
    peer: Peer,
    report: PerplexityReport,
    num_weights: int,
    files: list[PeerFile],
    fitting: list[OurReading | None],
    readings: list[OurReading],
) -> Measured:
    """The report's results as rows; its order is reference, F32 check, files, readings."""
    reference, check, *results = report.results
    check_float(check)

    def point(name: str, num_bytes: int, file_bytes: int, result: WidthResult) -> Point:
        return Point(name, num_bytes, file_bytes, 8 * num_bytes / num_weights, result)

    theirs = [
        (file.format, point(file.name, file.num_bytes, file.path.stat().st_size, result))
        for file, result in zip(files, results[: len(files)], strict=True)
    ]
    points = {
        id(reading): point(f"{reading.bits:g}", reading.num_bytes, reading.file_bytes, result)
        for reading, result in zip(readings, results[len(files) :], strict=True)
    }
    measured = rows(theirs, [None if reading is None else points[id(reading)] for reading in fitting])
    counts = (report.num_blocks, report.num_scored)
    return Measured(peer, report.label, *counts, reference, check, measured, list(points.values()))


def check_float(check: WidthResult) -> None:
    """Refuse to compare anything where llama.cpp's float model is not ours."""
    divergence, top1 = check.mean_kl, check.top1_agreement
    if divergence is None or top1 is None or divergence > MAX_FLOAT_KL or top1 < LEAST_FLOAT_TOP1:
        raise BenchmarkError(
            f"llama.cpp's F32 model is not the checkpoint: KL {divergence}, top-1 {top1}; at most "
            f"{MAX_FLOAT_KL:g} and at least {LEAST_FLOAT_TOP1:g} are allowed, so nothing can be compared"
        )


def record(arguments: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """Everything needed to tell what was measured, as plain values."""
    file = TaperFile.open(arguments.taper)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(arguments.hf_dir).resolve().name,
        "taper": {"file": Path(arguments.taper).name, "provenance": file.provenance},
        "text": Path(arguments.text).name,
        "calibration": Path(arguments.calibration).name,
        "calibration_tokens": arguments.calibration_tokens,
        "blocks": "evenly spaced, no random choice",
        "seed": file.provenance.get("seed"),
        "label": measured.label,
        "num_blocks": measured.num_blocks,
        "num_scored": measured.num_scored,
        "versions": {
            "taper": version("taper"),
            "llama.cpp": measured.peer.commit,
            "llama.cpp from": measured.peer.package,
            "gguf": version("gguf"),
            "numpy": version("numpy"),
        },
        "processor": processor(),
        "reference": asdict(measured.reference),
        "float_check": asdict(measured.float_check),
        "rows": [row_json(row) for row in measured.rows],
        "ours": [asdict(point) for point in measured.ours],
    }


def show(arguments: argparse.Namespace, measured: Measured) -> None:
    """Print table and JSON, and draw the plot where one is asked for."""
    name = Path(arguments.hf_dir).resolve().name
    title = (
        f"{name}, {Path(arguments.text).name}: {measured.label}, "
        f"{measured.num_blocks} blocks, {measured.num_scored:,} tokens scored"
    )
    check = measured.float_check
    print(f"{title}\nfloat perplexity {measured.reference.perplexity:.4f}; ", end="")
    print(f"llama.cpp's F32 against ours: KL {check.mean_kl:.1e}, top-1 {check.top1_agreement:.2%}\n")
    print(table(measured.rows) + "\n\n" + summary(measured.rows) + "\n")
    if arguments.plot is not None:
        plot(measured.rows, measured.ours, title, arguments.plot)
    print(json.dumps(record(arguments, measured)))


def _progress(done: int, total: int, left_s: float) -> None:
    print(f"\rblock {done} of {total}, {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FORMATS)}")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Compare quality per byte with llama.cpp's formats.")
    made.add_argument("hf_dir", metavar="HF_DIR", help="the float checkpoint of both sides")
    made.add_argument("--taper", required=True, metavar="FILE", help="our file, made from HF_DIR")
    made.add_argument("--text", required=True, metavar="TEXT", help="test text, .txt or .txt.xz")
    made.add_argument("--calibration", required=True, metavar="TEXT", help="text of the importance matrix")
    made.add_argument("--calibration-tokens", type=_positive, default=QuantizeOptions().calibration_tokens)
    made.add_argument("--peers", type=Path, default=default_dir(), metavar="DIR", help="cache folder")
    made.add_argument("--formats", type=_formats, default=FORMATS, help=f"of {','.join(FORMATS)}")
    made.add_argument("--blocks", type=_positive, default=40, help="blocks, evenly spaced over the text")
    made.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="of llama.cpp")
    made.add_argument("--plot", type=Path, metavar="PNG", help="draw the plot (needs matplotlib)")
    return made


def main() -> int:
    """Command line. Returns the exit status."""
    arguments = parser().parse_args()
    try:
        show(arguments, measure(arguments))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except TaperError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
