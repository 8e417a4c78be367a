"""A picture of masked sampling: which positions were masked, fixed and masked again, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nar_speech.pipelines.plot import save_picture
from nar_speech.sampling.trace import ItemTrace

MASKED, GIVEN, AGAIN = (0.16, 0.17, 0.2), (0.78, 0.83, 0.9), (0.85, 0.15, 0.15)
COLOURS = "viridis"
PALE = 0.45  # share of the colour that a position keeps after the step in which it was fixed
INCHES_PER_STEP, INCHES_PER_FRAME = 0.11, 0.022


def step_colours(trace: ItemTrace, stage: int) -> np.ndarray:
    """(S, T, 3) colours of one codebook's calls, in [0, 1].

    A position is dark while it stays masked, takes a colour of its own in the step that gives it its last
    token, is pale after that, red where a fixed one was masked again, and light where it was given.
    """
    from matplotlib import colormaps

    masked = trace.masked[trace.stage == stage]
    steps, length = masked.shape
    fixed_at = trace.fixed_at(stage)
    calls = np.arange(1, steps + 1)[:, None]
    own = colormaps[COLOURS](fixed_at / max(steps, 1))[:, :3]
    picture = np.broadcast_to(1 - PALE * (1 - own), (steps, length, 3)).copy()
    picture[masked] = MASKED
    before = np.concatenate([np.ones((1, length), bool), masked[:-1]]) if steps else masked
    picture[masked & ~before] = AGAIN
    newly = masked & (fixed_at == calls)
    picture[newly] = np.broadcast_to(own, picture.shape)[newly]
    picture[:, trace.fixed[stage]] = GIVEN
    return picture


def plot_steps(
    traces: ItemTrace | Sequence[ItemTrace], path: str | Path, frame_rate: float, title: str = ""
) -> None:
    """Draw the steps of one clip into an image file.

    One panel per codebook, time to the right and steps downwards; below, in which step each code was fixed.

    Args:
        traces: of the clip, or of each of its windows, which are drawn side by side.
        path: its suffix names the format, .png for example.
        frame_rate: code frames per second. Time is that of the clip.

    Raises:
        InputError: the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    traces = [traces] if isinstance(traces, ItemTrace) else list(traces)
    codebooks = len(traces[0].fixed)
    heights = [max([int((t.stage == k).sum()) for t in traces] + [1]) for k in range(codebooks)]
    widths = [max(t.masked.shape[1], 1) for t in traces]
    inches = sum(h * INCHES_PER_STEP + 0.35 for h in heights) + 1.4
    size = min(max(sum(widths) * INCHES_PER_FRAME, 8), 32), min(max(inches, 4), 40)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window and no global state, unlike pyplot
    ratios = [max(h, 3) for h in heights] + [max(codebooks, 3)]
    axes = figure.subplots(
        codebooks + 1, len(traces), squeeze=False, height_ratios=ratios, width_ratios=widths
    )
    for column, trace in enumerate(traces):
        span = trace.begin / frame_rate, (trace.begin + trace.masked.shape[1]) / frame_rate
        for stage in range(codebooks):
            _draw_stage(axes[stage, column], trace, stage, span, first=column == 0)
        image = _draw_summary(axes[-1, column], trace, span)
        if column == 0:
            axes[-1, 0].set_ylabel("codebook")
        if column == len(traces) - 1:
            figure.colorbar(image, ax=axes[-1, column], label="share of steps")
    if title:
        figure.suptitle(title[:160].replace("$", r"\$"), fontsize=9)
    save_picture(figure, path)


def _draw_stage(axis: Any, trace: ItemTrace, stage: int, span: tuple[float, float], first: bool) -> None:
    """Calls of one codebook, downwards."""
    picture = step_colours(trace, stage)
    calls = np.flatnonzero(trace.stage == stage)
    axis.set_xticklabels([])
    if not len(calls):
        axis.text(0.5, 0.5, "given", ha="center", va="center", transform=axis.transAxes)
        axis.set_yticks([])
        return
    axis.imshow(picture, aspect="auto", interpolation="nearest", extent=(*span, len(calls) + 0.5, 0.5))
    heat, guide = trace.temperature[calls], trace.guidance[calls]
    axis.set_title(
        f"codebook {stage}: temperature {heat[0]:.2g} to {heat[-1]:.2g},"
        f" guidance {guide[0]:.3g} to {guide[-1]:.3g}",
        fontsize=7,
        loc="left",
        pad=2,
    )
    axis.yaxis.get_major_locator().set_params(integer=True)
    if first:
        axis.set_ylabel("step")


def _draw_summary(axis: Any, trace: ItemTrace, span: tuple[float, float]) -> Any:
    """(K, T) in which share of its stage's steps every code was fixed."""
    codebooks, length = trace.fixed.shape
    shares = np.full((codebooks, length), np.nan)
    for stage in range(codebooks):
        calls = int((trace.stage == stage).sum())
        fixed_at = trace.fixed_at(stage)
        shares[stage] = np.where(fixed_at > 0, fixed_at / max(calls, 1), np.nan)
    axis.set_facecolor(GIVEN)
    axis.set_xlabel("seconds")
    axis.set_yticks(np.arange(codebooks))
    return axis.imshow(
        shares,
        aspect="auto",
        interpolation="nearest",
        cmap=COLOURS,
        vmin=0,
        vmax=1,
        extent=(*span, codebooks - 0.5, -0.5),
    )
