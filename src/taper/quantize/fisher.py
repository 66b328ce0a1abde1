"""Diagonal Fisher of every weight, measured with torch: the sensitivity of SqueezeLLM and Any-Precision LLM.

    python -m taper.quantize.fisher HF_DIR TEXT -o FILE

F is the sum over sequences of the squared gradient of the mean next-token loss, as in Any-Precision LLM.
Needs the extra `train` (torch, transformers); reading the file (`taper.quantize.fisher_file`) needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from taper.errors import TaperError, UsageError
from taper.formats.huggingface import HfCheckpoint
from taper.formats.text import read_text
from taper.models.families import MatrixSource, matrix_sources
from taper.quantize.calibrate import sample_tokens

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_DEFAULT_TOKENS = 51200  # 100 sequences of 512, as Any-Precision LLM takes


def measure_fisher(hf_dir: str | Path, tokens: Int32, out: str | Path) -> None:
    """Run the checkpoint forward and backward over sequences and write the figures.

    Args:
        hf_dir: folder of a Hugging Face checkpoint.
        tokens: int32 (sequences, tokens).
        out: safetensors file to write.

    Raises:
        UsageError: torch or transformers is not installed.
    """
    torch, transformers = _extra("torch"), _extra("transformers")
    checkpoint = HfCheckpoint.open(hf_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).float().eval()
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for sequence in tokens:
        model.zero_grad(set_to_none=True)
        ids = torch.from_numpy(sequence.astype(np.int64))[None]
        model(input_ids=ids, labels=ids).loss.backward()
        for name, weight in weights.items():
            sums[name] += weight.grad**2
    figures = {source.name: _folded(checkpoint, source, sums) for source in matrix_sources(checkpoint.config)}
    save_file(figures, out, {"num_tokens": str(tokens.size), "checkpoint_sha256": checkpoint.fingerprint})


def _folded(checkpoint: HfCheckpoint, source: MatrixSource, sums: dict[str, Any]) -> Float32:
    """A gain g of the norm makes the stored weight g w, so its gradient is 1/g of that of w."""
    figures = np.concatenate([sums[name].numpy() for name, _ in source.parts])
    if source.gain is not None:
        gain = checkpoint.tensor(source.gain)
        squares = np.where(gain == 0, np.float32(1), gain * gain)
        figures = np.where(gain == 0, np.float32(0), figures / squares)
    return np.ascontiguousarray(figures, dtype=np.float32)


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"the diagonal Fisher needs {name}", hint='install it: pip install "taper[train]"'
        ) from error


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure the diagonal Fisher of a checkpoint.")
    parser.add_argument("hf_dir", metavar="HF_DIR")
    parser.add_argument("text", metavar="TEXT", help="text like what the model will read (.txt, .txt.xz)")
    parser.add_argument("-o", "--out", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=_DEFAULT_TOKENS, metavar="N")
    arguments = parser.parse_args()
    try:
        checkpoint = HfCheckpoint.open(arguments.hf_dir)
        tokens = sample_tokens(checkpoint, read_text(arguments.text), arguments.tokens)
        measure_fisher(arguments.hf_dir, tokens, arguments.out)
    except TaperError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out}: {tokens.size:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
