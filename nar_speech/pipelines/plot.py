"""A picture of a recognition: spectrogram, CIF weights or CTC posteriors, and where the tokens are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nar_speech.audio import AudioSource, read_audio
from nar_speech.errors import InputError
from nar_speech.pipelines.recognize import Analysis
from nar_speech.types import Token

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Transcriber

logger = logging.getLogger(__name__)
PLOT_SECONDS = 20.0
INCHES_PER_SECOND = 1.5
POSTERIOR_CURVES = 12
FIRST_EAST_ASIAN = 0x2E7F  # what DejaVu Sans lacks begins behind this character
EAST_ASIAN_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


def plot_recognition(transcriber: Transcriber, source: AudioSource, path: str | Path, **options: Any) -> None:
    """Draw the first 20 seconds of a recording into an image file.

    Args:
        path: its suffix names the format, .png for example.
        options: as in a call of ``transcriber``.

    Raises:
        InputError: the picture can't be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    audio = read_audio(source, transcriber.sample_rate, duration=PLOT_SECONDS)
    transcript = transcriber(audio, **options)
    decoding = transcriber.decoding_for(options)
    analysis = transcriber.recognizer.analyse(audio.samples, decoding)
    tokens = [token for segment in transcript.segments for token in segment.tokens]
    with rc_context({"font.family": _fonts(transcript.text)}):
        size = min(max(audio.duration * INCHES_PER_SECOND, 8), 32), 6
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # no window and no global state, unlike pyplot
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _draw_features(upper, analysis, audio.duration)
        # Verified tokens are of the verifier's vocabulary: then the curves are the network's own best.
        ids = None if decoding.verify else [token.id for token in tokens]
        _draw_output(lower, analysis, ids, transcriber.recognizer.tokenizer.pieces)
        for axis, top in ((upper, True), (lower, False)):
            _draw_tokens(axis, tokens, names=top)
        upper.set_title(_plain(transcript.text[:160]), fontsize=9, pad=18)
        lower.set_xlabel("seconds")
        lower.set_xlim(0, audio.duration)
        save_picture(figure, path)


def check_picture(path: str | Path) -> None:
    """Whether a picture can be written there, before the work that it shows.

    Raises:
        InputError: a suffix of no picture, or no such folder.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    path, known = Path(path), FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower()[1:] not in known:
        raise InputError(f"{path}: not a picture's suffix; use .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder; make it first")


def save_picture(figure: Any, path: Any) -> None:
    """Write a matplotlib figure.

    Raises:
        InputError: the suffix is of no picture, or the file can't be written.
    """
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: can't write the picture: {reason}; use a .png file in a folder that exists"
        ) from error


def _fonts(text: str) -> list[str]:
    """matplotlib's default font and, for East Asian text, the first installed font that has its glyphs."""
    default = ["DejaVu Sans"]
    if not any(ord(character) > FIRST_EAST_ASIAN for character in text):
        return default
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    found = next((name for name in EAST_ASIAN_FONTS if name in installed), None)
    if found is None:
        logger.warning(
            "the picture shows boxes for East Asian characters: no font has them; install fonts-noto-cjk"
        )
        return default
    return [*default, found]


def _draw_features(axis: Any, analysis: Analysis, duration: float) -> None:
    """Features over time; of stacked frames the middle one."""
    axis.imshow(
        analysis.features.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        extent=(0, len(analysis.features) * analysis.feature_seconds, 0, analysis.features.shape[1]),
    )
    axis.set_ylabel("feature")


def _draw_output(axis: Any, analysis: Analysis, ids: Sequence[int] | None, pieces: Any) -> None:
    """CIF weights as bars; posteriors of the tokens ``ids``, or of the best of each frame, as curves."""
    step = analysis.frame_seconds
    if analysis.weights is not None:
        times = (np.arange(len(analysis.weights)) + 0.5) * step
        axis.bar(times, analysis.weights, width=step, color="tab:blue", alpha=0.6, label="CIF weight")
        axis.set_ylabel("CIF weight")
    if analysis.posteriors is not None:
        times = (np.arange(len(analysis.posteriors)) + 0.5) * step
        if ids is None:
            ids = [index for index in analysis.posteriors.argmax(-1).tolist() if index != analysis.blank]
        shown = list(dict.fromkeys(ids))
        strongest = sorted(shown, key=lambda i: -analysis.posteriors[:, i].max())[:POSTERIOR_CURVES]
        axis.plot(times, analysis.posteriors[:, analysis.blank], color="0.7", lw=0.8, label="blank")
        for index in strongest:
            label = " " + _plain(pieces([index])[0])  # a legend leaves out labels that begin with "_"
            axis.plot(times, analysis.posteriors[:, index], lw=1, label=label)
        axis.set_ylabel("weight, posterior" if analysis.weights is not None else "CTC posterior")
    axis.set_ylim(0, 1.05)
    axis.legend(fontsize=7, ncols=7, loc="upper right")


def _draw_tokens(axis: Any, tokens: Sequence[Token], names: bool) -> None:
    """A line where each token begins, and its text above."""
    for token in tokens:
        axis.axvline(token.start, color="tab:green", lw=0.6, alpha=0.8)
        if names:
            middle = (token.start + token.end) / 2
            axis.annotate(
                _plain(token.text),
                (middle, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7,
            )


def _plain(text: str) -> str:
    """Dollar signs would start a formula."""
    return text.replace("$", r"\$").replace("\u2581", "_")
