"""`taper run --audit`: one line, JSON, and the answer in the colours of its damage."""

from __future__ import annotations

import json

import pytest

import taper as package
from taper.cli.damage import audit_line, damage_text
from taper.engine import Audit

GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def answered(model):
    """An answer and its tokenizer."""
    llm = package.load(model)
    yield llm.generate("the in", policy="fixed:2", max_tokens=8), llm.tokenizer
    llm.close()


def audit_with(kl, agreement=None, certainty=None) -> Audit:
    zeros = (0.0,) * len(kl)
    agrees = tuple(agreement or [True] * len(kl))
    return Audit(8, tuple(kl), agrees, zeros, zeros, tuple(certainty or zeros), 0.25, 2_500_000, len(kl))


def test_audit_is_one_line_on_stderr_and_leaves_the_answer_alone(taper, model):
    plain = taper("run", model, "the in", "--bits", "2", *GREEDY)
    audited = taper("run", model, "the in", "--bits", "2", *GREEDY, "--audit")
    assert (audited.status, audited.out) == (0, plain.out)
    assert "audit" not in plain.err
    (line,) = [line for line in audited.err.splitlines() if line.startswith("audit against 8 bits: ")]
    for part in ("mean KL ", "worst ", " at token ", "top-1 ", "sure tokens changed", "read for it"):
        assert part in line


def test_json_has_the_audit(taper, model):
    outcome = taper("run", model, "the in", "--policy", "phase:8/2", *GREEDY, "--audit", "--json")
    record = json.loads(outcome.out)
    audit = record["audit"]
    assert len(audit["kl"]) == len(record["tokens"]) == 8
    assert audit["kl"][0] == 0 < audit["mean_kl"] == pytest.approx(sum(audit["kl"]) / 8)
    assert audit["worst_kl"] == audit["kl"][audit["worst_index"]]
    assert audit["num_pass_tokens"] == 8
    assert json.loads(taper("run", model, "the in", *GREEDY, "--json").out)["audit"] is None


def test_damage_follows_the_answer_where_bits_are_shown(taper, model):
    plain = taper("run", model, "the in", "--bits", "2", *GREEDY)
    outcome = taper("run", model, "the in", "--bits", "2", *GREEDY, "--audit", "--show-bits")
    assert outcome.out == "[2]" + plain.out
    assert "tokens by KL: " in outcome.err
    assert "\x1b" not in outcome.err
    assert "tokens by KL: " not in taper("run", model, "the in", *GREEDY, "--audit").err


def test_audit_does_not_depend_on_the_speed_of_a_disk(taper, cut_model):
    outcome = taper("run", cut_model, "the in", *GREEDY, "--audit")
    assert "note: file is cut off" in outcome.err
    assert "audit against 4 bits: " in outcome.err
    outcome = taper("run", cut_model, "the in", *GREEDY, "--audit", "--progressive-load")
    assert "more are used as they arrive" in outcome.err
    assert "audit against 4 bits: " in outcome.err


def test_line_names_the_worst_token_and_changed_decisions(answered):
    completion, tokenizer = answered
    audit = audit_with(
        [0.5, 0.25, 0, 0, 1.5, 0, 0, 0],
        agreement=[False, False, True, True, False, True, True, True],
        certainty=[0.95, 0.5, 0.99, 0, 0.9, 0, 0, 0],
    )
    word = [tokenizer.decode([token_id]) for token_id in completion.token_ids]
    line = audit_line(completion, audit, tokenizer)
    assert line == (
        f"audit against 8 bits: mean KL 0.281 nats · worst 1.5 nats at token 4 {word[4]!r} · top-1 62.5% · "
        f"2 of 3 sure tokens changed (token 0 {word[0]!r}, token 4 {word[4]!r}) · "
        "0.25 s and 2.50 MB read for it"
    )
    assert "worst 1.5 nats at token 4 · " in audit_line(completion, audit, None)


def test_marks_stand_before_each_change_of_level(answered):
    completion, tokenizer = answered
    audit = audit_with([0, 0.009, 0.01, 0.2, 0.1, 0.5, 9, 0])
    text = damage_text(completion, audit, tokenizer, has_colour=False)
    shown, legend = text.rsplit("\n", 1)
    assert legend == "tokens by KL: <0.01 nats: 3  0.01+ nats: 1  0.1+ nats: 2  0.5+ nats: 2"
    for mark in ("[<0.01]", "[0.01+]", "[0.1+]", "[0.5+]"):
        assert shown.count(mark) == (2 if mark == "[<0.01]" else 1)
        shown = shown.replace(mark, "")
    assert shown == completion.text


def test_a_character_of_several_tokens_has_their_largest_damage(answered):
    completion, tokenizer = answered
    ids = tokenizer.encode("é!", special_tokens=False)
    assert len(ids) == 3
    split = type("Split", (), {"token_ids": ids, "prompt_ids": completion.prompt_ids})
    text = damage_text(split, audit_with([0.2, 0, 0]), tokenizer, has_colour=False)
    assert text.startswith("[0.1+]é[<0.01]!\n")


def test_each_level_has_its_colour(answered):
    completion, tokenizer = answered
    text = damage_text(completion, audit_with([0, 0.05, 0.2, 1, 0, 0, 0, 0]), tokenizer, has_colour=True)
    for colour in (34, 142, 172, 160):
        assert f"\x1b[38;5;{colour}m" in text
    assert "[<0.01]" not in text


def test_chat_is_audited(taper, model, monkeypatch):
    lines = iter(["the in"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def ask(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    from taper.cli import run as run_module

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(run_module, "_piped_prompt", lambda: None)
    outcome = taper("run", model, *GREEDY, "--audit")
    assert outcome.err.count("audit against 8 bits: ") == 1
