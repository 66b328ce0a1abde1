"""Speed, area and energy of Anda's accelerator and its baselines by an analytic model, beside the paper's.

    python benchmarks/anda/accelerator.py

Simulated hardware: nothing here is a time of this machine. All constants are those of `published.py`, none is
fitted.

- Speed: a group of 64 takes M + 1 cycles in Anda, 16 in FP-FP, FP-INT, iFPU and FIGNA, x in FIGNA-Mx; a
  product (m x k x n) takes ceil(m / 16) ceil(n / 16) ceil(k / 64) groups. All arrays have one peak
  throughput.
- Area: the printed total for Anda. A baseline is the printed parts without the compressor, its array (MXU)
  larger by the ratio of the processing elements' areas: 1 over the printed area efficiency, for Anda 16 / 5
  over that at M = 4.
- Energy: the printed shares of LLaMA-13B. FP-FP's compute is divided by the printed energy efficiency of a
  processing element, in Anda 5 / (M + 1) times that at M = 4; SRAM and DRAM are FP-FP's in the baselines,
  and Anda's own printed shares in Anda.

A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import published
from bops import mean_bits
from published import CHOSEN, LOSSES, MODELS, PES, Model, Pe, geometric_mean

FP_FP, ANDA = PES[0], PES[-1]
BASELINES = PES[1:-1]
LLAMA_13B = next(model for model in MODELS if model.name == "LLaMA-13B")
TUPLES = {(c.model.name, c.loss): c.bits for c in CHOSEN if c.dataset == "WikiText2"}
# A second law for Anda's energy over FP-FP's, as fitted to the printed speed and energy of LLaMA-13B at three
# losses: energy = offset + slope * mean M. A check only.
ENERGY_FIT = (0.274, 0.0075)
# Int4 weights with a float16 scale for 128 of them.
WEIGHT_BITS = 4 + 16 / 128


def group_cycles(pe: Pe, bits: int) -> int:
    """Cycles of one group; `bits` matters to Anda only."""
    return bits + 1 if pe.group_cycles is None else pe.group_cycles


def cycles(pe: Pe, model: Model, bits: Sequence[int]) -> int:
    """Cycles of all linear layers over an input of the model's largest length.

    Args:
        pe: processing elements of the array.
        model: dimensions.
        bits: magnitude bits of the inputs of qkv, o, up, down.
    """
    tiles_down = -(-model.max_tokens // published.ARRAY_ROWS)
    total = 0
    for (k, n), b in zip(model.gemms, bits, strict=True):
        groups = tiles_down * -(-n // published.ARRAY_COLUMNS) * -(-k // published.GROUP_SIZE)
        total += model.num_layers * groups * group_cycles(pe, b)
    return total


def speedup(pe: Pe, model: Model, bits: Sequence[int]) -> float:
    """Over FP-FP."""
    return cycles(FP_FP, model, bits) / cycles(pe, model, bits)


def pe_area(pe: Pe) -> float:
    """Area of a processing element over FP-FP's, of equal peak throughput."""
    if pe.group_cycles is None:
        return 16 / (published.ANDA_PE_BITS + 1) / pe.area_efficiency
    return 1 / pe.area_efficiency


def area_mm2(pe: Pe) -> float:
    """Area of the accelerator."""
    if pe is ANDA:
        return published.TOTAL_AREA_MM2
    parts = published.AREA_MM2
    others = sum(parts.values()) - parts["MXU"] - parts["compressor"]
    return others + parts["MXU"] * pe_area(pe) / pe_area(ANDA)


def area_efficiency(pe: Pe, model: Model, bits: Sequence[int]) -> float:
    """Speed for the area, over FP-FP."""
    return speedup(pe, model, bits) * area_mm2(FP_FP) / area_mm2(pe)


def mac_energy(pe: Pe, bits: float) -> float:
    """Energy of a multiplication in the array over FP-FP's; `bits` matters to Anda only."""
    if pe.group_cycles is None:
        return (bits + 1) / (published.ANDA_PE_BITS + 1) / pe.energy_efficiency
    return 1 / pe.energy_efficiency


def pe_power(pe: Pe) -> float:
    """Power of a processing element over FP-FP's, of equal peak throughput."""
    return 16 * mac_energy(pe, 0) if pe.group_cycles is None else mac_energy(pe, 0)


def energy_shares(pe: Pe, model: Model, bits: Sequence[int]) -> tuple[float, float, float]:
    """Compute, SRAM and DRAM, percent of FP-FP's energy as printed, whose shares sum to 101."""
    compute, *memory = published.ENERGY_SHARES["FP-FP"]
    if pe is ANDA:
        memory = [*published.ENERGY_SHARES["Anda 0.1 %"][1:]]
    return compute * mac_energy(pe, mean_bits(model.macs, bits)), *memory


def energy_efficiency(pe: Pe, model: Model, bits: Sequence[int]) -> float:
    """Work for the energy, over FP-FP."""
    return sum(published.ENERGY_SHARES["FP-FP"]) / sum(energy_shares(pe, model, bits))


def mean_over_models(figure: Callable[[Pe, Model, Sequence[int]], float], pe: Pe, loss: str) -> float:
    """Geometric mean of a figure with the tuples found on WikiText2 at a loss."""
    return geometric_mean([figure(pe, model, TUPLES[model.name, loss]) for model in MODELS])


def beside(figure: str, of: str, model: float, printed: float | None, note: str = "") -> dict[str, Any]:
    """A row: a figure of the model beside the printed one."""
    deviation = None if printed is None else model / printed - 1
    return {
        "figure": figure,
        "of": of,
        "model": model,
        "printed": printed,
        "deviation_frac": deviation,
        "note": note,
    }


def pe_rows() -> list[dict[str, Any]]:
    """Processing elements: one printed column from another, and Anda's laws at the other end of its range."""
    rows = []
    for pe in PES[1:]:
        note = "from the printed efficiency" if pe is not ANDA else "from its efficiency at M = 4"
        rows.append(beside("PE area", pe.name, pe_area(pe), published.PE_AREA[pe.name], note))
        rows.append(beside("PE power", pe.name, pe_power(pe), published.PE_POWER[pe.name], note))
    area_13, energy_13 = published.ANDA_PE_13
    law = "inversely as M + 1, from M = 4"
    rows.append(beside("PE area efficiency", "Anda M13", 16 / 14 / pe_area(ANDA), area_13, law))
    rows.append(beside("PE energy efficiency", "Anda M13", 1 / mac_energy(ANDA, 13), energy_13, law))
    return rows


def mean_rows() -> list[dict[str, Any]]:
    """Geometric means over the nine models."""
    figures = (
        ("speed-up", speedup, published.SPEEDUP),
        ("area efficiency", area_efficiency, published.AREA_EFFICIENCY),
        ("energy efficiency", energy_efficiency, published.ENERGY_EFFICIENCY),
    )
    rows = []
    for name, figure, printed in figures:
        for pe in BASELINES:
            rows.append(beside(name, pe.name, mean_over_models(figure, pe, "1 %"), printed.get(pe.name)))
        for loss in LOSSES:
            of = f"Anda {loss}"
            rows.append(beside(name, of, mean_over_models(figure, ANDA, loss), printed[of]))
    for pe in BASELINES:
        if pe.name in published.SPEED_OVER_FIGNA:
            loss, printed_ratio = published.SPEED_OVER_FIGNA[pe.name]
            ratio = mean_over_models(speedup, ANDA, loss) / mean_over_models(speedup, pe, loss)
            rows.append(beside(f"speed over {pe.name}", f"Anda {loss}", ratio, printed_ratio))
    return rows


def llama_rows() -> list[dict[str, Any]]:
    """LLaMA-13B alone; its tuple at 5 % is not printed, so its mean M comes from the printed speed-up."""
    bits = TUPLES[LLAMA_13B.name, "0.1 %"]
    speed, energy = published.LLAMA_13B["0.1 %"]
    rows = [
        beside("LLaMA-13B speed-up", "Anda 0.1 %", speedup(ANDA, LLAMA_13B, bits), speed),
        beside("LLaMA-13B energy efficiency", "Anda 0.1 %", energy_efficiency(ANDA, LLAMA_13B, bits), energy),
    ]
    speed, energy = published.LLAMA_13B["5 %"]
    compute, *memory = published.ENERGY_SHARES["FP-FP"]
    total = compute * mac_energy(ANDA, 16 / speed - 1) + sum(published.ENERGY_SHARES["Anda 1 %"][1:])
    note = "derived: mean M from the printed speed-up"
    rows.append(
        beside("LLaMA-13B energy efficiency", "Anda 5 %", (compute + sum(memory)) / total, energy, note)
    )
    for pe in BASELINES:
        printed = published.LLAMA_13B_ENERGY.get(pe.name)
        found = energy_efficiency(pe, LLAMA_13B, bits)
        rows.append(beside("LLaMA-13B energy efficiency", pe.name, found, printed))
    for pe, of, loss in [
        *((pe, pe.name, "1 %") for pe in BASELINES),
        *((ANDA, f"Anda {x}", x) for x in LOSSES),
    ]:
        shares = energy_shares(pe, LLAMA_13B, TUPLES[LLAMA_13B.name, loss])
        rows.append(beside("LLaMA-13B compute, % of FP-FP", of, shares[0], published.ENERGY_SHARES[of][0]))
    return rows


def check_rows() -> list[dict[str, Any]]:
    """The main figures by other readings of the same tables."""
    rows = []
    parts_mm2 = sum(published.AREA_MM2.values())
    rows.append(beside("area, mm2", "Anda, sum of parts", parts_mm2, published.TOTAL_AREA_MM2))
    power_mw = sum(published.POWER_MW.values())
    rows.append(beside("power, mW", "Anda, sum of parts", power_mw, published.TOTAL_POWER_MW))
    offset, slope = ENERGY_FIT
    for loss in LOSSES:
        of = f"Anda {loss}"
        area = mean_over_models(area_efficiency, ANDA, loss) * area_mm2(ANDA) / parts_mm2
        note = "with the sum of Anda's parts, 2.21 mm2"
        rows.append(beside("area efficiency", of, area, published.AREA_EFFICIENCY[of], note))
        means = [mean_bits(model.macs, TUPLES[model.name, loss]) for model in MODELS]
        energy = geometric_mean([1 / (offset + slope * mean) for mean in means])
        note = "by the law fitted to LLaMA-13B"
        rows.append(beside("energy efficiency", of, energy, published.ENERGY_EFFICIENCY[of], note))
    return rows


def derived() -> list[dict[str, Any]]:
    """What the printed constants imply for LLaMA-13B in seconds, joules and DRAM traffic.

    The shares give DRAM's energy as a multiple of compute's, whose watts are printed for Anda's array; at
    3.9 pJ a bit that is a number of passes over the weights, so of rows of activations that share one pass.
    """
    shares = published.ENERGY_SHARES
    bits = TUPLES[LLAMA_13B.name, "0.1 %"]
    weights_bits = sum(LLAMA_13B.macs) * WEIGHT_BITS
    array_w = {"Anda": published.POWER_MW["MXU"] * 1e-3}
    array_w["FP-FP"] = array_w["Anda"] / pe_power(ANDA)
    fp_fp_j = cycles(FP_FP, LLAMA_13B, bits) / published.CLOCK_HZ * array_w["FP-FP"]
    rows = []
    for pe, of in ((FP_FP, "FP-FP"), (ANDA, "Anda 0.1 %")):
        seconds = cycles(pe, LLAMA_13B, bits) / published.CLOCK_HZ
        dram_bits = fp_fp_j * shares[of][2] / shares["FP-FP"][0] / published.DRAM_J_PER_BIT
        busy = dram_bits / 8 / published.DRAM_BYTES_PER_S / seconds
        passes = dram_bits / weights_bits
        rows += [
            beside("2,048 tokens, s", of, seconds, None),
            beside("array, J", of, seconds * array_w[pe.name], None),
            beside("DRAM traffic, GB", of, dram_bits / 8e9, None),
            beside("DRAM busy, share of the time", of, busy, None),
            beside("rows for each pass over the weights", of, LLAMA_13B.max_tokens / passes, None),
        ]
    return rows


def model_rows() -> list[dict[str, Any]]:
    """Each model's own figures, of which only LLaMA-13B's are printed."""
    return [
        {
            "model": model.name,
            "loss": loss,
            "bits": bits,
            "mean_bits": mean_bits(model.macs, bits),
            "speedup": speedup(ANDA, model, bits),
            "area_efficiency": area_efficiency(ANDA, model, bits),
            "energy_efficiency": energy_efficiency(ANDA, model, bits),
        }
        for model in MODELS
        for loss in LOSSES
        for bits in [TUPLES[model.name, loss]]
    ]


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of figures beside the printed ones."""
    print(f"\n{title}\n{'figure':<38} {'of':<20} {'model':>9} {'printed':>8} {'differ':>7}")
    for r in rows:
        printed = "" if r["printed"] is None else f"{r['printed']:.2f}"
        differ = "" if r["printed"] is None else f"{r['deviation_frac']:+.1%}"
        line = f"{r['figure']:<38} {r['of']:<20} {r['model']:>9.4g} {printed:>8} {differ:>7}  {r['note']}"
        print(line.rstrip())


def print_models(rows: list[dict[str, Any]]) -> None:
    """A table of the models."""
    names = f"{'model':<11} {'loss':>5} {'q-o-u-d':>10} {'mean M':>7} {'speed':>6} {'area':>6} {'energy':>6}"
    print(f"\nAnda by model, WikiText2\n{names}")
    for r in rows:
        bits = "-".join(map(str, r["bits"]))
        print(
            f"{r['model']:<11} {r['loss']:>5} {bits:>10} {r['mean_bits']:>7.3f} {r['speedup']:>6.2f} "
            f"{r['area_efficiency']:>6.2f} {r['energy_efficiency']:>6.2f}"
        )


def main() -> None:
    """Run the command."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    sections = {
        "processing elements over FP-FP": pe_rows(),
        "geometric means over nine models": mean_rows(),
        "LLaMA-13B": llama_rows(),
        "the same by other readings": check_rows(),
        "LLaMA-13B, derived, not printed": derived(),
    }
    for title, rows in sections.items():
        print_rows(title, rows)
    models = model_rows()
    print_models(models)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(json.dumps({"benchmark": "anda_accelerator", "date": date, **sections, "models": models}))


if __name__ == "__main__":
    main()
