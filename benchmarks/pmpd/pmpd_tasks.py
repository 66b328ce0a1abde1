"""Four tasks made from the shared data.

The dialogue data is for measuring only (non-commercial licence); nothing of it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common import BenchmarkError

from taper.tokenizer import Tokenizer
from taper.tune.prompts import PromptSet, read_prompts


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        path: of the data, under the data folder.
        prompt_tokens: of a prompt; of JSON lines, at most.
        limit: on the tokens of an answer, L. L - 1 decode passes, a multiple of 3, so that thirds are exact.
        is_generated: whether greedy answers are scored; else only the likelihood of the reference, because
            the model is too small to answer.
    """

    path: str
    prompt_tokens: int
    limit: int
    is_generated: bool


TASKS = {
    "stories": Task("tinystories/tinystories_test.txt.xz", 64, 64, True),
    "prose": Task("heldout/test-fiction.txt.xz", 128, 64, True),
    "dialogue": Task("eval/dialogsum-test.jsonl.xz", 448, 31, True),
    "arithmetic": Task("eval/gsm8k-test.jsonl.xz", 256, 97, False),
}
# JSON lines drawn for each one that is kept: 60 % of the summaries and 65 % of the worked answers are as long
# as the limit.
DRAWN = 3


def prompts_of(name: str, data: Path, tokenizer: Tokenizer, count: int) -> PromptSet:
    """Prompts of a task, the same ones every time.

    Each reference is as long as the limit: in a shorter one a falling schedule would read more bits than a
    rising one, and the comparison would be one of bits.

    Raises:
        BenchmarkError: no such task, its data is not there, or too few references are long enough.
        UsageError: fewer prompts than asked for.
    """
    if name not in TASKS:
        raise BenchmarkError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    task = TASKS[name]
    path = data / task.path
    if not path.exists():
        raise BenchmarkError(f"{path} is not there; give the folder of the data with --data")
    drawn = read_prompts(
        path,
        tokenizer,
        name=name,
        num_prompts=count * (DRAWN if ".jsonl" in task.path else 1),
        prompt_tokens=task.prompt_tokens,
        max_tokens=task.limit,
    )
    whole = [index for index, ids in enumerate(drawn.references) if len(ids) == task.limit]
    if len(whole) < count:
        raise BenchmarkError(
            f"{path} has {len(whole)} references of {task.limit} tokens, {count} are asked for"
        )
    return drawn.select(whole[:count])
