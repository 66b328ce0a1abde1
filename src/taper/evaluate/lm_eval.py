"""Taper as a model of lm-eval-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    pip install 'taper[lm-eval]'
    python -m taper.evaluate.lm_eval --model taper --model_args file=model.taper,bits=3 --tasks hellaswag

The arguments after the module's name are the harness's own. In Python, importing this module registers the
model `taper`. Needs lm_eval 0.4.5 or newer; nothing else of Taper imports this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taper.engine import load
from taper.errors import UsageError
from taper.evaluate.likelihood import Scorer
from taper.evaluate.perplexity import checked_widths, open_model
from taper.evaluate.requests import GENERATION_TOKENS, generation_options
from taper.precision import Fixed

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UsageError(
        f"lm-eval-harness cannot be imported: {error}", hint="install it: pip install 'taper[lm-eval]'"
    ) from error

_log = logging.getLogger(__name__)


@register_model("taper")  # type: ignore[untyped-decorator, unused-ignore]
class TaperLM(LM):  # type: ignore[misc, unused-ignore]
    """A `.taper` file at one width, or a Hugging Face folder in float32.

    Args:
        file: path of either.
        bits: the width; a fraction is a budget in bits per weight; None means the largest.
        max_gen_toks: longest generation where a task sets none.
        options: what the harness passes to every model (batch_size, device, ...); one sequence is read at a
            time on the CPU, so they change nothing.

    Raises:
        UsageError: a width outside the file, or a model without a tokenizer.
    """

    def __init__(
        self, file: str, bits: float | None = None, max_gen_toks: int = GENERATION_TOKENS, **options: Any
    ) -> None:
        super().__init__()
        self._path = Path(file)
        decoder, tokenizer = open_model(self._path)
        (self.bits,) = checked_widths(decoder, [decoder.max_bits if bits is None else bits])
        self._scorer = Scorer(decoder, tokenizer, self.bits)
        self._llm = load(self._path)
        self._max_new_tokens = max_gen_toks

    def loglikelihood(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each (context, continuation)."""
        scores = self._all(
            "loglikelihood", requests, lambda arguments: self._scorer.score(arguments[0], arguments[1])
        )
        num_cut = sum(score.num_dropped > 0 for score in scores)
        if num_cut:
            _log.warning("%d of %d contexts lost their beginning to fit the model's", num_cut, len(scores))
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], **options: Any) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's context."""
        return self._all(
            "loglikelihood_rolling", requests, lambda arguments: self._scorer.rolling(arguments[0])
        )

    def generate_until(self, requests: Sequence[Any], **options: Any) -> list[str]:
        """The continuation of each (context, options), up to one of the strings in `until`."""
        return self._all("generate_until", requests, self._generate)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the model's own template makes. Raises UsageError without one."""
        if not add_generation_prompt:
            raise UsageError("continuing a started answer is not supported", hint="ask for a new answer")
        return self._llm.render_chat(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """Names the file for the harness's caches of requests."""
        return self._path.name

    def _generate(self, arguments: tuple[str, dict[str, Any]]) -> str:
        prompt, given = arguments
        tokenizer = self._llm.tokenizer
        assert tokenizer is not None  # open_model refuses a model without one
        ids = tokenizer.encode(prompt)
        options = generation_options(given, self._max_new_tokens, self._llm.engine.model.context_length)
        room = self._llm.engine.model.context_length - options["max_tokens"]
        if len(ids) > room:
            _log.warning("a prompt lost its first %d tokens to fit the model's context", len(ids) - room)
        return self._llm.generate(ids[-room:], policy=Fixed(self.bits), **options).text

    def _all(self, kind: str, requests: Sequence[Any], answer: Callable[[Any], Any]) -> list[Any]:
        """Answer every request in order, and let the harness's cache know each answer at once."""
        found = []
        for request in requests:
            found.append(answer(request.args))
            if kind == "generate_until":
                self.cache_hook.add_partial(kind, request.args, found[-1])
        return found


def main() -> None:
    """Run the harness's own command line with the model `taper` known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
