"""What a sequence may say next: the hook by which a grammar, or a given text, holds the sampler."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The state of one sequence's constraint; a request holds a function that makes a new one."""

    def mask(self) -> NDArray[np.bool_]:
        """Tokens that may come next: bool, (vocab,), at least one of them True."""
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was drawn."""
        ...

    def fork(self) -> Constraint:
        """The same state for drafts; this one does not notice."""
        ...


class GivenTokens:
    """Lets a sequence say the given tokens, then anything: their log-probabilities are the model's own.

    Args:
        token_ids: in their order.
        vocab_size: of the model.
    """

    def __init__(self, token_ids: tuple[int, ...], vocab_size: int, position: int = 0) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size
        self._position = position

    def mask(self) -> NDArray[np.bool_]:
        """See `Constraint`."""
        if self._position >= len(self._token_ids):
            return np.ones(self._vocab_size, np.bool_)
        only = np.zeros(self._vocab_size, np.bool_)
        only[self._token_ids[self._position]] = True
        return only

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        self._position += 1

    def fork(self) -> GivenTokens:
        """See `Constraint`."""
        return GivenTokens(self._token_ids, self._vocab_size, self._position)
