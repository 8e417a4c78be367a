"""Reading and writing audio: every source, every rate, partial reads, long files, bad files."""

import io
import logging
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech import audio
from nar_speech.audio import info, read_audio, read_blocks, resample, write_audio
from nar_speech.errors import AudioError, MissingExtraError
from nar_speech.types import Audio

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
]
LOSSLESS = 2 / 32768


def signal(samples, channels=1, rate=16000, seed=0):
    """A sweep with some noise, (N,) or (C, N)."""
    t = np.arange(samples) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 * t + 100 * t * t))
    noise = np.random.default_rng(seed).standard_normal((channels, samples)) * 1e-3
    return (
        np.squeeze(wave + noise, 0).astype(np.float32) if channels == 1 else (wave + noise).astype(np.float32)
    )


def encoded(samples, rate=16000, format="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples).T, rate, format=format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_every_format_from_every_kind_of_source(tmp_path, monkeypatch, format, subtype):
    want = signal(16000 if subtype != "OPUS" else 48000)
    data = encoded(want, 16000, format, subtype)
    path = tmp_path / f"speech.{format.lower()}"
    path.write_bytes(data)
    first = read_audio(path).samples
    assert first.dtype == np.float32
    assert first.shape == want.shape
    lossy = format in ("OGG", "MP3")
    assert np.abs(first - want)[500:-500].max() < (0.06 if lossy else LOSSLESS)

    class Pipe:  # a file object that can't seek
        def read(self):
            return data

    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)
    with open(path, "rb") as handle:
        for source in (
            str(path),
            handle,
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            Pipe(),
            "-",
        ):
            assert np.array_equal(read_audio(source).samples, first), type(source)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_any_rate_becomes_the_wanted_one(rate):
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32) * 0.5
    got = read_audio(encoded(tone, rate, "WAV", "FLOAT"))
    assert got.sample_rate == 16000
    assert abs(len(got.samples) - 16000) <= 1
    want = np.sin(2 * np.pi * 1000 * np.arange(len(got.samples)) / 16000) * 0.5
    assert np.abs(got.samples - want)[200:-200].max() < 1e-3
    assert np.array_equal(got.samples, soxr.resample(tone, rate, 16000))


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_averaged_or_kept(channels):
    wave = signal(4000, channels)
    data = encoded(wave, 48000, "WAV", "FLOAT")
    kept = read_audio(data, 48000, mono=False).samples
    assert np.array_equal(kept, wave)
    mono = read_audio(data, 48000).samples
    assert np.allclose(mono, wave if channels == 1 else wave.mean(0), atol=1e-7)
    assert read_audio((wave, 48000), 48000, mono=False).samples.shape == wave.shape


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "float16", "float32", "float64"])
def test_arrays_are_scaled_by_their_type(dtype):
    levels = np.array([-1.0, -0.5, 0.0, 0.5])
    kind = np.dtype(dtype)
    if kind.kind == "i":
        samples = (levels * (np.iinfo(kind).max + 1.0)).astype(kind)
    elif kind.kind == "u":
        samples = (levels * 128 + 128).astype(kind)
    else:
        samples = levels.astype(kind)
    got = read_audio((samples, 16000)).samples
    assert got.dtype == np.float32
    assert np.array_equal(got, levels)


def test_bare_arrays_tensors_and_audio():
    torch = pytest.importorskip("torch")
    wave = signal(1000)
    assert np.array_equal(read_audio(wave).samples, wave)
    assert np.array_equal(read_audio(torch.from_numpy(wave)).samples, wave)
    assert np.array_equal(read_audio(Audio(wave, 16000)).samples, wave)
    assert len(read_audio(Audio(wave, 8000)).samples) == 2000


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
@pytest.mark.parametrize("quiet", [False, True])
def test_a_part_equals_that_part_of_the_whole(format, subtype, quiet):
    wave = signal(3 * 48000, rate=48000)
    if quiet:  # mp3 frames of a pure sweep keep their data far before them
        t = np.arange(3 * 48000) / 48000
        wave = (0.3 * np.sin(2 * np.pi * (200 * t + 100 * t * t))).astype(np.float32)
    data = encoded(wave, 48000, format, subtype)
    whole = read_audio(data, 48000).samples
    for start, duration in ((0.0, 0.25), (0.3, 0.5), (1.7, 1.0), (2.5, None), (2.9, 60.0)):
        part = read_audio(data, 48000, start=start, duration=duration).samples
        begin = round(start * 48000)
        want = whole[begin : None if duration is None else begin + round(duration * 48000)]
        assert part.shape == want.shape
        assert np.abs(part - want).max() < 1e-6, (start, duration)


def test_a_part_of_an_array():
    wave = signal(16000)
    assert np.array_equal(read_audio(wave, start=0.25, duration=0.5).samples, wave[4000:12000])


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_info_reads_the_header_only(format, subtype):
    data = encoded(signal(24000, 2), 48000, format, subtype)
    about = info(data)
    assert (about.sample_rate, about.channels, about.frames, about.duration) == (48000, 2, 24000, 0.5)
    assert about.format.startswith(format)


def test_a_long_header_costs_nothing_to_inspect_and_a_late_part_little(tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 16000, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(16000 * 60, dtype=np.int16))
    begin = time.perf_counter()
    assert info(path).duration == 3600
    assert len(read_audio(path, start=3599.0).samples) == 16000
    assert time.perf_counter() - begin < 0.5


@given(
    rate=st.sampled_from([8000, 16000, 22050, 44100, 48000]),
    samples=st.integers(1, 60000),
    block=st.floats(0.01, 1.5),
)
@settings(max_examples=40, deadline=None)
def test_blocks_joined_equal_the_whole_file_resampled_at_once(rate, samples, block):
    wave = signal(samples, 2, rate)
    data = encoded(wave, rate, "WAV", "FLOAT")
    size = audio.BLOCK_VALUES
    audio.BLOCK_VALUES = 5000  # many decoded blocks
    try:
        blocks = list(read_blocks(data, 16000, block))
        whole = read_audio(data, 16000).samples
    finally:
        audio.BLOCK_VALUES = size
    assert [len(b) for b in blocks[:-1]] == [round(block * 16000)] * (len(blocks) - 1)
    assert 0 < len(blocks[-1]) <= round(block * 16000)
    assert np.array_equal(np.concatenate(blocks), whole)
    once = wave.mean(0) if rate == 16000 else soxr.resample(wave.mean(0), rate, 16000)
    if len(once):
        np.testing.assert_allclose(whole, once, atol=1e-6)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_decoding_in_blocks_equals_decoding_at_once(monkeypatch, format, subtype):
    t = np.arange(2 * 48000) / 48000
    data = encoded(0.3 * np.sin(2 * np.pi * 300 * t), 48000, format, subtype)
    whole = read_audio(data, 48000).samples
    monkeypatch.setattr(audio, "BLOCK_VALUES", 3000)
    assert np.abs(read_audio(data, 48000).samples - whole).max() < 1e-6


@pytest.mark.slow
def test_three_hours_stream_in_little_memory(tmp_path):
    import resource

    path = tmp_path / "three_hours.flac"
    with soundfile.SoundFile(path, "w", 48000, 2, "PCM_16") as file:
        minute = (signal(48000 * 60, 2, 48000).T * 32767).astype(np.int16)
        for _ in range(180):
            file.write(minute)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = sum(len(block) for block in read_blocks(path, 16000, 30.0))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert total == 3 * 3600 * 16000
    assert grown < 200_000  # kilobytes; the samples alone would take 691 MB


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("rate", [8000, 16000, 48000, 192000])
def test_one_sample_is_audio(samples, rate):
    got = read_audio(encoded(np.full(samples, 0.5), rate)).samples
    assert len(got) >= 1
    assert np.isfinite(got).all()
    if rate == 16000:
        assert np.array_equal(got, np.full(samples, 0.5))


def test_resample_keeps_channels():
    wave = signal(4800, 2, 48000)
    got = resample(wave, 48000, 16000)
    assert got.shape == (2, 1600)
    assert np.array_equal(got[1], resample(np.ascontiguousarray(wave[1]), 48000, 16000))
    assert resample(wave[0], 16000, 16000).shape == (4800,)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus", "aiff"])
def test_write_and_read_back(tmp_path, suffix):
    wave = signal(48000, 2, 48000)
    path = tmp_path / f"out.{suffix}"
    write_audio(path, Audio(wave, 48000))
    got = read_audio(path, 48000, mono=False).samples
    assert got.shape == wave.shape
    assert np.abs(got - wave)[:, 2000:-2000].max() < (0.06 if suffix in ("ogg", "mp3", "opus") else LOSSLESS)


def test_a_long_ogg_file_is_written_and_cut_exactly(tmp_path):
    wave = signal(100 * 48000, rate=48000) * 0.5
    write_audio(tmp_path / "long.ogg", wave, 48000)
    whole = read_audio(tmp_path / "long.ogg", 48000).samples
    assert len(whole) == len(wave)
    for start in (10.0, 60.0, 69.9, 70.1, 99.5):
        part = read_audio(tmp_path / "long.ogg", 48000, start=start, duration=0.3).samples
        assert np.abs(part - whole[round(start * 48000) :][: len(part)]).max() < 1e-6, start


def test_write_clips_and_says_so(caplog):
    file = io.BytesIO()
    with caplog.at_level(logging.WARNING):
        write_audio(file, np.array([0.0, 1.5, -3.0]), 16000, format="WAV")
    assert "clipped" in caplog.text
    assert np.allclose(read_audio(file.getvalue()).samples, [0.0, 1.0, -1.0], atol=LOSSLESS)


@pytest.mark.parametrize(
    ("target", "samples", "rate", "words"),
    [
        ("out.xyz", np.zeros(5), 16000, "can't tell the format"),
        ("out", np.zeros(5), 16000, "can't tell the format"),
        ("no/such/folder/out.wav", np.zeros(5), 16000, "can't write"),
        ("out.wav", np.zeros(0), 16000, "holds no samples"),
        ("out.wav", np.array([np.nan]), 16000, "NaN"),
        ("out.wav", np.zeros(5), None, "sample_rate is needed"),
        ("out.wav", np.zeros(5), 5, "5 Hz"),
    ],
)
def test_impossible_writes_are_refused(tmp_path, target, samples, rate, words):
    with pytest.raises(AudioError, match=words):
        write_audio(tmp_path / target, samples, rate)


def one_line(error):
    text = str(getattr(error, "value", error))
    assert "\n" not in text
    return text


def test_missing_folder_empty_and_text_files(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not audio at all, but words")
    (tmp_path / "noise.raw").write_bytes(bytes(100))
    cases = {
        "missing.wav": "no such file",
        ".": "is a folder",
        "empty.wav": "is empty",
        "text.wav": "not audio",
        "noise.raw": "no header",
    }
    for name, words in cases.items():
        for function in (read_audio, info, lambda path: list(read_blocks(path))):
            with pytest.raises(AudioError, match=words) as error:
                function(tmp_path / name)
            assert name.strip(".") in one_line(error)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros(0, np.float32), "no samples"),
        ((np.zeros((2, 0)), 16000), "no samples"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.array([0.0, np.inf]), "NaN or infinite"),
        (np.zeros(5, np.int64), "array of int64"),
        (np.zeros(5, bool), "array of bool"),
        (np.zeros(5, complex), "array of complex"),
        (np.array(["a"]), "array of <U1"),
        (np.zeros((2, 2, 2)), "shape"),
        (np.array(1.0), "shape"),
        ((np.zeros((16000, 2)), 16000), "transpose"),
        (np.array([0.0, 20000.0]), "float samples reach 20000"),
        ((np.zeros(5), 0), "0 Hz"),
        ((np.zeros(5), 10**9), "1000000000 Hz"),
        ((np.zeros(5), 16000.5), "whole Hz"),
        ((np.zeros(5),), "pair"),
        (None, "NoneType"),
        (3.5, "float"),
        ([0.0, 1.0], "list"),
        (io.StringIO("text"), "text"),
    ],
)
def test_wrong_sources_are_refused(source, words):
    with pytest.raises(AudioError, match=words) as error:
        read_audio(source)
    one_line(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": -1.0}, "start is -1"),
        ({"start": float("nan")}, "start is nan"),
        ({"start": 1.0}, "behind the end"),
        ({"duration": 0.0}, "duration is 0"),
        ({"duration": -2.0}, "duration is -2"),
        ({"sample_rate": 10}, "10 Hz"),
    ],
)
def test_wrong_options_are_refused(options, words):
    for source in (signal(16000), encoded(signal(16000))):
        with pytest.raises(AudioError, match=words):
            read_audio(source, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_file_with_nan_samples_is_refused(bad):
    wave = signal(16000)
    wave[8000] = bad
    with pytest.raises(AudioError, match=r"at 0\.500 s"):
        read_audio(encoded(wave, 16000, "WAV", "FLOAT"))
    part = read_audio(encoded(wave, 16000, "WAV", "FLOAT"), duration=0.4)  # the good part can be read
    assert part.duration == 0.4


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_file_without_samples_is_refused(format, subtype):
    with pytest.raises(AudioError):
        read_audio(encoded(np.zeros(0), 16000, format, subtype))


@pytest.mark.parametrize("rate", [1, 900, 2_000_000])
def test_an_absurd_rate_in_a_header_is_refused(rate):
    with pytest.raises(AudioError, match=f"{rate} Hz"):
        read_audio(encoded(signal(100), rate))


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_cut_file_is_used_as_far_as_it_goes_or_refused(format, subtype, caplog):
    wave = signal(48000)
    data = encoded(wave, 16000, format, subtype)
    whole = read_audio(data).samples
    lengths = []
    for cut in [*range(0, 200, 13), *np.linspace(200, len(data) - 1, 40).astype(int)]:
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                got = read_audio(data[:cut]).samples
        except AudioError as error:
            one_line(error)
            lengths.append(0)
            continue
        assert 0 < len(got) <= len(whole)
        lossless = format in ("WAV", "FLAC")
        assert np.abs(got - whole[: len(got)])[: len(got) - 3000].max(initial=0) < (1e-6 if lossless else 0.1)
        if lossless:
            assert "cut off or damaged" in caplog.text
        lengths.append(len(got))
    assert lengths[0] == 0
    assert lengths[-1] > 0.6 * len(whole)


def test_a_wav_stream_of_unknown_length_is_not_damaged(caplog):
    data = bytearray(encoded(signal(16000)))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # what ffmpeg writes into a pipe
    with caplog.at_level(logging.WARNING):
        assert len(read_audio(bytes(data)).samples) == 16000
    assert not caplog.text


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus", "m4a", "aiff", "au"])
def test_random_bytes_never_do_more_than_an_audio_error(tmp_path, suffix):
    generator = np.random.default_rng(sum(map(ord, suffix)))
    path = tmp_path / f"random.{suffix}"
    for size in (1, 3, 16, 100, 5000):
        path.write_bytes(generator.bytes(size))
        try:
            assert np.isfinite(read_audio(path).samples).all()  # random bytes may happen to decode
        except (AudioError, MissingExtraError) as error:
            one_line(error)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_flipped_bytes_never_do_more_than_an_audio_error(data):
    format, subtype = data.draw(st.sampled_from(FORMATS))
    broken = bytearray(encoded(signal(4000), 16000, format, subtype))
    for place in data.draw(st.lists(st.integers(0, min(len(broken) - 1, 400)), min_size=1, max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    try:
        assert np.isfinite(read_audio(bytes(broken)).samples).all()
    except (AudioError, MissingExtraError) as error:
        one_line(error)


def container(name, codec, rate=48000, channels=2, seconds=2):
    """Encode a sweep with PyAV; returns the file's bytes and the samples (C, N)."""
    av = pytest.importorskip("av")
    wave = signal(seconds * rate, channels, rate)
    file = io.BytesIO()
    with av.open(file, "w", format=name) as output:
        stream = output.add_stream(codec, rate=rate, layout="stereo" if channels == 2 else "mono")
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout=stream.layout.name)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size or 1024)
        frame.pts, frame.time_base = 0, Fraction(1, rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue(), wave


@pytest.mark.parametrize(
    ("name", "codec"),
    [("mp4", "aac"), ("ipod", "aac"), ("webm", "libopus"), ("matroska", "aac"), ("adts", "aac")],
)
def test_other_containers_through_pyav(tmp_path, name, codec):
    data, wave = container(name, codec)
    path = tmp_path / "speech.bin"  # the content decides, not the suffix
    path.write_bytes(data)
    about = info(path)
    assert (about.sample_rate, about.channels) == (48000, 2)
    whole = read_audio(path, 48000, mono=False).samples
    assert abs(whole.shape[1] - wave.shape[1]) < 4096
    if name != "adts":  # which does not say how long its encoder's delay was
        assert np.abs(whole[:, 4000:90000] - wave[:, 4000:90000]).max() < 0.05
    part = read_audio(data, 48000, start=1.0, duration=0.5).samples
    assert len(part) == 24000
    errors = [np.abs(part - whole.mean(0)[48000 + k :][:24000]).max() for k in range(-48, 49)]
    assert min(errors) < 0.05  # at the right place to a millisecond


def test_a_cut_or_silent_container_is_an_audio_error():
    data, _ = container("mp4", "aac")
    for cut in (12, 40, 100, 1000):
        with pytest.raises(AudioError) as error:
            read_audio(data[:cut])
        one_line(error)


def test_without_pyav_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"nar-speech\[av\]"):
        read_audio(b"\x00\x00\x00\x20ftypM4A " + bytes(40))


def test_a_file_object_of_the_caller_stays_open(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(signal(100)))
    with open(path, "rb") as handle:
        read_audio(handle)
        assert not handle.closed
        assert np.array_equal(read_audio(handle).samples, read_audio(path).samples)
