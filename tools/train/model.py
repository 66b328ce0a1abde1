"""A small Llama-architecture language model in plain torch.

Parameter names follow Hugging Face's LlamaForCausalLM, so that a state
dictionary can be written out unchanged. The output head is tied to the
embedding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits of so many tokens at a time: what a core's cache holds, or a GPU's memory has room for.
LOSS_CHUNK_TOKENS = {"cpu": 1024, "cuda": 16384}
SHORT_TOKENS = 512


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, in elements, heads, layers and tokens."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def hugging_face(self) -> dict[str, object]:
        """Returns the contents of a Hugging Face config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "initializer_range": 0.02,
            "rope_scaling": None,
            "use_cache": True,
            "torch_dtype": "float32",
        }


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalises float32 input over the last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary embedding to (batch, heads, tokens, head_dim), halves layout."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Causal attention by plain products; on this CPU faster than the fused kernel.

    Query heads that share a key head are stacked along the token axis. `q` is
    (batch, heads, tokens, head_dim), `mask` (tokens, tokens) holds 0 or -inf.
    """
    batch, heads, tokens, size = q.shape
    stacked = q.reshape(batch * k.shape[1], -1, size)
    wide = mask.repeat(heads // k.shape[1], 1).expand(stacked.shape[0], -1, -1)
    scores = torch.baddbmm(wide, stacked, k.flatten(0, 1).mT, alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(batch, heads, tokens, size)


def attend_long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the fused kernel, whose memory does not grow with tokens squared."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Attends over (batch, tokens, hidden)."""
        batch, tokens, _ = x.shape
        config = self.config
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)).to(x.dtype)
        heads = F.linear(x, weight).view(batch, tokens, -1, config.head_dim).transpose(1, 2)
        rotating = config.num_attention_heads + config.num_key_value_heads
        v = heads[:, rotating:]
        q, k = rotate(heads[:, :rotating], cos, sin).split(
            (config.num_attention_heads, config.num_key_value_heads), dim=1
        )
        mixed = attend_short(q, k, v, mask) if len(mask) else attend_long(q, k, v)
        return F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), self.o_proj.weight.to(x.dtype))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, hidden) to the same shape."""
        gate = F.linear(x, self.gate_proj.weight.to(x.dtype))
        up = F.linear(x, self.up_proj.weight.to(x.dtype))
        return F.linear(F.silu(gate) * up, self.down_proj.weight.to(x.dtype))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Maps float32 (batch, tokens, hidden) to the same shape; products in the type of `mask`."""
        x = x + self.self_attn(self.input_layernorm(x).to(mask.dtype), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x).to(mask.dtype))


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.arange(config.max_position_embeddings).float()[:, None] / config.rope_theta**half
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Maps token ids (batch, tokens) to normalised hidden states; products in `dtype`."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        size = length if length <= SHORT_TOKENS and not tokens.is_cuda else 0
        mask = torch.full((size, size), float("-inf"), dtype=dtype, device=tokens.device).triu(1)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class TiedLoss(torch.autograd.Function):
    """Mean next-token cross-entropy (nats) through the tied head, in chunks.

    The gradients are computed in the forward pass, chunk by chunk, so that the
    full logits matrix never exists.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Takes hidden (n, hidden), weight (vocab, hidden) and targets (n,)."""
        h16, w16 = hidden.bfloat16(), weight.bfloat16()
        d_hidden, d_weight = torch.empty_like(h16), torch.zeros_like(weight)
        total, count = torch.zeros((), device=hidden.device), hidden.shape[0]
        chunk = LOSS_CHUNK_TOKENS[hidden.device.type]
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            logits = F.linear(h16[part], w16).float()
            index = targets[part, None]
            log_p = torch.log_softmax(logits, dim=-1)
            total -= log_p.gather(1, index).sum()
            minus = torch.full(index.shape, -1.0, device=hidden.device)
            d_logits = log_p.exp_().scatter_add_(1, index, minus).bfloat16()
            torch.mm(d_logits, w16, out=d_hidden[part])
            d_weight += torch.mm(d_logits.t(), h16[part])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        """Scales the stored gradients."""
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad / ctx.count
        return d_hidden.float() * scale, d_weight * scale, None


class LanguageModel(nn.Module):
    """Causal language model with a tied output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.reset()

    def reset(self) -> None:
        """Initialises the weights: small embedding, small residual outputs."""
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if "embed" in name else 0.5 * weight.shape[1] ** -0.5 * (0.1 if residual else 1.0)
            nn.init.normal_(weight, std=std)

    def logits(self, tokens: Tensor) -> Tensor:
        """Returns float32 logits (batch, tokens, vocab)."""
        return F.linear(self.model(tokens), self.model.embed_tokens.weight).float()
