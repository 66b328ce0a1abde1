"""What is measured: groups of sides that alternate, and what each group has to show.

A claim is a row of the table in docs/performance.md. It is worked out for each round from the figures of that
round alone, so that a machine that changes its speed changes both sides.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sides import Figures, Programs, Side

PROGRESSIVE = "progressive:4@0,3@86,2@171"
PEERS = ("openvino_int4", "onnxruntime_int4", "ctranslate2_int8", "transformers_bf16")

# The figures of one round by name; `bandwidth` is the share of the read bandwidth by name.
Round = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of what is to be shown.

    Attributes:
        text: what is compared with what.
        value: from the figures of a round and their shares of the bandwidth; None where a side is missing.
        bound: what it has to reach, None where it is only reported.
        at_least: whether more is better.
        unit: `x`, `%`, `ms`, `MB` or `s`.
    """

    text: str
    value: Callable[[Round, Round], float | None]
    bound: float | None
    at_least: bool = True
    unit: str = "x"


@dataclass(frozen=True, slots=True)
class Group:
    """Sides that run in turn.

    Attributes:
        name: for --only.
        unit: of the figures.
        sides: in the order of the first round; every second round runs backwards.
        claims: what their figures have to show.
        threads: of the bandwidth sample beside them.
    """

    name: str
    unit: str
    sides: tuple[Side, ...]
    claims: tuple[Claim, ...]
    threads: int = 2


def ratio(text: str, ours: str, theirs: Iterable[str], bound: float, **more: bool) -> Claim:
    """Our figure over the best of theirs that ran."""
    names = tuple(theirs)

    def value(figures: Round, shares: Round) -> float | None:
        others = [figures[name] for name in names if name in figures]
        return figures[ours] / max(others) if others and ours in figures else None

    return Claim(text, value, bound, **more)


def share(text: str, name: str, bound: float) -> Claim:
    """Bytes of the model read per second over the read bandwidth beside it."""

    def value(figures: Round, shares: Round) -> float | None:
        return 100 * shares[name] if name in shares else None

    return Claim(text, value, bound, unit="%")


def plain(text: str, name: str, bound: float, unit: str) -> Claim:
    """A figure that has to stay below a bound."""
    return Claim(text, lambda figures, shares: figures.get(name), bound, at_least=False, unit=unit)


def decode(programs: Programs, threads: int) -> Group:
    """Decoding from an empty context at every width beside every format."""
    count = ("--prompt", "0", "--generate", "64")
    theirs = ("-p", "0", "-n", "64")
    sides = [programs.taper(bits, *count, threads=threads) for bits in ("4", "3", "2")]
    for name in ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "TQ2_0"):
        sides.append(programs.llama_bench(name, *theirs, threads=threads))
    if programs.ik is not None:
        for name in ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K"):
            sides.append(programs.ik_bench(name, *theirs, threads=threads))
    claims = [
        share(f"share of the measured read bandwidth at {bits} bits", f"taper {bits} bits", 78)
        for bits in "432"
    ]
    for bits, names, bound in (
        ("4", ["llama.cpp Q4_0"], 1.35),
        ("4", ["llama.cpp Q4_K_M", "ik_llama.cpp Q4_K_M"], 1.5),
        ("3", ["llama.cpp Q3_K_M"], 2.6),
        ("3", ["ik_llama.cpp Q3_K_M"], 1.9),
        ("2", ["llama.cpp Q2_K"], 3.6),
        ("2", ["ik_llama.cpp Q2_K"], 2.9),
        ("2", ["llama.cpp TQ2_0"], 2.3),
    ):
        text = f"decode at {bits} bits against {' or '.join(names)}"
        claims.append(ratio(text, f"taper {bits} bits", names, bound))
    return Group("decode", "tok/s", tuple(sides), tuple(claims), threads)


def field(programs: Programs, threads: int) -> Group:
    """Decoding with the programs that are no ggml."""
    sides = [programs.taper("4", "--prompt", "0", "--generate", "64", threads=threads)]
    for script in (name for name in PEERS if name in programs.runners):
        sides.append(programs.runner(script, "--prompt", "0", threads=threads))
    if "openvino_int4" in programs.runners:
        options = ("--prompt", "0", "--hint", "f32")
        sides.append(programs.runner("openvino_int4", *options, threads=threads, label=" f32"))
    return Group("field", "tok/s", tuple(sides), (), threads)


def progressive(programs: Programs, threads: int) -> Group:
    """256 tokens at 4, then 3, then 2 bits."""
    sides = [programs.taper(PROGRESSIVE, "--prompt", "0", "--generate", "256", threads=threads)]
    theirs = ("-p", "0", "-n", "256")
    sides.append(programs.llama_bench("Q4_K_M", *theirs, threads=threads))
    if programs.ik is not None:
        sides.append(programs.ik_bench("Q4_K_M", *theirs, threads=threads))
    names = ["llama.cpp Q4_K_M", "ik_llama.cpp Q4_K_M"]
    text = "progressive 4 to 2 bits, 256 tokens, against "
    claims = [
        ratio(text + name, "taper progressive", [name], 2.6)
        for name in names
        if name[0] == "l" or programs.ik
    ]
    return Group("progressive", "tok/s", tuple(sides), tuple(claims), threads)


def prefill(programs: Programs, threads: int) -> Group:
    """A prompt of 512 tokens."""
    count, theirs = ("--prompt", "512", "--generate", "0"), ("-p", "512", "-n", "0")
    sides = [programs.taper(bits, *count, threads=threads) for bits in ("4", "2")]
    names = ("Q4_0", "Q4_K_M")  # F16 and Q8_0 read prompts slower than these wherever they were measured
    sides += [programs.llama_bench(name, *theirs, threads=threads, flash=on) for name in names for on in "01"]
    if programs.ik is not None:
        sides += [programs.ik_bench(name, *theirs, threads=threads) for name in ("Q4_0", "Q4_K_M")]
    for script in (name for name in PEERS if name in programs.runners):
        sides.append(programs.runner(script, "--generate", "0", threads=threads))
    best = [f"llama.cpp {name} -fa {on} pp" for name in names for on in "01"]
    text = "prefill of 512 tokens against "
    claims = (
        ratio(text + "OpenVINO GenAI INT4", "taper 4 bits pp", ["openvino int4 pp"], 2),
        ratio(text + "llama.cpp's best format", "taper 4 bits pp", best, 5),
    )
    return Group("prefill", "tok/s", tuple(sides), claims, threads)


def depth(programs: Programs, threads: int) -> Group:
    """Decoding with a context that is in the cache already."""
    depths = "0,1024,3072"
    ours = ("--prompt", "0", "--generate", "32", "--depth", depths)
    theirs = ("-p", "0", "-n", "32", "-d", depths)
    sides = [programs.taper(bits, *ours, threads=threads) for bits in ("4", "2")]
    sides += [programs.llama_bench("Q4_0", *theirs, threads=threads, flash=on) for on in "01"]
    names = [f"llama.cpp Q4_0 -fa {on} @ d3072" for on in "01"]
    text = "decode at 3,072 tokens of context, 4 bits, against llama.cpp Q4_0 at its best"
    return Group("depth", "tok/s", tuple(sides), (ratio(text, "taper 4 bits @ d3072", names, 1.6),), threads)


def attention(programs: Programs, threads: int) -> Group:
    """What 8,192 tokens of context add to a step."""
    options = ("--prompt", "0", "--generate", "32", "--depth", "0,8192")
    sides = tuple(programs.taper(bits, *options, threads=threads) for bits in ("4", "2"))

    def value(figures: Round, shares: Round) -> float | None:
        return 100 * (1 - figures["taper 4 bits @ d8192"] / figures["taper 4 bits"])

    text = "attention at 8k context: share of decode time at 4 bits"
    return Group("attention", "tok/s", sides, (Claim(text, value, 25, at_least=False, unit="%"),), threads)


def batch(programs: Programs, threads: int) -> Group:
    """Sequences that decode together, tokens of all of them per second."""
    counts = "1,2,4,8,16"
    options = ("--prompt", "0", "--generate", "32", "--depth", "32", "--batch", counts)
    sides = (
        programs.taper("4", *options, threads=threads),
        programs.taper("2", *options, threads=threads),
        programs.llama_batched("Q4_0", counts, threads=threads),
    )
    name = "taper 4 bits"
    text = "batch of 8 sequences against 1, decode throughput at 4 bits"
    claims = (ratio(text, f"{name} x8 @ d32", [f"{name} @ d32"], 4.5),)
    return Group("batch", "tok/s", sides, claims, threads)


def verify(programs: Programs, threads: int) -> Group:
    """One pass over the tokens of a draft."""
    options = ("--prompt", "0", "--generate", "0", "--depth", "256", "--verify", "1,5")
    sides = tuple(programs.taper(bits, *options, threads=threads) for bits in ("8", "4"))

    def value(figures: Round, shares: Round) -> float | None:
        return 5 * figures["taper 4 bits vf1 @ d256"] / figures["taper 4 bits vf5 @ d256"]

    text = "verification of 5 tokens against 1 token, 4 bits: time"
    return Group("verify", "tok/s", sides, (Claim(text, value, 1.35, at_least=False),), threads)


def contention(programs: Programs, threads: int) -> Group:
    """Decoding while another process keeps one core busy."""
    ours, theirs = ("--prompt", "0", "--generate", "32"), ("-p", "0", "-n", "32")
    alone = (
        programs.taper("4", *ours, threads=threads),
        programs.llama_bench("Q4_0", *theirs, threads=threads),
    )
    sides = tuple(busy(side, on) for side in alone for on in (False, True))

    def value(name: str) -> Callable[[Round, Round], float | None]:
        return lambda figures, shares: figures[name] / figures[f"{name} beside a busy process"]

    text = "slow-down of 2-thread decode beside a process that keeps one core busy"
    claims = (
        Claim(text, value("taper 4 bits"), 3, at_least=False),
        Claim(f"{text}, llama.cpp Q4_0", value("llama.cpp Q4_0"), None, at_least=False),
    )
    return Group("contention", "tok/s", sides, claims, threads)


def busy(side: Side, on: bool) -> Side:
    """A side, or the same beside a busy process under another name."""
    if not on:
        return side
    suffix = " beside a busy process"

    def read(text: str) -> Figures:
        return {name + suffix: figure for name, figure in side.read(text).items()}

    return replace(side, name=side.name + suffix, read=read, busy_core=True)


def load(programs: Programs, threads: int) -> Group:
    """From opening a file in the page cache to the end of the first decode step, and the memory then."""
    file = str(programs.models / f"{programs.shape.name}.taper")
    names = {
        "ready_ms": "file opened",
        "first_step_ms": "first step done",
        "anonymous_mb": "anonymous memory",
    }
    side = programs.script("load", file, "--bits", "4", "--threads", str(threads), names=names)
    claims = (
        plain("load of a file in the page cache to the first decode step", "file opened", 100, "ms"),
        plain("the same to the end of the first decode step", "first step done", 100, "ms"),
        plain("anonymous memory beside the KV cache", "anonymous memory", 60, "MB"),
    )
    return Group("load", "ms or MB", (replace(side, files=(Path(file),)),), claims, threads)


def overhead(programs: Programs, threads: int) -> Group:
    """Steps of models with the same layers whose matrices are next to nothing."""
    file = str(programs.models / f"{programs.shape.name}.taper")
    sides = []
    for model, options in ((programs.shape.name, (file,)), ("the embedded model", ())):
        names = {"overhead_percent": f"overhead, {model}", "thin_us": f"thin step, {model}"}
        sides.append(programs.script("overhead", *options, "--threads", str(threads), names=names))
    text = "Python and dispatch overhead per step, "
    claims = (
        plain(text + programs.shape.name, f"overhead, {programs.shape.name}", 3, "%"),
        plain(text + "the embedded model", "overhead, the embedded model", 30, "%"),
    )
    return Group("overhead", "% or µs", tuple(sides), claims, threads)


def first_token(programs: Programs, threads: int) -> Group:
    """From the start of `taper run` to the first byte of the answer."""
    side = programs.script("first_token", names={"first_token_s": "first token", "exit_s": "process ended"})
    text = "time to first token of taper run on the embedded model"
    claims = (plain(text, "first token", 0.4, "s"),)
    return Group("first-token", "s", (side,), claims, threads)


def small(programs: Programs, threads: int) -> Group:
    """The 135 M shape; `programs` are those of that shape."""
    ours, theirs = ("--prompt", "0", "--generate", "128"), ("-p", "0", "-n", "128")
    sides = [programs.taper(bits, *ours, threads=threads) for bits in ("4", "3", "2")]
    names = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "Q8_0")
    sides += [programs.llama_bench(name, *theirs, threads=threads) for name in names]
    claims = [
        ratio(
            f"135 M shape, {threads} threads: decode at {bits} bits against {text}",
            f"taper {bits} bits",
            against,
            bound,
        )
        for bits, text, against, bound in (
            ("4", "llama.cpp Q4_0", ["llama.cpp Q4_0"], 1.35),
            ("3", "llama.cpp Q3_K_M", ["llama.cpp Q3_K_M"], 2.6),
            ("2", "llama.cpp's fastest format", [f"llama.cpp {name}" for name in names], 2.3),
        )
    ]
    return Group(f"135m-{threads}", "tok/s", tuple(sides), tuple(claims), threads)


def avx2(programs: Programs, threads: int) -> Group:
    """AVX2 alone on both sides."""
    ours, theirs = ("--prompt", "0", "--generate", "32"), ("-p", "0", "-n", "32")
    sides = [programs.taper(bits, *ours, threads=threads, isa="avx2") for bits in ("8", "4", "3", "2")]
    names = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "TQ2_0")
    sides += [programs.llama_bench(name, *theirs, threads=threads, avx2=True) for name in names]
    claims = [
        ratio(
            f"AVX2 alone: decode at {bits} bits against llama.cpp {' or '.join(against)}",
            f"taper {bits} bits",
            [f"llama.cpp {name}" for name in against],
            1,
        )
        for bits, against in (
            ("8", ["Q8_0"]),
            ("4", ["Q4_0", "Q4_K_M"]),
            ("3", ["Q3_K_M"]),
            ("2", ["Q2_K", "TQ2_0"]),
        )
    ]
    return Group("avx2", "tok/s", tuple(sides), tuple(claims), threads)


def linear(programs: Programs, threads: int) -> Group:
    """The linear layers in half precision beside a whole step of ours at 2 bits."""
    sides = [
        programs.taper("2", "--prompt", "0", "--generate", "64", threads=threads),
        programs.llama_bench("F16", "-p", "0", "-n", "32", threads=threads),
    ]
    names = ["llama.cpp F16"]
    if "linear_half" in programs.runners:
        torch = {name: f"torch {name}" for name in ("float16", "bfloat16")}
        sides.append(programs.runner("linear_half", threads=threads, names=torch))
        names += torch.values()
    text = "linear layers at 2 bits (the whole step) against "
    claims = tuple(ratio(text + name, "taper 2 bits", [name], 6.5) for name in names)
    return Group("linear", "tok/s", tuple(sides), claims, threads)
