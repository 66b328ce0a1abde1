"""Tunes a schedule for a task: costs, search, test on held-out prompts, controls."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from taper.errors import UsageError
from taper.evaluate.perplexity import check_vocabularies, open_model
from taper.formats.container import TaperFile
from taper.formats.safetensors_header import read_header
from taper.models.parts import FLOAT_BITS
from taper.tune.bounds import CONFIDENCE, LEAST_DOCUMENTS
from taper.tune.controls import order_controls, thirds, uniform_controls
from taper.tune.costs import OBJECTIVES, Costs, measure_costs
from taper.tune.held_out import HeldOutTest, engine_times
from taper.tune.losses import LOSSES, Loss
from taper.tune.prompts import PromptSet, read_prompts
from taper.tune.report import Row, TuneReport
from taper.tune.schedule import Schedule, monotone_schedules, uniform
from taper.tune.search import Bench, Found, Report, Search
from taper.tune.store import ValueStore
from taper.tune.walks import Reference, ScoredWalk, Task

# Answers that the engine's time is measured over.
_TIMED_PROMPTS = 9


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What is asked for.

    Attributes:
        task: its name, under which the winner is stored.
        path: of its prompts (`taper.tune.prompts.read_prompts`).
        work: folder of unfinished work.
        max_loss: the limit, as a share.
        loss: one of `LOSSES`.
        objective: time, bits or energy.
        high_bits: the uniform width to compare with; None: the file's largest.
        widths: to choose from; None: all whole ones up to `high_bits`.
        num_segments: of an answer.
        search_prompts, held_out_prompts: about so many, of different documents.
        prompt_tokens, max_tokens: of a prompt and of its answer.
        against: the float checkpoint's folder, for losses against a model; None: the file at all planes.
        seed: of the prompts.
    """

    task: str
    path: Path
    work: Path
    max_loss: float = 0.01
    loss: str = "likelihood"
    objective: str = "time"
    high_bits: float | None = None
    widths: tuple[float, ...] | None = None
    num_segments: int = 8
    search_prompts: int = 32
    held_out_prompts: int = 200
    prompt_tokens: int = 64
    max_tokens: int = 128
    against: Path | None = None
    seed: int = 0


def tune(
    model: str | Path, options: TuneOptions, report: Report = lambda what, done_frac, left_s: None
) -> TuneReport:
    """Find the cheapest schedule whose loss on held-out prompts is surely within the limit.

    The candidates of the search are ordered from the safest to the cheapest before any held-out prompt is
    read, then tested in that order, each at the full level, until the first fails (fixed-sequence testing;
    as risk control: Angelopoulos et al., Learn then Test, arXiv 2110.01052). So the chance that a schedule
    over the limit is accepted is at most 1 - `CONFIDENCE`, however many are tried.

    Args:
        model: a `.taper` file.
        options: what is asked for.
        report: called as report(what, done fraction, seconds left).

    Raises:
        UsageError: options that contradict the file, the task or each other.
        DoesNotFitError: prompt and answer are longer than the context.
        ModelNotFoundError, CorruptFileError: as opening the model does.
    """
    return _Tuning(model, options, report).run()


class _Tuning:
    def __init__(self, model: str | Path, options: TuneOptions, report: Report) -> None:
        self._options, self._report = options, report
        self._file = TaperFile.open(model)
        self._decoder, self._tokenizer = open_model(model)
        self._high = self._decoder.max_bits if options.high_bits is None else options.high_bits
        self._widths = self._checked_widths()
        self._loss = self._checked_loss()
        self._schedules = monotone_schedules(self._widths, options.max_tokens, options.num_segments)
        self._search_prompts, self._held_out = self._prompts()
        self._reference = self._checked_reference()
        self._store = ValueStore(options.work, self._fingerprint())
        self._costs = self._stored_costs()

    def run(self) -> TuneReport:
        """Search, test, controls; the unfinished work is removed at the end."""
        options = self._options
        bench = self._bench(self._search_prompts, self._loss.search_walk, "search")
        search = Search(bench, self._loss, self._costs, options.max_loss, self._high)
        ladder = search.ladder(self._schedules)
        pmpd = self._pmpd_choice(search)
        high = uniform(self._high, options.max_tokens)
        test = HeldOutTest(self._bench(self._held_out, self._loss.walk, "test"), self._loss, high)
        candidates, passed = self._climb(test, ladder)
        shown = ladder[max(0, passed - 1)] if ladder else None
        controls = self._controls(shown, pmpd)
        result = self._result(test, shown, controls, candidates, passed)
        self._store.remove()
        return result

    def _checked_widths(self) -> tuple[float, ...]:
        low = self._decoder.min_bits
        chosen = self._options.widths or tuple(range(low, math.floor(self._high) + 1))
        widths = tuple(sorted({*chosen, self._high}))
        for bits in widths:
            self._decoder.widths(bits)
        if widths[-1] > self._high:
            raise UsageError(
                f"width {widths[-1]:g} is above the high width {self._high:g}",
                hint="leave it out, or raise --high",
            )
        if len(widths) < 2:
            raise UsageError(f"{self._high:g} bits alone leave nothing to choose", hint="give lower widths")
        return widths

    def _checked_loss(self) -> Loss:
        options = self._options
        for what, name, known in (
            ("loss", options.loss, [*LOSSES]),
            ("objective", options.objective, [*OBJECTIVES]),
        ):
            if name not in known:
                raise UsageError(f"{what} {name!r} is none of {', '.join(known)}")
        if not 0.0 < options.max_loss < 1.0:
            raise UsageError(f"the limit of the loss is {options.max_loss:g}; it must be above 0 and below 1")
        loss = LOSSES[options.loss]
        if options.against is not None and not loss.has_reference:
            raise UsageError(
                f"--against belongs to a loss against a model; {loss.name} compares with uniform high",
                hint="choose --loss kl or --loss rouge-model, or leave --against out",
            )
        return loss

    def _prompts(self) -> tuple[PromptSet, PromptSet]:
        options = self._options
        total = options.search_prompts + options.held_out_prompts
        prompts = read_prompts(
            options.path,
            self._tokenizer,
            name=options.task,
            num_prompts=total,
            prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        search, held_out = prompts.split(options.search_prompts / total)
        if held_out.num_documents < LEAST_DOCUMENTS:
            raise UsageError(
                f"{held_out.num_documents} held-out documents are too few for a confidence bound",
                hint=f"ask for prompts from at least {LEAST_DOCUMENTS}, of a text of more documents",
            )
        return search, held_out

    def _checked_reference(self) -> Reference:
        if self._options.against is None:
            return Reference(self._decoder, self._decoder.max_bits)
        decoder, _ = open_model(self._options.against)
        check_vocabularies(decoder, self._decoder)
        return Reference(decoder, FLOAT_BITS)

    def _fingerprint(self) -> dict[str, str]:
        """Everything that the values depend on, and what ranks them."""
        options = dataclasses.asdict(self._options)
        del options["work"]
        prompts = repr((self._search_prompts, self._held_out)).encode()
        digests = read_header(self._file.path).metadata["digests"].encode()
        return {name: str(value) for name, value in options.items()} | {
            "file": hashlib.sha256(digests).hexdigest(),
            "prompts": hashlib.sha256(prompts).hexdigest(),
        }

    def _stored_costs(self) -> Costs:
        costs = self._store.costs()
        if costs is None:
            costs = self._measured_costs(self._widths)
            self._store.save_costs(costs)
        return costs

    def _measured_costs(self, widths: Sequence[float]) -> Costs:
        """For the prompt of median length."""
        self._report("costs of the widths", 0.0, None)
        prompt = sorted(self._held_out.prompts, key=len)[len(self._held_out) // 2]
        options = self._options
        return measure_costs(self._decoder, prompt, options.max_tokens, widths, options.objective)

    def _bench(self, prompts: PromptSet, walk: Callable[[Task, int], ScoredWalk], stage: str) -> Bench:
        task = Task(self._decoder, self._tokenizer, prompts, self._high, self._reference)
        return Bench(task, walk, self._store, stage, self._report)

    def _pmpd_choice(self, search: Search) -> Schedule | None:
        """The cheapest of PMPD's grid within the limit on the search prompts, by the mean alone as there."""
        grid = thirds(self._high, self._widths, self._options.max_tokens)
        losses = search.losses(grid, len(self._search_prompts), f"PMPD's {len(grid)} schedules")
        within = [s for s, loss in zip(grid, losses, strict=True) if loss <= self._options.max_loss]
        return min(within, key=self._costs.of, default=None)

    def _climb(self, test: HeldOutTest, ladder: Sequence[Found]) -> tuple[list[Row], int]:
        """Test the ladder in its order up to the first that fails: the rows, and how many passed."""
        if not ladder:
            return [], 0
        test.measure([found.schedule for found in ladder], "held-out prompts")
        rows: list[Row] = []
        for passed, found in enumerate(ladder):
            rows.append(test.row("candidate", found.schedule, self._costs, search_loss=found.loss))
            if rows[-1].upper >= self._options.max_loss:
                return rows, passed
        return rows, len(rows)

    def _controls(self, shown: Found | None, pmpd: Schedule | None) -> dict[str, Schedule]:
        """By name; what needs a width of its own has its cost measured."""
        controls = uniform_controls(self._widths, self._options.max_tokens)
        if shown is not None:
            controls |= order_controls(shown.schedule)
            average = math.floor(100 * shown.schedule.average_bits) / 100
            if self._decoder.has_sensitivity and average not in self._widths:
                controls["flat fraction"] = uniform(
                    average, self._options.max_tokens, shown.schedule.prefill_bits
                )
                self._costs = self._costs.with_widths(self._measured_costs([average]))
        return controls if pmpd is None else controls | {"PMPD thirds": pmpd}

    def _result(
        self,
        test: HeldOutTest,
        shown: Found | None,
        controls: dict[str, Schedule],
        candidates: Sequence[Row],
        passed: int,
    ) -> TuneReport:
        """Everything that was found, with the controls measured."""
        options = self._options
        test.measure([*controls.values()], "controls on held-out prompts")
        self._report("time in the engine", 0.0, None)
        timed = [*controls.values(), *([] if shown is None else [shown.schedule])]
        times = engine_times(self._decoder, self._held_out.select(range(_TIMED_PROMPTS)), timed)
        beside = None if shown is None else shown.schedule
        rows = [test.row(role, s, self._costs, beside=beside) for role, s in controls.items()]
        best = None
        if shown is not None:
            role = "winner" if passed else "safest candidate"
            best = test.row(role, shown.schedule, self._costs, search_loss=shown.loss)
            best = dataclasses.replace(best, token_ms=times[best.bits])
        return TuneReport(
            task=options.task,
            objective=options.objective,
            unit=self._costs.unit,
            loss=options.loss,
            loss_summary=self._loss.summary,
            max_loss=options.max_loss,
            confidence=CONFIDENCE,
            high_bits=self._high,
            reference=self._reference_name(),
            widths=self._widths,
            num_segments=options.num_segments,
            max_tokens=options.max_tokens,
            prompt_tokens=int(statistics.median(len(prompt) for prompt in self._held_out.prompts)),
            num_schedules=len(self._schedules),
            search_prompts=len(self._search_prompts),
            held_out_prompts=len(self._held_out),
            held_out_documents=self._held_out.num_documents,
            prefill_costs=self._costs.prefill,
            decode_costs=self._costs.decode,
            candidates=tuple(candidates),
            winner=best if passed else None,
            shown=best,
            controls=tuple(dataclasses.replace(row, token_ms=times[row.bits]) for row in rows),
        )

    def _reference_name(self) -> str:
        if not self._loss.has_reference:
            return f"uniform {self._high:g} bits"
        if self._options.against is not None:
            return self._options.against.resolve().name
        return f"{self._file.path.name} at {self._decoder.max_bits} bits"
