"""A conversation at the terminal, with the model's chat template or, without one, as one growing text."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from taper.cli.answer import closing_line, show
from taper.cli.damage import report_audit
from taper.cli.run import RunOptions, complete
from taper.errors import TaperError

if TYPE_CHECKING:
    from taper.engine import LLM, Completion, Request, TokenStream

# How often to look whether more planes have arrived while the user thinks.
READ_AHEAD_POLL_S = 0.2


def chat(llm: LLM, options: RunOptions) -> None:
    """Answer lines until end of input. Ctrl-C ends an answer; at the prompt it ends the program.

    A turn that fails, such as one that no longer fits the context, is reported and taken back.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    kind = "chat" if llm.has_chat_template else "text continuation (the model has no chat template)"
    click.echo(f"{kind}; Ctrl-C stops an answer, Ctrl-D ends", err=True)
    conversation = Conversation(llm, options)
    while True:
        try:
            with conversation.reading_ahead():
                line = input("> ")
        except EOFError:
            click.echo(err=True)
            return
        if not line:
            continue
        try:
            completion = conversation.answer(line)
            click.echo(closing_line(completion), err=True)
            report_audit(completion, llm.tokenizer, options.show_bits)
        except TaperError as error:
            click.echo(f"error: {error}\nhint: {error.hint or 'ask something else'}", err=True)


class Conversation:
    """The turns so far. Without a template they are one text that each line and answer extends."""

    def __init__(self, llm: LLM, options: RunOptions) -> None:
        self._llm = llm
        self._options = options
        self._messages: list[dict[str, str]] = []
        self._text = ""

    def answer(self, line: str) -> Completion:
        """Show and keep the answer to a line; an error leaves the conversation as it was."""
        if not self._llm.has_chat_template:
            completion = self._complete(self._text + line, is_chat=False)
            self._text += f"{line}{completion.text}\n"
            return completion
        messages = [*self._messages, {"role": "user", "content": line}]
        completion = self._complete(self._llm.render_chat(messages), is_chat=True)
        self._messages = [*messages, {"role": "assistant", "content": completion.text}]
        return completion

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """While the block waits for a line, read the conversation so far at the prompt's bits.

        The next turn would do it anyway. What an earlier turn wrote into its KV cache at fewer bits, in its
        answer or because planes were missing, is so replaced; when more planes arrive meanwhile, again.
        """
        request = self._expected()
        if request is None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(
            target=self._read_ahead, args=(request, stop), name="taper-read-ahead", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            request.cancel()
            thread.join()

    def _read_ahead(self, request: Request, stop: threading.Event) -> None:
        # What is wrong with a conversation, such as its length, is said when its turn comes.
        with contextlib.suppress(TaperError):
            while not (stop.is_set() or self._llm.engine.prepare(request)):
                stop.wait(READ_AHEAD_POLL_S)

    def _expected(self) -> Request | None:
        """What the next prompt will begin with; None before the first turn, and for a template that wants
        the user's turn first."""
        has_template = self._llm.has_chat_template
        try:
            text = self._llm.render_chat(self._messages) if has_template and self._messages else self._text
        except TaperError:
            return None
        if not text or self._llm.tokenizer is None:
            return None
        return self._llm.request(
            text,
            policy=self._options.policy,
            max_tokens=1,
            special_tokens=not has_template,
            allow_lower_bits=self._options.allow_lower_bits,
        )

    def _complete(self, prompt: str, is_chat: bool) -> Completion:
        """Ctrl-C ends the answer only: `show` returns early, and what there is so far counts."""

        def use(stream: TokenStream) -> None:
            try:
                show(stream, self._options.show_bits)
            except KeyboardInterrupt:
                stream.close()

        return complete(self._llm, self._options, prompt, use, is_chat)
