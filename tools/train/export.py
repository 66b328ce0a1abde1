"""Write a Hugging Face model directory from a checkpoint; measure it; print samples."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import LanguageModel, ModelConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

END = 0
PROMPTS = (
    "Once upon a time",
    "Lily and her dog went to the park.",
    "One day, a boy named Tom found a small box.",
    "The old man looked at the sea and said,",
    "It was a dark and windy night, and",
)
MEASURED = ("tinystories_test", "test", "test-fiction", "test-expository", "test-dialogue")


def fail(message: str) -> None:
    """Prints a one-line error and exits with status 1."""
    sys.exit(f"export: {message}")


def load(path: Path) -> tuple[LanguageModel, dict[str, object]]:
    """Returns the model and the rest of a checkpoint."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:
        fail(f"cannot read {path.name}: {error}")
    model = LanguageModel(ModelConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model.eval(), state


def write_directory(model: LanguageModel, work: Path, out: Path) -> None:
    """Writes the model directory beside `out`, then moves it into place."""
    temporary, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: weight.detach().float().contiguous() for name, weight in model.state_dict().items()}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "model.safetensors").chmod(0o644)
    write_json(temporary / "config.json", model.config.hugging_face())
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    write_json(temporary / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.7})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, temporary / name)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: dict[str, object]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def loss(model: LanguageModel, tokens: Tensor, length: int) -> float:
    """Returns the mean loss (nats per token) over whole rows of `length` tokens."""
    rows = (tokens.numel() - 1) // length
    inputs = tokens[: rows * length].view(rows, length)
    targets = tokens[1 : rows * length + 1].view(rows, length)
    at_once = max(1, 2048 // length)
    total = 0.0
    for part, goal in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        logits = model.logits(part)
        total += float(F.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="sum"))
    return total / targets.numel()


def measure(model: LanguageModel, work: Path, length: int, limit: int) -> dict[str, dict[str, float]]:
    """Returns perplexity and bits per byte of the held-out sets, in rows of `length` tokens."""
    facts = json.loads((work / "data-facts.json").read_text())["heldout"]
    results = {}
    for name in MEASURED:
        tokens = torch.from_numpy(np.load(work / f"heldout-{name}.npy", allow_pickle=False).astype(np.int64))
        nats = loss(model, tokens[: limit or None], length)
        bits = nats / math.log(2) * facts[name]["tokens"] / facts[name]["bytes"]
        perplexity = round(math.exp(nats), 3)
        results[name] = {"nats_per_token": nats, "perplexity": perplexity, "bits_per_byte": round(bits, 4)}
        print(f"{name}: perplexity {perplexity} per token, {bits:.4f} bits per byte", flush=True)
    return results


@torch.no_grad()
def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int, temperature: float) -> str:
    """Returns the prompt and up to `count` more tokens; temperature 0 is greedy."""
    ids = [END, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    for _ in range(count):
        hidden = model.model(torch.tensor([ids]))[0, -1]
        logits = model.model.embed_tokens.weight @ hidden
        if temperature == 0:
            best = int(logits.argmax())
        else:
            best = int(torch.multinomial((logits / temperature).softmax(-1), 1))
        if best == END:
            break
        ids.append(best)
    return tokenizer.decode(ids[1:])


def show_samples(model: LanguageModel, tokenizer: Tokenizer, count: int) -> None:
    """Prints samples of up to `count` tokens, greedy and at temperature 0.7."""
    torch.manual_seed(1)
    for temperature in (0.0, 0.7):
        for prompt in PROMPTS:
            text = generate(model, tokenizer, prompt, count, temperature)
            print(f"--- temperature {temperature}\n{text}\n", flush=True)


def main() -> None:
    """Exports, measures, samples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="directory with checkpoint.pt and the arrays"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write, replaced whole")
    parser.add_argument("--length", type=int, default=512, help="tokens of context for perplexity")
    parser.add_argument(
        "--limit", type=int, default=0, help="tokens of each held-out set to measure, 0 for all"
    )
    parser.add_argument("--sample-tokens", type=int, default=120)
    arguments = parser.parse_args()
    model, state = load(arguments.work / "checkpoint.pt")
    write_directory(model, arguments.work, arguments.out)
    print(
        f"step {state['step']}, {state['tokens'] / 1e6:.2f} M tokens: written to {arguments.out}", flush=True
    )
    record = {"step": state["step"], "tokens": state["tokens"], "context": arguments.length}
    record["heldout"] = measure(model, arguments.work, arguments.length, arguments.limit)
    write_json(arguments.work / f"{arguments.out.name}-measured.json", record)
    show_samples(model, Tokenizer.from_file(str(arguments.work / "tokenizer.json")), arguments.sample_tokens)


if __name__ == "__main__":
    main()
