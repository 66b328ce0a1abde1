"""The DFTSP paper's edge node: cost of a request in computation, memory and bandwidth (arXiv 2405.07140).

Equations are known from a follow-up that restates them; of the settings none could be read in the paper.
*Recalled* marks what was remembered of it and *assumed* what had to be made up; `docs/dftsp.md` lists both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, inf, log2, log10

from taper.errors import UsageError
from taper.planner.dftsp import Candidate, Problem

_NS = 10**9
# Bandwidth is counted in parts of a billion, so that a whole band is this.
BAND = 10**9
_TOKEN_BITS = 32  # the follow-up's


@dataclass(frozen=True, slots=True)
class EdgeModel:
    """A decoder of equal layers with multi-head attention, by its published configuration.

    Attributes:
        layers: L.
        width: d_m.
        ffn: d_f.
    """

    name: str
    layers: int
    width: int
    ffn: int

    @property
    def weight_bytes(self) -> int:
        """m_1 = L (8 d_m^2 + 4 d_m d_f): four projections and two matrices of 16 bits; no embeddings."""
        return self.layers * (8 * self.width**2 + 4 * self.width * self.ffn)

    def kv_bytes(self, prompt: int, output: int) -> int:
        """4 L d_m (s' + n): keys and values of 16 bits.

        Args:
            prompt: tokens, s', padded.
            output: tokens, n.
        """
        return 4 * self.layers * self.width * (prompt + output)

    def prefill_flops(self, prompt: int) -> int:
        """L (6 s' d_m^2 + (4 s'^2 d_m + 2 s' d_m^2) + 4 s' d_m d_f): Q, K and V; attention, output; FFN."""
        d = self.width
        return self.layers * (8 * prompt * d * d + 4 * prompt**2 * d + 4 * prompt * d * self.ffn)

    def decode_flops(self, prompt: int, output: int) -> int:
        """L (n - 1) (6 d_m^2 + (4 (s' + n / 2) d_m + 2 d_m^2) + 4 d_m d_f): n of the request itself."""
        d = self.width
        return self.layers * (output - 1) * (8 * d * d + 2 * (2 * prompt + output) * d + 4 * d * self.ffn)


MODELS = {
    model.name: model
    for model in (
        EdgeModel("bloom-3b", 30, 2560, 10240),
        EdgeModel("bloom-7.1b", 30, 4096, 16384),
        EdgeModel("opt-13b", 40, 5120, 20480),
    )
}


@dataclass(frozen=True, slots=True)
class EdgeQuantizer:
    """What a quantiser does to memory, time and accuracy.

    Attributes:
        memory_frac: alpha. Assumed: bits / 16.
        time_frac: beta. Assumed: half the time follows the bytes of the weights.
        perplexity_increase: of a model. Assumed: of the size of ZeroQuant-V2's, not read from its tables.
    """

    name: str
    memory_frac: float
    time_frac: float
    perplexity_increase: dict[str, float]

    def accuracy(self, model: EdgeModel) -> float:
        """f(increase) = exp(-increase), 0 to 1; that f falls is recalled, its form assumed."""
        return exp(-self.perplexity_increase[model.name])


QUANTIZERS = {
    quantizer.name: quantizer
    for quantizer in (
        EdgeQuantizer("w16a16", 1.0, 1.0, {"bloom-3b": 0.0, "bloom-7.1b": 0.0, "opt-13b": 0.0}),
        EdgeQuantizer("gptq-w8a16", 0.5, 0.75, {"bloom-3b": 0.02, "bloom-7.1b": 0.02, "opt-13b": 0.02}),
        EdgeQuantizer("gptq-w4a16", 0.25, 0.625, {"bloom-3b": 0.6, "bloom-7.1b": 0.35, "opt-13b": 0.25}),
        EdgeQuantizer("zq-local-w4a16", 0.25, 0.625, {"bloom-3b": 0.75, "bloom-7.1b": 0.4, "opt-13b": 0.35}),
    )
}


@dataclass(frozen=True, slots=True)
class EdgeNode:
    """Base station and server.

    Attributes:
        flops: a second. Recalled: 20 Jetson TX2 of 1.33 TFLOP/s.
        memory_bytes: recalled: 32 GB each.
        uplink_s, downlink_s: T_U and T_D. Recalled.
        uplink_hz, downlink_hz: bandwidths. Recalled.
        padded_prompt: tokens s' that every prompt is padded to: the longest that requests have.
        noise_dbm_hz: density of the noise. Recalled.
        user_dbm, node_dbm: power of transmission. Assumed.
    """

    flops: float = 20 * 1.33e12
    memory_bytes: float = 20 * 32e9
    uplink_s: float = 0.25
    downlink_s: float = 0.25
    uplink_hz: float = 20e6
    downlink_hz: float = 20e6
    padded_prompt: int = 512
    noise_dbm_hz: float = -174.0
    user_dbm: float = 23.0
    node_dbm: float = 30.0

    def band_frac(self, tokens: int, gain_db: float, *, is_uplink: bool) -> float:
        """Least share of the band that carries tokens within the slot: bits / (T B log2(1 + SNR)).

        Args:
            tokens: of 32 bits.
            gain_db: of the channel, fading included.
            is_uplink: or the downlink.

        Returns:
            At least 0; above 1 where the whole band is too little.
        """
        power, band, slot = (
            (self.user_dbm, self.uplink_hz, self.uplink_s)
            if is_uplink
            else (self.node_dbm, self.downlink_hz, self.downlink_s)
        )
        snr_db = power + gain_db - self.noise_dbm_hz - 10 * log10(band)
        capacity = slot * band * log2(1 + 10 ** (snr_db / 10))
        return tokens * _TOKEN_BITS / capacity if capacity else inf


def path_gain_db(distance_m: float) -> float:
    """Gain without fading: 3GPP's 128.1 + 37.6 log10(km), negative. Assumed: the paper's is not known."""
    return -(128.1 + 37.6 * log10(distance_m / 1000))


@dataclass(frozen=True, slots=True)
class EdgeRequest:
    """A user's.

    Attributes:
        arrival_s: seconds from the begin.
        prompt_tokens: s.
        output_tokens: n, known in advance, as in the paper.
        latency_s: tau, from arrival to the end of the downlink.
        min_accuracy: a, 0 to 1.
        distance_m: to the node.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    latency_s: float
    min_accuracy: float
    distance_m: float


@dataclass(frozen=True, slots=True)
class EdgeCell:
    """A node that serves one model in one precision, which is given and not chosen.

    Raises:
        UsageError: where the weights alone are more than the memory.
    """

    model: EdgeModel
    quantizer: EdgeQuantizer
    node: EdgeNode = EdgeNode()

    def __post_init__(self) -> None:
        if self._kv_budget() < 0:
            raise UsageError(
                f"{self.model.name} at {self.quantizer.name} needs "
                f"{self.quantizer.memory_frac * self.model.weight_bytes / 1e9:.2f} GB for its weights, "
                f"the node has {self.node.memory_bytes / 1e9:.2f} GB",
                hint="give it a smaller model, fewer bits or more memory",
            )

    def admits(self, request: EdgeRequest) -> bool:
        """Constraint (e): whether the precision is accurate enough."""
        return request.min_accuracy <= self.quantizer.accuracy(self.model)

    def compute_ns(self, request: EdgeRequest) -> int:
        """beta (t^I + t^A), the prompt padded, rounded up; a batch takes the sum of its members'."""
        prompt, output = self.node.padded_prompt, request.output_tokens
        flops = self.model.prefill_flops(prompt) + self.model.decode_flops(prompt, output)
        return ceil(self.quantizer.time_frac * flops / self.node.flops * _NS)

    def slack_ns(self, request: EdgeRequest, now_s: float) -> int:
        """tau - t_w - T_U - T_D, rounded down; negative when it is too late."""
        waited = now_s - request.arrival_s
        return floor((request.latency_s - waited - self.node.uplink_s - self.node.downlink_s) * _NS)

    def problem(self, requests: Sequence[EdgeRequest], now_s: float, fading: Sequence[float]) -> Problem:
        """Constraints (a) to (d) of one epoch: uplink, downlink, memory; time and slack.

        Args:
            requests: that wait, each admitted.
            now_s: the begin of the epoch.
            fading: power gain of each request's channel, mean 1, constant within the epoch, the same in
                both directions.
        """
        rows = zip(requests, fading, strict=True)
        return Problem(
            tuple(self._candidate(request, now_s, gain) for request, gain in rows),
            (BAND, BAND, self._kv_budget()),
        )

    def _candidate(self, request: EdgeRequest, now_s: float, fading: float) -> Candidate:
        gain_db = path_gain_db(request.distance_m) + 10 * log10(max(fading, 1e-30))
        up = self.node.band_frac(request.prompt_tokens, gain_db, is_uplink=True)
        down = self.node.band_frac(request.output_tokens, gain_db, is_uplink=False)
        kv = self.model.kv_bytes(self.node.padded_prompt, request.output_tokens)
        return Candidate(
            self.compute_ns(request),
            self.slack_ns(request, now_s),
            (
                ceil(min(up, 2) * BAND),  # 2: more than there is, whatever it is
                ceil(min(down, 2) * BAND),
                ceil(self.quantizer.memory_frac * kv),
            ),
        )

    def _kv_budget(self) -> int:
        return floor(self.node.memory_bytes - self.quantizer.memory_frac * self.model.weight_bytes)
