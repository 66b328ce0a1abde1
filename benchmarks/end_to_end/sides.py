"""The programs that are compared: what is run, and which figures its output holds."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from build import Peer
from common import BenchmarkError
from gguf_models import Shape, file_bytes_per_token

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one run.

    Attributes:
        value: in the unit of its group.
        bytes_per_token: bytes of the model that decoding one token reads, where that is known.
    """

    value: float
    bytes_per_token: float | None = None


Figures = dict[str, Figure]


@dataclass(frozen=True, slots=True)
class Side:
    """One command; every sample of it is a fresh process.

    Attributes:
        name: for messages and the record.
        command: program and arguments.
        read: from its stdout to figures by name.
        environment: what is set for it alone.
        busy_core: whether another process keeps one core busy meanwhile.
        files: what it maps, read once before the first round so that no sample waits for the disk.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[str], Figures]
    environment: Mapping[str, str] = field(default_factory=dict)
    busy_core: bool = False
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the programs and models are.

    Attributes:
        shape: of the models.
        models: folder with the `.taper` and `.gguf` files.
        python: interpreter that has taper.
        llama: llama.cpp for this processor.
        llama_avx2: llama.cpp for AVX2 alone, None where no group needs it.
        ik: llama-bench of ik_llama.cpp, None to leave it out.
        runners: name of a script in `peers/` to the interpreter that has its program.
        peer_models: folder of the checkpoint and the models of `peers/`.
    """

    shape: Shape
    models: Path
    python: str
    llama: Peer
    llama_avx2: Peer | None
    ik: Path | None
    runners: Mapping[str, str]
    peer_models: Path

    def gguf(self, type_name: str) -> Path:
        """The file of a type."""
        return self.models / f"{self.shape.name}-{type_name}.gguf"

    def taper(self, bits: str, *options: str, threads: int, isa: str | None = None, **more: bool) -> Side:
        """`taper bench` at a width, or under a policy where `bits` is the text of one."""
        file = self.models / f"{self.shape.name}.taper"
        width = ("--bits", bits) if bits.isdecimal() else ("--policy", bits)
        command = (self.python, "-m", "taper", "bench", str(file), *width, *options)
        name = f"taper {bits} bits" if bits.isdecimal() else "taper progressive"
        return Side(
            name,
            (*command, "--threads", str(threads), "--repeat", "1", "--json"),
            lambda text: read_taper(text, name),
            environment={} if isa is None else {"TAPER_ISA": isa},
            files=(file,),
            **more,
        )

    def llama_bench(
        self, type_name: str, *options: str, threads: int, flash: str = "", avx2: bool = False, **more: bool
    ) -> Side:
        """llama-bench, with flash attention off (0) or on (1) where that is said."""
        peer = self.llama_avx2 if avx2 else self.llama
        assert peer is not None
        attention = ("-fa", flash) if flash else ()
        name = f"llama.cpp {type_name}" + (f" -fa {flash}" if flash else "")
        command = (str(peer.program("llama-bench")), "-m", str(self.gguf(type_name)), *options, *attention)
        return self._bench(name, command, type_name, threads, **more)

    def ik_bench(self, type_name: str, *options: str, threads: int) -> Side:
        """llama-bench of ik_llama.cpp, which rearranges the weights for the processor as it loads them."""
        command = (str(self.ik), "-m", str(self.gguf(type_name)), *options, "-rtr", "1")
        return self._bench(f"ik_llama.cpp {type_name}", command, type_name, threads)

    def _bench(self, name: str, command: tuple[str, ...], type_name: str, threads: int, **more: bool) -> Side:
        file = self.gguf(type_name)
        command = (*command, "-t", str(threads), "-r", "1", "-o", "json")
        return Side(name, command, lambda text: read_llama(text, name, file), files=(file,), **more)

    def llama_batched(self, type_name: str, batches: str, *, threads: int) -> Side:
        """llama-batched-bench: each sequence reads 32 tokens and generates 32."""
        file, name = self.gguf(type_name), f"llama.cpp {type_name}"
        counts = ("-npp", "32", "-ntg", "32", "-npl", batches, "-c", "2048")
        command = (str(self.llama.program("llama-batched-bench")), "-m", str(file), *counts)
        options = ("-t", str(threads), "--output-format", "jsonl")
        return Side(name, (*command, *options), lambda text: read_batched(text, name), files=(file,))

    def runner(
        self,
        script: str,
        *options: str,
        threads: int,
        label: str = "",
        names: Mapping[str, str] | None = None,
    ) -> Side:
        """A script of `peers/`; `names` are the figures for keys of its JSON, else decode and prefill."""
        model = self.peer_models / f"{self.shape.name}-{script.partition('_')[0]}"
        checkpoint = self.peer_models / f"{self.shape.name}-transformers"
        name = f"{script.replace('_', ' ')}{label}"
        path = str(HERE / "peers" / f"{script}.py")
        command = (self.runners[script], path, str(checkpoint), str(model), "--threads", str(threads))
        keys = names or {"decode_tokens_per_s": name, "prefill_tokens_per_s": f"{name} pp"}
        return Side(name, (*command, *options), lambda text: read_keys(text, name, keys))

    def script(self, script: str, *options: str, names: Mapping[str, str]) -> Side:
        """A script of this folder under our interpreter; `names` are the figures for keys of its JSON."""
        command = (self.python, str(HERE / f"{script}.py"), *options)
        return Side(script, command, lambda text: read_keys(text, script, names))


def last_json(text: str, program: str) -> object:
    """The JSON of the last line."""
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise BenchmarkError(f"the last line of {program} is no JSON; run its command alone") from None


def read_taper(text: str, name: str) -> Figures:
    """Tokens per second of every row of `taper bench --json`."""
    report = last_json(text, name)
    try:
        rows = report["rows"]  # type: ignore[index]
        return {
            figure_name(name, row["test"]): Figure(row["tokens_per_s"], row["bytes_per_token"])
            for row in rows
        }
    except (KeyError, TypeError):
        raise BenchmarkError("taper bench printed other rows; use the taper of this checkout") from None


def read_llama(text: str, name: str, file: Path) -> Figures:
    """Tokens per second of every row of `llama-bench -o json`; the bytes are those of the file's tensors."""
    try:
        rows = json.loads(text)
        tests = [
            (
                (f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}")
                + (f" @ d{row['n_depth']}" if row.get("n_depth") else ""),
                float(row["avg_ts"]),
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError):
        raise BenchmarkError(f"llama-bench printed no JSON for {name}; run its command alone") from None
    num_bytes = file_bytes_per_token(file)
    return {figure_name(name, test): Figure(value, num_bytes) for test, value in tests}


def read_batched(text: str, name: str) -> Figures:
    """Generated tokens per second of every batch of `llama-batched-bench --output-format jsonl`."""
    figures = {}
    for line in text.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            figures[f"{name} x{row['pl']}"] = Figure(float(row["speed_tg"]))
    if not figures:
        raise BenchmarkError(f"llama-batched-bench printed no rows for {name}; run its command alone")
    return figures


def read_keys(text: str, script: str, names: Mapping[str, str]) -> Figures:
    """Figures of the scripts of this folder; a key that is None or missing was not measured."""
    report = last_json(text, script)
    if not isinstance(report, dict):
        raise BenchmarkError(f"the last line of {script} is no JSON object; run its command alone")
    return {name: Figure(float(report[key])) for key, name in names.items() if report.get(key) is not None}


def figure_name(name: str, test: str) -> str:
    """`taper 4 bits @ d3072` for tg64 @ d3072: without the counts that are the same for a whole group."""
    found = re.fullmatch(r"(pp|tg|vf)(\d+)( x\d+)?( @ d\d+)?", test)
    if found is None:
        raise BenchmarkError(f"test {test!r} of {name} is unknown; use the programs of this checkout")
    kind, count, batch, depth = found.groups()
    marks = {"pp": " pp", "tg": "", "vf": f" vf{count}"}
    return name + marks[kind] + (batch or "") + (depth or "")
