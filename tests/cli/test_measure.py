"""`taper bench`, `taper eval` and `taper quantize` in this process."""

from __future__ import annotations

import json

import pytest

from taper.formats.container import TaperFile
from taper.testing.tiny import tiny_config, tiny_hf_dir, tiny_taper


@pytest.fixture
def text(tmp_path):
    """About 3000 tokens of the tiny tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text("The sailor and the stone in the water of the old town. " * 90)
    return path


def test_bench_rows(taper, model):
    outcome = taper("bench", model, "--bits", "4,2", "--prompt", "8", "--generate", "3", "--repeat", "2")
    assert outcome.status == 0
    assert "pp8" in outcome.out
    report = json.loads(outcome.out.splitlines()[-1])
    rows = report["rows"]
    assert [(row["test"], row["bits"]) for row in rows] == [("pp8", 4), ("tg3", 4), ("pp8", 2), ("tg3", 2)]
    for row in rows:
        assert len(row["seconds"]) == 2
        median = sum(row["seconds"]) / 2
        assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / median)
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_token"] * row["tokens_per_s"] / 1e9)
    # Keys and values of 1, 2 and 3 tokens: 2 layers, 2 heads of 16, float16.
    kv = 2 * 2 * 2 * 16 * 2 * (1 + 2 + 3) / 3
    from taper.models import Decoder

    weights = Decoder.from_taper(TaperFile.open(model)).bytes_per_pass(4)
    assert rows[1]["bytes_per_token"] == pytest.approx(weights + kv)


def test_bench_after_a_context(taper, model):
    options = (
        "--bits",
        "4",
        "--prompt",
        "8",
        "--generate",
        "2",
        "--depth",
        "0,100",
        "--repeat",
        "1",
        "--json",
    )
    rows = {row["test"]: row for row in json.loads(taper("bench", model, *options).out)["rows"]}
    assert list(rows) == ["pp8", "tg2", "pp8 @ d100", "tg2 @ d100"]
    # Keys and values of 100 more tokens for each: 2 layers, 2 heads of 16, float16.
    more = rows["tg2 @ d100"]["bytes_per_token"] - rows["tg2"]["bytes_per_token"]
    assert more == 100 * 2 * 2 * 2 * 16 * 2


def test_bench_of_a_verification_reads_the_weights_once(taper, model):
    options = (
        "--bits",
        "4",
        "--prompt",
        "0",
        "--generate",
        "0",
        "--verify",
        "1,5",
        "--repeat",
        "1",
        "--json",
    )
    one, five = json.loads(taper("bench", model, *options).out)["rows"]
    assert (one["test"], five["test"]) == ("vf1", "vf5")
    assert five["num_tokens"] == 5 * one["num_tokens"]
    assert five["bytes_per_token"] < one["bytes_per_token"] / 4


def test_bench_says_where_the_time_goes(taper, model):
    options = ("--bits", "4", "--prompt", "0", "--generate", "8", "--repeat", "1", "--stages", "--json")
    (row,) = json.loads(taper("bench", model, *options).out)["rows"]
    assert {"qkv", "attention", "down", "head", "rest"} <= set(row["stages"])
    assert sum(row["stages"].values()) == pytest.approx(1)
    (plain,) = json.loads(taper("bench", model, *(word for word in options if word != "--stages")).out)[
        "rows"
    ]
    assert plain["stages"] == {}


def test_bench_decodes_several_sequences_together(taper, model):
    options = ("--bits", "4", "--prompt", "0", "--generate", "4", "--batch", "1,3", "--repeat", "1", "--json")
    one, three = json.loads(taper("bench", model, *options).out)["rows"]
    assert (one["test"], three["test"]) == ("tg4", "tg4 x3")
    assert three["num_tokens"] == 3 * one["num_tokens"]
    assert three["bytes_per_token"] < one["bytes_per_token"] / 2


def test_bench_goes_back_behind_a_window(taper, model):
    """Each repetition begins at the depth again, further back than the window."""
    outcome = taper("bench", model, "--bits", "4", "--prompt", "0", "--generate", "150", "--depth", "70",
                    "--repeat", "2", "--kv", "7,4@64", "--json")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["rows"][0]["num_tokens"] == 150


def test_bench_under_a_policy(taper, model):
    policy = "progressive:4@0,3@2,2@3"
    options = ("--policy", policy, "--prompt", "0", "--generate", "4", "--repeat", "1", "--json")
    (row,) = json.loads(taper("bench", model, *options).out)["rows"]
    # Tokens 1 to 4: the pass for token 1 runs at 4 bits, for 2 at 3, for 3 and 4 at 2.
    assert (row["policy"], row["bits"]) == (policy, 11 / 4)


def test_bench_json_prints_one_line(taper, model):
    outcome = taper(
        "bench", model, "--bits", "2", "--prompt", "0", "--generate", "2", "--repeat", "1", "--json"
    )
    assert outcome.out.count("\n") == 1
    assert [row["test"] for row in json.loads(outcome.out)["rows"]] == ["tg2"]


def test_bench_refuses_what_it_cannot_measure(taper, model):
    assert taper("bench", model, "--prompt", "0", "--generate", "0").status == 2
    assert taper("bench", model, "--bits", "9").status == 2
    assert taper("bench", model, "--bits", "4;3").status == 2
    assert taper("bench", model, "--prompt", "257").status == 4
    assert taper("bench", model, "--threads", "0").status == 2
    assert taper("bench", model, "--depth", "256", "--prompt", "0", "--generate", "1").status == 4
    assert taper("bench", model, "--depth", "1,x").status == 2
    assert taper("bench", model, "--batch", "0").status == 2
    assert taper("bench", model, "--bits", "4", "--policy", "fixed:4").status == 2
    for policy in ("exact:8/4", "learned"):
        outcome = taper("bench", model, "--policy", policy)
        assert outcome.status == 2
        assert "hangs on the answer" in outcome.err


def test_eval_labels_both_protocols(taper, model, text):
    outcome = taper("eval", model, "--text", text, "--bits", "2,8", "--protocol", "both", "--max-blocks", "2")
    assert outcome.status == 0
    assert "llama.cpp, 256-token blocks" in outcome.out
    assert "blocks, 256-token blocks, last 255 tokens scored: 2 blocks, 510 tokens scored" in outcome.out


def test_quantize_then_eval_against_the_checkpoint(taper, tmp_path, text):
    folder = tiny_hf_dir(tmp_path / "hf", num_layers=1)
    out = tmp_path / "out.taper"
    outcome = taper(
        "quantize", folder, "-o", out, "--bits", "2-4", "--calibration", text, "--calibration-tokens", "512"
    )
    assert outcome.status == 0, outcome.err
    assert "2 to 4 bits" in outcome.out
    file = TaperFile.open(out, verify=True)
    assert (file.config, file.min_bits, file.max_bits) == (tiny_config(num_layers=1), 2, 4)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    outcome = taper(
        "eval", out, "--text", text, "--bits", "4", "--against", folder, "--max-blocks", "1", "--json"
    )
    report = json.loads(outcome.out)["reports"][0]
    assert [result["bits"] for result in report["results"]] == [32, 4]
    assert report["results"][1]["mean_kl"] > 0


def test_errors_of_quantize_and_eval(taper, tmp_path, model, text):
    assert taper("quantize", tmp_path / "none", "-o", tmp_path / "x.taper", "--calibration", text).status == 3
    folder = tiny_hf_dir(tmp_path / "hf")
    options = ("--calibration", text)
    assert taper("quantize", folder, "-o", tmp_path / "no" / "x.taper", *options).status == 2
    assert taper("quantize", folder, "-o", tmp_path / "x.taper", "--bits", "8-2", *options).status == 2
    assert taper("eval", model, "--text", tmp_path / "none.txt").status == 2
    assert taper("eval", model, "--text", text, "--bits", "9").status == 2
    assert taper("eval", tmp_path / "none.taper", "--text", text).status == 3


def test_bench_serve_compares_policies_and_replays_a_trace(taper, tmp_path):
    trace, model = tmp_path / "trace.json", tiny_taper(tmp_path / "t.taper", max_position_embeddings=1024)
    options = ("--serve", "--policies", "planner,fcfs:4", "--seconds", "0.1", "--loads", "1", "--json")
    both = taper("bench", model, *options, "--on", "both", "--save-trace", trace)
    found = json.loads(both.out.splitlines()[-1])
    assert [(row["where"], row["policy"]) for row in found["rows"]] == [
        ("engine", "planner"), ("engine", "fcfs:4"), ("simulator", "planner"), ("simulator", "fcfs:4"),
    ]  # fmt: skip
    assert len({row["admitted"] + row["refused"] for row in found["rows"]}) == 1
    assert found["verdict"]["engine"]["1"]["best_other"] == "fcfs:4"
    again = json.loads(taper("bench", model, *options, "--trace", trace).out.splitlines()[-1])
    assert len(again["rows"]) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--loads", "2"), "give --serve"),
        (("--serve", "--bits", "4"), "--serve reads"),
        (("--serve", "--policies", "best"), "no policy 'best'"),
        (("--serve", "--policies", "edf"), "requests of up to 656 tokens"),
        (("--serve", "--trace", "none.json"), "there is no trace"),
    ],
)
def test_bench_serve_refuses(taper, model, options, says):
    outcome = taper("bench", model, *options)
    assert outcome.status == 2
    assert says in outcome.err
