"""Muon: momentum, orthogonalised (Jordan et al., 2024), for the matrices of the layers."""

from __future__ import annotations

import math
from concurrent.futures import Executor

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps on a stack of matrices with rows <= columns."""
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the hidden matrices."""

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float, weight_decay: float, workers: Executor
    ) -> None:
        self.workers = workers
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[no-untyped-def,override]
        """Updates every parameter; matrices of equal shape share one batched product."""
        group = self.param_groups[0]
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for weight in group["params"]:
            state = self.state[weight]
            momentum = state.setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1.0 - group["momentum"])
            update = weight.grad.lerp(momentum, group["momentum"])
            update = update if update.shape[0] <= update.shape[1] else update.mT
            stacks.setdefault(tuple(update.shape), []).append((weight, update))
        pieces = [pairs[i : i + 4] for pairs in stacks.values() for i in range(0, len(pairs), 4)]
        list(self.workers.map(lambda pairs: self._update(pairs, group), pieces))

    @torch.no_grad()
    def _update(self, pairs: list[tuple[Tensor, Tensor]], group: dict[str, float]) -> None:
        updates = orthogonalise(torch.stack([update for _, update in pairs]))
        for (weight, _), update in zip(pairs, updates, strict=True):
            self._apply(weight, update, group)

    @staticmethod
    def _apply(weight: Tensor, update: Tensor, group: dict[str, float]) -> None:
        rows, columns = weight.shape
        update = update if update.shape == weight.shape else update.mT
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))
