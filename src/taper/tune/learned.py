"""`taper tune --learned`: labels from a text, a predictor for each pair of widths, and a scheduler for the
file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from taper.errors import CorruptFileError, UsageError
from taper.formats.container import TaperFile
from taper.formats.learned import MAX_SEGMENTS, MAX_WEIGHTS, LearnedScheduler, PredictorWeights, hidden_size
from taper.formats.writer import rewrite_header
from taper.models import Decoder
from taper.precision import describe_widths
from taper.tokenizer import Tokenizer
from taper.tune.learned_labels import (
    LabelPlan,
    MeasuredPrompt,
    labels_within,
    measure_prompts,
    random_cuts,
    tolerance_for,
    with_greedy_answers,
)
from taper.tune.learned_train import TrainingPlan, train
from taper.tune.prompts import read_prompts

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """What to learn, from what.

    Attributes:
        text: generic text, .txt or .txt.xz, of documents that `<|endoftext|>` ends.
        widths: of the answers, falling, two at least.
        prefill_bits: of the prompts; None takes all bits of the file.
        num_segments: parts of an answer; a switch is at the beginning of one.
        num_prompts: PMPD takes 256.
        prompt_tokens: of the longest prompt.
        max_tokens: of the answers.
        seed: of prompts, cuts and training.
    """

    text: Path
    widths: tuple[float, ...]
    prefill_bits: float | None = None
    num_segments: int = 8
    num_prompts: int = 256
    prompt_tokens: int = 256
    max_tokens: int = 128
    seed: int = 0


def learn(
    model: str | Path, options: LearnOptions, progress: Progress | None = None, dry_run: bool = False
) -> LearnedScheduler:
    """Measure, train, and store the scheduler in the file unless it is a dry run.

    Raises:
        ModelNotFoundError, CorruptFileError: as `TaperFile.open`; a file that is cut off takes no scheduler.
        UsageError: widths that the file does not hold or that do not fall, no tokenizer, too little text.
    """
    file = TaperFile.open(model)
    if file.is_truncated and not dry_run:
        raise CorruptFileError(
            f"{model} is cut off: only a whole file takes a scheduler", hint="copy or download the file again"
        )
    scheduler = learned_scheduler(file, options, progress)
    if not dry_run:
        rewrite_header(model, replace(file.header, learned=scheduler))
    return scheduler


def learned_scheduler(
    file: TaperFile, options: LearnOptions, progress: Progress | None = None
) -> LearnedScheduler:
    """Measure and train. Raises UsageError as `learn`."""
    decoder = Decoder.from_taper(file)
    prefill_bits = decoder.max_bits if options.prefill_bits is None else options.prefill_bits
    _check(decoder, options, prefill_bits)
    if file.tokenizer_json is None:
        raise UsageError("the model holds no tokenizer, so it cannot read text")
    prompts = read_prompts(
        options.text,
        Tokenizer(file.tokenizer_json),
        name="learned",
        num_prompts=options.num_prompts,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    plan = LabelPlan(options.widths, prefill_bits, options.num_segments, decoder.max_bits)
    cut = random_cuts(prompts, options.seed)
    answered = with_greedy_answers(decoder, cut, plan.reference_bits, progress)
    measured = measure_prompts(decoder, answered, plan, progress)
    return fit(measured, plan, decoder.config.num_kv_heads, _record(options), options.seed)


def fit(
    measured: list[MeasuredPrompt], plan: LabelPlan, kv_heads: int, record: dict[str, Any], seed: int
) -> LearnedScheduler:
    """Label, and train one predictor for each pair of neighbouring widths.

    The tolerances share the answer out: of N widths each has about one part in N.

    Args:
        measured: in random order.
        plan: that they were measured by.
        kv_heads: of the model.
        record: of the text; what the training found joins it.
        seed: of the training.
    """
    examples = [(prompt.keys, prompt.values) for prompt in measured]
    num_classes, predictors, found = plan.num_segments + 1, [], []
    for pair in range(len(plan.widths) - 1):
        damage = np.array([prompt.damage[pair] for prompt in measured])
        tolerance = tolerance_for(damage, (pair + 1) / len(plan.widths))
        labels = labels_within(damage, tolerance)
        trained = train(examples, labels, num_classes, kv_heads, TrainingPlan(seed=seed))
        predictors.append(trained.weights)
        found.append(
            {
                "widths": list(plan.widths[pair : pair + 2]),
                "tolerance_nats": tolerance,
                "label_counts": np.bincount(labels, minlength=num_classes).tolist(),
                "epoch": trained.epoch,
                "loss": trained.loss,
                "chance_loss": trained.chance_loss,
            }
        )
    return LearnedScheduler(
        plan.widths, plan.prefill_bits, plan.num_segments, tuple(predictors), record | {"pairs": found}
    )


def _record(options: LearnOptions) -> dict[str, Any]:
    return {
        "text": options.text.name,
        "num_prompts": options.num_prompts,
        "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
    }


def _check(decoder: Decoder, options: LearnOptions, prefill_bits: float) -> None:
    widths = options.widths
    if len(widths) < 2 or list(widths) != sorted(set(widths), reverse=True):
        raise UsageError(
            f"the widths {widths} do not fall", hint="give two or more, the largest first, as in 4,3"
        )
    for bits in (*widths, prefill_bits):
        if not decoder.min_bits <= bits <= decoder.max_bits:
            held = describe_widths(decoder.min_bits, decoder.max_bits)
            raise UsageError(f"{bits:g} bits are asked for; this model holds {held}")
        decoder.widths(bits)
    if prefill_bits < widths[0]:
        raise UsageError(f"the prompt's {prefill_bits:g} bits are below the first width, {widths[0]:g}")
    if not 1 <= options.num_segments <= MAX_SEGMENTS:
        raise UsageError(f"{options.num_segments} segments are outside 1 to {MAX_SEGMENTS}")
    config = decoder.config
    hidden = hidden_size(config.num_kv_heads * config.head_dim)
    shapes = PredictorWeights.shapes(config.num_kv_heads, config.head_dim, hidden, options.num_segments + 1)
    size = (len(widths) - 1) * sum(int(np.prod(shape)) for shape in shapes.values())
    if size > MAX_WEIGHTS:
        raise UsageError(
            f"predictors of {size:,} weights are beyond the {MAX_WEIGHTS:,} that a file takes",
            hint="give fewer widths",
        )
