"""What reading a prompt again buys, once the planes that it missed have arrived.

    python benchmarks/precision/refresh.py FILE --text TEXT [--low 2,3,4] [--late 4,8]

Windows of a text, forced: a prompt and the first tokens of an answer are read at a low width by a file cut to
it, as while a file arrives. Then all planes are there and the later tokens are read at the late width, over
the KV cache as it is ("kept"), over one that was written again at all planes ("refreshed"), and over one that
never missed a plane: prompt at all planes, early tokens at the late width ("never short"). The figure is the
KL divergence of the later tokens' distributions from those of a run at all planes throughout; its error comes
from the spread between windows. Rows for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taper.evaluate.divergence import agreements, kl_divergences, log_normalisers
from taper.evaluate.statistics import mean_of_blocks
from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.kernels import set_num_threads
from taper.models import Decoder
from taper.tokenizer import Tokenizer

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
# Part of a window, and the decoder and the width that read it.
Part = tuple[Ids, Decoder, int]


def late_logits(parts: Sequence[Part]) -> tuple[F32, float]:
    """Logits of the last part's tokens over the cache that the others wrote, and the seconds of those."""
    cache = parts[-1][1].new_cache(sum(len(ids) for ids, _, _ in parts))
    began = time.perf_counter()
    for ids, decoder, bits in parts[:-1]:
        decoder.forward(ids, cache, bits, "none")
    seconds = time.perf_counter() - began
    ids, decoder, bits = parts[-1]
    logits = decoder.forward(ids, cache, bits, "all")
    assert logits is not None
    return logits, seconds


def measure(
    windows: Sequence[Ids], full: Decoder, cut: Decoder, late_bits: int, num_prompt: int, num_early: int
) -> dict[str, Any]:
    """KL and agreement of the three ways, and the time of a refresh."""
    high, low = full.max_bits, cut.max_bits
    figures: dict[str, list[tuple[F32, F32]]] = {"kept": [], "refreshed": [], "never short": []}
    refresh_s = []
    for window in windows:
        prompt, early, late = np.split(window, [num_prompt, num_prompt + num_early])
        reference, _ = late_logits([(prompt, full, high), (early, full, high), (late, full, high)])
        norms = log_normalisers(reference)
        ways = {
            "kept": [(prompt, cut, low), (early, cut, low)],
            "refreshed": [(np.concatenate([prompt, early]), full, high)],
            "never short": [(prompt, full, high), (early, full, late_bits)],
        }
        for name, parts in ways.items():
            logits, seconds = late_logits([*parts, (late, full, late_bits)])
            divergences = kl_divergences(reference, norms, logits, log_normalisers(logits))
            figures[name].append((divergences.astype(np.float32), agreements(reference, logits)))
            if name == "refreshed":
                refresh_s.append(seconds)
    result: dict[str, Any] = {"low_bits": low, "late_bits": late_bits, "ways": {}}
    for name, rows in figures.items():
        kl = mean_of_blocks(np.stack([row[0] for row in rows]))
        agreed = mean_of_blocks(np.stack([row[1] for row in rows]))
        result["ways"][name] = {
            "kl": kl.value,
            "kl_se": kl.standard_error,
            "agreement": agreed.value,
            "agreement_se": agreed.standard_error,
        }
    return result | {"refresh_ms": 1e3 * statistics.median(refresh_s)}


def windows_of(path: Path, tokenizer_json: str, length: int, count: int) -> list[Ids]:
    """The first windows of a text, one after another."""
    # A token is at least a byte; 16 for one are plenty.
    text = read_text(path)[: 16 * length * count]
    ids = np.array(Tokenizer(tokenizer_json).encode(text, special_tokens=False), np.int32)
    if len(ids) < length * count:
        raise SystemExit(
            f"{path} holds {len(ids)} tokens, {length * count} are needed; ask for fewer windows"
        )
    return [ids[start : start + length] for start in range(0, length * count, length)]


def main() -> None:
    """Print rows and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--low", default="2,3,4", help="widths that had arrived, separated by commas")
    parser.add_argument("--late", default="4,8", help="widths of the later tokens, separated by commas")
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--early", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="later tokens, which are measured")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    set_num_threads(options.threads)
    file = TaperFile.open(options.file)
    length = options.prompt + options.early + options.tokens
    assert file.tokenizer_json is not None
    windows = windows_of(options.text, file.tokenizer_json, length, options.windows)
    full = Decoder.from_taper(file)
    results = []
    for low in (int(word) for word in options.low.split(",")):
        cut = Decoder.from_taper(TaperFile.open(options.file, max_bits=low))
        for late in (int(word) for word in options.late.split(",")):
            results.append(measure(windows, full, cut, late, options.prompt, options.early))
            ways = "; ".join(
                f"{name} {way['kl']:.4f} +- {way['kl_se']:.4f} ({way['agreement']:.1%})"
                for name, way in results[-1]["ways"].items()
            )
            cost = f"{results[-1]['refresh_ms']:.1f} ms"
            print(f"prompt at {low}, later tokens at {late} bits: KL {ways}; refresh {cost}", flush=True)
    record = {
        "benchmark": "refresh",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "file": options.file.name,
        "text": options.text.name,
        "prompt_tokens": options.prompt,
        "early_tokens": options.early,
        "later_tokens": options.tokens,
        "windows": options.windows,
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
