"""`taper run`: what is model and what is prompt, limits, marks of the bits, json, chat."""

from __future__ import annotations

import builtins
import json
import os
import re
import sys
from pathlib import Path

import pytest

from taper.cli.run import split_arguments
from taper.errors import ModelNotFoundError
from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_hf_dir, tiny_taper

GREEDY = ("--temperature", "0", "--max-tokens", "8")


def run_json(taper, *arguments, **options):
    outcome = taper("run", *arguments, "--json", **options)
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def test_text_goes_to_stdout_and_figures_to_stderr(taper, model):
    record = run_json(taper, model, "the in", *GREEDY)
    outcome = taper("run", model, "the in", *GREEDY)
    assert outcome.status == 0
    assert outcome.out == record["text"] + "\n"
    for figure in ("prompt 3 tokens at", "generated 8 tokens at", "bits on average", "read per token", "MiB"):
        assert figure in outcome.err


def test_json_has_the_bits_of_every_token(taper, model):
    record = run_json(taper, model, "the in", "--policy", "progressive:8@0,4@2,3@5", *GREEDY)
    assert [token["bits"] for token in record["tokens"]] == [8, 8, 4, 4, 4, 3, 3, 3]
    assert record["policy"] == "progressive:8@0,4@2,3@5"
    assert record["finish_reason"] == "length"
    assert record["usage"]["num_prompt_tokens"] == len(record["prompt_ids"]) == 3
    assert record["usage"]["average_bits"] == pytest.approx((8 + 3 * 4 + 3 * 3) / 7)


def test_bits_is_short_for_fixed(taper, model):
    record = run_json(taper, model, "a", "--bits", "3", *GREEDY)
    assert record["policy"] == "fixed:3"
    outcome = taper("run", model, "a", "--bits", "3", "--policy", "fixed:4")
    assert outcome.status == 2
    outcome = taper("run", model, "a", "--bits", "9")
    assert outcome.status == 2
    assert "2 to 8 bits" in outcome.err


def test_exact_says_what_became_of_the_drafts(taper, model):
    record = run_json(taper, model, "the in", "--bits", "8", *GREEDY)
    outcome = taper("run", model, "the in", "--policy", "exact", "--temperature", "0", "--max-tokens", "40")
    assert outcome.out.startswith(record["text"])
    assert re.search(r"[0-9]+% of drafts accepted, [1-9]\.[0-9]{2} tokens a pass", outcome.err)
    assert "drafts" not in taper("run", model, "the in", "--bits", "8", *GREEDY).err


def test_seed_gives_the_same_text(taper, model):
    options = (model, "a", "--seed", "5", "--temperature", "1.5", "--max-tokens", "12")
    first = run_json(taper, *options)
    assert first["seed"] == 5
    assert run_json(taper, *options)["text"] == first["text"]
    assert run_json(taper, *options[:3], "6", *options[4:])["text"] != first["text"]


def test_marks_at_each_change_where_colours_do_not_belong(taper, model):
    plain = taper("run", model, "a", *GREEDY, "--policy", "progressive:8@0,3@4").out
    outcome = taper("run", model, "a", *GREEDY, "--policy", "progressive:8@0,3@4", "--show-bits")
    assert outcome.out.startswith("[8]")
    assert outcome.out.count("[3]") == 1
    assert outcome.out.replace("[8]", "").replace("[3]", "") == plain
    assert "[8] 8 bits: 4 tokens  [3] 3 bits: 4 tokens" in outcome.err


def test_prompt_from_standard_input(taper, model):
    piped = run_json(taper, model, *GREEDY, stdin=b"the in\n")
    assert piped["prompt_ids"] == run_json(taper, model, "the in", *GREEDY)["prompt_ids"]
    outcome = taper("run", model, stdin=b"\xff")
    assert outcome.status == 2
    assert "not UTF-8 at byte 0" in outcome.err


def test_empty_prompt_is_refused(taper, model):
    for stdin, arguments in ((b"", (model,)), (b"\n", (model,)), (b"", (model, ""))):
        outcome = taper("run", *arguments, stdin=stdin)
        assert outcome.status == 2
        assert outcome.err.startswith("error: the prompt is empty")


def test_limits_are_refused_not_shortened(taper, model):
    assert taper("run", model, "a", "--max-tokens", "256").status == 4
    outcome = taper("run", model, "a" * 300)
    assert outcome.status == 4
    assert "300 prompt and 1 new tokens exceed the context of 256" in outcome.err
    outcome = taper("run", model, "a b c", "--ctx-size", "10", "--max-tokens", "8")
    assert outcome.status == 4
    assert "ask for at most 7 new tokens" in outcome.err
    assert taper("run", model, "a", "--ctx-size", "257").status == 4
    assert taper("run", model, "a", "--max-tokens", "0").status == 2
    assert taper("run", model, "a", "--top-p", "0").status == 2
    record = run_json(taper, model, "a b c", "--ctx-size", "10", "--temperature", "0")
    assert record["usage"]["num_completion_tokens"] == 7


def test_stop_text_ends_the_answer(taper, model):
    text = run_json(taper, model, "the in", *GREEDY)["text"]
    stop = text[2:4]
    record = run_json(taper, model, "the in", *GREEDY, "--stop", stop)
    assert (record["finish_reason"], record["stop_reason"]) == ("stop", stop)
    assert record["text"] == text[: text.index(stop)]


@pytest.fixture
def growing_model(cut_model) -> Path:
    """The cut file as if its last bytes had just come: after ten seconds it counts as cut for ever."""
    cut_model.touch()
    return cut_model


def test_cut_off_file_runs_with_a_notice(taper, growing_model):
    outcome = taper("run", growing_model, "a", *GREEDY)
    assert outcome.status == 0
    assert "4 of 8 planes; more are used as they arrive" in outcome.err
    assert "at most 4 bits" in outcome.err
    outcome = taper("run", growing_model, "a", *GREEDY, "--no-progressive-load")
    assert outcome.status == 0
    assert "note: file is cut off" in outcome.err
    assert taper("run", growing_model, "a", "--bits", "5").status == 2


def test_a_file_cut_off_long_ago_is_called_so(taper, cut_model, tmp_path):
    old = tmp_path / "old.taper"
    old.write_bytes(cut_model.read_bytes())
    os.utime(old, (0, 0))
    outcome = taper("run", old, "a", *GREEDY)
    assert outcome.status == 0
    assert "note: file is cut off" in outcome.err


def test_a_partial_file_is_found_by_the_name_that_it_will_have(taper, cut_model, tmp_path):
    (tmp_path / "new.taper.part").write_bytes(cut_model.read_bytes())
    assert taper("run", tmp_path / "new.taper", "a", *GREEDY).status == 0
    outcome = taper("run", tmp_path / "new.taper", "a", *GREEDY, "--no-progressive-load")
    assert outcome.status == 3


@pytest.mark.parametrize("named", ["--bits 3", "--policy progressive", "--seed 1", "--json", "--audit"])
def test_what_is_named_does_not_depend_on_the_disk(taper, growing_model, named):
    outcome = taper("run", growing_model, "a", *GREEDY, *named.split())
    assert outcome.status == 0
    assert "note: file is cut off" in outcome.err
    outcome = taper("run", growing_model, "a", *GREEDY, *named.split(), "--progressive-load")
    assert "more are used as they arrive" in outcome.err


def test_memory_budget_lowers_the_bits_and_says_so(taper, model):
    file = TaperFile.open(model)
    budget = file.memory_at(5) + 10_000
    record = run_json(taper, model, "the in", *GREEDY, "--policy", "phase:8/3", "--memory-budget", budget)
    assert [token["bits"] for token in record["tokens"]] == [5] + [3] * 7
    assert record["ceilings"] == [{"token": 0, "bits": 5}]
    outcome = taper("run", model, "the in", *GREEDY, "--memory-budget", "10kB")
    assert outcome.status == 4
    assert "the memory budget is 0.0 MB" in outcome.err
    assert taper("run", model, "the in", *GREEDY, "--memory-budget", "auto").status == 0
    assert taper("run", model, "the in", *GREEDY, "--memory-budget", "much").status == 2


def test_hugging_face_folder_runs(taper, tmp_path):
    folder = tiny_hf_dir(tmp_path / "hf")
    record = run_json(taper, folder, "the in", *GREEDY)
    assert {token["bits"] for token in record["tokens"]} == {32}


def test_model_without_a_tokenizer_cannot_read_text(taper, tmp_path):
    from taper.testing.random_model import SHAPES, write_random_model

    write_random_model(tmp_path / "mute.taper", SHAPES["tiny"])
    outcome = taper("run", tmp_path / "mute.taper", "a")
    assert outcome.status == 2
    assert "no tokenizer" in outcome.err


def test_single_argument_is_a_model_or_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.taper").touch()
    assert split_arguments(()) == (None, None)
    assert split_arguments(("m", "p")) == ("m", "p")
    assert split_arguments(("model.taper",)) == ("model.taper", None)
    assert split_arguments((str(tmp_path),)) == (str(tmp_path), None)
    for prompt in (
        "Once upon a time",
        "Hello",
        "either/or is a question",
        "x" * 5000,
        "nul\0byte",
        "ends with .taper ",
    ):
        assert split_arguments((prompt,)) == (None, prompt)
    for path in ("missing.taper", "dir/model", "./model", "C:\\model", "model.GGUF"):
        with pytest.raises(ModelNotFoundError, match="no such file"):
            split_arguments((path,))


def test_three_arguments_are_too_many(taper, model):
    outcome = taper("run", model, "Once", "upon")
    assert outcome.status == 2
    assert "put the prompt in quotes" in outcome.err


@pytest.fixture
def at_terminal(monkeypatch):
    """Lines that a person types, ended by Ctrl-D."""

    def type_lines(*lines):
        left = list(lines)

        def read(_prompt):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr("taper.cli.run._piped_prompt", lambda: None)

    return type_lines


def test_chat_renders_the_turns_so_far(taper, tmp_path, at_terminal, monkeypatch):
    model = tiny_taper(tmp_path / "chat.taper", chat=True)
    rendered = []
    from taper.engine import LLM

    original = LLM.render_chat
    monkeypatch.setattr(LLM, "render_chat", lambda self, m: rendered.append(list(m)) or original(self, m))
    at_terminal("the in", "", "and to")
    outcome = taper("run", model, *GREEDY)
    assert outcome.status == 0
    assert outcome.err.count("generated") == 2
    # Between the turns what has been said is rendered too, to be read ahead.
    ahead = [messages for messages in rendered if messages[-1]["role"] == "assistant"]
    rendered = [messages for messages in rendered if messages[-1]["role"] == "user"]
    assert ahead[0] == rendered[1][:2]
    first_answer = rendered[1][1]
    assert rendered[0] == [{"role": "user", "content": "the in"}]
    assert rendered[1] == [rendered[0][0], first_answer, {"role": "user", "content": "and to"}]
    assert first_answer["role"] == "assistant"
    assert first_answer["content"] in outcome.out


def test_chat_without_a_template_extends_one_text_and_takes_failed_turns_back(taper, model, at_terminal):
    at_terminal("the in", "x" * 400, "on")
    outcome = taper("run", model, *GREEDY)
    assert outcome.status == 0
    assert "no chat template" in outcome.err
    assert "exceed the context of 256" in outcome.err
    assert outcome.err.count("generated 8 tokens") == 2


def test_interrupt_at_the_chat_prompt_ends_with_130(taper, model, monkeypatch):
    def interrupted(_prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", interrupted)
    monkeypatch.setattr("taper.cli.run._piped_prompt", lambda: None)
    assert taper("run", model).status == 130


def test_json_at_a_terminal_needs_a_prompt(taper, model, at_terminal):
    at_terminal()
    assert taper("run", model, "--json").status == 2


def test_colours_on_a_terminal_and_none_with_no_color(taper, model, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    outcome = taper("run", model, "a", *GREEDY, "--bits", "4", "--show-bits")
    assert "\x1b[38;5;34m" in outcome.out
    assert outcome.out.startswith("\x1b[2ma\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    outcome = taper("run", model, "a", *GREEDY, "--bits", "4", "--show-bits")
    assert "\x1b" not in outcome.out + outcome.err
    assert outcome.out.startswith("[4]")
