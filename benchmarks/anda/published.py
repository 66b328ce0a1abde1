"""What Anda (arXiv 2411.15982, HPCA 2025) prints: models, tuples, savings, and its accelerator's figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOSSES = ("0.1 %", "1 %")
DATASETS = ("WikiText2", "PTB", "C4")


@dataclass(frozen=True, slots=True)
class Model:
    """Dimensions of a model of the evaluation.

    Attributes:
        name: short.
        hidden: width d.
        ffn: width of the feed-forward network.
        num_layers: blocks.
        gated: whether a gate matrix stands beside up.
        max_tokens: longest input, at which the accelerator is run.
    """

    name: str
    hidden: int
    ffn: int
    num_layers: int
    gated: bool
    max_tokens: int

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(k, n) of a layer's products with qkv, o, up (and gate), down; KV heads are not shared."""
        d, f = self.hidden, self.ffn
        return ((d, 3 * d), (d, d), (d, (1 + self.gated) * f), (f, d))

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-accumulates of a token with qkv, o, up (and gate), down of all layers."""
        return tuple(self.num_layers * k * n for k, n in self.gemms)


OPT_125M = Model("OPT-125M", 768, 3072, 12, False, 2048)
MODELS = (
    Model("OPT-1.3B", 2048, 8192, 24, False, 2048),
    Model("OPT-2.7B", 2560, 10240, 32, False, 2048),
    Model("OPT-6.7B", 4096, 16384, 32, False, 2048),
    Model("LLaMA-7B", 4096, 11008, 32, True, 2048),
    Model("LLaMA2-7B", 4096, 11008, 32, True, 4096),
    Model("OPT-13B", 5120, 20480, 40, False, 2048),
    Model("LLaMA-13B", 5120, 13824, 40, True, 2048),
    Model("LLaMA2-13B", 5120, 13824, 40, True, 4096),
    Model("OPT-30B", 7168, 28672, 48, False, 2048),
)

# A row a model, as MODELS; a column for each dataset and loss, in their order: bits of qkv-o-up-down and the
# BOPs saving.
_CHOSEN = """
8655 2.74      8554 2.95  11-8-10-9 1.64  8776 2.31  9898 1.86  7676 2.43
7555 2.91      6554 3.25  8687 2.13       6566 2.70  8787 2.11  6565 2.86
7554 3.10      6454 3.31  8677 2.23       6565 2.86  8677 2.23  6564 3.05
9887 1.99      7666 2.56  8777 2.21       6767 2.54  8678 2.16  6566 2.70
9788 1.96      7666 2.56  7886 2.19       7676 2.39  8688 2.04  6666 2.67
7655 2.86      6654 3.20  9989 1.84       6666 2.67  8677 2.23  6565 2.86
10-8-8-8 1.88  7566 2.59  8767 2.35       6666 2.67  8678 2.16  6566 2.70
10-10-8-9 1.80 7767 2.44  7456 2.84       6556 2.92  8778 2.14  6566 2.70
7554 3.10      6454 3.31  8686 2.23       6565 2.86  7677 2.31  6464 3.09
"""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A printed tuple.

    Attributes:
        model: that it was searched for.
        dataset, loss: that it was searched on, and how much it may lose.
        bits: magnitude bits of qkv, o, up, down.
        saving: printed BOPs saving over float16.
    """

    model: Model
    dataset: str
    loss: str
    bits: tuple[int, ...]
    saving: float


def _parse(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("-") if "-" in text else text))


def _chosen() -> tuple[Chosen, ...]:
    places = [(dataset, loss) for dataset in DATASETS for loss in LOSSES]
    found = []
    for model, line in zip(MODELS, _CHOSEN.strip().splitlines(), strict=True):
        words = line.split()
        pairs = zip(words[::2], words[1::2], strict=True)
        for (dataset, loss), (bits, saving) in zip(places, pairs, strict=True):
            found.append(Chosen(model, dataset, loss, _parse(bits), float(saving)))
    return tuple(found)


CHOSEN = _chosen()
# The search's path on OPT-125M at 1 %, and which combinations became the best.
TRACE = (
    ((4, 4, 4, 4), False),
    ((5, 5, 5, 5), False),
    ((6, 6, 6, 6), False),
    ((7, 7, 7, 7), True),
    ((7, 7, 6, 7), True),
    ((7, 7, 5, 7), False),
    ((7, 7, 6, 6), True),
    ((7, 7, 5, 6), False),
    ((7, 7, 6, 5), True),
    ((7, 7, 5, 5), False),
)


@dataclass(frozen=True, slots=True)
class Pe:
    """A processing element at equal peak throughput, over FP-FP's.

    Attributes:
        name: of the accelerator.
        area_efficiency, energy_efficiency: printed; Anda's at 4 magnitude bits.
        group_cycles: cycles for a group at FP-FP's 16; None for Anda's, M + 1.
    """

    name: str
    area_efficiency: float
    energy_efficiency: float
    group_cycles: int | None


PES = (
    Pe("FP-FP", 1.0, 1.0, 16),
    Pe("FP-INT", 1.59, 1.93, 16),
    Pe("iFPU", 3.78, 3.51, 16),
    Pe("FIGNA", 5.58, 5.87, 16),
    Pe("FIGNA-M11", 6.55, 8.03, 11),
    Pe("FIGNA-M8", 8.09, 10.49, 8),
    Pe("Anda", 13.89, 16.07, None),
)
ANDA_PE_BITS = 4
# The other end of the printed range, by which the law in M is checked: area, energy efficiency at 13 bits.
ANDA_PE_13 = (4.96, 5.74)
# Printed PE area and power over FP-FP's, two digits.
PE_AREA = {
    "FP-FP": 1.0,
    "FP-INT": 0.63,
    "iFPU": 0.26,
    "FIGNA": 0.18,
    "FIGNA-M11": 0.15,
    "FIGNA-M8": 0.12,
    "Anda": 0.23,
}
PE_POWER = {
    "FP-FP": 1.0,
    "FP-INT": 0.52,
    "iFPU": 0.28,
    "FIGNA": 0.17,
    "FIGNA-M11": 0.12,
    "FIGNA-M8": 0.10,
    "Anda": 0.20,
}

ARRAY_ROWS = ARRAY_COLUMNS = 16
GROUP_SIZE = 64
CLOCK_HZ = 285e6
DRAM_BYTES_PER_S = 256e9
DRAM_J_PER_BIT = 3.9e-12
# Anda's accelerator at 16 nm, 0.8 V: mm2, mW. The areas sum to 2.21; 2.17 is printed as their total.
AREA_MM2 = {
    "MXU": 0.41,
    "compressor": 0.07,
    "vector unit": 0.05,
    "activation buffer": 0.87,
    "weight buffer": 0.80,
    "control": 0.01,
}
TOTAL_AREA_MM2 = 2.17
POWER_MW = {
    "MXU": 54.34,
    "compressor": 1.06,
    "vector unit": 0.87,
    "activation buffer": 16.94,
    "weight buffer": 7.96,
    "control": 0.01,
}
TOTAL_POWER_MW = 81.18
# Energy of LLaMA-13B, percent of FP-FP's (which sum to 101): compute, SRAM, DRAM.
ENERGY_SHARES = {
    "FP-FP": (42, 11, 48),
    "FP-INT": (22, 11, 48),
    "iFPU": (12, 11, 48),
    "FIGNA": (7, 11, 48),
    "FIGNA-M11": (5, 11, 48),
    "FIGNA-M8": (4, 11, 48),
    "Anda 0.1 %": (5, 5, 24),
    "Anda 1 %": (4, 5, 24),
}

# Geometric means over MODELS and FP-FP, WikiText2: one figure, or Anda's at 0.1 % and 1 %.
SPEEDUP = {"FIGNA": 1.00, "FIGNA-M11": 1.45, "FIGNA-M8": 2.00, "Anda 0.1 %": 2.14, "Anda 1 %": 2.49}
AREA_EFFICIENCY = {
    "FP-INT": 1.23,
    "iFPU": 1.60,
    "FIGNA": 1.72,
    "FIGNA-M11": 2.55,
    "FIGNA-M8": 3.60,
    "Anda 0.1 %": 3.47,
    "Anda 1 %": 4.03,
}
ENERGY_EFFICIENCY = {
    "FP-INT": 1.25,
    "iFPU": 1.42,
    "FIGNA": 1.53,
    "FIGNA-M11": 1.69,
    "FIGNA-M8": 1.94,
    "Anda 0.1 %": 3.07,
    "Anda 1 %": 3.16,
}
# LLaMA-13B alone: speed-up and energy efficiency of Anda by loss; energy efficiency of two baselines' bars.
LLAMA_13B = {"0.1 %": (1.73, 2.95), "5 %": (2.74, 3.22)}
LLAMA_13B_ENERGY = {"FIGNA-M11": 1.58, "FIGNA-M8": 1.61}
# Anda's speed over FIGNA-M11's at 0.1 % and over FIGNA-M8's at 1 %.
SPEED_OVER_FIGNA = {"FIGNA-M11": ("0.1 %", 1.48), "FIGNA-M8": ("1 %", 1.25)}


def geometric_mean(values: list[float]) -> float:
    """Of positive values."""
    return float(np.exp(np.mean(np.log(values))))
