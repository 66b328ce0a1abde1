"""A conversation at the terminal, with the model's chat template or, without one, as one growing text."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from taper.cli.answer import closing_line, show
from taper.cli.run import RunOptions, complete
from taper.errors import TaperError

if TYPE_CHECKING:
    from taper.engine import LLM, Completion, TokenStream


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
            line = input("> ")
        except EOFError:
            click.echo(err=True)
            return
        if not line:
            continue
        try:
            click.echo(closing_line(conversation.answer(line)), err=True)
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

    def _complete(self, prompt: str, is_chat: bool) -> Completion:
        """Ctrl-C ends the answer only: `show` returns early, and what there is so far counts."""

        def use(stream: TokenStream) -> None:
            try:
                show(stream, self._options.show_bits)
            except KeyboardInterrupt:
                stream.close()

        return complete(self._llm, self._options, prompt, use, is_chat)
