"""A GGUF model of the peer that `taper.evaluate.Reader` can read: its logits come from `logits.cpp`."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from build import Peer
from common import BenchmarkError, progress, run
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

COMPILE_TIMEOUT_S = 600
CLOSE_TIMEOUT_S = 60
# In the order in which a linker of static libraries needs them.
LIBRARIES = (
    "src/libllama.a",
    "ggml/src/libggml.a",
    "ggml/src/libggml-cpu.a",
    "ggml/src/libggml-base.a",
)


def build_logits(peer: Peer, directory: Path) -> Path:
    """Compile `logits.cpp` against the built peer where that has not been done since either changed."""
    source = Path(__file__).with_name("logits.cpp")
    build = peer.bin_dir.parent
    libraries = [build / name for name in LIBRARIES]
    program = directory / "logits"
    newest = max(path.stat().st_mtime for path in (source, *libraries))
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    progress(f"compiling {source.name}")
    directory.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{build.parent / 'source' / folder}" for folder in ("include", "ggml/include")]
    compiler = [os.environ.get("CXX", "c++"), "-O2", "-std=c++17", "-fopenmp"]
    run(
        [*compiler, *headers, source, "-o", program, *libraries, "-ldl", "-lm", "-lpthread"],
        timeout_s=COMPILE_TIMEOUT_S,
    )
    return program


@dataclass(slots=True)
class PeerCache:
    """The cache lies in the peer's process; this says when to empty it."""

    capacity: int
    restart: bool = True

    def truncate(self, num_tokens: int) -> None:
        """Empty the cache before the next tokens."""
        if num_tokens:
            raise BenchmarkError(f"a peer's cache is cut to {num_tokens} tokens; only 0 is supported")
        self.restart = True


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """What a reader asks of a model's configuration."""

    vocab_size: int


class PeerDecoder:
    """One GGUF model in a process of its own, with the part of `taper.models.Decoder` that readers use.

    Args:
        program: from `build_logits`.
        model: the GGUF file.
        context_tokens: longest block.
        threads: of the peer.
        kv_type: f16, the peer's default, or f32 to compare exactly.

    Raises:
        BenchmarkError: the program cannot load the model, here or in `forward`.
    """

    def __init__(
        self, program: Path, model: Path, *, context_tokens: int, threads: int, kv_type: str = "f16"
    ) -> None:
        self.context_length = context_tokens
        self._model = model
        # Waiting threads of one peer must not take the processor from the next.
        self._process = subprocess.Popen(
            [str(program), str(model), str(context_tokens), str(threads), kv_type],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        self.config = PeerConfig(int(np.frombuffer(self._read(4), np.int32)[0]))

    def __enter__(self) -> "PeerDecoder":
        """The process runs from the start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def new_cache(self, max_tokens: int) -> PeerCache:
        """An empty cache."""
        return PeerCache(max_tokens)

    def forward(self, tokens: Int32, cache: PeerCache, bits: float, logits: str = "all") -> Float32 | None:
        """Run tokens that follow the earlier ones. `bits` is only a label: a GGUF file has one width.

        Returns:
            Float32 (tokens, vocab), or None for `logits="none"`.
        """
        header = np.array([cache.restart, len(tokens), logits != "none"], dtype=np.int32)
        cache.restart = False
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(header.tobytes() + np.asarray(tokens, dtype=np.int32).tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        if logits == "none":
            return None
        size = len(tokens) * self.config.vocab_size
        return np.frombuffer(self._read(4 * size), np.float32).reshape(len(tokens), -1).copy()

    def _read(self, num_bytes: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(num_bytes)
        if len(data) != num_bytes:
            raise self._ended()
        return data

    def _ended(self) -> BenchmarkError:
        status = self._process.wait(CLOSE_TIMEOUT_S)
        return BenchmarkError(f"the peer's process for {self._model.name} ended early with status {status}")
