"""Continuous integrate-and-fire (CIF): from frames to one vector per token, and where each token ends.

Weights alpha in [0, 1] are summed along the frames; every time the sum passes an integer a token is complete,
and its vector is the alpha-weighted sum of the frames since the last one (Dong and Xu, arXiv 1905.11235;
Paraformer: arXiv 2206.08317, section 3.2).

Everything here works on prefix sums and has no loop over frames. With P_t the sum of the first t weights,
frame t gives token k the length of the overlap of [P_{t-1}, P_t] with [k, k + 1]. That equals the usual
loop for weights up to 1, and stays right above 1, where a frame completes several tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nar_speech.config import check_range
from nar_speech.layers.packed import PackedLinear, WindowProduct, keep_float, linear_relu
from nar_speech.layers.precision import no_autocast

if TYPE_CHECKING:
    from nar_speech.layers.cif_stream import CifChunk, CifState
    from nar_speech.layers.sanm_stream import StreamConfig

FIRE_SLACK = 1e-4  # time stamps count a token as complete this much early, so rounding never loses one
SNAP = 1e-6  # training: a prefix sum this close to the target length is the target length

LANES = 32  # floats; elementwise functions of a CPU differ in the last bit where fewer are left over

CifMode = Literal["overlap", "prefix", "sequential"]


@dataclass(frozen=True)
class CifOutput:
    """What a predictor returns.

    embeds: (B, U, D) one vector per token, zero past ``token_lengths``.
    token_num: (B,) float32: training: sum of the weights before scaling; inference: predicted token count.
    token_lengths: (B,) int64 number of tokens of each item.
    alphas: (B, T) float32 weights, or (B, T + 1) where a tail weight was added.
    peaks: like ``alphas``: the running sum since the last token; 1 or more exactly where a token ends.
    token_num2: (B,) float32, training of a predictor with a time stamp head: sum of that head's weights.
    """

    embeds: Tensor
    token_num: Tensor
    token_lengths: Tensor
    alphas: Tensor
    peaks: Tensor
    token_num2: Tensor | None = None


@dataclass(frozen=True)
class CifTimes:
    """Second weights of a time stamp head, scaled to the token count, and their fire tracks.

    alphas, peaks: (B, R * T) at R times the frame rate; frame_alphas, frame_peaks: (B, T) the same summed to
    frames; token_num: (B,) sum of the weights before scaling.
    """

    alphas: Tensor
    peaks: Tensor
    frame_alphas: Tensor
    frame_peaks: Tensor
    token_num: Tensor


def prefix_sums(alphas: Tensor) -> Tensor:
    """(B, T) -> (B, T) running sums in float64 (float32 where the device has no float64).

    Long sums of float32 lose the fraction that decides where a token ends.
    """
    dtype = torch.float32 if alphas.device.type == "mps" else torch.float64
    return alphas.cumsum(dim=-1, dtype=dtype)


def fire_counts(sums: Tensor, threshold: float = 1.0, step: float = 1.0) -> Tensor:
    """How many tokens the frame-by-frame loop has completed after each frame.

    The loop completes at most one token a frame, F_t = min(F_{t-1} + 1, n_t) with n_t the number of tokens
    the prefix sum is worth; unrolled, F_t = t + min(0, min_{s <= t} (n_s - s)) for t counted from 1.

    Args:
        sums: (B, T) prefix sums, not decreasing.
        threshold: integral at which a token is complete.
        step: what is subtracted from the integral then.

    Returns:
        (B, T), the dtype of ``sums``, whole numbers.
    """
    worth = (((sums - threshold) / step).floor() + 1).clamp_min(0)
    frames = torch.arange(1, sums.shape[-1] + 1, device=sums.device, dtype=sums.dtype)
    if sums.shape[-1] == 0:
        return worth
    return frames + (worth - frames).cummin(dim=-1).values.clamp_max(0)


def _previous(x: Tensor) -> Tensor:
    """Shift by one frame along the last dimension; zero comes in."""
    return F.pad(x[..., :-1], (1, 0))


@torch.no_grad()
def fire_track(sums: Tensor, threshold: float = 1.0, step: float = 1.0) -> Tensor:
    """The integral of the loop at each frame before anything is subtracted (B, T), float32.

    It is ``threshold`` or more exactly at the frames that complete a token.
    """
    return (sums - step * _previous(fire_counts(sums, threshold, step))).float()


@torch.no_grad()
def prefix_track(sums: Tensor) -> Tensor:
    """Fraction of the prefix sum, plus 1 at frames where it passed an integer: (B, T), float32."""
    whole = sums.floor()
    return ((whole > _previous(whole)).to(sums.dtype) + sums - whole).float()


def overlap_weights(sums: Tensor, tokens: int | Tensor) -> Tensor:
    """Share of each frame in each token: (B, T) prefix sums -> (B, U, T); complete tokens' rows sum to 1.

    ``tokens``: U, or the numbers (B, U) of the tokens that are wanted.
    """
    reached = (sums[:, None, :] - _numbers(tokens, sums)[..., None]).clamp(0, 1)
    return reached - _previous(reached)


def _numbers(tokens: int | Tensor, sums: Tensor) -> Tensor:
    if isinstance(tokens, Tensor):
        return tokens
    return torch.arange(tokens, device=sums.device, dtype=sums.dtype)


def one_fire_weights(alphas: Tensor, sums: Tensor, tokens: int | Tensor, sequential: bool) -> Tensor:
    """The shares (B, U, T) of the official implementations, which see one token end per frame.

    They differ from :func:`overlap_weights` only where a weight is above 1. ``sequential``: the loop, which
    carries a sum above 1 to the next frame; otherwise the parallel form, which keeps only its fraction.
    ``tokens``: U, or the numbers (B, U) of the tokens that are wanted.
    """
    alphas = alphas.to(sums.dtype)
    if sequential:
        after = fire_counts(sums)
        before = _previous(after)
        fired = after > before
        done = torch.where(fired, 1 - (_previous(sums) - before), alphas)
    else:
        fired = sums.floor() > _previous(sums.floor())
        after = fired.cumsum(dim=-1).to(sums.dtype)
        before = _previous(after)
        done = torch.where(fired, alphas - (sums - sums.floor()), alphas)
    index = _numbers(tokens, sums)[..., None]
    rest = torch.where(fired, alphas - done, 0)
    return (before[:, None] == index) * done[:, None] + ((after[:, None] == index) & fired[:, None]) * rest[
        :, None
    ]


def integrate(
    hidden: Tensor,
    alphas: Tensor,
    sums: Tensor,
    counts: Tensor,
    tokens: int,
    mode: CifMode = "overlap",
) -> Tensor:
    """One vector per token.

    Args:
        hidden: (B, T, D) frames.
        alphas: (B, T) weights >= 0.
        sums: (B, T) their prefix sums.
        counts: (B,) complete tokens of each item; later ones are zero.
        tokens: U, number of vectors to return.
        mode: "overlap" (right for any weight), or an official form: "prefix" or "sequential".

    Returns:
        (B, U, D) of the dtype of ``hidden``; computed in float32 from float64 prefix sums.
    """
    if mode == "overlap":
        shares = overlap_weights(sums, tokens)
    else:
        shares = one_fire_weights(alphas, sums, tokens, mode == "sequential")
    exists = torch.arange(tokens, device=hidden.device) < counts[:, None]
    shares = (shares * exists[:, :, None]).float()
    return (shares @ hidden.float()).to(hidden.dtype)


@dataclass(frozen=True)
class PredictorConfig:
    """Numbers of a CIF predictor; the defaults are those of Paraformer-large.

    l_order, r_order: context frames of the convolution on each side. tail_threshold: weight of an extra last
    frame at inference, so that an almost complete last token is kept; 0: none. tail_mask: it stands right
    after an item's last frame instead of at the batch's last column. smooth_factor, noise_threshold:
    weight = relu(smooth_factor * sigmoid - noise_threshold). The others belong to the time stamp head (V3).
    """

    l_order: int = 1
    r_order: int = 1
    tail_threshold: float = 0.45
    tail_mask: bool = True
    smooth_factor: float = 1.0
    noise_threshold: float = 0.0
    dropout: float = 0.1
    smooth_factor2: float = 0.25
    noise_threshold2: float = 0.01
    upsample_times: int = 3
    upsample_type: Literal["cnn", "cnn_blstm"] = "cnn_blstm"
    use_cif1_cnn: bool = False

    def __post_init__(self) -> None:
        check_range(self, 0, 1000, "l_order", "r_order")
        check_range(self, 1, 100, "upsample_times")
        check_range(self, 0, 1, "dropout")
        check_range(self, 0, 1000, "tail_threshold", "smooth_factor", "smooth_factor2")
        check_range(self, 0, 1000, "noise_threshold", "noise_threshold2")


class CifPredictorV2(nn.Module):
    """Dense convolution over neighbouring frames, one weight per frame, parallel CIF."""

    depthwise = False
    official_mode: CifMode = "prefix"

    def __init__(self, size: int, config: PredictorConfig | None = None):
        """``size``: width D of the encoder output."""
        super().__init__()
        self.config, self.size = config or PredictorConfig(), size
        kernel = self.config.l_order + self.config.r_order + 1
        self.cif_conv1d = nn.Conv1d(size, size, kernel, groups=size if self.depthwise else 1)
        self.cif_output = nn.Linear(size, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        layer = self.cif_output
        return layer.dtype if isinstance(layer, PackedLinear) else layer.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        layer = self.cif_output
        return torch.device("cpu") if isinstance(layer, PackedLinear) else layer.weight.device

    def merge_projections(self) -> None:
        """Make the convolution a product of windows, whose bits do not depend on the batch, for inference.

        See :mod:`nar_speech.layers.packed`. It stays float32 where others become int8.
        """
        if not self.depthwise and not isinstance(self.cif_conv1d, WindowProduct):
            self.cif_conv1d = WindowProduct(self.cif_conv1d)
            keep_float(self.cif_conv1d.linear)

    def _context(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) each frame with its neighbours."""
        frames = F.pad(hidden, (0, 0, self.config.l_order, self.config.r_order))
        if isinstance(self.cif_conv1d, WindowProduct):
            return self.cif_conv1d(frames, linear_relu)
        return F.relu(self.cif_conv1d(frames.transpose(1, 2))).transpose(1, 2)

    def _weights(self, context: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) -> weights (B, T) float32, zero past ``lengths``."""
        alphas = _sigmoid(self.cif_output(context).squeeze(-1).float())
        alphas = F.relu(alphas * self.config.smooth_factor - self.config.noise_threshold)
        return alphas * _valid(lengths, alphas.shape[1])

    def alphas(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Weights (B, T) float32 of the frames (B, T, D), without scaling or tail."""
        with no_autocast(hidden):
            return self._weights(self._context(hidden.to(self.dtype)), lengths)

    def forward(
        self,
        hidden: Tensor,
        lengths: Tensor,
        target_lengths: Tensor | None = None,
        official: bool = False,
    ) -> CifOutput:
        """Predict the tokens of a batch.

        Args:
            hidden: (B, T, D) encoder output. Rows past ``lengths`` next to the last valid one are seen by the
                convolution: pass them as zero to get what an item gives alone.
            lengths: (B,) int64 valid frames.
            target_lengths: (B,) int64 training: the weights are scaled to sum to these, all tokens exist.
            official: follow the official implementation where a weight is above 1 (one token end per frame).
        """
        with no_autocast(hidden):
            alphas = self.alphas(hidden, lengths)
            if target_lengths is not None:
                return self.to_targets(hidden, alphas, target_lengths, official)
            return self._infer(hidden, alphas, lengths, self.official_mode if official else "overlap")

    def init_state(self, batch: int, device: torch.device | str | None = None) -> CifState:
        """State of ``batch`` streams that have not begun (:mod:`nar_speech.layers.cif_stream`)."""
        from nar_speech.layers.cif_stream import init_cif

        return init_cif(self, batch, device)

    def step(
        self,
        hidden: Tensor,
        valid: Tensor,
        state: CifState,
        final: Tensor,
        stream: StreamConfig,
        silent: Tensor | None = None,
    ) -> tuple[CifChunk, CifState]:
        """Tokens that end in the next window (B, W, D) of every stream; ``valid`` (B, W) bool rows of it."""
        from nar_speech.layers.cif_stream import step_cif

        return step_cif(self, stream, hidden, valid, state, final, silent)

    @staticmethod
    def scale(alphas: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (B, T) that sum to ``targets`` (B,), their prefix sums, and the sum (B, 1) before."""
        sums = prefix_sums(alphas)
        total, goal = sums[:, -1:], targets[:, None].to(sums.dtype)
        scale = goal / total.clamp_min(1e-6)
        sums = sums * scale
        sums = torch.where(sums > goal - SNAP, goal, sums)  # the last token ends exactly on an integer
        return (alphas * scale).float(), sums, total

    def to_targets(
        self, hidden: Tensor, alphas: Tensor, targets: Tensor, official: bool = False
    ) -> CifOutput:
        """Training: as many tokens as ``targets`` (B,) says, of frames (B, T, D) with weights (B, T)."""
        alphas, sums, total = self.scale(alphas, targets)
        tokens = int(targets.max()) if targets.numel() else 0
        mode = self.official_mode if official else "overlap"
        embeds = integrate(hidden, alphas, sums, targets, tokens, mode)
        return CifOutput(embeds, total.squeeze(1).float(), targets, alphas, self._track(sums))

    def _infer(self, hidden: Tensor, alphas: Tensor, lengths: Tensor, mode: CifMode) -> CifOutput:
        if self.config.tail_threshold > 0:
            hidden, alphas = self._add_tail(hidden, alphas, lengths)
        sums = prefix_sums(alphas)
        total = sums[:, -1]
        counts = total.floor().long()
        if self.config.tail_threshold > 0:
            token_num, token_lengths = counts.float(), counts
        else:
            token_num, token_lengths = total.float(), total.round().long()
        tokens = int(token_lengths.max()) if token_lengths.numel() else 0
        if mode != "overlap":  # several ends in one frame count once
            fired = self._track(sums) >= 1
            counts = torch.minimum(counts, fired.sum(dim=-1))
        embeds = integrate(hidden, alphas, sums, counts, tokens, mode)
        return CifOutput(embeds, token_num, token_lengths, alphas, self._track(sums))

    def _track(self, sums: Tensor) -> Tensor:
        return prefix_track(sums) if self.official_mode == "prefix" else fire_track(sums)

    def _add_tail(self, hidden: Tensor, alphas: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """One more frame of zeros at the end, and the tail weight at the frame after the last valid one."""
        columns = torch.arange(alphas.shape[1] + 1, device=alphas.device)
        place = lengths[:, None] if self.config.tail_mask else alphas.shape[1]
        tail = (columns == place).to(alphas.dtype) * self.config.tail_threshold
        return F.pad(hidden, (0, 0, 0, 1)), F.pad(alphas, (0, 1)) + tail


class CifPredictorV1(CifPredictorV2):
    """Depthwise convolution with a residual connection; the official code integrates frame by frame."""

    depthwise = True
    official_mode: CifMode = "sequential"

    def _context(self, hidden: Tensor) -> Tensor:
        frames = F.pad(hidden, (0, 0, self.config.l_order, self.config.r_order)).transpose(1, 2)
        context = self.cif_conv1d(frames).transpose(1, 2) + hidden
        return F.relu(F.dropout(context, self.config.dropout, self.training))


class CifPredictorV3(CifPredictorV2):
    """V2 with a second head that weighs frames of a higher rate, for time stamps."""

    official_mode: CifMode = "sequential"

    def __init__(self, size: int, config: PredictorConfig | None = None):
        super().__init__(size, config)
        times = self.config.upsample_times
        self.upsample_cnn = nn.ConvTranspose1d(size, size, times, times)
        recurrent = self.config.upsample_type == "cnn_blstm"
        if recurrent:
            self.blstm = nn.LSTM(size, size, batch_first=True, bidirectional=True)
        self.cif_output2 = nn.Linear(2 * size if recurrent else size, 1)

    def fine_alphas(self, hidden: Tensor, lengths: Tensor, official_padding: bool = False) -> Tensor:
        """Weights (B, R * T) float32 of the second head, R = ``upsample_times``, not scaled.

        ``official_padding``: let the backward LSTM run over padded frames, as the official code does, so that
        an item's weights depend on the batch it is in.
        """
        times = self.config.upsample_times
        with no_autocast(hidden):
            hidden = hidden.to(self.dtype)
            context = self._context(hidden) if self.config.use_cif1_cnn else hidden
            fine = self.upsample_cnn(context.transpose(1, 2)).transpose(1, 2)
            fine_lengths = lengths * times
            if self.config.upsample_type == "cnn_blstm":
                fine = self._recur(fine, fine_lengths, official_padding)
            alphas = self.cif_output2(fine).squeeze(-1).float().sigmoid()
            alphas = F.relu(alphas * self.config.smooth_factor2 - self.config.noise_threshold2)
            return alphas * _valid(fine_lengths, alphas.shape[1])

    def _recur(self, fine: Tensor, lengths: Tensor, official_padding: bool) -> Tensor:
        host = lengths.cpu()
        if official_padding or bool((host >= fine.shape[1]).all()):
            return self.blstm(fine)[0]
        packed = pack_padded_sequence(fine, host.clamp_min(1), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.blstm(packed)[0], batch_first=True, total_length=fine.shape[1])[0]

    def forward(
        self,
        hidden: Tensor,
        lengths: Tensor,
        target_lengths: Tensor | None = None,
        official: bool = False,
    ) -> CifOutput:
        """As :meth:`CifPredictorV2.forward`; in training ``token_num2`` is the second head's sum."""
        output = super().forward(hidden, lengths, target_lengths, official)
        if target_lengths is None:
            return output
        token_num2 = self.fine_alphas(hidden, lengths, official).sum(dim=-1)
        return CifOutput(
            output.embeds, output.token_num, output.token_lengths, output.alphas, output.peaks, token_num2
        )

    def times(
        self, hidden: Tensor, lengths: Tensor, token_num: Tensor, official_padding: bool = False
    ) -> CifTimes:
        """Fire tracks of the second head, its weights scaled to sum to the token count.

        Args:
            hidden: (B, T, D) encoder output, rows past ``lengths`` zero.
            lengths: (B,) int64.
            token_num: (B,) tokens that were decoded.
        """
        alphas = self.fine_alphas(hidden, lengths, official_padding)
        total = alphas.sum(dim=-1)
        alphas = alphas * (token_num / total.clamp_min(1e-6))[:, None]
        frame_alphas = alphas.unflatten(1, (-1, self.config.upsample_times)).sum(dim=-1)
        step = 1 - FIRE_SLACK
        return CifTimes(
            alphas,
            fire_track(prefix_sums(alphas), step, step),
            frame_alphas,
            fire_track(prefix_sums(frame_alphas), step, step),
            total,
        )


def _sigmoid(x: Tensor) -> Tensor:
    """sigmoid of (B, T), each row computed as it would be alone."""
    return F.pad(x, (0, -x.shape[1] % LANES)).sigmoid()[:, : x.shape[1]]


def _valid(lengths: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size) float32, one at valid frames."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None]).float()


PREDICTORS: dict[str, type[CifPredictorV2]] = {
    "v1": CifPredictorV1,
    "v2": CifPredictorV2,
    "v3": CifPredictorV3,
}
