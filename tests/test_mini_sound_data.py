"""Data of the mini_sound recipe: vocabulary, music, effects, recordings, manifests, classifier."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.types import Audio
from tests.mini_en_scripts import commit_all
from tests.mini_sound_scripts import RECIPE, sound_scripts

RATE, CLIP = 16000, 80000


@pytest.fixture(scope="module")
def local():
    with sound_scripts() as scripts:
        yield scripts


def clip_of(local, label, labels=None, seed=1):
    return local.render.Clip(f"{label} {seed}", label, labels or {}, "train", seed)


# ---- vocabulary -------------------------------------------------------------------------------------------


def test_every_caption_means_one_class(local):
    found = local.captions.all_captions()
    assert not [caption for caption, names in found.items() if len(names) != 1]
    assert len(found) > 800
    for caption in found:
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", caption), caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
        assert not re.search(r"\b(a|an) [a-z ]*chords\b", caption), caption


def test_captions_say_what_the_labels_say(local):
    labels = {"form": "solo", "instrument": "piano", "pattern": "chords", "tempo": "slow", "mood": "sad"}
    found = local.captions.captions("music", "piano", labels)
    assert found[:3] == [
        "slow sad piano chords",
        "slow sad piano chords in a minor key",
        "piano, chords, slow, sad",
    ]
    labels |= {"instrument": "acoustic guitar", "pattern": "melody", "tempo": "medium", "mood": "happy"}
    found = local.captions.captions("music", "acoustic guitar", labels)
    assert "an acoustic guitar melody" in found
    assert found[0] == "a medium tempo happy acoustic guitar melody"
    assert local.captions.captions("effects", "siren", {"speed": "fast"})[0] == "a fast siren wailing"
    assert local.captions.captions("esc10", "rain")[0] == "rain falling"
    assert local.captions.captions("other", "perc_bell") == []


def test_everything_in_the_vocabulary_can_be_made(local):
    known = local.captions.vocabulary()
    assert set(known["effects"]) == set(local.effects.MAKERS)
    assert set(known["music"]["instruments"]) == set(local.compose.INSTRUMENTS)
    assert set(known["music"]["bands"]) == set(local.compose.LEAD)
    assert len(known["esc10"]) == 10
    assert len(set(local.captions.classes())) == len(local.captions.classes()) == 10 + 16 + 11 + 2
    named = [name for entry in known["samples"].values() for name in entry["files"]]
    assert len(named) == len(set(named))
    assert not set(named) & set(local.real_sounds.LEFT_OUT)


# ---- the plan of what is rendered -------------------------------------------------------------------------


@given(train=st.integers(1, 3000), dev=st.integers(0, 300), held=st.integers(0, 300), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_a_plan_is_balanced_and_its_splits_share_nothing(local, train, dev, held, seed):
    counts = {"train": train, "dev": dev, "eval": held}
    clips = local.render.plan(local.captions.effect_labels(), counts, seed)
    assert len({clip.name for clip in clips}) == len(clips)
    assert local.render.plan(local.captions.effect_labels(), counts, seed) == clips
    for split, count in counts.items():
        mine = [clip.label for clip in clips if clip.split == split]
        kinds = {label: mine.count(label) for label in mine}
        assert len(kinds) == (16 if count else 0)
        # A kind with two speeds has at least one of each; rounding is half a clip a speed.
        assert all(abs(number - count / 16) <= 2 for number in kinds.values())
    others = local.render.plan(local.captions.effect_labels(), counts, seed + 1)
    assert not {clip.name for clip in clips} & {clip.name for clip in others}


def test_a_rendering_goes_on_where_it_stopped(local, tmp_path, capsys):
    clips = local.render.plan([("dial tone", {}), ("laser", {})], {"train": 4, "dev": 2, "eval": 2}, 3)
    rows = local.render.render("effects", "effects", clips, local.effects.make, tmp_path, 1, "ours")
    assert [row["split"] for row in rows].count("train") == 4
    first, second = (tmp_path / "sounds" / rows[n]["path"] for n in (0, 1))
    before, time = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    local.render.render("effects", "effects", clips, local.effects.make, tmp_path, 1, "ours")
    assert "7 of 8 clips are there" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == time
    assert second.read_bytes() == before  # the same name is the same sound
    samples, rate = soundfile.read(second)
    assert (len(samples), rate) == (CLIP, RATE)
    assert soundfile.info(second).subtype == "PCM_16"


@given(
    length=st.integers(0, 3 * RATE), gain=st.floats(1e-4, 1), loudness=st.floats(-40, -10), loop=st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_clips_have_one_length_and_loudness(local, length, gain, loudness, loop):
    sound = gain * np.random.default_rng(length).uniform(-1, 1, length)
    levelled = local.base.level(sound, loudness)
    assert len(levelled) == length
    assert np.abs(levelled).max(initial=0) <= 0.9001
    if length:
        assert np.abs(levelled).max() <= np.abs(sound).max() * 10**1.5 * 1.001
    clip = local.base.fit(levelled, loop=loop)
    assert clip.shape == (CLIP,)
    assert clip.dtype == np.float32
    if loop and length:  # goes round, up to the fade at the end
        end = min(2 * length, CLIP - int(0.03 * RATE))
        np.testing.assert_allclose(clip[length:end], levelled[: end - length], atol=1e-6)


# ---- effects ----------------------------------------------------------------------------------------------


def effect(local, label, labels=None, seed=1):
    return local.base.level(local.base.fit(local.effects.make(clip_of(local, label, labels, seed))))


def test_every_effect_sounds_and_is_the_same_again(local):
    for label, labels in local.captions.effect_labels():
        sound = effect(local, label, labels)
        assert np.isfinite(sound).all()
        assert np.abs(sound).max() > 0.05, label
        assert np.array_equal(sound, effect(local, label, labels)), label
        assert not np.allclose(sound, effect(local, label, labels, seed=2)), label


def spectrum(sound):
    return np.abs(np.fft.rfft(sound * np.hanning(len(sound)))), np.fft.rfftfreq(len(sound), 1 / RATE)


def centre(sound):
    """Frequency that halves the power, in Hz."""
    power, frequency = spectrum(sound)
    total = np.cumsum(power**2)
    return frequency[np.searchsorted(total, total[-1] / 2)]


def test_effects_have_the_pitch_they_should(local):
    for seed in range(3):
        power, frequency = spectrum(effect(local, "dial tone", seed=seed))
        low, high = (frequency < 395) & (frequency > 100), (frequency > 395) & (frequency < 600)
        assert abs(frequency[low][power[low].argmax()] - 350) < 8
        assert abs(frequency[high][power[high].argmax()] - 440) < 8
        assert 3800 < centre(effect(local, "crickets", seed=seed)) < 5300
        assert centre(effect(local, "explosion", seed=seed)) < 400
        assert 3000 < centre(effect(local, "white noise", seed=seed)) < 5000


def pulses(sound):
    """Onsets in 5 s: how often the smoothed envelope rises through a third of its peak."""
    envelope = np.convolve(np.abs(sound), np.ones(800) / 800, "same")
    above = envelope > envelope.max() / 3
    return int((above[1:] & ~above[:-1]).sum())


def test_slow_is_slower_than_fast(local):
    for label in ("alarm clock", "footsteps"):
        slow, fast = (
            [pulses(effect(local, label, {"speed": speed}, seed)) for seed in range(4)]
            for speed in ("slow", "fast")
        )
        assert sum(fast) > 1.3 * sum(slow), label
        # Heel and sole of a footstep may count twice, beeps may not.
        assert label == "footsteps" or all(3 <= beeps <= 6 for beeps in slow)
        assert label == "footsteps" or all(18 <= beeps <= 32 for beeps in fast)


def test_whistles_go_up_and_down(local):
    for label, up in (("rising whistle", True), ("falling whistle", False)):
        for seed in range(3):
            sound = effect(local, label, seed=seed)
            frames = sound[: CLIP // 800 * 800].reshape(-1, 800)
            loud = np.sqrt((frames**2).mean(1)) > 0.05
            pitch = np.abs(np.fft.rfft(frames * np.hanning(800), axis=1)).argmax(1) * RATE / 800
            pair = loud[1:] & loud[:-1]
            steps = np.diff(pitch)[pair]
            # Frames of 50 ms; one jump back between two slides is allowed for.
            assert (np.median(steps) >= 0) == up or np.median(steps) == 0
            assert ((steps > 0).sum() > (steps < 0).sum()) == up


# ---- music ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**28 - 1))
def test_variable_lengths_are_read_back(local, number):
    data = local.midi.variable_length(number)
    value = 0
    for place, byte in enumerate(data):
        assert (byte >= 128) == (place < len(data) - 1)
        value = value << 7 | byte & 127
    assert value == number
    assert len(data) <= 4


def read_midi(data):
    """(tick, message bytes) of a format 0 file whose channel messages all have their status byte."""
    assert data[:14] == b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xf4"
    assert data[14:18] == b"MTrk"
    track = data[22:]
    assert int.from_bytes(data[18:22], "big") == len(track)
    place, now, out = 0, 0, []
    while place < len(track):
        delta = 0
        while True:
            byte, place = track[place], place + 1
            delta = delta << 7 | byte & 127
            if byte < 128:
                break
        now += delta
        size = 3 + track[place + 2] if track[place] == 0xFF else (2 if track[place] >> 4 == 0xC else 3)
        out.append((now, track[place : place + size]))
        place += size
    return out


def test_midi_files_hold_the_notes(local):
    Note = local.midi.Note
    notes = [Note(0.5, 1.0, 60, 90), Note(1.0, 1.0, 60, 80), Note(0.2, 0.1, 36, 100, 9), Note(5.5, 1, 72, 90)]
    messages = read_midi(local.midi.midi_file(notes, {0: 73}, 5.0))
    assert [tick for tick, _ in messages] == sorted(tick for tick, _ in messages)
    assert (0, bytes([0xC0, 73])) in messages
    assert (200, bytes([0x99, 36, 100])) in messages
    assert (300, bytes([0x89, 36, 0])) in messages
    # The repeated key is let go before it is pressed again, and nothing comes after the end.
    assert (995, bytes([0x80, 60, 0])) in messages
    assert messages[-1] == (5000, b"\xff\x2f\x00")
    assert not any(message[1] == 72 for _, message in messages[1:])


def test_pieces_follow_their_labels(local):
    music = local.captions.vocabulary()["music"]
    for labels in local.captions.music_labels():
        low, high = music["tempos"][labels["tempo"]]
        rng = np.random.default_rng(5)
        notes, programs = local.compose.compose(rng, labels, (low + high) / 2)
        assert notes
        assert all(
            0 <= note.start < 5 and 20 <= note.velocity <= 125 and 20 <= note.pitch < 110 for note in notes
        )
        assert {note.channel for note in notes} - {9} == set(programs)
        assert (9 in {note.channel for note in notes}) == (labels["form"] != "solo")


def pieces(local, labels, bpm, count=8):
    for seed in range(count):
        yield local.compose.compose(np.random.default_rng(seed), labels, bpm)[0]


def test_fast_music_has_more_onsets_and_sad_music_lies_lower(local):
    instruments = local.captions.vocabulary()["music"]["instruments"]
    for instrument, patterns in instruments.items():
        for pattern in patterns:
            labels = {"form": "solo", "instrument": instrument, "pattern": pattern, "tempo": "", "mood": ""}
            mean = {}
            for mood, bpm in product(("happy", "sad"), (63, 104, 168)):
                played = list(pieces(local, labels | {"mood": mood}, bpm))
                onsets = [len({round(note.start / 0.06) for note in notes}) for notes in played]
                mean[mood, bpm] = np.mean(onsets), np.mean([note.pitch for notes in played for note in notes])
            for mood in ("happy", "sad"):
                slow, medium, fast = (mean[mood, bpm][0] for bpm in (63, 104, 168))
                assert slow * 1.25 < medium, (instrument, pattern, mood)
                assert medium * 1.25 < fast, (instrument, pattern, mood)
            for bpm in (63, 104, 168):
                assert mean["happy", bpm][1] > mean["sad", bpm][1], (instrument, pattern, bpm)


@given(seed=st.integers(0, 10_000), mood=st.sampled_from(["happy", "sad"]), bpm=st.integers(50, 190))
@settings(max_examples=40, deadline=None)
def test_notes_are_of_the_key_and_the_last_chord_is_the_tonic(local, seed, mood, bpm):
    rng = np.random.default_rng(seed)
    frame = local.compose.new_frame(rng, bpm, mood)
    assert frame.chords[0] == frame.chords[-1] == 0
    player = local.compose.Player(rng, frame, 0, 86)
    local.compose.melody(player, 67)
    allowed = {0, 2, 4, 5, 7, 9, 11} if mood == "happy" else {0, 2, 3, 5, 7, 8, 10, 11}
    classes = {(note.pitch - frame.tonic) % 12 for note in player.notes}
    assert classes <= allowed
    assert (player.notes[-1].pitch - frame.tonic) % 12 == 0


needs_fluidsynth = pytest.mark.skipif(
    not (shutil.which("fluidsynth") and Path("/usr/share/sounds/sf2/FluidR3_GM.sf2").exists()),
    reason="fluidsynth or its sound font is not installed",
)


@needs_fluidsynth
def test_music_is_rendered(local):
    labels = {"form": "band", "instrument": "flute", "tempo": "fast", "mood": "happy"}
    clip = clip_of(local, "band", labels)
    sound = local.render_music.make(clip, local.render_music.FONT)
    assert len(sound) >= CLIP
    assert np.sqrt((sound[:CLIP] ** 2).mean()) > 0.003
    assert np.array_equal(sound, local.render_music.make(clip, local.render_music.FONT))


def test_scripts_say_what_is_wrong_in_one_line(local, tmp_path, monkeypatch, capsys):
    for name, words, said in (
        ("effects", ["--work", tmp_path, "--hours", "-1"], "--hours and --jobs must be positive"),
        ("render_music", ["--work", tmp_path, "--sound-font", "no.sf2"], "no.sf2"),
        ("make_cuts", ["--work", tmp_path], "run real_sounds.py first"),
        ("real_sounds", ["--work", tmp_path, "--shared-data", tmp_path / "no"], "no such folder"),
        ("classifier", ["score", tmp_path / "no.safetensors", tmp_path], "no.safetensors"),
    ):
        if name == "render_music" and not shutil.which("fluidsynth"):
            said = "fluidsynth"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            getattr(local, name).main()
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.startswith("error: ")
        assert said in error
        assert len(error.splitlines()) == 1, error


# ---- recordings and manifests -----------------------------------------------------------------------------

CREDIT = (
    "- **[{name}.ogg](https://github.com/x/{name}.ogg)**:   clip derived from [a [loud] dog.wav]"
    "(http://www.freesound.org/people/nfrae/sounds/1/) by *nfrae* ([CC0](http://creativecommons.org/cc0))\n"
)
NAMES = ["1-1-A", "4-2-A", "4-3-A", "4-4-A", "5-5-A"]


def noise_file(path, length=5.0, rate=44100, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = np.random.default_rng(len(path.name)).uniform(-0.1, 0.1, int(length * rate))
    soundfile.write(path, sound, rate, **more)


@pytest.fixture
def work(local, tmp_path, monkeypatch):
    """A work folder with a little ESC-10 (from a git mirror), Sonic Pi, effects and speech."""
    repo = tmp_path / "mirror" / "karolpiczak+ESC-10" / "repo"
    for name in [*NAMES, "1-9-A"]:
        noise_file(repo / "002 - Rain" / f"{name}.ogg", format="OGG", subtype="VORBIS")
    (repo / "README.md").write_text("".join(CREDIT.format(name=name) for name in NAMES))  # not 1-9-A
    commit_all(repo)
    for name, length in (("bd_808", 0.5), ("loop_perc1", 2.0), ("loop_amen", 2.0), ("loop_mika", 8.0)):
        noise_file(tmp_path / "samples" / f"{name}.flac", length)
    monkeypatch.setattr(local.real_sounds, "ESC10_COMMIT", "HEAD")
    args = Namespace(
        work=tmp_path / "work",
        github=str(tmp_path / "mirror"),
        shared_data=None,
        samples=tmp_path / "samples",
    )
    for source in ("esc10", "sonic_pi"):
        rows = getattr(local.real_sounds, source)(args)
        local.base.write_jsonl(args.work / "sounds" / f"{source}.jsonl", rows)
    clips = local.render.plan([("laser", {}), ("dial tone", {})], {"train": 6, "dev": 2, "eval": 4}, 1)
    local.render.render("effects", "effects", clips, local.effects.make, args.work, 1, "ours")
    rows = []
    for number in range(30):
        source, name = ("coffee_commands", f"order-{number}") if number else ("ljspeech32", "LJ001-0001")
        noise_file(args.work / "real" / source / f"{name}.flac", 0.5, RATE)
        rows.append({"path": f"{source}/{name}.flac", "name": name, "source": source, "duration": 0.5})
    rows = [row | {"text": "a latte", "speaker": None, "licence": "Apache-2.0"} for row in rows]
    local.base.write_jsonl(args.work / "real" / "ljspeech32.jsonl", rows[:1])
    local.base.write_jsonl(args.work / "real" / "coffee_commands.jsonl", rows[1:])
    noise_file(args.work / "eval" / "vctk" / "p225_003.flac", 0.5, RATE)
    vctk = {"path": "vctk/p225_003.flac", "name": "p225_003", "source": "vctk", "duration": 0.5}
    local.base.write_jsonl(args.work / "eval" / "vctk.jsonl", [vctk | {"text": "six spoons"}])
    return args


def test_recordings_keep_fold_5_and_their_authors(local, work, capsys):
    rows = {row["name"]: row for row in local.base.read_jsonl(work.work / "sounds" / "esc10.jsonl")}
    assert {name: row["split"] for name, row in rows.items()} == {
        "1-1-A": "train",
        "4-2-A": "dev",
        "4-3-A": "dev",
        "4-4-A": "train",
        "5-5-A": "eval",
    }
    assert rows["1-1-A"]["author"] == "nfrae"
    assert rows["1-1-A"]["title"] == "a [loud] dog.wav"
    assert rows["1-1-A"]["licence"] == "CC0"
    samples = {row["name"]: row for row in local.base.read_jsonl(work.work / "sounds" / "sonic_pi.jsonl")}
    assert set(samples) == {"bd_808", "loop_perc1", "loop_mika", "loop_mika-end"}
    assert (samples["bd_808"]["kind"], samples["bd_808"]["label"]) == ("samples", "kick drum")
    assert samples["loop_perc1"]["kind"] == "other"
    one_shot, _ = soundfile.read(work.work / "sounds" / samples["bd_808"]["path"])
    loop, _ = soundfile.read(work.work / "sounds" / samples["loop_perc1"]["path"])
    assert np.abs(one_shot[RATE:]).max() == 0  # silence after it
    assert np.allclose(loop[:RATE], loop[2 * RATE : 3 * RATE], atol=1e-4)  # goes round


def read_cuts(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_manifests_keep_what_is_held_out(local, work, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_cuts.py", "--work", str(work.work)])
    local.make_cuts.main()
    cuts = {path.name.split(".")[0]: read_cuts(path) for path in (work.work / "cuts").glob("*.jsonl.gz")}
    assert set(cuts) == {
        *("codec_train_speech", "codec_train_real", "codec_train_effects", "codec_dev"),
        *("sound_train", "sound_dev", "eval_speech", "eval_esc10", "eval_effects"),
    }
    names = {part: {cut["id"] for cut in rows} for part, rows in cuts.items()}
    held = set().union(*(ids for part, ids in names.items() if part.startswith("eval")))
    assert held == {"esc10-5-5-A", "vctk-p225_003"} | names["eval_effects"]
    assert len(names["eval_effects"]) == 4
    rest = set().union(*(ids for part, ids in names.items() if not part.startswith("eval")))
    assert not held & rest
    assert not {cut["id"] for cut in cuts["codec_dev"]} & names["sound_train"]
    assert "ljspeech32-LJ001-0001" in names["codec_dev"]
    for part in ("codec_train_speech", "codec_train_real", "codec_train_effects"):
        assert not names[part] & names["codec_dev"]
    told = {cut["id"]: cut["supervisions"][0] for cut in cuts["sound_train"]}
    assert set(told) == {"esc10-1-1-A", "esc10-4-4-A", "sonic_pi-bd_808"} | names["codec_train_effects"]
    rain = told["esc10-1-1-A"]
    assert rain["text"] == "rain falling"
    assert rain["custom"]["captions"] == local.captions.captions("esc10", "rain")
    assert {rain["custom"][key] for key in ("kind", "label", "licence", "author", "source")} == {
        *("esc10", "rain", "CC0", "nfrae")
    }


def test_a_reserved_clip_stops_the_manifests(local, capsys):
    rows = [{"source": "esc10", "name": "5-5-A", "fold": 5}]
    with pytest.raises(SystemExit):
        local.make_cuts.check({"sound_train": rows})
    assert "5-5-A is reserved" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        local.make_cuts.check(
            {
                "codec_dev": [{"source": "effects", "name": "x"}],
                "eval_effects": [{"source": "effects", "name": "x"}],
            }
        )
    local.make_cuts.check(
        {"sound_train": [{"source": "esc10", "name": "1-1-A", "fold": 1}], "eval_esc10": rows}
    )


# ---- classifier -------------------------------------------------------------------------------------------


def test_the_classifier_learns_and_scores(local, tmp_path, capsys, monkeypatch):
    clips = local.render.plan([("laser", {}), ("dial tone", {})], {"train": 12, "dev": 0, "eval": 6}, 1)
    rows = local.render.render("effects", "effects", clips, local.effects.make, tmp_path, 1, "ours")
    for split in ("train", "eval"):
        listed = [{"path": row["path"], "label": row["label"]} for row in rows if row["split"] == split]
        local.base.write_jsonl(tmp_path / "sounds" / f"{split}.jsonl", listed)
    model = tmp_path / "classifier.safetensors"
    options = Namespace(
        manifest=[tmp_path / "sounds" / "train.jsonl"], output=model, dev=[], steps=30, batch=8
    )
    more = {
        "most": 80,
        "real": 1.0,
        "mixup": False,
        "report": 10,
        "seed": 1,
        "threads": 1,
        "dtype": "float32",
    }
    options = Namespace(**vars(options), **more)
    local.classifier.train(options)
    network, known = local.classifier.load(model)
    assert known == ["dial tone", "laser"] or known == ["laser", "dial tone"]
    result = local.classifier.score_source(network, known, tmp_path / "sounds" / "eval.jsonl")
    assert result["clips"] == 6
    assert result["accuracy"] == 1.0
    assert result["classes"]["laser"] == {"clips": 3, "accuracy": 1.0, "top3": 1.0, "heard_as": {}}
    # Captions and folders give the class too; another class is skipped; a wrong wish counts as wrong.
    laser = next(row["path"] for row in rows if row["label"] == "laser")
    wishes = [
        {"path": laser, "text": text} for text in ("laser shots", "a telephone dial tone", "a dog barking")
    ]
    local.base.write_jsonl(tmp_path / "sounds" / "wishes.jsonl", wishes)
    result = local.classifier.score_source(network, known, tmp_path / "sounds" / "wishes.jsonl")
    assert (result["clips"], result["skipped"], result["accuracy"]) == (2, 1, 0.5)
    assert result["classes"]["dial tone"]["heard_as"] == {"laser": 1}
    (tmp_path / "made" / "dial-tone").mkdir(parents=True)
    soundfile.write(tmp_path / "made" / "dial-tone" / "1.wav", effect(local, "dial tone", seed=9), RATE)
    result = local.classifier.score_source(network, known, tmp_path / "made")
    assert (result["clips"], result["accuracy"]) == (1, 1.0)
    assert local.classifier.windows(tmp_path / "made" / "dial-tone" / "1.wav").shape == (1, CLIP)
    # As the scorer of a benchmark: generated audio against its caption.
    monkeypatch.setenv(local.heard.VARIABLE, str(model))
    local.heard.classifier.cache_clear()
    clip = Audio(effect(local, "dial tone", seed=9)[None], RATE)
    assert local.heard.heard([clip, clip], ["a telephone dial tone", "laser shots"]) == [1.0, 0.0]
    with pytest.raises(SystemExit):
        local.heard.heard([clip], ["polka"])
    assert "'polka'" in capsys.readouterr().err


def test_prompts_name_every_class_once(local):
    meaning = local.captions.all_captions()
    assert [meaning[prompt] for prompt in local.heard.prompts()] == [[n] for n in local.captions.classes()]


@given(frames=st.integers(40, 300), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_features_know_no_gain_and_augmentation_stays_finite(local, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(3, 64, frames, generator=generator) ** 8
    power[2] = 0  # a silent clip
    compress = local.classifier.LogMel.compress
    assert torch.allclose(compress(power[:2]), compress(power[:2] * 0.01), atol=1e-3)
    changed = local.classifier.augment(power, generator)
    assert changed.shape == power.shape
    assert (changed >= 0).all()
    features = local.classifier.mask(compress(changed), generator)
    assert torch.isfinite(features).all()
    assert features.max() <= 1


# ---- run.sh -----------------------------------------------------------------------------------------------


def run_sh(*words):
    return subprocess.run(
        ["bash", str(RECIPE / "run.sh"), *words], capture_output=True, text=True, check=False
    )


def test_run_sh_explains_itself_and_refuses_nonsense(tmp_path):
    said = run_sh("--help")
    assert said.returncode == 0
    assert "--hours-music" in said.stdout
    for words, message in (
        (["--colour", "red"], "unknown option --colour"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "x"], "--seed must be a whole number"),
        (["--processes", "0"], "--processes must be 1 to 8"),
        (["--hours-music", "x"], "--hours-music must be a number"),
        (["--shared-data", str(tmp_path / "no")], "--shared-data: no folder"),
        (["--speech", str(tmp_path)], "run stage 0 of mini_en"),
    ):
        said = run_sh(*words)
        assert said.returncode == 2
        assert message in said.stderr
        assert len(said.stderr.splitlines()) == 1


# ---- clips that are judged --------------------------------------------------------------------------------


def test_clips_of_another_model_are_not_judged_for_this_one(local, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    made = tmp_path / "made"
    local.make_sounds.same_maker(made, tmp_path / "one", 6, {"steps": [2]})
    local.make_sounds.same_maker(made, tmp_path / "one", 6, {"steps": [2]})
    for model, asked in (("two", (6, {"steps": [2]})), ("one", (6, {"steps": [3]}))):
        with pytest.raises(SystemExit):
            local.make_sounds.same_maker(made, tmp_path / model, *asked)
        assert "another model or other options" in capsys.readouterr().err


def test_held_out_manifests_are_those_that_are_there(tmp_path):
    script = (RECIPE / "run.sh").read_text()
    function = script[script.index("held_out() {") :]
    function = function[: function.index("\n}\n") + 3]
    (tmp_path / "cuts").mkdir()
    command = f'set -euo pipefail; work={tmp_path}; {function}\nheld_out; printf "%s\\n" "${{dev[@]}}"'
    for names in (["effects", "music"], ["esc10", "effects", "music"]):
        for name in names:
            (tmp_path / f"cuts/eval_{name}.jsonl.gz").touch()
        said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
        assert said.split() == [f"{tmp_path}/cuts/eval_{name}.jsonl.gz" for name in names]
