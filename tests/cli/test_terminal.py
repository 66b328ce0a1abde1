"""Units, colours and tables."""

from __future__ import annotations

import sys

from taper.cli.terminal import file_size, in_bits_colour, memory_size, printable, table, waiting_line


def test_sizes_are_decimal_for_files_and_binary_for_memory():
    assert [file_size(n) for n in (0, 999, 1000, 12_345_678, 2.5e9)] == [
        "0 bytes", "999 bytes", "1.00 kB", "12.35 MB", "2.50 GB",
    ]  # fmt: skip
    assert memory_size(3 << 20) == "3 MiB"
    assert memory_size(None) == "unknown"


def test_line_breaks_stay_outside_the_colour():
    assert in_bits_colour("a\n\nb", 4) == "\x1b[38;5;34ma\x1b[0m\n\n\x1b[38;5;34mb\x1b[0m"
    assert len({in_bits_colour("a", bits) for bits in range(1, 9)}) == 8


def test_model_text_cannot_command_the_terminal():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b]0;title\x07\x9b2J\r") == "\ufffd]0;title\ufffd\ufffd2J\ufffd"


def test_table_aligns_numbers():
    assert table(("bits", "bytes"), [("2", "5"), ("10", "1,000")]) == "bits  bytes\n2         5\n10    1,000"


def test_waiting_line_is_written_over_and_gone_at_the_end(capsys, monkeypatch):
    with waiting_line("waiting") as update:
        update(1_000_000, 4_000_000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    with waiting_line("waiting") as update:
        update(1_000_000, 4_000_000)
        update(2_000_000, 4_000_000)
    err = capsys.readouterr().err
    assert err == "\rwaiting: 1.00 MB of 4.00 MB  \rwaiting: 2.00 MB of 4.00 MB  \r\x1b[K"
    with waiting_line("waiting"):
        pass
    assert capsys.readouterr().err == ""
