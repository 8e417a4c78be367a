"""NeMo's models: names and sizes, the three forms they come in, archives that mean harm, what is refused."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import nar_speech
from nar_speech import hub
from nar_speech.checkpoint import compare_shapes, rename_tensors
from nar_speech.errors import CheckpointError, ConfigError, NarSpeechError
from nar_speech.layers.fastconformer import FastConformerConfig
from nar_speech.models import nemo_official
from nar_speech.models.ctc import CtcModel
from nar_speech.models.nemo_official import RENAME, convert_config, head_as_linear, load_nemo
from tests.model_folders import FASTCONFORMER, nemo_file, nemo_files
from tests.test_ctc import full_size

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["nemo_ctc_large", "nemo_hybrid_streaming"])
def test_full_size_names_and_shapes(name):
    entry, shapes = full_size(name)
    tensors = head_as_linear({n: torch.empty(s, device="meta") for n, s in shapes.items()}, name)
    config = convert_config({"encoder": entry["config"]}, tensors, name)
    assert config.vocab_size == 1025
    assert config.blank == 1024
    with torch.device("meta"):
        model = CtcModel(config)
    renamed = {n: tuple(t.shape) for n, t in rename_tensors(tensors, RENAME).items()}
    assert compare_shapes(model, renamed) == []
    ours = sum(t.numel() for t in model.state_dict().values())
    others = (s for n, s in shapes.items() if n.startswith(("decoder.prediction", "joint.")))
    assert ours + sum(int(np.prod(shape)) for shape in others) == entry["parameters"]


def same_weights(a, b):
    ours, theirs = (model.network.state_dict() for model in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_files_archives_and_folders_with_an_archive_are_one_model(tmp_path):
    plain = load_nemo(nemo_files(tmp_path / "plain"))
    assert plain.card.name == "plain"
    assert plain.frontend.config.kind == "nemo"
    assert plain.network.config.blank == plain.tokenizer.vocab_size
    config = FastConformerConfig(**plain.network.config.encoder_conf)
    assert (config.att_context_size[0], config.subsampling_factor) == ([8, 3], 4)
    (tmp_path / "hub").mkdir()
    for path in (
        nemo_file(tmp_path / "tar"),
        nemo_file(tmp_path / "old", mode="w:gz"),
        nemo_file(tmp_path / "hub" / "model").parent,
    ):
        if path.is_dir():
            (path / "model_files" / "model_config.yaml").rename(path / "model_files" / "other.yaml")
        assert hub.detect(path) == "nemo"
        model = load_nemo(path)
        assert same_weights(model, plain)
        assert model.tokenizer.decode([5, 9, 20]) == plain.tokenizer.decode([5, 9, 20])


def test_the_text_is_that_of_the_steps(tmp_path):
    """A whole recording under the first context, and the same in chunks of audio."""
    from nar_speech.models.ctc_stream import CtcStream
    from nar_speech.search.ctc_stream import GreedyStream

    path = nemo_file(tmp_path / "m", seed=3)
    wave = np.random.default_rng(0).normal(0, 0.1, 40_000).astype(np.float32)
    want = nar_speech.load_model(path, device="cpu")((wave, 16000)).text
    model = hub.load_parts(path)
    stream = CtcStream(model.network, model.frontend)
    search, state, begin = GreedyStream(model.network.config.blank), stream.init_state(1), 0
    while begin < len(wave):
        size = stream.chunk if begin else stream.first
        part = torch.from_numpy(wave[begin : begin + size])
        audio = torch.nn.functional.pad(part, (0, max(stream.first, stream.chunk) - len(part)))[None]
        final = torch.tensor([len(part) < size])
        frames, state = stream.step(audio, torch.tensor([len(part)]), final, state)
        count = int(frames.counts[0])
        search.push(frames.values[0, :count].numpy(), frames.symbols[0, :count].numpy())
        begin += size
    assert final.item()
    assert len(want) > 20
    assert model.tokenizer.decode(search.tokens) == want


def test_offline_models_normalise(tmp_path):
    encoder = {
        **FASTCONFORMER,
        "feat_in": 20,
        "att_context_size": [-1, -1],
        "att_context_style": "regular",
        "conv_context_size": None,
        "causal_downsampling": True,
        "att_context_probs": None,
    }
    preprocessor = {"normalize": "per_feature", "features": 20, "window_size": 0.025, "n_fft": 512}
    model = load_nemo(nemo_files(tmp_path / "m", encoder=encoder, preprocessor=preprocessor))
    assert model.frontend.config.normalize == "per_feature"
    with pytest.raises(ConfigError, match="causal"):
        model.network.init_state(1)


def message_of(path):
    with pytest.raises(NarSpeechError) as caught:
        hub.load_parts(path)
    assert "\n" not in str(caught.value)
    assert Path(path).name in str(caught.value)
    return str(caught.value)


def change(folder, edit):
    """Edit model_config.yaml."""
    path = folder / "model_config.yaml"
    tree = yaml.safe_load(path.read_text())
    edit(tree)
    path.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("encoder", {"self_attention_model": "rel_pos_local_attn"}, "self_attention_model"),
        ("encoder", {"_target_": "nemo.collections.asr.modules.ConvASREncoder"}, "ConvASREncoder"),
        ("encoder", {"conv_norm_type": "instance_norm"}, "conv_norm_type"),
        ("encoder", {"conv_context_size": [3, 1]}, "conv_context_size [3, 1]"),
        ("encoder", {"subsampling": "stacking"}, "subsampling"),
        ("encoder", {"feat_out": 7}, "feat_out"),
        ("encoder", {"feat_in": None}, "feat_in"),
        ("encoder", {"feat_in": 24}, "misshaped: encoder.pre_encode.out.weight"),
        ("encoder", {"feat_in": 19}, "preprocessor.features 20"),
        ("encoder", {"att_context_size": 7}, "can't be built"),
        ("encoder", {"n_layer": 3}, "unknown key 'n_layer'"),
        ("encoder", {"n_layers": 3}, "missing"),
        ("encoder", {"reduction": "striding"}, "reduction"),
        ("preprocessor", {"normalize": "all_features"}, "all_features"),
        ("preprocessor", {"features": 24}, "mel filters"),
        ("preprocessor", {"log": False}, "log False"),
        ("preprocessor", {"blur": 1}, "unknown key 'blur'"),
        ("preprocessor", {"_target_": "x.AudioToMFCCPreprocessor"}, "AudioToMFCCPreprocessor"),
        ("tokenizer", {"type": "wpe"}, "'wpe'"),
    ],
)
def test_other_models_are_refused_with_a_reason(tmp_path, section, values, words):
    folder = nemo_files(tmp_path / "m")
    change(folder, lambda tree: tree[section].update(values))
    assert words in message_of(folder)


def test_missing_parts_are_named(tmp_path):
    folder = nemo_files(tmp_path / "m")
    (folder / "0a1b_tokenizer.model").rename(folder / "kept")
    assert "no file 0a1b_tokenizer.model" in message_of(folder)
    (folder / "kept").rename(folder / "other_tokenizer.model")
    assert load_nemo(folder).tokenizer.vocab_size > 10  # the only one there is
    change(folder, lambda tree: tree.pop("tokenizer"))
    tree = yaml.safe_load((folder / "model_config.yaml").read_text())
    assert load_nemo(folder).tokenizer.pieces([3]) == tree["aux_ctc"]["decoder"]["vocabulary"][3:4]
    change(folder, lambda tree: tree["aux_ctc"]["decoder"]["vocabulary"].pop())
    assert "a blank; use the files of this model" in message_of(folder)
    change(folder, lambda tree: tree.pop("aux_ctc"))
    assert "neither tokenizer nor vocabulary" in message_of(folder)
    tensors = torch.load(folder / "model_weights.ckpt", weights_only=True)
    heads = [name for name in tensors if name.startswith("ctc_decoder")]
    torch.save({n: t for n, t in tensors.items() if n not in heads}, folder / "model_weights.ckpt")
    assert "only a transducer" in message_of(folder)
    (folder / "model_weights.ckpt").unlink()
    assert "model_weights.ckpt is missing" in message_of(folder)
    (folder / "model_config.yaml").write_text("- a list\n")
    (folder / "model_weights.ckpt").touch()
    assert "not a readable configuration" in message_of(folder)
    (folder / "model_config.yaml").unlink()
    for name in "ab":
        (folder / f"{name}.nemo").touch()
    assert "2 .nemo files" in message_of(folder)


def repack(path, change):
    """Write an archive again; ``change`` gets its (member, bytes) pairs and gives others."""
    with tarfile.open(path) as archive:
        members = [(m, archive.extractfile(m).read() if m.isfile() else b"") for m in archive.getmembers()]
    with tarfile.open(path, "w") as archive:
        for member, data in change(members):
            archive.addfile(member, io.BytesIO(data))
    return path


def named(name, kind=tarfile.REGTYPE, link="", data=b"x"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
    return member, data


def test_nothing_is_written_where_an_archive_says(tmp_path, monkeypatch):
    """Members outside, links and folders are passed over; the model beside them loads."""
    monkeypatch.setattr(nemo_official.tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    path = nemo_file(tmp_path / "m")
    target = tmp_path / "target"
    target.write_text("untouched")
    evil = [
        named("../evil"),
        named("./../../evil"),
        named(str(tmp_path / "evil")),
        named("deep/er/model_config.yaml"),
        named("link_tokenizer.model", tarfile.SYMTYPE, str(target)),
        named("hard_tokenizer.model", tarfile.LNKTYPE, str(target)),
        named("pipe", tarfile.FIFOTYPE),
        named("device", tarfile.CHRTYPE),
    ]
    plain = load_nemo(path)
    assert same_weights(load_nemo(repack(path, lambda members: [*evil, *members])), plain)
    assert target.read_text() == "untouched"
    assert not list(tmp_path.rglob("*evil*"))
    assert not list((tmp_path / "temp").iterdir())  # cleaned up


def test_damaged_archives_are_refused(tmp_path, monkeypatch):
    path = nemo_file(tmp_path / "m")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a whole .nemo archive" in message_of(path)
    path.write_bytes(b"no archive at all" * 100)
    assert "not a whole .nemo archive" in message_of(path)
    path.write_bytes(b"")
    message_of(path)
    path.write_bytes(whole)
    repack(path, lambda members: [m for m in members if "weights" not in m[0].name])
    assert "holds no model_weights.ckpt" in message_of(path)
    path.write_bytes(whole)
    repack(path, lambda members: [*members, named("model_config.yaml")])
    assert "model_config.yaml twice" in message_of(path)
    path.write_bytes(whole)
    monkeypatch.setattr(nemo_official, "MAX_MEMBERS", 3)
    assert "more than 3 files" in message_of(path)
    monkeypatch.setattr(nemo_official, "MAX_TEXT", 1000)
    assert "claims" in message_of(path)


def test_archives_do_not_fill_the_disk(tmp_path):
    folder = nemo_files(tmp_path / "m")
    (folder / "model_weights.ckpt").write_bytes(bytes(64 << 20))
    path = tmp_path / "bomb.nemo"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=".")
    assert path.stat().st_size < 1 << 20
    assert "20-fold" in message_of(path)


class Evil:
    def __reduce__(self):
        return eval, ("open('/tmp/nar_speech_evil', 'w')",)


def test_weights_run_no_code(tmp_path):
    folder = nemo_files(tmp_path / "m")
    torch.save({"a": Evil()}, folder / "model_weights.ckpt")
    assert "could run code" in message_of(folder)
    assert not Path("/tmp/nar_speech_evil").exists()


def test_a_blank_beside_the_tokens_must_fit_in_our_folder_too(tmp_path):
    ours = hub.import_model(nemo_file(tmp_path / "m"), tmp_path / "ours")
    path = ours / "model.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["network"]["blank"] = 0
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="vocab_size"):
        hub.load_parts(ours)


def test_only_nemo_files_are_taken_for_models(tmp_path):
    with pytest.raises(CheckpointError, match="no such model"):
        load_nemo(tmp_path / "gone.nemo")
    assert hub.resolve(str(nemo_file(tmp_path / "m"))) == tmp_path / "m.nemo"
