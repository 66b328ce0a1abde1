"""What an audit found, for people: one line, and the answer once more in the colours of its damage."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from taper.cli.terminal import file_size, in_colour, is_coloured, printable

if TYPE_CHECKING:
    from taper.engine import Audit, Completion
    from taper.tokenizer import Tokenizer

# KL in nats from which a token is of the next level. By Pinsker's inequality the probabilities of any set of
# tokens have moved by at most sqrt(KL / 2): 7 % below 0.01, 22 % below 0.1, 50 % below 0.5.
_LIMITS = (0.01, 0.1, 0.5)
_NAMES = ("<0.01", "0.01+", "0.1+", "0.5+")
_COLOURS = (34, 142, 172, 160)  # of 256, from green to red

# Changed decisions that the line spells out.
_MAX_NAMED = 3


def audit_line(completion: Completion, audit: Audit, tokenizer: Tokenizer | None) -> str:
    """The audit's figures and its cost in one line; tokens are counted from 0."""

    def named(index: int) -> str:
        token_id = completion.token_ids[index]
        text = "" if tokenizer is None else tokenizer.decode([token_id], special_tokens=True)
        return f"token {index} {printable(text)!r}" if text else f"token {index}"

    bound, decisions = audit.mean_kl_bound, audit.decisions
    sure = f"{len(decisions.changed)} of {decisions.num_sure} sure tokens changed"
    if decisions.changed:
        more = ", ..." if len(decisions.changed) > _MAX_NAMED else ""
        sure += f" ({', '.join(map(named, decisions.changed[:_MAX_NAMED]))}{more})"
    mean = f"mean KL {_nats(audit.mean_kl)}"
    parts = [
        mean if bound is None else f"{mean} (95 % bound {_nats(bound)})",
        f"worst {_nats(audit.worst_kl)} at {named(audit.worst_index)}",
        f"top-1 {audit.top1_share:.1%}",
        sure,
        f"{audit.seconds:.2f} s and {file_size(audit.num_bytes)} read for it",
    ]
    return f"audit against {audit.bits:g} bits: " + " · ".join(parts)


def damage_text(completion: Completion, audit: Audit, tokenizer: Tokenizer, has_colour: bool) -> str:
    """The answer with each token in its level's colour, or a mark such as [0.1+] before each change of level,
    and a legend.
    """
    counts = Counter(_level(kl) for kl in audit.kl)
    text, last = "", None
    for piece, kl in _pieces(completion, audit, tokenizer):
        level = _level(kl)
        shown = printable(piece)
        if has_colour:
            text += in_colour(shown, _COLOURS[level])
        else:
            text += shown if level == last else f"[{_NAMES[level]}]{shown}"
        last = level
    entries = [(level, f"{_NAMES[level]} nats: {counts[level]}") for level in sorted(counts)]
    legend = (in_colour(f"■ {entry}", _COLOURS[level]) if has_colour else entry for level, entry in entries)
    return f"{text}\ntokens by KL: {'  '.join(legend)}"


def report_audit(completion: Completion, tokenizer: Tokenizer | None, show_damage: bool) -> None:
    """Say on stderr what an audit found; nothing where there was none."""
    audit = completion.audit
    if audit is None:
        return
    if show_damage and tokenizer is not None:
        click.echo(damage_text(completion, audit, tokenizer, is_coloured(sys.stderr)), err=True)
    click.echo(audit_line(completion, audit, tokenizer), err=True)


def _pieces(completion: Completion, audit: Audit, tokenizer: Tokenizer) -> Iterator[tuple[str, float]]:
    """Text and damage; a character of several tokens has the largest of theirs."""
    from taper.tokenizer import IncrementalDetokenizer

    detokenizer = IncrementalDetokenizer(tokenizer, completion.prompt_ids)
    worst = 0.0
    for token_id, kl in zip(completion.token_ids, audit.kl, strict=True):
        worst = max(worst, kl)
        if piece := detokenizer.append(token_id):
            yield piece, worst
            worst = 0.0
    if rest := detokenizer.flush():
        yield rest, worst


def _level(kl: float) -> int:
    return bisect_right(_LIMITS, kl)


def _nats(kl: float) -> str:
    """Three digits that matter; 0 is exact."""
    return f"{kl:.3g} nats"
