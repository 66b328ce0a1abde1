"""The front door: a model, its tokenizer and its chat template in one object."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from taper.config import ModelConfig
from taper.engine.completion import Completion
from taper.engine.engine import Engine, TokenStream
from taper.engine.limits import Limits
from taper.engine.loading import ArrivingDecoder, begun_arrival
from taper.engine.memory_budget import MemoryBudget, Planes, PressureGauge
from taper.engine.model_runner import Model
from taper.engine.request import Request
from taper.engine.sampling_params import SamplingParams
from taper.errors import ModelNotFoundError, UsageError
from taper.formats.arrival import Arrival, Progress
from taper.formats.container import TaperFile
from taper.formats.huggingface import HfCheckpoint
from taper.formats.learned import LearnedScheduler
from taper.models import Decoder
from taper.precision import PrecisionPolicy, parse_policy
from taper.tokenizer import ChatTemplate, Message, Tokenizer

SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))
REQUEST_FIELDS = frozenset(field.name for field in fields(Request) if field.init) - {
    "prompt", "policy", "sampling", "_cancelled",
}  # fmt: skip


class LLM:
    """A loaded model; `taper.load` makes one.

    Args:
        model: the decoder.
        tokenizer_json: text of tokenizer.json; without one, prompts are token ids.
        chat_template: Jinja source; without one, `chat` is refused.
        policies: policy texts that the model's file names; `default`, where present, is used when none is
            asked for.
        notice: what the user should know about the file, such as that it is cut short.
        limits: as in `Engine`.
        learned: the file's scheduler for the policy `learned`.
        card: the file's quality card; empty where there is none.
    """

    def __init__(
        self,
        model: Model,
        tokenizer_json: str | None,
        chat_template: str | None = None,
        policies: Mapping[str, str] | None = None,
        notice: str | None = None,
        limits: Limits | None = None,
        learned: LearnedScheduler | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        tokenizer = None if tokenizer_json is None else Tokenizer(tokenizer_json)
        self.engine = Engine(model, tokenizer, limits=limits)
        self.policies = dict(policies or {})
        self.notice = notice
        self.learned = learned
        self.card = dict(card or {})
        self.tokenizer_json = tokenizer_json
        self._template = ChatTemplate(chat_template, self._template_variables()) if chat_template else None

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.engine.model.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def min_bits(self) -> int:
        """Least width that the model can be read at."""
        return self.engine.model.min_bits

    @property
    def max_bits(self) -> int:
        """Largest width that the model can be read at; 32 for a Hugging Face folder."""
        return self.engine.model.max_bits

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._template is not None

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template writes tools into the prompt."""
        return self._template is not None and self._template.knows_tools

    def stream(
        self, prompt: str | Sequence[int], *, policy: str | PrecisionPolicy | None = None, **options: Any
    ) -> TokenStream:
        """Continue a prompt; an iterator of `StepOutput`, whose `str()` is the new text.

        Args:
            prompt: text or token ids.
            policy: text for `parse_policy`, a name from `policies`, or a policy object; None takes the file's
                `default`, else `progressive`.
            options: the other fields of `Request` (max_tokens, stop, ...), `sampling=SamplingParams(...)`, or
                single fields of `SamplingParams` (temperature, seed, ...), which override it.

        Raises:
            UsageError: an unknown option, or a value that is never right.
            DoesNotFitError: prompt and output are longer than the context.
        """
        return self.engine.stream(self.request(prompt, policy=policy, **options))

    def generate(
        self, prompt: str | Sequence[int], *, policy: str | PrecisionPolicy | None = None, **options: Any
    ) -> Completion:
        """Continue a prompt to the end; arguments and errors as `stream`."""
        return self.engine.generate(self.request(prompt, policy=policy, **options))

    def stream_chat(
        self, messages: Sequence[Message], *, policy: str | PrecisionPolicy | None = None, **options: Any
    ) -> TokenStream:
        """Answer a chat; `messages` as in `render_chat`, the rest as in `stream`."""
        prompt = self.render_chat(messages)
        return self.stream(prompt, policy=policy, special_tokens=False, **options)

    def chat(
        self, messages: Sequence[Message], *, policy: str | PrecisionPolicy | None = None, **options: Any
    ) -> Completion:
        """Answer a chat to the end; `messages` as in `render_chat`, the rest as in `stream`."""
        prompt = self.render_chat(messages)
        return self.generate(prompt, policy=policy, special_tokens=False, **options)

    def audit(
        self,
        prompt: str | Sequence[int],
        answer: str | Sequence[int],
        *,
        policy: str | PrecisionPolicy | None = None,
        **options: Any,
    ) -> Completion:
        """What the bits of a policy cost in a given answer, such as a tool call that must be right.

        The answer's tokens take the place of drawn ones; `Completion.audit` has the figures, its `decisions`
        the tokens that the audit's width is sure of and these bits would not have written.

        Args:
            prompt: text or token ids.
            answer: text, cut into tokens as the continuation of the prompt's text, or token ids.
            policy: as in `stream`.
            options: as in `stream`, of which `audit_bits` and `special_tokens` matter here.

        Raises:
            UsageError, DoesNotFitError: as `stream`; an empty answer.
        """
        return self.engine.audit(self.request(prompt, policy=policy, **{**options, "audit": True}), answer)

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt that the model's template makes of messages, each with `role` and `content`.

        Args:
            messages: of the chat.
            tools: functions that the model may call; used by templates that know of tools (`knows_tools`).

        Raises:
            UsageError: a model without a template, or messages that it refuses.
        """
        if self._template is None:
            raise UsageError(
                "the model has no chat template", "give a prompt to continue instead of messages"
            )
        return self._template.render(messages, tools=tools)

    def request(
        self, prompt: str | Sequence[int], *, policy: str | PrecisionPolicy | None = None, **options: Any
    ) -> Request:
        """The request that `stream` would run, for `engine.stream`, and to cancel it."""
        sampling = options.pop("sampling", None) or SamplingParams()
        overrides = {name: options.pop(name) for name in [*options] if name in SAMPLING_FIELDS}
        unknown = [name for name in options if name not in REQUEST_FIELDS]
        if unknown:
            known = ", ".join(sorted(REQUEST_FIELDS | SAMPLING_FIELDS))
            raise UsageError(f"there is no option {unknown[0]!r}", f"the options are {known}")
        return Request(prompt, self.policy(policy), replace(sampling, **overrides), **options)

    def policy(self, policy: str | PrecisionPolicy | None = None) -> PrecisionPolicy:
        """The policy for this model; a name in `policies` stands for its text."""
        if policy is None:
            policy = "default" if "default" in self.policies else "progressive"
        if not isinstance(policy, str):
            return policy
        text = self.policies.get(policy, policy)
        fractions = self.engine.model.has_sensitivity
        return parse_policy(text, self.min_bits, self.max_bits, fractions, self.learned)

    @property
    def arrival(self) -> ArrivingDecoder | None:
        """The decoder of a file that was still arriving when it was loaded, else None."""
        model = self.engine.model
        return model if isinstance(model, ArrivingDecoder) else None

    def close(self) -> None:
        """End the helper process of the chat template, if one runs, and read no more of an arriving file."""
        if self._template is not None:
            self._template.close()
        if self.arrival is not None:
            self.arrival.close()

    def _template_variables(self) -> dict[str, str]:
        """The special tokens that chat templates refer to."""
        tokenizer, config = self.tokenizer, self.config
        if tokenizer is None:
            return {}
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
        ids = {"bos_token": config.bos_token_id, "eos_token": eos}
        return {name: tokenizer.token(i) or "" for name, i in ids.items() if i is not None}


def load(
    source: str | Path | None = None,
    *,
    verify: bool = False,
    progressive: bool = False,
    memory_budget: int | Literal["auto"] | None = None,
    waiting: Progress = lambda there, needed: None,
    kv: str | None = None,
) -> LLM:
    """Load a model.

    Args:
        source: a `.taper` file, a Hugging Face folder (run in float32), or None for the model in the package.
        verify: read a `.taper` file once and compare every checksum first; with `progressive`, compare those
            of each plane before it is used.
        progressive: return as soon as the first planes are in memory, and let the width rise as later ones
            arrive from the disk or, where the file (or SOURCE.part) is still being written, from its writer.
            What is generated meanwhile depends on the disk; records say the bits.
        memory_budget: bytes for weights and KV caches together; `auto` watches the system's memory instead.
            Planes above what fits are not kept in memory; a request that wants them is refused or, with
            `allow_lower_bits`, gets fewer bits.
        waiting: called with the bytes that are there and those that the first planes need.
        kv: format of the KV cache: `float16`, or magnitude bits of planes such as `7`, `k7v5` or `7,4@128`
            (docs/kv.md); None takes the file's own, else float16.

    Raises:
        ModelNotFoundError: nothing there, or no model.
        CorruptFileError: a file that contradicts itself or, with `verify`, its checksums.
        UsageError: a model that Taper does not support.
        DoesNotFitError: the budget has no room for the weights at the least width.
    """
    path = embedded_model() if source is None else Path(source)
    if path.is_dir():
        if memory_budget is not None:
            raise UsageError(
                f"{path} is a folder: it has one width to run at", "a budget needs a .taper file"
            )
        if kv is not None:
            raise UsageError(f"{path} is a folder: its KV cache is float32", "kv needs a .taper file")
        checkpoint = HfCheckpoint.open(path)
        return LLM(Decoder.from_hf(checkpoint), checkpoint.tokenizer_json, checkpoint.chat_template)
    arrival = begun_arrival(path, verify, waiting) if progressive else None
    if arrival is not None and not arrival.is_whole:
        return _arriving(arrival, memory_budget, kv)
    file = TaperFile.open(path, verify=verify) if arrival is None else arrival.open()
    limits = Limits(budget=_budget(file, file, memory_budget))
    decoder = Decoder.from_taper(file, kv=kv)
    return _llm(decoder, file, file.notice(), limits)


def _arriving(arrival: Arrival, memory_budget: int | Literal["auto"] | None, kv: str | None) -> LLM:
    """A model that runs while its file comes in."""
    decoder, notice = ArrivingDecoder(arrival, kv), arrival.notice()
    file = decoder.file
    limits = Limits(lambda: decoder.available_bits, _budget(file, decoder, memory_budget))
    decoder.follow()
    return _llm(decoder, file, notice, limits)


def _llm(model: Model, file: TaperFile, notice: str | None, limits: Limits) -> LLM:
    """A file's model with what else its header holds."""
    return LLM(
        model,
        file.tokenizer_json,
        file.chat_template,
        file.policies,
        notice,
        limits=limits,
        learned=file.learned,
        card=file.card,
    )


def _budget(file: TaperFile, planes: Planes, total: int | Literal["auto"] | None) -> MemoryBudget | None:
    if total is None:
        return None
    widths = range(file.min_bits, file.total_bits + 1)
    gauge = PressureGauge(widths[0], widths[-1]) if total == "auto" else None
    total_bytes = None if total == "auto" else total
    return MemoryBudget({bits: file.memory_at(bits) for bits in widths}, planes, total_bytes, gauge)


def embedded_model() -> Path:
    """The `.taper` file in the package. Raises ModelNotFoundError where this build has none."""
    assets = Path(str(importlib.resources.files("taper") / "assets"))
    found = sorted(assets.glob("*.taper"))
    if not found:
        raise ModelNotFoundError("the package holds no model", "give a .taper file or a Hugging Face folder")
    return found[0]
