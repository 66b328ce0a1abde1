"""`taper inspect`: what a .taper file holds, and whether its bytes are right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from taper.cli.card import card_text
from taper.cli.options import json_option, model_path
from taper.cli.terminal import file_size, note, table
from taper.errors import CorruptFileError

if TYPE_CHECKING:
    from taper.formats.container import TaperFile


@click.command("inspect")
@click.argument("model", required=False)
@click.option("--verify", is_flag=True, help="Read all bytes and compare every checksum.")
@json_option
def command(model: str | None, verify: bool, as_json: bool) -> None:
    """Show the configuration, the widths with their true sizes, and the quality card of MODEL.

    MODEL is a .taper file; without it, the model in the package is shown. A width's bytes are those of the
    whole file that holds it: header, tokenizer, scales and planes. bpw is all of that in bits per weight.
    """
    from taper.formats.container import TaperFile

    file = TaperFile.open(model_path(model))
    damaged = file.verify() if verify else None
    description = describe(file, damaged)
    if as_json:
        click.echo(json.dumps(description))
    else:
        note(file.notice())
        click.echo(_text(description))
    if damaged:
        raise CorruptFileError(
            f"{file.path}: {len(damaged)} tensors do not match their checksums: {', '.join(damaged[:5])}",
            hint="copy or download the file again",
        )


def describe(file: TaperFile, damaged: list[str] | None) -> dict[str, Any]:
    """Everything that `taper inspect --json` prints; `damaged` is None where nothing was verified."""
    return {
        "file": str(file.path),
        "file_bytes": file.file_bytes,
        "total_bytes": file.total_bytes,
        "notice": file.notice(),
        "config": file.config.to_dict(),
        "num_weights": file.num_weights,
        "num_planes": file.max_bits,
        "num_planes_in_header": file.total_bits,
        "widths": [
            {"bits": bits, "bytes": file.bytes_at(bits), "bpw": 8 * file.bytes_at(bits) / file.num_weights}
            for bits in range(file.min_bits, file.max_bits + 1)
        ],
        "planes": file.header.planes,
        "sensitivity": None if file.sensitivity is None else file.sensitivity.to_dict(),
        "has_tokenizer": file.tokenizer_json is not None,
        "has_chat_template": file.chat_template is not None,
        "policies": file.policies,
        "learned": _learned(file),
        "activations": file.header.activations.to_dict(),
        "card": file.card,
        "provenance": file.provenance,
        "damaged": damaged,
    }


def _text(description: dict[str, Any]) -> str:
    config = description["config"]
    rope = config["rope"]
    head = "tied" if config["tie_word_embeddings"] else "untied"
    has = {key: "yes" if description[f"has_{key}"] else "no" for key in ("tokenizer", "chat_template")}
    lines = [
        f"file          {description['file']}, {file_size(description['file_bytes'])}",
        f"model         {config['architecture']}, {description['num_weights']:,} weights",
        f"layers        {config['num_layers']}, hidden {config['hidden_size']}, "
        f"FFN {config['intermediate_size']}",
        f"attention     {config['num_heads']} heads, {config['num_kv_heads']} KV heads, "
        f"head_dim {config['head_dim']}, RoPE {rope['variant']} with theta {rope['theta']:g}",
        f"vocabulary    {config['vocab_size']:,}, {head} head",
        f"context       {config['max_position_embeddings']:,} tokens",
        f"tokenizer     {has['tokenizer']}; chat template: {has['chat_template']}",
        f"planes        {description['num_planes']} of {description['num_planes_in_header']}"
        f"{_ceilings(description['planes'])}",
        f"sensitivity   {_sensitivity(description['sensitivity'])}",
    ]
    if description["damaged"] is not None:
        lines.append(f"checksums     {'damaged' if description['damaged'] else 'all match'}")
    rows = [(str(w["bits"]), f"{w['bytes']:,}", f"{w['bpw']:.2f}") for w in description["widths"]]
    lines += ["", table(("bits", "bytes", "bpw"), rows)]
    if description["card"].get("widths"):
        lines += ["", f"quality       {card_text(description['card'])}"]
    else:
        lines += [
            "",
            "quality       no card (taper eval --text --against --write-card makes one)",
        ]
    for title in ("policies", "learned", "activations", "provenance"):
        if description[title]:
            lines += ["", title, *_nested(description[title])]
    return "\n".join(lines)


def _learned(file: TaperFile) -> dict[str, Any] | None:
    if file.learned is None:
        return None
    widths, prefill_bits = list(file.learned.widths), file.learned.prefill_bits
    return {"widths": widths, "prefill_bits": prefill_bits} | file.learned.record


def _ceilings(planes: dict[str, int]) -> str:
    """Which matrices hold fewer planes than the file."""
    counts = {bits: sum(other == bits for other in planes.values()) for bits in sorted(set(planes.values()))}
    return "".join(f"; {count} matrices hold {bits}" for bits, count in counts.items())


def _sensitivity(raw: dict[str, Any] | None) -> str:
    if raw is None:
        return "none: whole numbers of bits only (taper allocate --text measures it)"
    return f"{raw['num_tokens']:,} tokens of {raw['text']} against {raw['reference']}"


def _nested(value: Any, indent: str = "  ") -> list[str]:
    """A JSON value as indented lines."""
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}", *_nested(item, indent + "  ")]
        elif isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
            lines.append(f"{indent}{key}")
            lines += [f"{indent}  {', '.join(f'{k} {v}' for k, v in row.items())}" for row in item]
        else:
            lines.append(f"{indent}{key}: {item}")
    return lines
