"""Bits of activations and KV cache, found on calibration text and tested on held-out text (docs/anda.md)."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.errors import UsageError
from taper.evaluate.divergence import log_likelihoods, log_normalisers
from taper.evaluate.protocols import cut
from taper.formats.activations import TENSOR_TYPES, ActivationBits
from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.layers.rope import context_length
from taper.models import Decoder
from taper.tokenizer import Tokenizer
from taper.tune.activation_spaces import REFERENCE_BITS, SEARCHES, ActivationOptions, JointSpace, PaperSpace
from taper.tune.anda_search import Combination, Evaluation, SearchResult
from taper.tune.bounds import CONFIDENCE, upper_bound
from taper.tune.own_text import OWN_TEXT, write_windows

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

# As long as the windows that texts are cut into.
OWN_WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A combination on held-out windows: loss, and its one-sided 95 % upper bound by the bootstrap-t."""

    bits: Combination
    loss: float
    bound: float


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """What a search found.

    Attributes:
        names: of the variables, in the order of combinations.
        result: the path.
        tested: some dearer combinations, then the bests of the path, on held-out text, the dearest first,
            until one is not surely within the limit.
        winner: the cheapest that is; None where not even the dearest is.
        chosen: the winner for the file's header.
        saving: of BOPs (`paper`) or of cost (`joint`) against the reference.
        bits: width of the weights.
        num_tokens: scored in calibration and in the test.
        texts: names of the files that both are from, or `own text`, which the model wrote.
    """

    names: tuple[str, ...]
    result: SearchResult
    tested: tuple[HeldOut, ...]
    winner: HeldOut | None
    chosen: ActivationBits | None
    saving: float | None
    bits: int
    num_tokens: tuple[int, int]
    texts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "variables": list(self.names),
            "weight_bits": self.bits,
            "evaluations": [
                {"bits": list(tried.bits), "cost": tried.cost, "loss": tried.loss, "is_best": tried.is_best}
                for tried in self.result.evaluations
            ],
            "is_finished": self.result.is_finished,
            "held_out": [{"bits": list(t.bits), "loss": t.loss, "bound": t.bound} for t in self.tested],
            "winner": None if self.winner is None else list(self.winner.bits),
            "saving": self.saving,
            "calibration_tokens": self.num_tokens[0],
            "held_out_tokens": self.num_tokens[1],
            "texts": list(self.texts),
            "stored": None if self.chosen is None else self.chosen.to_dict(),
        }


def tune_activations(
    model: str | Path,
    options: ActivationOptions,
    trace: Callable[[Evaluation], None] = lambda evaluation: None,
    progress: Callable[[str, float], None] = lambda what, done: None,
) -> ActivationReport:
    """Search, then test on held-out text what the search held for good.

    Combinations with up to three bits more than the first best, then the bests of the path are tested from
    the dearest on at 95 %, and the first that fails ends the test: a fixed sequence, so that the whole of it
    errs in at most 5 % of cases.

    Args:
        model: a `.taper` file.
        options: see there; without texts the model writes its own at 14 bits (`own_text`).
        trace: called with each evaluation of the search.
        progress: called as progress(what, share done).

    Raises:
        UsageError: a model without tokenizer, an unknown search, texts that are too short, a width that the
            file does not hold.
        ModelNotFoundError, CorruptFileError: as opening the model does.
    """
    file = TaperFile.open(model)
    if file.tokenizer_json is None:
        raise UsageError(f"{model} holds no tokenizer, so text cannot be read", "add its tokenizer.json")
    if options.search not in SEARCHES:
        raise UsageError(f"search {options.search!r} is none of {', '.join(SEARCHES)}")
    bits = _weight_bits(file, options.bits)
    calibration, held_out = _windows(file, bits, options, progress)
    space = SEARCHES[options.search](file, bits, options)
    progress("reference", 0.0)
    losses = _Losses(file, bits, calibration)

    def follow(evaluation: Evaluation) -> None:
        trace(evaluation)
        counts[0] += 1
        progress("search", counts[0] / options.max_evaluations)

    counts = [0]
    result = space.search(lambda combination: losses.loss(space.chosen(combination)), follow)
    tested, winner = _test(file, bits, held_out, space, result, options.max_loss, progress)
    scored = calibration.shape[1] - calibration.shape[1] // 2 - 1
    chosen = None
    if winner is not None:
        chosen = space.chosen(winner.bits, _evidence(options, bits, result, winner))
    return ActivationReport(
        space.names,
        result,
        tuple(tested),
        winner,
        chosen,
        None if winner is None else space.saving(winner.bits),
        bits,
        (len(calibration) * scored, len(held_out) * scored),
        _names(options),
    )


_REFERENCE = ActivationBits(dict.fromkeys(TENSOR_TYPES, REFERENCE_BITS))


@dataclass(slots=True)
class _Losses:
    """Losses of choices on some windows; the reference is read once."""

    file: TaperFile
    bits: int
    windows: Int32
    _reference: Float64 = field(init=False)

    def __post_init__(self) -> None:
        self._reference = self._per_window(_REFERENCE)

    def differences(self, choice: ActivationBits) -> Float64:
        """Of mean negative log-likelihood from the reference's, by window."""
        return self._per_window(choice) - self._reference

    def loss(self, choice: ActivationBits) -> float:
        """Perplexity over the reference's, minus 1."""
        return float(np.expm1(self.differences(choice).mean()))

    def _per_window(self, choice: ActivationBits) -> Float64:
        return window_losses(Decoder.from_taper(self.file, activations=choice), self.windows, self.bits)


def window_losses(decoder: Decoder, windows: Int32, bits: int) -> Float64:
    """Mean negative log-likelihood of the second half of each window, float64 (windows,).

    Args:
        decoder: the model.
        windows: int32 (windows, tokens), each read from an empty cache.
        bits: of every pass.
    """
    length = windows.shape[1]
    cache, first = decoder.new_cache(length), length // 2
    found = []
    for window in windows:
        cache.truncate(0)
        decoder.forward(window[:first], cache, bits, logits="none")
        logits = decoder.forward(window[first:-1], cache, bits, logits="all")
        assert logits is not None
        likelihoods = log_likelihoods(logits, log_normalisers(logits), window[first + 1 :])
        found.append(-float(np.mean(likelihoods, dtype=np.float64)))
    return np.array(found)


def _test(
    file: TaperFile,
    bits: int,
    windows: Int32,
    space: PaperSpace | JointSpace,
    result: SearchResult,
    max_loss: float,
    progress: Callable[[str, float], None],
) -> tuple[list[HeldOut], HeldOut | None]:
    losses = _Losses(file, bits, windows)
    bests = [tried.bits for tried in result.evaluations if tried.is_best]
    candidates = [*space.dearer(bests[0]), *bests] if bests else []
    tested: list[HeldOut] = []
    winner = None
    for count, combination in enumerate(candidates, 1):
        differences = losses.differences(space.chosen(combination))
        bound = float(np.expm1(upper_bound(differences)))
        tested.append(HeldOut(combination, float(np.expm1(differences.mean())), bound))
        progress("held out", count / len(candidates))
        if bound > max_loss:
            break
        winner = tested[-1]
    return tested, winner


def _windows(
    file: TaperFile, bits: int, options: ActivationOptions, progress: Callable[[str, float], None]
) -> tuple[Int32, Int32]:
    """Calibration from the beginning of each text, held out from its end."""
    assert file.tokenizer_json is not None
    tokenizer, config = Tokenizer(file.tokenizer_json), file.config
    wanted = options.calibration_windows + options.held_out_windows
    if not options.texts:
        tokens = write_windows(
            Decoder.from_taper(file, activations=_REFERENCE),
            bits,
            wanted,
            min(OWN_WINDOW_TOKENS, context_length(config)),
            tokenizer.encode(""),
            lambda done: progress(OWN_TEXT, done),
        )
        return tokens[: options.calibration_windows], tokens[options.calibration_windows :]
    calibration, held_out = [], []
    for path in options.texts:
        tokens = cut(read_text(path), tokenizer, context_length(config), "llama.cpp").tokens
        if len(tokens) < wanted:
            raise UsageError(
                f"{path} has {len(tokens)} windows of {tokens.shape[1]} tokens; {wanted} are needed",
                "give a longer text, or ask for fewer windows",
            )
        calibration.append(tokens[: options.calibration_windows])
        held_out.append(tokens[len(tokens) - options.held_out_windows :])
    return np.concatenate(calibration), np.concatenate(held_out)


def _names(options: ActivationOptions) -> tuple[str, ...]:
    return tuple(path.name for path in options.texts) or (OWN_TEXT,)


def _weight_bits(file: TaperFile, bits: int | None) -> int:
    if bits is None:
        return min(max(4, file.min_bits), file.max_bits)
    if not file.min_bits <= bits <= file.max_bits:
        raise UsageError(f"{bits} bits are outside the file's {file.min_bits}..{file.max_bits}")
    return bits


def _evidence(options: ActivationOptions, bits: int, result: SearchResult, winner: HeldOut) -> dict[str, Any]:
    return {
        "search": options.search,
        "max_loss": options.max_loss,
        "weight_bits": bits,
        "texts": list(_names(options)),
        "evaluations": len(result.evaluations),
        "held_out_loss": winner.loss,
        "held_out_bound": winner.bound,
        "confidence": CONFIDENCE,
        "date": datetime.date.today().isoformat(),
    }
