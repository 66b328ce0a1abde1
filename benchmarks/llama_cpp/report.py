"""The figures of a comparison and how they are printed."""

from dataclasses import asdict, dataclass
from statistics import median

# Above this share of all cores in other hands, a sample says more about them than about us.
DISTURBED_FRAC = 0.05


@dataclass(frozen=True, slots=True)
class Side:
    """One program at one width: what stays the same from round to round.

    Attributes:
        name: such as `4 bits` or `Q4_0`.
        command: program and arguments that gave the samples.
        file_bytes: size of the model file.
        bytes_per_token: bytes of the model read to decode one token.
        weights_per_token: weights multiplied to decode one token.
    """

    name: str
    command: tuple[str, ...]
    file_bytes: int
    bytes_per_token: int
    weights_per_token: int

    @property
    def bpw(self) -> float:
        """Bits that are read per weight, everything stored with it included."""
        return 8 * self.bytes_per_token / self.weights_per_token


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one side.

    Attributes:
        side: what ran.
        tokens_per_s: decoding speed it reported.
        others_frac: share of all cores that other processes took meanwhile, 0 to 1 or unknown.
    """

    side: Side
    tokens_per_s: float
    others_frac: float | None

    @property
    def bytes_per_s(self) -> float:
        """Bytes of the model read per second."""
        return self.tokens_per_s * self.side.bytes_per_token

    @property
    def disturbed(self) -> bool:
        """Whether the machine was not ours alone."""
        return self.others_frac is not None and self.others_frac > DISTURBED_FRAC


@dataclass(frozen=True, slots=True)
class Pair:
    """Our run and theirs, one after the other, and the read bandwidth just before."""

    round: int
    read_bytes_per_s: float
    ours: Sample
    theirs: Sample

    @property
    def ratio(self) -> float:
        """Our speed over theirs; above 1 we are faster."""
        return self.ours.tokens_per_s / self.theirs.tokens_per_s

    @property
    def disturbed(self) -> bool:
        """Whether either run shared the machine."""
        return self.ours.disturbed or self.theirs.disturbed


@dataclass(frozen=True, slots=True)
class Summary:
    """All rounds of one of our widths against one of their types.

    Attributes:
        ours: our side.
        theirs: their side.
        num_pairs: rounds measured.
        num_disturbed: pairs in which other processes took more than `DISTURBED_FRAC`.
        ours_tokens_per_s: median over rounds.
        theirs_tokens_per_s: median over rounds.
        ours_mbu_frac: median share of the measured read bandwidth, 0 to 1 and above with cache hits.
        theirs_mbu_frac: the same for the peer.
        ratio: median of the rounds' ratios ours / theirs.
        ratio_min: smallest ratio of a round.
        ratio_max: largest ratio of a round.
    """

    ours: Side
    theirs: Side
    num_pairs: int
    num_disturbed: int
    ours_tokens_per_s: float
    theirs_tokens_per_s: float
    ours_mbu_frac: float
    theirs_mbu_frac: float
    ratio: float
    ratio_min: float
    ratio_max: float


def summarize(pairs: list[Pair]) -> list[Summary]:
    """Reduce the pairs to one summary per combination of sides, in order of appearance."""
    groups: dict[tuple[Side, Side], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.ours.side, pair.theirs.side), []).append(pair)
    return [_summary(*sides, group) for sides, group in groups.items()]


def _summary(ours: Side, theirs: Side, group: list[Pair]) -> Summary:
    ratios = [pair.ratio for pair in group]
    return Summary(
        ours,
        theirs,
        num_pairs=len(group),
        num_disturbed=sum(pair.disturbed for pair in group),
        ours_tokens_per_s=median(pair.ours.tokens_per_s for pair in group),
        theirs_tokens_per_s=median(pair.theirs.tokens_per_s for pair in group),
        ours_mbu_frac=median(pair.ours.bytes_per_s / pair.read_bytes_per_s for pair in group),
        theirs_mbu_frac=median(pair.theirs.bytes_per_s / pair.read_bytes_per_s for pair in group),
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


ROUND_HEADER = (
    f"{'round':>5}  {'pair':<18}  {'read GB/s':>9}  {'ours tok/s':>10}  {'GB/s':>6}  {'share':>6}  "
    f"{'theirs tok/s':>12}  {'GB/s':>6}  {'share':>6}  {'ratio':>6}"
)


def disturbed_line(pairs: list[Pair]) -> str:
    """Return a warning where others used the machine, else an empty line."""
    count = sum(pair.disturbed for pair in pairs)
    if not count:
        return ""
    return (
        f"warning: in {count} of {len(pairs)} pairs other processes took more than {DISTURBED_FRAC:.0%} of "
        "the processor; such figures say nothing about either program, run again on an idle machine"
    )


def summary_json(row: Summary) -> dict[str, object]:
    """Return one summary as plain values."""
    values = asdict(row)
    for key, side in (("ours", row.ours), ("theirs", row.theirs)):
        values[key]["bpw"] = side.bpw
    return values


def round_json(pair: Pair) -> dict[str, object]:
    """Return one pair as plain values; the sides stand in full in the summary."""
    return {
        "round": pair.round,
        "ours": pair.ours.side.name,
        "theirs": pair.theirs.side.name,
        "read_bytes_per_s": pair.read_bytes_per_s,
        "ours_tokens_per_s": pair.ours.tokens_per_s,
        "theirs_tokens_per_s": pair.theirs.tokens_per_s,
        "ours_others_frac": pair.ours.others_frac,
        "theirs_others_frac": pair.theirs.others_frac,
        "ratio": pair.ratio,
    }


def round_line(pair: Pair) -> str:
    """Return the table row of one pair; a trailing mark says that others used the machine."""
    names = _names(pair.ours.side, pair.theirs.side)
    cells = f"{pair.round:>5}  {names:<18}  {pair.read_bytes_per_s / 1e9:>9.1f}"
    for sample, width in ((pair.ours, 10), (pair.theirs, 12)):
        share = sample.bytes_per_s / pair.read_bytes_per_s
        cells += f"  {sample.tokens_per_s:>{width}.2f}  {sample.bytes_per_s / 1e9:>6.1f}  {share:>6.1%}"
    busy = max(pair.ours.others_frac or 0.0, pair.theirs.others_frac or 0.0)
    mark = f"  disturbed: others took {busy:.0%} of the processor" if pair.disturbed else ""
    return f"{cells}  {pair.ratio:>6.3f}{mark}"


def summary_lines(summaries: list[Summary]) -> list[str]:
    """Return the closing tables: speeds of each pair, then sizes of each side."""
    lines = [
        f"{'median of rounds':<18}  {'ours tok/s':>10}  {'share':>6}  {'theirs tok/s':>12}  {'share':>6}  "
        f"{'ours/theirs':>11}  {'min':>6}  {'max':>6}  {'disturbed':>9}"
    ]
    for row in summaries:
        lines.append(
            f"{_names(row.ours, row.theirs):<18}  {row.ours_tokens_per_s:>10.2f}  {row.ours_mbu_frac:>6.1%}  "
            f"{row.theirs_tokens_per_s:>12.2f}  {row.theirs_mbu_frac:>6.1%}  {row.ratio:>11.3f}  "
            f"{row.ratio_min:>6.3f}  {row.ratio_max:>6.3f}  {row.num_disturbed:>4} of {row.num_pairs}"
        )
    lines += ["", f"{'':<18}  {'bits per weight':>15}  {'bytes per token':>15}  {'file bytes':>14}  command"]
    for side in _sides(summaries):
        lines.append(
            f"{side.name:<18}  {side.bpw:>15.3f}  {side.bytes_per_token:>15,}  {side.file_bytes:>14,}  "
            f"{' '.join(side.command)}"
        )
    return lines


def _sides(summaries: list[Summary]) -> list[Side]:
    return list(dict.fromkeys([row.ours for row in summaries] + [row.theirs for row in summaries]))


def _names(ours: Side, theirs: Side) -> str:
    return f"{ours.name} : {theirs.name}"
