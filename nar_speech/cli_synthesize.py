"""``nar-speech synthesize``, ``edit`` and ``models watermark-check``."""

from __future__ import annotations

import argparse
import json

from nar_speech.cli_output import FAILED, OK, SOME_FAILED, complain
from nar_speech.errors import InputError


def check_watermarks(options: argparse.Namespace) -> int:
    """Tell of every file whether it, or a part of it, is marked."""
    from nar_speech.audio import read_audio
    from nar_speech.pipelines.watermark import SAMPLE_RATE, find_watermark, load_watermark

    load_watermark()
    failed = 0
    for file in options.files:
        try:
            whole, *windows = find_watermark(read_audio(file, SAMPLE_RATE).samples, SAMPLE_RATE)
        except InputError as error:
            complain(str(error))
            failed += 1
            continue
        if options.json:
            parts = [{**vars(part), "marked": part.marked} for part in windows]
            print(json.dumps({"path": file, **vars(whole), "marked": whole.marked, "windows": parts}))
            continue
        inside = [part for part in windows if part.marked]
        said = "marked" if whole.marked else "not marked"
        if inside and not all(part.marked for part in windows):
            places = ", ".join(f"{part.start:g}-{part.end:g} s" for part in inside)
            said = f"marked in part: {places}"
        print(f"{file}\t{said} (score {whole.score:.2f})")
    if not failed:
        return OK
    return FAILED if failed == len(options.files) else SOME_FAILED
