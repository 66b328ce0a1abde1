"""KV formats as text, and what they allow."""

from __future__ import annotations

import pytest

from taper.errors import UsageError
from taper.kvcache import KvPlanes, parse_kv


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", KvPlanes(7, 7)),
        ("k7v5", KvPlanes(7, 5)),
        ("7,4@128", KvPlanes(7, 7, 4, 4, 128)),
        ("k7v6,k5v4@256", KvPlanes(7, 6, 5, 4, 256)),
        ("float16", None),
    ],
)
def test_text_and_back(text, expected):
    assert parse_kv(text) == expected
    if expected is not None:
        assert str(expected) == text


REFUSED = ["", "8", "0", "k7", "v7", "7,", "7,4", "7,4@", "7,4@0", "4,7@128", "k7v3,4@9", "7 ", "-1", "f16"]


@pytest.mark.parametrize("text", [*REFUSED, "7,4@12345678901"])
def test_anything_else_is_refused_with_a_way_out(text):
    with pytest.raises(UsageError) as refusal:
        parse_kv(text)
    assert "float16" in str(refusal.value.hint)


def test_bits_by_layer():
    kv = KvPlanes((7, 6), 5, (4, 3), None, 64)
    assert kv.num_layers == 2
    assert kv.layer(0) == (7, 5, 4, 5)
    assert kv.layer(1) == (6, 5, 3, 5)
    with pytest.raises(UsageError, match=r"\[2, 3\] layers"):
        KvPlanes((7, 6), (5, 5, 5))
    with pytest.raises(UsageError, match="no window"):
        KvPlanes(7, 7, 4)
