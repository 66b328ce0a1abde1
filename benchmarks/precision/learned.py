"""Is the learned policy no worse than a static switch at equal average bits, on tasks neither has seen?

    python benchmarks/precision/learned.py MODEL --train TEXT --task TEXT [--task TEXT] [--widths 3,2]

Trains a scheduler on the one text and takes prompts of the others, each cut at a random length. Loss is the
mean KL divergence from all planes, along the text's own continuation and along the greedy answer of all
planes; and one minus ROUGE-L of the policy's greedy answer with that of all planes. The static policy
switches every prompt at one place, mixed between two neighbouring segments (for ROUGE-L: at the nearest
token) so that its average bits are the learned policy's. `shuffled` gives the learned policy's switches to
other prompts: the difference is what looking at the prompt buys. `oracle` chooses each switch with the
prompt's measured losses in hand, by the training's own rule. Intervals are 95 %, from the spread of the
paired differences over documents, less what is proportional to a prompt's own bits: since the means of the
bits are equal, that part cancels. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taper.engine import Engine, Request, SamplingParams
from taper.errors import TaperError
from taper.evaluate.sequences import rouge_l
from taper.formats.container import TaperFile
from taper.formats.learned import LearnedScheduler
from taper.kernels import set_num_threads
from taper.models import Decoder
from taper.precision import StepContext
from taper.precision.learned import Learned, padded, predict, switch_start
from taper.tokenizer import Tokenizer
from taper.tune.greedy import GreedyWalk
from taper.tune.learned import LearnOptions, learned_scheduler
from taper.tune.learned_labels import (
    LabelPlan,
    labels_within,
    measure_prompts,
    random_cuts,
    tolerance_for,
    with_greedy_answers,
)
from taper.tune.prompts import PromptSet, read_prompts

F64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

Z95 = 1.96


@dataclass(frozen=True, slots=True)
class Compared:
    """Mean losses of the policies at the same average bits, and the difference in question.

    Attributes:
        loss: what was measured.
        means: policy to mean loss.
        difference, half_width: of learned minus static, and its 95 % interval.
        against_shuffled, shuffled_half_width: of learned minus shuffled.
    """

    loss: str
    means: dict[str, float]
    difference: float
    half_width: float
    against_shuffled: float | None = None
    shuffled_half_width: float | None = None


def high_passes(num_segments: int, max_tokens: int) -> F64:
    """Decode passes at the higher width, by class; the last is never to switch."""
    starts = [switch_start(segment, num_segments, max_tokens) for segment in range(num_segments)]
    return np.array([*(start - 1 for start in starts), max_tokens - 1], dtype=np.float64)


def static_loss(damage: F64, passes: F64, wanted: float) -> F64:
    """Loss of each prompt where all switch at one place, mixed of two so that `wanted` passes are high."""
    upper = int(np.clip(np.searchsorted(passes, wanted), 1, len(passes) - 1))
    share = (wanted - passes[upper - 1]) / (passes[upper] - passes[upper - 1])
    return (1 - share) * damage[:, upper - 1] + share * damage[:, upper]


def oracle_classes(damage: F64, passes: F64, wanted: float) -> Int64:
    """Labels of the tolerance whose mean of high passes is nearest to `wanted`."""
    shares = np.linspace(0, 1, 201)
    found = [labels_within(damage, tolerance_for(damage, share)) for share in shares]
    return min(found, key=lambda labels: abs(passes[labels].mean() - wanted))


def at_equal_bits(differences: F64, passes: F64) -> tuple[float, float]:
    """Mean difference of policies of equal mean bits, and the half width of its 95 % interval.

    The regression estimator (Cochran, Sampling Techniques, 1977, section 7.3) with the high passes of a
    prompt as the covariate, whose mean both policies share.

    Args:
        differences: of each prompt, learned minus static.
        passes: at the higher width, of each prompt under the learned policy.
    """
    centred = passes - passes.mean()
    spread = float(centred @ centred)
    slope = float(centred @ differences) / spread if spread else 0.0
    residuals = differences - differences.mean() - slope * centred
    error = float(np.sqrt(residuals @ residuals / max(1, len(residuals) - 2) / len(residuals)))
    return float(differences.mean()), Z95 * error


def compare_divergence(name: str, damage: F64, classes: Int64, passes: F64) -> Compared:
    """The policies by their damage, (prompts, classes)."""
    wanted = float(passes[classes].mean())
    rows = np.arange(len(damage))
    learned, static = damage[rows, classes], static_loss(damage, passes, wanted)
    shuffled = damage @ (np.bincount(classes, minlength=len(passes)) / len(classes))
    means = {
        "learned": learned,
        "static": static,
        "shuffled": shuffled,
        "oracle": damage[rows, oracle_classes(damage, passes, wanted)],
        "never switch": damage[:, -1],
        "all low": damage[:, 0],
    }
    own = passes[classes]
    return Compared(
        name,
        {policy: float(values.mean()) for policy, values in means.items()},
        *at_equal_bits(learned - static, own),
        *at_equal_bits(learned - shuffled, own),
    )


def greedy_losses(
    decoder: Decoder,
    tokenizer: Tokenizer,
    scheduler: LearnedScheduler,
    prompts: PromptSet,
    num_high: dict[str, Int64],
) -> dict[str, F64]:
    """1 - ROUGE-L of each prompt's greedy answer with its reference, by policy.

    Args:
        decoder, tokenizer: the model.
        scheduler: its two widths and the prompt's bits.
        prompts: the task.
        num_high: policy to the decode passes at the higher width, of each prompt.
    """
    high, low = scheduler.widths
    losses = {policy: np.empty(len(prompts)) for policy in num_high}
    for number, prompt in enumerate(prompts.prompts):
        wanted = tokenizer.decode(prompts.references[number])
        walk = GreedyWalk(decoder, prompt, prompts.max_tokens)
        walk.prefill(scheduler.prefill_bits)
        walk.extend(high, prompts.max_tokens)
        # The latest switch first: what is left of the answer when it goes back is always of the high width.
        for policy in sorted(num_high, key=lambda name: -num_high[name][number]):
            walk.back_to(min(len(walk.tokens), int(num_high[policy][number]) + 1))
            walk.extend(low, prompts.max_tokens)
            losses[policy][number] = 1 - rouge_l(wanted, tokenizer.decode(walk.tokens))
    return losses


def compare_greedy(
    decoder: Decoder,
    tokenizer: Tokenizer,
    scheduler: LearnedScheduler,
    prompts: PromptSet,
    passes: Int64,
) -> Compared:
    """The policies by their greedy answers; `passes` are the learned policy's at the higher width."""
    same = np.ones_like(passes)
    losses = greedy_losses(
        decoder,
        tokenizer,
        scheduler,
        prompts,
        {
            "learned": passes,
            "static": round(float(passes.mean())) * same,
            "never switch": (prompts.max_tokens - 1) * same,
            "all low": 0 * same,
        },
    )
    means = {policy: float(values.mean()) for policy, values in losses.items()}
    paired = at_equal_bits(losses["learned"] - losses["static"], passes.astype(np.float64))
    return Compared("1 - ROUGE-L, greedy", means, *paired)


class _Timed(Learned):
    """The policy with a clock around the step that decides."""

    seconds = 0.0

    def bits(self, step: StepContext) -> float:
        began, is_first = time.thread_time(), step.phase == "decode" and step.num_generated == 1
        bits = super().bits(step)
        if is_first:
            self.seconds = time.thread_time() - began
        return bits


def decision_shares(decoder: Decoder, scheduler: LearnedScheduler, prompts: PromptSet) -> F64:
    """Share of each request's time that the decision takes, both as CPU time of the calling thread: it works
    or spins in every pass, and other programs do not count."""
    engine, shares = Engine(decoder, None), []
    for prompt in prompts.prompts:
        policy = _Timed(scheduler)
        request = Request(
            prompt, policy, SamplingParams(temperature=0.0), prompts.max_tokens, ignore_eos=True
        )
        began = time.thread_time()
        engine.generate(request)
        shares.append(policy.seconds / (time.thread_time() - began))
    return np.array(shares)


def run_task(
    decoder: Decoder,
    tokenizer: Tokenizer,
    scheduler: LearnedScheduler,
    path: Path,
    options: argparse.Namespace,
) -> dict[str, object]:
    """Everything about one task."""
    drawn = read_prompts(
        path,
        tokenizer,
        name=path.name,
        num_prompts=options.prompts,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        seed=options.seed + 1,
    )
    prompts = random_cuts(drawn, options.seed + 1)
    plan = LabelPlan(scheduler.widths, scheduler.prefill_bits, scheduler.num_segments, decoder.max_bits)
    along_text = measure_prompts(decoder, prompts, plan)
    answered = with_greedy_answers(decoder, prompts, decoder.max_bits)
    along_answer = measure_prompts(decoder, answered, plan)
    entries = [(measured.keys, measured.values) for measured in along_text]
    classes = np.array(
        [int(predict(scheduler.predictors[0], padded([entry])).logits[0].argmax()) for entry in entries]
    )
    passes = high_passes(scheduler.num_segments, options.max_tokens)
    rows = [
        compare_divergence(name, np.array([one.damage[0] for one in measured]), classes, passes)
        for name, measured in (("KL along the text", along_text), ("KL along the answer", along_answer))
    ]
    chosen = passes[classes].astype(np.int64)
    rows.append(compare_greedy(decoder, tokenizer, scheduler, answered, chosen))
    high, low = scheduler.widths
    high_frac = float(chosen.mean()) / (options.max_tokens - 1)
    shares = decision_shares(decoder, scheduler, prompts.select(range(min(40, len(prompts)))))
    return {
        "task": path.name,
        "num_prompts": len(prompts),
        "num_documents": prompts.num_documents,
        "classes": np.bincount(classes, minlength=len(passes)).tolist(),
        "average_bits": low + high_frac * (high - low),
        "decision_share_median": float(np.median(shares)),
        "decision_share_max": float(shares.max()),
        "rows": [asdict(row) for row in rows],
    }


def report(found: dict[str, object]) -> str:
    """One task as text."""
    lines = [
        f"{found['task']}: {found['num_prompts']} prompts of {found['num_documents']} documents, "
        f"{found['average_bits']:.3f} bits on average, switches {found['classes']}, decision "
        f"{found['decision_share_median']:.2%} of a request's time (median; at most "
        f"{found['decision_share_max']:.2%})"
    ]
    for row in found["rows"]:
        means = ", ".join(f"{policy} {value:.5f}" for policy, value in row["means"].items())
        static = row["means"]["static"]
        lines.append(
            f"  {row['loss']}: {means}\n"
            f"    learned - static {row['difference']:+.5f} ± {row['half_width']:.5f}"
            f" ({row['difference'] / static:+.2%} ± {row['half_width'] / static:.2%} of static's)"
        )
        if row["against_shuffled"] is not None:
            lines.append(
                f"    learned - shuffled {row['against_shuffled']:+.5f} ± {row['shuffled_half_width']:.5f}"
            )
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="generic text")
    parser.add_argument("--task", type=Path, action="append", required=True, help="text of another kind")
    parser.add_argument("--widths", default="3,2", help="two, the larger first; fractions as 3.3,2.3")
    parser.add_argument("--prefill-bits", type=float, help="default: all")
    parser.add_argument("--train-prompts", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Train, compare, print."""
    options = arguments(given)
    set_num_threads(options.threads)
    try:
        file = TaperFile.open(options.model)
        decoder, tokenizer = Decoder.from_taper(file), Tokenizer(file.tokenizer_json or "")
        widths = tuple(float(word) for word in options.widths.split(","))
        if len(widths) != 2:
            raise TaperError(f"{options.widths} are not two widths")
        scheduler = learned_scheduler(
            file,
            LearnOptions(
                options.train,
                widths,
                options.prefill_bits,
                options.segments,
                options.train_prompts,
                options.prompt_tokens,
                options.max_tokens,
                options.seed,
            ),
        )
        print(f"{options.model.name}: {scheduler.record}", flush=True)
        found = []
        for path in options.task:
            found.append(run_task(decoder, tokenizer, scheduler, path, options))
            print(report(found[-1]), flush=True)
    except TaperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"model": options.model.name, "training": scheduler.record, "tasks": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
