"""The embedded streaming model: what ``--stream`` and the server use where no other model is named."""

import json
from pathlib import Path

import torch

from nar_speech import cli, hub, inspection
from nar_speech.engine.asr_files import StreamTranscriber
from nar_speech.metrics import word_error_rate
from nar_speech.text.normalize import normalize_english

torch.set_num_threads(1)
FOLDER = Path(__file__).parent / "data" / "real"
ROWS = [json.loads(line) for line in (FOLDER / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
PATHS = [str(FOLDER / row["path"]) for row in ROWS]
LARGEST = 16_000_000  # bytes of the folder
ONLINE_WER, CORRECTED_WER = 0.25, 0.15


def error_rate(second_pass):
    transcriber = StreamTranscriber.load(device="cpu", second_pass=second_pass)
    texts = [result.transcript.text for result in transcriber.results(PATHS)]
    references = [row["text"] for row in ROWS]
    return word_error_rate(references, [normalize_english(text) for text in texts]).rate, texts


def test_it_is_small_and_known_by_its_name(capsys):
    folder = hub.resolve(hub.TWIN)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST
    assert cli.main(["models", "list"]) == 0
    assert hub.TWIN in capsys.readouterr().out
    assert all(check.passed for check in inspection.verify(hub.TWIN))


def test_text_of_the_stream_alone():
    rate, texts = error_rate("none")
    assert rate <= ONLINE_WER, texts


def test_the_second_pass_corrects_it():
    rate, texts = error_rate(None)
    assert rate <= CORRECTED_WER, texts


def test_the_command_line_needs_no_name_of_a_model(capsys):
    assert cli.main(["transcribe", "--stream", PATHS[0], "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert (out.strip() != "", err) == (True, "")
