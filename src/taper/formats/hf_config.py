"""A Hugging Face `config.json` as a `ModelConfig`, or one line that says why not.

Whatever a checkpoint claims beyond what the decoder computes is refused here, so that no architecture
half-runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from taper.config import ModelConfig, RopeConfig
from taper.errors import CorruptFileError, UsageError
from taper.formats.validate import check_config

# LlamaConfig, MistralConfig and Qwen2Config share these defaults in transformers.
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one architecture's config.json is read.

    Attributes:
        kv_heads: default of num_key_value_heads; None means as many as query heads.
        biases: of qkv, o and mlp, from the raw configuration.
        check: refuses what is special about this architecture and not computed here.
    """

    kv_heads: int | None
    biases: Callable[[dict[str, Any]], tuple[bool, bool, bool]]
    check: Callable[[dict[str, Any]], None]


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Read config.json and generation_config.json.

    Args:
        raw: config.json.
        generation: generation_config.json, empty where there is none; its eos tokens are added.

    Raises:
        UsageError: an architecture or a feature that is not supported.
        CorruptFileError: a value that is missing or makes no sense.
    """
    name = architecture_of(raw)
    architecture = _ARCHITECTURES[name]
    _check_features(raw)
    architecture.check(raw)
    try:
        config = _model_config(name, architecture, raw, generation)
        check_config(config)
    except KeyError as error:
        raise CorruptFileError(f"config.json has no {error.args[0]!r}", hint=_FETCH_AGAIN) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptFileError(f"config.json: {error}", hint=_FETCH_AGAIN) from error
    return config


def architecture_of(raw: dict[str, Any]) -> str:
    """Name of a supported architecture. Raises UsageError with the list of them for any other."""
    names = raw.get("architectures")
    known = f"supported are {', '.join(_ARCHITECTURES)}"
    if not isinstance(names, list) or len(names) != 1:
        raise UsageError(f"config.json names the architectures {names!r}; exactly one is needed", hint=known)
    if names[0] not in _ARCHITECTURES:
        raise UsageError(f"architecture {names[0]!r} is not supported", hint=known)
    return str(names[0])


_FETCH_AGAIN = "the checkpoint is incomplete; fetch it again"


def _model_config(
    name: str, architecture: _Architecture, raw: dict[str, Any], generation: dict[str, Any]
) -> ModelConfig:
    num_heads = raw["num_attention_heads"]
    qkv_bias, o_bias, mlp_bias = architecture.biases(raw)
    return ModelConfig(
        architecture=name,
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=_given(raw, "num_key_value_heads", architecture.kv_heads or num_heads),
        head_dim=_head_dim(raw, num_heads),
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=_given(raw, "rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        rope=_rope(raw),
        tie_word_embeddings=_given(raw, "tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        bos_token_id=_bos(raw.get("bos_token_id")),
        eos_token_ids=_eos(raw.get("eos_token_id"), generation.get("eos_token_id")),
    )


def _given(raw: dict[str, Any], key: str, default: Any) -> Any:
    """The value; null counts as absent, as in transformers."""
    value = raw.get(key)
    return default if value is None else value


def _head_dim(raw: dict[str, Any], num_heads: int) -> Any:
    given = raw.get("head_dim")
    if given is not None:
        return given  # check_config refuses what is no integer
    if raw["hidden_size"] % num_heads:
        raise ValueError(
            f"hidden_size {raw['hidden_size']} is not a multiple of num_attention_heads {num_heads}"
        )
    return raw["hidden_size"] // num_heads


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters` that hold
    both."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or _DEFAULT_ROPE_THETA
    old_name, new_name = parameters.pop("type", None), parameters.pop("rope_type", None)
    variant = new_name or old_name or "default"
    # Both live beside the scaling in some checkpoints.
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if raw.get(key) is not None:
            parameters.setdefault(key, raw[key])
    return RopeConfig(theta=theta, variant={"su": "longrope"}.get(variant, variant), parameters=parameters)


def _bos(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError(f"bos_token_id {value!r} is not one token")
    return value


def _eos(*values: Any) -> tuple[int, ...]:
    """Every end token that either file names, without repetition."""
    tokens: list[int] = []
    for value in values:
        tokens += [] if value is None else value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(tokens))


def _check_features(raw: dict[str, Any]) -> None:
    if raw.get("quantization_config") is not None:
        raise UsageError(
            "config.json has a quantization_config: it is quantised already; float weights are needed",
            hint="use the original float16, bfloat16 or float32 checkpoint",
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UsageError(f"hidden_act {activation!r} is not supported; it must be 'silu'", hint=_OTHER_MODEL)
    kinds = set(raw.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UsageError(
            f"layer_types {', '.join(sorted(kinds))} are not supported; all must be full_attention",
            hint=_OTHER_MODEL,
        )


_OTHER_MODEL = "use a model without it"


def _check_mistral(raw: dict[str, Any]) -> None:
    window, reach = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if window is not None and (reach is None or window < reach):
        raise UsageError(
            f"sliding_window {window} is shorter than the context of {reach} tokens; "
            "only full attention is supported",
            hint=f"set sliding_window to null and max_position_embeddings to {window} in config.json: "
            "the same model up to that length",
        )


def _check_qwen2(raw: dict[str, Any]) -> None:
    if raw.get("use_sliding_window"):
        raise UsageError(
            "use_sliding_window true is not supported; only full attention is", hint=_OTHER_MODEL
        )


def _no_check(raw: dict[str, Any]) -> None:
    """Nothing special."""


def _llama_biases(raw: dict[str, Any]) -> tuple[bool, bool, bool]:
    attention = _given(raw, "attention_bias", False)
    return attention, attention, _given(raw, "mlp_bias", False)


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(None, _llama_biases, _no_check),
    "MistralForCausalLM": _Architecture(8, lambda raw: (False, False, False), _check_mistral),
    "Qwen2ForCausalLM": _Architecture(32, lambda raw: (True, False, False), _check_qwen2),
}
