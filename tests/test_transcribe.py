"""The transcriber: cutting, batching, order, failures, times, formats, evaluation, plots."""

import json
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nar_speech
from nar_speech.errors import AudioError, ConfigError, InputError, ManifestError, NarSpeechError
from nar_speech.model_folder import SegmentConfig
from nar_speech.pipelines import plot, writers
from nar_speech.pipelines import segment as segments
from nar_speech.pipelines.evaluate import evaluate, read_manifest, report_lines
from nar_speech.pipelines.plot import plot_recognition
from nar_speech.pipelines.recognize import tidy
from nar_speech.pipelines.segment import Segmenter
from nar_speech.search.parallel import best_sequences
from nar_speech.types import Audio, Segment, Transcript, Word
from tests.model_folders import DECODER, ctc_folder, paraformer_folder, sensevoice_folder

torch.set_num_threads(1)
RATE = 16000
HOTWORD_DECODER = {**DECODER, "att_layer_num": 6, "embed": False, "output_layer": False}


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, int(RATE * seconds)).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"paraformer": paraformer_folder(base / "p"), "ctc": ctc_folder(base / "c")}


@pytest.fixture(scope="module")
def models(folders):
    return {name: nar_speech.load_model(folder, device="cpu") for name, folder in folders.items()}


# ---- cutting ----


class LoudnessVad:
    """Speech where a window is loud; needs no model and has no state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, lanes):
        self.calls += 1
        return np.where(np.abs(lanes).max(-1) > 0.05, 0.9, 0.1).astype(np.float32)


def recording(parts):
    """Parts (speech?, windows) as samples; speech windows are noise, others zero."""
    rng = np.random.default_rng(0)
    made = [(rng.uniform(0.1, 0.2, n * 512) * (1 if speech else 0)).astype(np.float32) for speech, n in parts]
    return np.concatenate([*made, np.zeros(0, np.float32)])


def blocks_of(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.booleans(), st.integers(1, 120)), max_size=25),
    tail=st.integers(0, 511),
    block=st.sampled_from([100, 4096, 50_000, 10_000_000]),
    lanes=st.sampled_from([(4, 2), (16, 3), (256, 32)]),
)
def test_cutting_keeps_all_speech_in_order_and_within_the_limits(parts, tail, block, lanes):
    config = SegmentConfig(
        whole=1.0, merge=2.0, longest=3.0, gap=0.5, min_speech=0.1, min_silence=0.2, pad=0.1
    )
    samples = np.concatenate([recording(parts), np.zeros(tail, np.float32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "LANE_WINDOWS", lanes[0])
        patch.setattr(segments, "LANES", lanes[1])
        pieces = list(Segmenter(config, RATE, LoudnessVad())(blocks_of(samples, block)))
    if len(samples) <= RATE:
        assert [len(p.samples) for p in pieces] == ([len(samples)] if len(samples) else [])
        return
    end = 0
    covered = np.zeros(len(samples), bool)
    for piece in pieces:
        begin = round(piece.start * RATE)
        assert begin >= end
        end = begin + len(piece.samples)
        assert end <= len(samples)
        assert np.array_equal(piece.samples, samples[begin:end])
        assert len(piece.samples) <= (config.longest + 2 * config.pad) * RATE
        covered[begin:end] = True
    loud = samples > 0
    if not pieces:
        assert loud.sum() <= len(parts) * config.min_speech * RATE + 512 * len(parts)
        return
    # Only stretches shorter than min_speech may be left out.
    lost = np.flatnonzero(loud & ~covered)
    runs = np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1)
    assert all(len(run) <= config.min_speech * RATE + 512 for run in runs)


def test_cuts_do_not_depend_on_blocks_or_lanes():
    samples = recording([(True, 40), (False, 30), (True, 300), (False, 5), (True, 20), (False, 90)] * 3)
    config = SegmentConfig(whole=1.0, merge=4.0, longest=6.0)
    results = []
    for block, lane in ((700, 8), (100_000, 64), (10**9, 256)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments, "LANE_WINDOWS", lane)
            pieces = Segmenter(config, RATE, LoudnessVad())(blocks_of(samples, block))
            results.append([(p.start, len(p.samples)) for p in pieces])
    assert results[0] == results[1] == results[2]
    assert len(results[0]) > 3


def test_an_overlong_stretch_is_cut_where_speech_is_least_likely():
    class Dip:
        def __call__(self, lanes):
            found = np.where(np.abs(lanes).max(-1) > 0, 0.9, 0.1)
            return np.where(np.abs(lanes).max(-1) > 0.5, 0.6, found).astype(np.float32)

    samples = np.full(512 * 150, 0.2, np.float32)
    samples[512 * 70 : 512 * 71] = 0.7  # the dip, inside the second half of the first 3 seconds
    pieces = list(Segmenter(SegmentConfig(whole=1.0, merge=3.0, longest=3.0), RATE, Dip())([samples]))
    assert round(pieces[1].start * RATE) == 512 * 70
    assert sum(len(p.samples) for p in pieces) == len(samples)


def test_short_audio_goes_whole_and_without_a_model():
    segmenter = Segmenter(SegmentConfig(), RATE)
    pieces = list(segmenter(blocks_of(noise(19.9), 30_000)))
    assert [(p.start, len(p.samples)) for p in pieces] == [(0.0, int(19.9 * RATE))]
    assert segmenter.vad is None


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_silero_finds_no_speech_in_noise_and_leaves_the_threads_alone(rate):
    before = torch.get_num_threads()
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.003, rate * 25).astype(np.float32)
    assert list(Segmenter(SegmentConfig(), rate)(blocks_of(samples, rate))) == []
    assert torch.get_num_threads() == before


def test_rates_without_a_voice_activity_model_are_refused():
    with pytest.raises(ConfigError, match="recordings of 22050 Hz can't be cut"):
        list(Segmenter(SegmentConfig(whole=1.0), 22050)([np.zeros(44100, np.float32)]))


# ---- the transcriber ----


@pytest.mark.parametrize("name", ["paraformer", "ctc"])
def test_batches_equal_singles_and_keep_the_order(models, name):
    items = [(noise(s, i), RATE) for i, s in enumerate((3.0, 0.3, 1.7, 0.01, 2.2, 0.9))]
    single = [models[name](item) for item in items]
    for seconds in (0.1, 5.0, 1000.0):
        together = models[name](items, batch_seconds=seconds)
        assert [t.text for t in together] == [t.text for t in single]
        assert [t.duration for t in together] == [t.duration for t in single]
        for a, b in zip(together, single, strict=True):
            assert [w.text for w in a.words] == [w.text for w in b.words]
            assert np.allclose([w.start for w in a.words], [w.start for w in b.words], atol=1e-4)
            assert a.confidence == pytest.approx(b.confidence, abs=1e-4)
    assert models[name](items)[0] == models[name](items)[0]


def test_all_kinds_of_inputs(models, tmp_path):
    samples = noise(0.5)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "b.flac", samples, RATE)
    model = models["paraformer"]
    want = model(samples).text
    path = tmp_path / "a.wav"
    sources = [
        path,
        str(path),
        path.read_bytes(),
        BytesIO(path.read_bytes()),
        (samples, RATE),
        Audio(samples, RATE),
    ]
    assert [t.text for t in model(sources)] == [want] * len(sources)
    assert model(path).source == str(path)
    assert model(samples).source is None
    assert [t.source for t in model(tmp_path)] == [str(tmp_path / "a.wav"), str(tmp_path / "b.flac")]
    assert [t.text for t in model(iter([samples]))] == [want]
    assert model([]) == []


def test_standard_input(models, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(0.5), RATE)
    data = (tmp_path / "a.wav").read_bytes()
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": BytesIO(data)}))
    assert models["ctc"]("-").text == models["ctc"](tmp_path / "a.wav").text


def test_one_bad_input_among_good_ones(models, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    good = (noise(0.5), RATE)
    results = list(
        models["ctc"].results([good, tmp_path / "bad.wav", good, np.full(100, np.nan, np.float32)])
    )
    assert [r.error is None for r in results] == [True, False, True, False]
    assert "bad.wav" in str(results[1].error)
    assert results[0].transcript.text == results[2].transcript.text
    with pytest.raises(AudioError, match=r"bad\.wav"):
        models["ctc"]([good, tmp_path / "bad.wav"])


def test_a_failing_batch_item_is_isolated(models, monkeypatch):
    model = models["paraformer"]
    encode = model.recognizer.network.encode

    def fail_on_long_items(feats, lengths):
        if int(lengths.max()) > 30:  # 1.8 s
            raise torch.OutOfMemoryError("tried to allocate everything")
        return encode(feats, lengths)

    monkeypatch.setattr(model.recognizer.network, "encode", fail_on_long_items)
    results = list(model.results([(noise(s), RATE) for s in (1.0, 2.5, 1.2, 1.1)]))
    assert [r.error is None for r in results] == [True, False, True, True]
    assert "out of memory" in str(results[1].error)


@pytest.mark.parametrize("name", ["paraformer", "ctc"])
@pytest.mark.parametrize("place", ["encoder.after_norm", "ctc.ctc_lo"])
def test_nan_is_an_error(folders, name, place):
    model = nar_speech.load_model(folders[name], device="cpu", decoder="ctc_greedy")
    model.recognizer.network.get_submodule(place).bias.data.fill_(float("nan"))
    with pytest.raises(NarSpeechError, match="the network gave NaN"):
        model(noise(1.0))
    if name == "paraformer" and place.startswith("encoder"):
        with pytest.raises(NarSpeechError, match="the network gave NaN"):
            model(noise(1.0), decoder="paraformer")


@pytest.mark.parametrize("name", ["paraformer", "ctc"])
@settings(max_examples=15, deadline=None)
@given(samples=st.integers(1, 40_000), seed=st.integers(0, 99))
def test_word_and_token_times_are_sane(models, name, samples, seed):
    wave = noise(3.0, seed)[:samples]
    transcript = models[name](wave)
    for units in (transcript.words, transcript.segments[0].tokens):
        times = [t for unit in units for t in (unit.start, unit.end)]
        assert times == sorted(times)
        assert all(0 <= t <= transcript.duration + 1e-9 for t in times)
        assert all(0 <= unit.confidence <= 1 for unit in units)
    assert "".join(w.text for w in transcript.words) == transcript.text.replace(" ", "")


def test_times_can_be_left_out(models):
    transcript = models["paraformer"](noise(1.0), times=False)
    assert transcript.words == ()
    assert transcript.text == models["paraformer"](noise(1.0)).text


def test_pieces_of_a_long_recording_keep_their_place(models, monkeypatch):
    model = models["paraformer"]
    config = SegmentConfig(whole=1.0, merge=2.0, longest=3.0)
    monkeypatch.setattr(model, "segmenters", {config: Segmenter(config, RATE, LoudnessVad())})
    samples = recording([(False, 60), (True, 50), (False, 100), (True, 30), (False, 20)])
    transcript = model(samples, segments=config)
    assert [round(s.start, 2) for s in transcript.segments] == [1.72, 6.52]
    for segment in transcript.segments:
        assert all(segment.start <= w.start <= w.end <= segment.end + 1e-9 for w in segment.words)
    alone = model(samples[round(1.72 * RATE) : round(1.72 * RATE) + 32000], segments=config)
    assert transcript.text == " ".join(s.text for s in transcript.segments)
    assert alone.duration == 2.0


def test_silence_gives_an_empty_transcript(models):
    transcript = models["ctc"](np.zeros(RATE * 30, np.float32))
    assert (transcript.text, transcript.segments, transcript.duration) == ("", (), 30.0)
    assert transcript.confidence == 0.0


def test_memory_does_not_grow_with_the_recording(models, monkeypatch):
    """The cutter never holds more audio than its lanes, the longest piece and a block."""
    model = models["ctc"]
    config = SegmentConfig(whole=1.0, merge=3.0, longest=4.0)
    segmenter = Segmenter(config, RATE, LoudnessVad())
    monkeypatch.setattr(model, "segmenters", {config: segmenter})
    monkeypatch.setattr(segments, "LANES", 2)
    held, judge = [], segmenter._probabilities
    monkeypatch.setattr(
        segmenter, "_probabilities", lambda warm, windows: held.append(len(windows)) or judge(warm, windows)
    )
    kept, add = [], segments._Joined.needed
    monkeypatch.setattr(
        segments._Joined,
        "needed",
        lambda self, window: kept.append(window * 512 - add(self, window)) or add(self, window),
    )
    block = recording([(True, 40), (False, 900)])

    def endless(source, rate, block_seconds):
        yield from [block] * 60

    monkeypatch.setattr("nar_speech.pipelines.transcribe.read_blocks", endless)
    transcript = model("anything.wav", segments=config)
    assert transcript.duration == pytest.approx(60 * len(block) / RATE)
    assert len(transcript.segments) == 60
    assert max(held) == 2 * segments.LANE_WINDOWS
    assert max(kept) <= (config.longest + config.gap + 1) * RATE


# ---- decoders and options ----


def test_decoders(models):
    wave = noise(1.5)
    paraformer, ctc = models["paraformer"], models["ctc"]
    assert paraformer(wave).text == paraformer(wave, decoder="paraformer").text
    assert ctc(wave).text == ctc(wave, decoder="ctc_greedy").text
    for model in (paraformer, ctc):
        beam = model(wave, decoder="ctc_beam", beam=8, nbest=4)
        hypotheses = beam.segments[0].nbest
        assert 1 <= len(hypotheses) <= 4
        assert hypotheses[0].text == beam.text
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
    rescored = ctc(wave, decoder="attention_rescoring", nbest=3)
    assert rescored.segments[0].nbest[0].text == rescored.text


def test_nbest_of_a_parallel_decoder_is_exact():
    torch.manual_seed(0)
    log_probs = torch.randn(4, 5).log_softmax(-1)
    grid = torch.cartesian_prod(*[torch.arange(5)] * 4)
    scores = log_probs[torch.arange(4), grid].double().sum(1)
    best = scores.argsort(descending=True)[:30]
    got = best_sequences(log_probs, 30)
    assert [ids for ids, _ in got] == [tuple(grid[i].tolist()) for i in best]
    assert np.allclose([score for _, score in got], scores[best])
    assert best_sequences(torch.zeros(0, 5), 3) == [((), 0.0)]


def test_nbest_of_the_paraformer(models):
    transcript = models["paraformer"](noise(1.0), nbest=3)
    hypotheses = transcript.segments[0].nbest
    assert hypotheses[0].text == transcript.text
    assert len({h.text for h in hypotheses}) == len(hypotheses)


def test_hotwords_change_a_beam_search(models):
    wave = noise(2.0)
    plain = models["ctc"](wave, decoder="ctc_beam", beam=31)
    biased = models["ctc"](wave, hotwords=("hello",), hotword_score=30.0, beam=31)
    assert "hello" in biased.text.replace(" ", "")
    assert "hello" not in plain.text


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ctc", {"decoder": "paraformer"}, "decoder 'paraformer': this is a CTC model"),
        ("paraformer", {"decoder": "attention_rescoring"}, "only U2 models"),
        ("paraformer", {"decoder": "paraformer", "hotwords": ("a",)}, "takes none; use ctc_beam"),
        ("ctc", {"decoder": "ctc_greedy", "nbest": 2}, "use ctc_beam"),
        ("ctc", {"hotwords": ("naïve",)}, "hotword 'naïve': the model's vocabulary can't spell it"),
        ("ctc", {"language": "zh"}, "language: 'zh' is not one of this model's: auto, en"),
        ("ctc", {"textnorm": "withitn"}, "textnorm: 'withitn' is a prompt of SenseVoice models"),
        ("ctc", {"batch_seconds": 0.0}, "batch_seconds: got 0"),
        ("ctc", {"batch_seconds": "a"}, "batch_seconds: got 'a'; must be a number above 0"),
        ("ctc", {"batch_seconds": float("nan")}, "batch_seconds: got nan"),
        ("ctc", {"hotword_score": float("inf")}, "hotword_score: got inf; must be a finite number"),
        ("ctc", {"hotword_score": -1.0}, "hotword_score: got -1; must be 0 to"),
        ("ctc", {"bream": 3}, "options: unknown key 'bream'"),
        ("ctc", {"beam": -1}, "beam: got -1"),
    ],
)
def test_wrong_options_fail_before_anything_runs(models, name, options, words):
    with pytest.raises(InputError) as caught:
        models[name].results([noise(1.0)], **options)
    assert words in str(caught.value)


def test_a_paraformer_without_ctc_head_says_so(tmp_path):
    model = nar_speech.load_model(paraformer_folder(tmp_path / "m", ctc_weight=0.0), device="cpu")
    transcript = model(noise(2.0))
    assert transcript.words[-1].end <= 2.0  # times from the CIF weights
    with pytest.raises(ConfigError, match="no CTC head; use paraformer"):
        model(noise(1.0), decoder="ctc_beam")
    with pytest.raises(ConfigError, match="no CTC head and no hotword decoder"):
        model(noise(1.0), hotwords=("hello",))


def test_sensevoice_prompts_and_tags(tmp_path):
    model = nar_speech.load_model(sensevoice_folder(tmp_path / "m"), device="cpu")
    wave = noise(2.0)
    plain = model(wave)
    assert plain.tags == ()  # this small vocabulary has none
    pieces = model.recognizer.tokenizer._pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.recognizer.tokenizer, "_pieces", [f"<|{p}|>" for p in ["yue"] * len(pieces)])
        tagged = model(wave)
    assert (tagged.tags, tagged.language) == (("yue",), "yue")
    assert plain.words[-1].end <= 2.0
    assert model(wave, language="zh", textnorm="withitn").segments != plain.segments
    assert model(wave, language="auto", textnorm="woitn") == plain
    with pytest.raises(ConfigError, match="language: 'de' is not one of this model's: auto, zh"):
        model(wave, language="de")
    assert model(wave, decoder="ctc_beam", nbest=2).segments[0].nbest


@pytest.mark.parametrize("variant", ["bicif", "contextual", "seaco"])
def test_paraformer_variants(tmp_path, variant):
    conf = {"hotword_conf": {"inner_dim": 32, "no_bias": 30, "decoder": HOTWORD_DECODER}, "ctc_weight": 0.0}
    if variant != "contextual":
        conf["predictor"] = "v3"
    model = nar_speech.load_model(paraformer_folder(tmp_path / "m", variant=variant, **conf), device="cpu")
    waves = [noise(2.0), noise(0.7, 1)]
    together, single = model(waves), [model(wave) for wave in waves]
    assert [t.text for t in together] == [t.text for t in single]
    times = [t for word in together[0].words for t in (word.start, word.end)]
    assert times == sorted(times)
    assert times[-1] <= 2.0
    if variant == "bicif":
        with pytest.raises(ConfigError, match="no CTC head and no hotword decoder"):
            model(waves[0], hotwords=("hello",))
    else:
        assert model(waves[0], hotwords=("hello", "world")).duration == 2.0


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["paraformer", "ctc"])
def test_other_dtypes_run(folders, name, dtype):
    model = nar_speech.load_model(folders[name], device="cpu", dtype=dtype)
    transcript = model(noise(1.0))
    assert 0 <= transcript.confidence <= 1
    assert transcript.duration == 1.0


def test_int8_is_for_the_cpu(folders, monkeypatch):
    monkeypatch.setattr("nar_speech.pipelines.transcribe.pick_device", lambda _: torch.device("cuda"))
    with pytest.raises(ConfigError, match="int8"):
        nar_speech.load_model(folders["ctc"], dtype="int8")


def test_tidy():
    assert tidy([], [], 1.0) == ((), ())
    starts, ends = tidy([-0.5, 0.3, 0.2, 5.0], [0.4, 0.25, 0.5, 6.0], 1.0)
    assert starts == (0.0, 0.3, 0.3, 1.0)
    assert ends == (0.3, 0.3, 0.5, 1.0)


# ---- writers ----


def transcript_of(*words, text=None):
    words = tuple(Word(t, s, e, 0.5) for t, s, e in words)
    text = text or writers.join_texts(w.text for w in words)
    segment = Segment(text, words[0].start, words[-1].end, 0.5, words)
    return Transcript(text, (segment,), words[-1].end, "en", "a.wav")


SHORT = transcript_of(("hello", 0.5, 0.9), ("<world>", 1.0, 1.25))


def test_formats():
    assert writers.write_txt(SHORT) == "hello <world>\n"
    assert writers.write_srt(SHORT) == "1\n00:00:00,500 --> 00:00:01,250\nhello <world>\n\n"
    assert writers.write_vtt(SHORT) == "WEBVTT\n\n00:00:00.500 --> 00:00:01.250\nhello &lt;world&gt;\n\n"
    assert writers.write_tsv(SHORT) == "start\tend\ttext\n500\t1250\thello <world>\n"
    assert writers.write_words(SHORT).splitlines()[1] == "1.000\t1.250\t0.500\t<world>"
    assert json.loads(writers.write_json(SHORT)) == json.loads(writers.write_jsonl(SHORT))
    assert json.loads(writers.write_json(SHORT))["segments"][0]["words"][0]["text"] == "hello"
    assert writers.write_jsonl(SHORT).count("\n") == 1
    empty = Transcript("", (), 3.0)
    assert (writers.write_txt(empty), writers.write_srt(empty)) == ("\n", "")
    assert writers.write_vtt(empty) == "WEBVTT\n\n"


def test_clock():
    assert writers.clock(0.0, ",") == "00:00:00,000"
    assert writers.clock(59.9996, ",") == "00:01:00,000"
    assert writers.clock(3661.5, ".") == "01:01:01.500"
    assert writers.clock(360000, ".") == "100:00:00.000"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("abc天地", min_size=1, max_size=30), st.floats(0.05, 3), st.floats(0, 2)),
        min_size=1,
        max_size=40,
    )
)
def test_long_segments_become_subtitles_that_fit(parts):
    words, clock = [], 0.0
    for text, length, pause in parts:
        words.append((text, clock, clock + length))
        clock += length + pause
    transcript = transcript_of(*words)
    cues = list(writers.make_cues(transcript))
    assert "".join(c.text for c in cues).replace(" ", "") == transcript.text.replace(" ", "")
    ends = [t for c in cues for t in (c.start, c.end)]
    assert ends == sorted(ends)
    for cue in cues:
        assert cue.end - cue.start <= writers.CUE_SECONDS + 1e-9
        assert len(cue.text) <= writers.CUE_CHARACTERS
    stamp = r"\d{2,}:[0-5]\d:[0-5]\d"
    lines = writers.write_srt(transcript).split("\n")
    times = [line for line in lines if "-->" in line]
    assert len(times) == len(cues)
    assert all(re.fullmatch(rf"{stamp},\d{{3}} --> {stamp},\d{{3}}", line) for line in times)


def test_chinese_is_joined_without_spaces():
    assert writers.join_texts(["你好", "世界", "ok", "", "go"]) == "你好世界 ok go"


# ---- evaluation and plots ----


@pytest.fixture
def manifest(models, tmp_path):
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", noise(1.0, i), RATE, subtype="FLOAT")
    texts = [models["ctc"](tmp_path / f"{i}.wav").text for i in range(3)]
    lines = [{"path": f"{i}.wav", "text": text} for i, text in enumerate(texts)]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_a_perfect_score(models, manifest):
    found = evaluate(models["ctc"], manifest)
    assert (found.words.rate, found.characters.rate, len(found.items)) == (0.0, 0.0, 3)
    assert found.problems == ()
    assert found.audio_seconds == 3.0
    json.dumps(found.to_dict())


def test_bad_lines_and_files_are_left_out_and_named(models, manifest):
    lines = [
        *manifest.read_text().splitlines(),
        "not json",
        '["list"]',
        '{"path": "0.wav"}',
        '{"path": 3, "text": "x"}',
        '{"path": "", "text": "x"}',
        '{"path": "gone.wav", "text": "x"}',
        '{"path": "1.wav", "text": "something else entirely"}',
    ]
    manifest.write_text("\n".join(lines))
    found = evaluate(models["ctc"], manifest)
    assert len(found.items) == 4
    assert found.words.rate > 0
    assert [re.search(r"m\.jsonl:(\d+)", p)[1] for p in found.problems] == ["5", "6", "7", "8", "9", "10"]
    report = "\n".join(report_lines(found))
    assert "excluded: " in report
    assert "REF: something else entirely" in report


def test_manifests_that_are_no_use(models, tmp_path):
    path = tmp_path / "m.jsonl"
    for data, words in ((None, "can't be read"), (b"", "has no lines"), (b"\xff\xfe", "is not UTF-8")):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ManifestError, match=words):
            read_manifest(path)
    path.write_text('{"path": "gone.wav", "text": "x"}')
    with pytest.raises(ManifestError, match=r"no utterance could be scored.*gone\.wav"):
        evaluate(models["ctc"], path)


def test_fonts_of_plots(monkeypatch, caplog):
    from types import SimpleNamespace

    from matplotlib.font_manager import fontManager

    assert plot._fonts("caf\u00e9 \u00fcber") == ["DejaVu Sans"]
    monkeypatch.setattr(fontManager, "ttflist", [SimpleNamespace(name="SimHei"), SimpleNamespace(name="X")])
    assert plot._fonts("\u4f60\u597d") == ["DejaVu Sans", "SimHei"]
    monkeypatch.setattr(fontManager, "ttflist", [])
    assert plot._fonts("\u4f60\u597d") == ["DejaVu Sans"]
    assert "fonts-noto-cjk" in caplog.text


@pytest.mark.parametrize("name", ["paraformer", "ctc"])
def test_plot(models, name, tmp_path):
    plot_recognition(models[name], noise(1.0), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="can't write the picture"):
        plot_recognition(models[name], noise(0.3), tmp_path / "gone" / "x.png")
    with pytest.raises(InputError, match="can't write the picture"):
        plot_recognition(models[name], noise(0.3), tmp_path / "x.nothing")


def test_transcripts_are_plain_values():
    other = replace(SHORT, text="x")
    assert other != SHORT
    assert SHORT.confidence == pytest.approx(0.5)
