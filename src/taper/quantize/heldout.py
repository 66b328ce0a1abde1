"""What the quality card is measured with: passages that calibration does not read, and float logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from taper.formats.huggingface import HfCheckpoint
from taper.layers.linear import FloatLinear, Norm
from taper.layers.rope import context_length
from taper.models.families import read_final_norm
from taper.models.parts import FLOAT_BITS
from taper.quantize.calibrate import CHARACTERS_PER_TOKEN, SEQUENCE_TOKENS, CalibrationRun

Float32 = npt.NDArray[np.float32]


def held_out_passages(
    checkpoint: HfCheckpoint, text: str, calibration_tokens: int, num_passages: int
) -> list[str]:
    """Passages from the gaps between those of `sample_tokens`, evenly spaced; none where the gaps are short.

    A passage begins where a calibration passage of the most characters would end, and ends before the next
    one begins.

    Args:
        checkpoint: for its context length.
        text: the calibration text.
        calibration_tokens: as given to `sample_tokens`.
        num_passages: at most that many.
    """
    length = min(SEQUENCE_TOKENS, context_length(checkpoint.config))
    count = max(1, calibration_tokens // length)
    window = length * CHARACTERS_PER_TOKEN
    starts = np.linspace(0, len(text), count, endpoint=False).astype(int)
    ends = [*starts[1:], len(text)]
    room = min(end - start for start, end in zip(starts, ends, strict=True)) - window
    in_gap = max(1, -(-num_passages // count))
    size = min(window, room // in_gap)
    if size < length:  # even one character a token would not fill a block
        return []
    begins = [start + window + part * size for start in starts for part in range(in_gap)]
    chosen = np.linspace(0, len(begins) - 1, min(num_passages, len(begins))).astype(int)
    return [text[begins[i] : begins[i] + size] for i in chosen]


def spaced_passages(checkpoint: HfCheckpoint, text: str, num_passages: int) -> list[str]:
    """Evenly spaced passages of a text that calibration does not read at all, at most `num_passages`."""
    window = min(SEQUENCE_TOKENS, context_length(checkpoint.config)) * CHARACTERS_PER_TOKEN
    count = max(1, min(num_passages, len(text) // window))
    starts = np.linspace(0, max(0, len(text) - window), count).astype(int)
    return [text[start : start + window] for start in starts]


class ReferenceRun(CalibrationRun):
    """The float model's logits, computed layer by layer: no more than one layer is held in float32."""

    def logits(self, first: int) -> Float32:
        """What predicts tokens `first` to the last: float32 (sequences, tokens - first, vocab)."""
        for index in range(self._config.num_layers):
            self.layer(index, observe=False)
        head = "embed" if self._config.tie_word_embeddings else "head"
        weight, bias = self._read(head)
        norm = Norm(self._config.rms_norm_eps, read_final_norm(self._checkpoint))
        linear = FloatLinear(weight, bias, norm)
        rows = [np.ascontiguousarray(hidden[first - 1 : -1]) for hidden in self._hidden_states()]
        return np.stack([linear(x, FLOAT_BITS) for x in rows])
