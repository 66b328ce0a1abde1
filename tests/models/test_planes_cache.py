"""The decoder over a KV cache of planes: the same bytes however the work is cut, shared out or computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from taper import kernels
from taper.formats.container import TaperFile
from taper.models.decoder import Decoder
from taper.testing.tiny import tiny_taper

BITS = 4
TOKENS = np.random.default_rng(0).integers(2, 290, 150).astype(np.int32)
# All that is stored, and less of blocks that lie back: at the end of TOKENS the first block is old.
FORMATS = ["7", "k5v3", "7,4@64"]


@pytest.fixture(scope="module", params=["head_dim 16", "head_dim 64"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaperFile:
    path = tmp_path_factory.mktemp("models") / "file.taper"
    wide = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    return TaperFile.open(tiny_taper(path, **(wide if request.param == "head_dim 64" else {})))


@pytest.fixture(autouse=True)
def as_many_threads_after_as_before():
    before = kernels.num_threads()
    yield
    kernels.set_num_threads(before)


def all_logits(decoder: Decoder, chunk: int) -> npt.NDArray[np.float32]:
    cache = decoder.new_cache(len(TOKENS))
    rows = [
        decoder.forward(TOKENS[begin : begin + chunk], cache, BITS, logits="all")
        for begin in range(0, len(TOKENS), chunk)
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("kv", FORMATS)
def test_isas_threads_and_cuts_of_the_prompt_agree(file, kv):
    """Cuts of 37 begin within the sixteen entries that share bytes, and a block grows old within a call."""
    decoder = Decoder.from_taper(file, kv=kv)
    kernels.set_num_threads(1)
    with kernels.use_isa("reference"):
        expected = all_logits(decoder, 37)
    assert np.isfinite(expected).all()
    assert not np.array_equal(expected, all_logits(Decoder.from_taper(file, kv="float16"), 37))
    for isa in kernels.available_isas():
        for threads in (1, 2):
            kernels.set_num_threads(threads)
            with kernels.use_isa(isa):
                for chunk in (len(TOKENS), 37, 1) if isa != "reference" else (len(TOKENS),):
                    np.testing.assert_array_equal(all_logits(decoder, chunk), expected)


@pytest.mark.parametrize("kv", FORMATS)
def test_an_observed_step_gives_the_native_bytes(file, kv):
    decoder = Decoder.from_taper(file, kv=kv)
    seen = []
    observed = decoder.forward(
        TOKENS, decoder.new_cache(len(TOKENS)), BITS, logits="all", observe=lambda *args: seen.append(args)
    )
    assert seen
    np.testing.assert_array_equal(observed, all_logits(decoder, len(TOKENS)))


@pytest.mark.parametrize("threads", [1, 2])
def test_sixteen_sequences_together_equal_each_alone(file, threads):
    decoder = Decoder.from_taper(file, kv="7,4@64")
    kernels.set_num_threads(threads)

    def caches():
        made = [decoder.new_cache(len(TOKENS)) for _ in range(16)]
        for i, cache in enumerate(made):
            decoder.forward(TOKENS[: 3 + 9 * i], cache, BITS, logits="none")
        return made

    tokens = np.arange(5, 21, dtype=np.int32)
    together = decoder.decode_batch(tokens, caches(), BITS)
    alone = [decoder.forward(tokens[i : i + 1], cache, BITS) for i, cache in enumerate(caches())]
    np.testing.assert_array_equal(together, np.concatenate(alone))
