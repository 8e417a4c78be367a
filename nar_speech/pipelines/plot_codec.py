"""A picture of a recording and what a codec made of it: two spectrograms on one scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nar_speech.pipelines.plot import save_picture

PLOT_SECONDS = 20.0
RANGE = 90.0  # dB below the loudest bin that are shown
WINDOW, HOP = 1024, 256


def plot_codec(
    original: np.ndarray, decoded: np.ndarray, sample_rate: int, path: str | Path, title: str
) -> None:
    """Draw the first 20 seconds of both signals (C, N), channels averaged, into an image file.

    Args:
        path: its suffix names the format, .png for example.

    Raises:
        InputError: the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = round(PLOT_SECONDS * sample_rate)
    pictures = [_decibels(signal.mean(0)[:most]) for signal in (original, decoded)]
    loudest = max(float(picture.max()) for picture in pictures)
    seconds = min(original.shape[1], most) / sample_rate
    figure = Figure(figsize=(min(max(6.0, 1.2 * seconds), 24.0), 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"))
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for axis, picture, name in zip(axes, pictures, ("original", "decoded"), strict=True):
        image = axis.imshow(
            picture,
            origin="lower",
            aspect="auto",
            extent=(0.0, seconds, 0.0, sample_rate / 2000),
            vmin=loudest - RANGE,
            vmax=loudest,
            cmap="magma",
        )
        axis.set_ylabel(f"{name}\nfrequency (kHz)")
    axes[1].set_xlabel("time (s)")
    figure.colorbar(image, ax=axes, label="dB")
    save_picture(figure, path)


def _decibels(signal: np.ndarray) -> np.ndarray:
    """(F, T) power spectrum in dB."""
    padded = np.pad(signal, (WINDOW // 2, WINDOW // 2 + HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)).T
    return 20 * np.log10(np.maximum(spectrum, 1e-6))
