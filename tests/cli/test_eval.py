"""`taper eval` with everything at once: text, JSON, card, and what it refuses before measuring."""

from __future__ import annotations

import json

import pytest

from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_hf_dir, tiny_taper


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf_dir(tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The sailor and the stone in the water of the old town. " * 60)
    return path


def test_everything_in_one_record(taper, model, folder, text, tmp_path):
    task = tmp_path / "mine.jsonl"
    task.write_text('{"context": "the sea", "choices": [" of rain", " in"], "answer": 0}\n' * 3)
    out, other = tmp_path / "out.json", tiny_taper(tmp_path / "other.taper", 2, 4, seed=1)
    outcome = taper("eval", model, "--text", text, "--bits", "2,4", "--against", folder, "--max-blocks", "2",
                    "--protocol", "both", "--tasks", task, "--generation", "2", "--also", other,
                    "--json", out)  # fmt: skip
    assert outcome.status == 0, outcome.err
    record = json.loads(out.read_text())
    assert record["date"].endswith("+00:00")
    assert (record["seed"], record["text"]) == (0, str(text))
    labels = [(report["file"], report["label"].split(",")[0]) for report in record["reports"]]
    assert labels == [(str(f), p) for f in (model, other) for p in ("llama.cpp", "blocks")]
    two = record["reports"][0]["results"][1]
    assert (two["bits"], record["reports"][0]["num_scored"]) == (2, 254)
    for name in ("mean_kl", "median_kl", "p999_kl", "top1", "increase"):
        assert two[f"{name}_standard_error"] is not None
    assert [(one["name"], [point["bits"] for point in one["points"]]) for one in record["sizes"]] == [
        ("tiny", [2, 4]),
        ("other", [2, 4]),
    ]
    assert [task["name"] for task in record["tasks"]] == ["mine"]
    assert [result["bits"] for result in record["generation"]["results"]] == [2, 4]
    for words in ("KL mean", "ROUGE-L F1", "mine: 3 items", "tiny.taper: llama.cpp"):
        assert words in outcome.out


def test_widths_of_the_file_do_not_apply_to_a_folder(taper, folder, text):
    outcome = taper("eval", folder, "--text", text, "--bits", "4")
    assert outcome.status == 2
    assert "4 bits are outside the model's 32..32" in outcome.err


def test_write_card_then_inspect(taper, folder, text, tmp_path):
    path = tiny_taper(tmp_path / "t.taper", 2, 3)
    before = TaperFile.open(path)
    outcome = taper("eval", path, "--text", text, "--against", folder, "--max-blocks", "2", "--write-card")
    assert outcome.status == 0, outcome.err
    file = TaperFile.open(path, verify=True)
    assert [width["bits"] for width in file.card["widths"]] == [2, 3]
    assert len(file.card["date"]) == len("2026-01-01")
    # Its own length counts: the sizes are those of the file as it is now.
    assert [width["total_bytes"] for width in file.card["widths"]] == [file.bytes_at(2), file.file_bytes]
    assert file.file_bytes > before.file_bytes
    # Once more over its own result: the header changes in place of growing.
    taper("eval", path, "--text", text, "--against", folder, "--max-blocks", "2", "--write-card")
    assert TaperFile.open(path, verify=True).card == file.card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure"),
        (("--text", "T", "--plot", "p.png"), "--plot needs --text and --against"),
        (("--tasks", "x.jsonl", "--generation", "2"), "--generation needs"),
        (("--text", "T", "--against", "H", "--write-card", "--protocol", "both"), "takes one protocol"),
        (("--text", "T", "--against", "H", "--plot", "none/p.png"), "folder none does not exist"),
        (("--tasks", "none.jsonl"), "none.jsonl is not a file"),
    ],
)
def test_refusals(taper, model, options, message):
    outcome = taper("eval", model, *options)
    assert outcome.status == 2
    assert message in outcome.err


def test_kv_holds_for_text_tasks_and_generation(taper, model, folder, text, tmp_path, monkeypatch):
    task = tmp_path / "mine.jsonl"
    task.write_text('{"context": "the sea and the stone", "choices": [" of rain", " in"], "answer": 0}\n' * 3)
    opened, real = [], Decoder.from_taper

    def spy(file, *arguments, **options):
        opened.append(options.get("kv"))
        return real(file, *arguments, **options)

    monkeypatch.setattr(Decoder, "from_taper", spy)
    losses = set()
    for kv in ("float16", "2", "7,2@64"):
        measured = ["--tasks", task, "--generation", "2", "--max-blocks", "1", "--against", folder]
        outcome = taper("eval", model, "--text", text, "--bits", "8", *measured, "--kv", kv, "--json")
        assert outcome.status == 0, outcome.err
        losses.add(json.loads(outcome.out)["reports"][0]["results"][1]["mean_kl"])
    measured_with = [kv for kv in opened if kv is not None]  # sizes of weights are asked for without one
    assert measured_with == ["float16"] * 3 + ["2"] * 3 + ["7,2@64"] * 3
    assert len(losses) == 3


def test_kv_is_refused_where_it_cannot_hold(taper, folder, model, text):
    outcome = taper("eval", folder, "--text", text, "--kv", "7")
    assert outcome.status == 2
    assert "its KV cache is float32" in outcome.err
    outcome = taper("eval", model, "--text", text, "--against", folder, "--kv", "7", "--write-card")
    assert outcome.status == 2
    assert "--write-card stores figures of the file as it is read by itself" in outcome.err
