"""Write models of random weights as GGUF, in the float and the quantized types of the peer.

Decoding speed depends on a model's shape and storage type, not on the values, so random weights
stand for trained ones. Output text is noise.
"""

import argparse
import importlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from build import Peer, ensure_peer
from common import BenchmarkError, default_dir, progress, run, run_main

SEED = 20
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
WEIGHT_STD = 0.02
CONTEXT_TOKENS = 16384
RMS_EPSILON = 1e-5
ROPE_BASE = 10000.0
NUM_SPECIAL_TOKENS = 3
NUM_BYTE_TOKENS = 256
# Values of the GGUF format.
TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_BYTE = 1, 2, 3, 6
FILE_TYPE_MOSTLY_F16 = 1
FLOAT_TYPE = "F16"
TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "TQ2_0", "Q8_0", FLOAT_TYPE)
QUANTIZE_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a Llama decoder.

    Attributes:
        name: used in file names and on the command line.
        num_layers: decoder layers.
        hidden: width of the residual stream.
        num_heads: query heads; they divide `hidden`.
        num_kv_heads: key and value heads; they divide `num_heads`.
        ffn: inner width of the feed-forward network.
        vocab: tokens in the vocabulary.
        tied: whether the output head is the embedding.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab: int
    tied: bool

    def __post_init__(self) -> None:
        """Refuse dimensions that no Llama decoder can have."""
        if self.hidden % self.num_heads or self.num_heads % self.num_kv_heads:
            raise BenchmarkError(
                f"shape {self.name} has hidden {self.hidden}, {self.num_heads} heads and "
                f"{self.num_kv_heads} KV heads; each must divide the one before"
            )
        if self.vocab < NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS:
            raise BenchmarkError(
                f"shape {self.name} has a vocabulary of {self.vocab} tokens; at least "
                f"{NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS} are needed for specials and bytes"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.num_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1.1b", 22, 2048, 32, 4, 5632, 32000, tied=False),
        Shape("135m", 30, 576, 9, 3, 1536, 49152, tied=True),
    )
}


def shape_named(name: str) -> Shape:
    """Return one of `SHAPES`."""
    if name not in SHAPES:
        raise BenchmarkError(f"--shape {name} is unknown; use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def check_types(types: Sequence[str]) -> None:
    """Refuse a name that is not among `TYPES`."""
    for name in types:
        if name not in TYPES:
            raise BenchmarkError(f"type {name} is unknown; use {', '.join(TYPES)}")


def optional_package(name: str) -> ModuleType:
    """Import a package that only this benchmark needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BenchmarkError(f"the Python package {name} is not installed; run pip install {name}") from None


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and (out_features, in_features), or (features,), of every tensor in file order."""
    kv = shape.num_kv_heads * shape.head_dim
    yield EMBEDDING, (shape.vocab, shape.hidden)
    for layer in range(shape.num_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (shape.hidden,)
        yield f"{block}.attn_q.weight", (shape.hidden, shape.hidden)
        yield f"{block}.attn_k.weight", (kv, shape.hidden)
        yield f"{block}.attn_v.weight", (kv, shape.hidden)
        yield f"{block}.attn_output.weight", (shape.hidden, shape.hidden)
        yield f"{block}.ffn_norm.weight", (shape.hidden,)
        yield f"{block}.ffn_gate.weight", (shape.ffn, shape.hidden)
        yield f"{block}.ffn_up.weight", (shape.ffn, shape.hidden)
        yield f"{block}.ffn_down.weight", (shape.hidden, shape.ffn)
    yield "output_norm.weight", (shape.hidden,)
    if not shape.tied:
        yield HEAD, (shape.vocab, shape.hidden)


def vocabulary(num_tokens: int) -> tuple[list[str], list[float], list[int]]:
    """Return a valid SentencePiece vocabulary of distinct tokens: specials, bytes, then words.

    Args:
        num_tokens: size of the vocabulary.

    Returns:
        Texts, scores and GGUF token types, one of each per token.
    """
    num_words = num_tokens - NUM_SPECIAL_TOKENS - NUM_BYTE_TOKENS
    texts = ["<unk>", "<s>", "</s>"]
    texts += [f"<0x{byte:02X}>" for byte in range(NUM_BYTE_TOKENS)]
    texts += [f"\u2581w{word}" for word in range(num_words)]
    scores = [0.0] * (num_tokens - num_words) + [-float(word) for word in range(num_words)]
    types = [TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_CONTROL]
    types += [TOKEN_BYTE] * NUM_BYTE_TOKENS + [TOKEN_NORMAL] * num_words
    return texts, scores, types


def metadata(shape: Shape) -> dict[str, object]:
    """Return what a Llama GGUF file says of itself: `GGUFWriter`'s `add_` methods and values."""
    texts, scores, types = vocabulary(shape.vocab)
    return {
        "name": f"random {shape.name}",
        "file_type": FILE_TYPE_MOSTLY_F16,
        "context_length": CONTEXT_TOKENS,
        "embedding_length": shape.hidden,
        "block_count": shape.num_layers,
        "feed_forward_length": shape.ffn,
        "head_count": shape.num_heads,
        "head_count_kv": shape.num_kv_heads,
        "rope_dimension_count": shape.head_dim,
        "rope_freq_base": ROPE_BASE,
        "layer_norm_rms_eps": RMS_EPSILON,
        "vocab_size": shape.vocab,
        "tokenizer_model": "llama",
        "token_list": texts,
        "token_scores": scores,
        "token_types": types,
    }


def write_f16(shape: Shape, path: Path) -> None:
    """Write `shape` with seeded normal weights as a GGUF file: matrices F16, norms F32.

    Tensors are drawn and written one by one, so memory holds one tensor at a time.

    Args:
        shape: the model's dimensions.
        path: file to write; it appears complete or not at all.
    """
    gguf, np = optional_package("gguf"), optional_package("numpy")
    progress(f"writing {path.name}")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    for name, value in metadata(shape).items():
        getattr(writer, f"add_{name}")(value)
    tensors = list(tensor_shapes(shape))
    for name, dims in tensors:
        dtype = np.dtype(np.float16 if len(dims) == 2 else np.float32)
        writer.add_tensor_info(name, dims, dtype, math.prod(dims) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (_, dims) in enumerate(tensors):
        if len(dims) == 1:
            writer.write_tensor_data(np.ones(dims, np.float32))
            continue
        weights = np.random.default_rng([SEED, index]).standard_normal(dims, np.float32)
        weights *= WEIGHT_STD
        writer.write_tensor_data(weights.astype(np.float16))
    writer.close()
    partial.rename(path)


def quantize_gguf(peer: Peer, source: Path, path: Path, name: str, imatrix: Path | None = None) -> None:
    """Write the float file `source` in a quantized type; the result appears complete or not at all.

    Args:
        peer: whose llama-quantize is used.
        source: GGUF file in a float type.
        path: file to write.
        name: the type, such as Q4_K_M.
        imatrix: importance matrix, None to quantize without.
    """
    progress(f"quantizing {path.name}")
    partial = path.with_suffix(".partial")
    options: list[str | Path] = [] if imatrix is None else ["--imatrix", imatrix]
    threads = str(os.cpu_count() or 1)
    run(
        [peer.program("llama-quantize"), *options, source, partial, name, threads],
        timeout_s=QUANTIZE_TIMEOUT_S,
    )
    partial.rename(path)


def ensure_models(shape: Shape, types: Sequence[str], directory: Path, peer: Peer) -> list[Path]:
    """Return the files of `shape` in the given types, writing those that are missing.

    The float file, the largest of all, stays only where it is asked for.

    Args:
        shape: the model's dimensions.
        types: names among `TYPES`.
        directory: folder of the files.
        peer: whose llama-quantize is used.

    Returns:
        One path per type, in the order of `types`.
    """
    check_types(types)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{shape.name}-{name}.gguf" for name in types}
    missing = [name for name, path in paths.items() if not path.exists()]
    source = directory / f"{shape.name}-{FLOAT_TYPE}.gguf"
    kept = FLOAT_TYPE in types or source.exists()
    if missing and not source.exists():
        write_f16(shape, source)
    for name in missing:
        if name != FLOAT_TYPE:
            quantize_gguf(peer, source, paths[name], name)
    if not kept:
        source.unlink(missing_ok=True)
    return [paths[name] for name in types]


def weights_per_token(shape: Shape) -> int:
    """Count the weights that decoding one token multiplies with.

    An embedding that is not also the head counts for nothing: one row of it is read.
    """
    return sum(math.prod(dims) for name, dims in tensor_shapes(shape) if shape.tied or name != EMBEDDING)


def file_bytes_per_token(path: Path) -> int:
    """Count the bytes of a GGUF file that hold the weights of `weights_per_token`."""
    tensors = optional_package("gguf").GGUFReader(path).tensors
    tied = all(tensor.name != HEAD for tensor in tensors)
    return sum(int(tensor.n_bytes) for tensor in tensors if tied or tensor.name != EMBEDDING)


def split_names(text: str) -> list[str]:
    """Split a comma-separated option into its names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    """Write the models of one shape and print their paths."""
    parser = argparse.ArgumentParser(description="Write GGUF models of random weights.")
    parser.add_argument("--shape", default="1.1b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--types", default="Q4_0", help=f"comma-separated, among {', '.join(TYPES)}")
    parser.add_argument("--dir", type=Path, default=default_dir(), help="cache folder")
    args = parser.parse_args()
    directory = args.dir.expanduser().resolve()
    shape = shape_named(args.shape)
    peer = ensure_peer(directory, jobs=os.cpu_count() or 1)
    types = split_names(args.types)
    for path in ensure_models(shape, types, directory / "models", peer):
        print(path)


if __name__ == "__main__":
    run_main(main)
