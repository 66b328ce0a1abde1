"""The record of a run, and the tables made of it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median

from groups import Claim, Group

# Above this share of all cores in other hands, a sample says more about them than about us.
DISTURBED_FRAC = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of one run.

    Attributes:
        group: what it belongs to.
        round: number of the round, over all runs that add to one record.
        name: of the figure.
        value: in the unit of the group.
        bytes_per_token: of the model, where known.
        read_bytes_per_s: read bandwidth just before.
        others_frac: share of all cores that other processes took meanwhile, 0 to 1 or unknown.
    """

    group: str
    round: int
    name: str
    value: float
    bytes_per_token: float | None
    read_bytes_per_s: float
    others_frac: float | None

    @property
    def disturbed(self) -> bool:
        """Whether the machine was not ours alone."""
        return self.others_frac is not None and self.others_frac > DISTURBED_FRAC

    @property
    def share_frac(self) -> float | None:
        """Share of the read bandwidth."""
        if self.bytes_per_token is None:
            return None
        return self.value * self.bytes_per_token / self.read_bytes_per_s


@dataclass(frozen=True, slots=True)
class Summary:
    """A figure over the quiet rounds: median, least and most, and how many rounds were left out."""

    name: str
    median: float
    least: float
    most: float
    share_frac: float | None
    num_rounds: int
    num_left_out: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim over all rounds."""

    text: str
    unit: str
    bound: float | None
    at_least: bool
    median: float
    least: float
    most: float
    num_rounds: int

    @property
    def holds(self) -> bool | None:
        """Whether the median reaches the bound, None without one."""
        if self.bound is None:
            return None
        return self.median >= self.bound if self.at_least else self.median <= self.bound


def quiet(samples: list[Sample]) -> list[Sample]:
    """The samples of a group without the rounds in which any was disturbed, or all where no round is left.

    Barriers of some peers slow down many times over beside other work, so such a round would flatter us.
    """
    disturbed = {sample.round for sample in samples if sample.disturbed}
    return [sample for sample in samples if sample.round not in disturbed] or samples


def summaries(group: str, samples: Iterable[Sample]) -> list[Summary]:
    """One summary a figure, in the order in which they were first measured."""
    all_of_group = [sample for sample in samples if sample.group == group]
    by_name: dict[str, list[Sample]] = {sample.name: [] for sample in all_of_group}
    for sample in quiet(all_of_group):
        by_name[sample.name].append(sample)
    rounds = {sample.round for sample in all_of_group}
    left = {sample.round for sample in quiet(all_of_group)}
    return [
        _summary(name, found, len(rounds), len(rounds - left)) for name, found in by_name.items() if found
    ]


def _summary(name: str, samples: list[Sample], num_rounds: int, num_left_out: int) -> Summary:
    values = [sample.value for sample in samples]
    shares = [sample.share_frac for sample in samples if sample.share_frac is not None]
    return Summary(
        name,
        median(values),
        min(values),
        max(values),
        median(shares) if shares else None,
        num_rounds,
        num_left_out,
    )


def verdicts(group: Group, samples: Iterable[Sample]) -> list[Verdict]:
    """Every claim of the group that its rounds can tell."""
    rounds: dict[int, list[Sample]] = {}
    for sample in quiet([sample for sample in samples if sample.group == group.name]):
        rounds.setdefault(sample.round, []).append(sample)
    found = (_verdict(claim, rounds.values()) for claim in group.claims)
    return [verdict for verdict in found if verdict is not None]


def _verdict(claim: Claim, rounds: Iterable[list[Sample]]) -> Verdict | None:
    values = []
    for samples in rounds:
        figures = {sample.name: sample.value for sample in samples}
        shares = {sample.name: sample.share_frac for sample in samples if sample.share_frac is not None}
        value = claim.value(figures, shares)
        if value is not None:
            values.append(value)
    if not values:
        return None
    middle = median(values)
    return Verdict(
        claim.text, claim.unit, claim.bound, claim.at_least, middle, min(values), max(values), len(values)
    )


def summary_lines(group: Group, rows: list[Summary]) -> list[str]:
    """The table of a group's figures, in Markdown."""
    lines = [
        f"| {group.name}, {group.unit} | median | least | most | share | rounds left out |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row.share_frac is None else f"{row.share_frac:.0%}"
        values = " | ".join(f"{value:.4g}" for value in (row.median, row.least, row.most))
        lines.append(f"| {row.name} | {values} | {share} | {row.num_left_out} of {row.num_rounds} |")
    return lines


def verdict_lines(rows: list[Verdict]) -> list[str]:
    """The table of what was to be shown."""
    lines = ["| measure | asked | measured (least to most) | reached |", "|---|---|---|---|"]
    for row in rows:
        asked = f"{'at least' if row.at_least else 'at most'} {row.bound:g} {row.unit}" if row.bound else ""
        measured = f"{row.median:.2f} {row.unit} ({row.least:.2f} to {row.most:.2f})"
        reached = {None: "", True: "yes", False: "no"}[row.holds]
        lines.append(f"| {row.text} | {asked} | {measured} | {reached} |")
    return lines


def as_json(
    conditions: Mapping[str, object], groups: list[Group], samples: list[Sample]
) -> dict[str, object]:
    """Everything as plain values, for the last line."""
    return {
        "conditions": dict(conditions),
        "groups": {
            group.name: {
                "unit": group.unit,
                "commands": {side.name: " ".join(side.command) for side in group.sides},
                "summary": [asdict(row) for row in summaries(group.name, samples)],
                "claims": [{**asdict(row), "holds": row.holds} for row in verdicts(group, samples)],
            }
            for group in groups
        },
    }
