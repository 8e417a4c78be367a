"""Model names, folders of every layout, downloads (without a network), import and verification."""

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

import nar_speech
from nar_speech import hub, inspection, locate
from nar_speech.config import read_yaml, write_yaml
from nar_speech.errors import CheckpointError, ConfigError, HubError, NarSpeechError
from nar_speech.model_folder import DecodingConfig, read_model_file
from tests.model_folders import (
    ctc_folder,
    funasr_folder,
    nemo_file,
    paraformer_folder,
    sensevoice_folder,
    wenet_folder,
)

torch.set_num_threads(1)
MAKERS = {
    "nar_speech": paraformer_folder,
    "funasr": funasr_folder,
    "sensevoice": sensevoice_folder,
    "wenet": wenet_folder,
    "nemo": nemo_file,
}


def noise(seconds=1.0, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)


def message_of(function, *arguments, error=NarSpeechError, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", MAKERS)
def test_every_layout_is_detected_loaded_and_run(tmp_path, layout):
    folder = MAKERS[layout](tmp_path / "m")
    assert hub.detect(folder) == layout
    model = hub.load_parts(folder)
    assert not model.network.training
    assert model.layout == layout
    transcript = nar_speech.load_model(folder, device="cpu")((noise(), 16000))
    assert transcript.duration == 1.0


@pytest.mark.parametrize("layout", ["funasr", "sensevoice", "wenet", "nemo"])
def test_an_imported_model_gives_the_same_text(tmp_path, layout):
    official = MAKERS[layout](tmp_path / "official")
    ours = hub.import_model(official, tmp_path / "ours")
    assert hub.detect(ours) == "nar_speech"
    sums = read_model_file(ours).sha256
    assert "model.safetensors" in sums
    before, after = (nar_speech.load_model(f, device="cpu")((noise(2), 16000)) for f in (official, ours))
    assert before.segments == after.segments
    assert hub.load_parts(ours).network.config == hub.load_parts(official).network.config
    assert all(check.passed for check in inspection.verify(ours))


def test_import_keeps_away_from_files(tmp_path):
    folder = paraformer_folder(tmp_path / "m")
    assert "not an empty folder" in message_of(hub.import_model, folder, tmp_path, error=HubError)
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "new"
    assert f"{target}: can't write" in message_of(hub.import_model, folder, target, error=HubError)


def test_names(tmp_path, monkeypatch):
    paraformer_folder(tmp_path / "assets" / hub.DEFAULT_MODEL)
    ctc_folder(tmp_path / "assets" / "other")
    monkeypatch.setattr(locate, "ASSETS", tmp_path / "assets")
    assert hub.embedded_models() == sorted([hub.DEFAULT_MODEL, "other"])
    assert hub.resolve("default") == hub.resolve(hub.DEFAULT_MODEL) == tmp_path / "assets" / hub.DEFAULT_MODEL
    assert hub.resolve("other").name == "other"
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.read_card("other").model == "ctc"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("./other") == hub.Path("other")
    assert "did you mean 'other'?" in message_of(hub.resolve, "othr", error=HubError)


def test_a_missing_default_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "ASSETS", tmp_path)
    assert "not in this installation" in message_of(hub.resolve, "default", error=HubError)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./gone", "no such model folder"),
        ("/nowhere/at/all", "no such model folder"),
        ("~/nowhere-at-all", "no such model folder"),
        ("paraformer_zh", "did you mean 'paraformer-zh'?"),
        ("no such name", "give a folder, a hub id"),
        ("a/b/c", "give a folder, a hub id"),
        ("", "give a folder, a hub id"),
    ],
)
def test_unknown_names(name, words):
    assert words in message_of(hub.resolve, name, error=HubError)


def test_incomplete_folders_say_what_is_missing(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    assert "neither configuration nor weights; accepted: ours (model.yaml" in message_of(hub.detect, folder)
    (folder / "model.pt").write_bytes(b"x")
    assert "only model.pt without its configuration" in message_of(hub.detect, folder)
    (folder / "config.yaml").write_text("model: Conformer\n")
    assert "FunASR model 'Conformer' is not supported; supported: Paraformer" in message_of(
        hub.detect, folder
    )
    (folder / "model.pt").unlink()
    assert "expected model.pt" in message_of(hub.detect, folder)
    (folder / "model.yaml").write_text("card: {}\n")
    assert "no model.safetensors" in message_of(hub.detect, folder)
    other = tmp_path / "n"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"x")
    assert "no model.yaml" in message_of(hub.detect, other)
    assert "is a file" in message_of(hub.resolve, str(other / "model.safetensors"))
    wenet = tmp_path / "w"
    wenet.mkdir()
    (wenet / "train.yaml").write_text("model: asr_model\n")
    assert "expected final.pt" in message_of(hub.load_parts, wenet)


def edit(folder, **sections):
    """Change keys of model.yaml; a value of None removes the key."""
    tree = read_yaml(folder / "model.yaml")
    for section, changes in sections.items():
        part = tree[section]
        for key, value in changes.items():
            part[key] = value
            if value is None:
                del part[key]
    write_yaml(tree, folder / "model.yaml")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"network": {"encoderr": "sanm"}}, "network: unknown key 'encoderr'; valid keys: "),
        ({"network": {"vocab_size": 77}}, "network.vocab_size is 77, but the tokenizer gives 31"),
        ({"network": {"input_size": 80}}, "network.input_size is 80, but the frontend gives 140"),
        ({"network": {"encoder": "lstm"}}, "unknown kind 'lstm'"),
        (
            {"card": {"model": "transducer"}},
            "card.model: unknown model 'transducer'; valid values: paraformer",
        ),
        ({"card": {"sample_rate": 8000}}, "card.sample_rate is 8000, frontend.sample_rate 16000"),
        ({"card": {"name": None}}, "card: key 'name' is required"),
        ({"frontend": {"windw": "povey"}}, "frontend: unknown key 'windw'"),
        ({"decoding": {"beams": 3}}, "decoding: unknown key 'beams'"),
        ({"decoding": {"beam": 0}}, "beam: got 0; must be 1 to 10000"),
        ({"decoding": {"decoder": "magic"}}, "decoder: got 'magic'; valid values: auto, paraformer"),
        ({"decoding": {"segments": {"longest": 3.0}}}, "need 1 <= merge <= longest"),
        ({"tokenizer": {"file": "gone.json"}}, "gone.json: can't read the vocabulary"),
    ],
)
def test_mistakes_in_model_yaml_are_named(tmp_path, sections, words):
    folder = paraformer_folder(tmp_path / "m")
    edit(folder, **sections)
    assert words in message_of(hub.load_parts, folder, error=ConfigError)


def test_weights_that_do_not_fit(tmp_path):
    folder = paraformer_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, f"1 missing: {name}"),
        ({**tensors, "stranger": torch.ones(2)}, "1 unexpected: stranger"),
        ({**tensors, name: torch.ones(7)}, f"1 misshaped: {name} is 7 in the file"),
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, f"NaN or infinite values in {name}"),
    ):
        save_file(changed, path)
        text = message_of(hub.load_parts, folder, error=CheckpointError)
        assert words in text
        assert str(path) in text


def test_verify(tmp_path):
    folder = paraformer_folder(tmp_path / "m")
    checks = inspection.verify(folder)
    assert [c.name for c in checks] == ["folder", "sha256", "weights", "run"]
    assert all(c.passed for c in checks)
    (folder / "tokens.json").write_text((folder / "tokens.json").read_text() + " ")
    checks = inspection.verify(folder)
    assert [c.passed for c in checks] == [True, False]
    assert "tokens.json: SHA-256 differs" in checks[1].detail
    (folder / "tokens.json").unlink()
    assert "tokens.json: is missing" in inspection.verify(folder)[1].detail
    assert not inspection.verify("no such name")[0].passed


def test_model_info(tmp_path):
    info = inspection.model_info(ctc_folder(tmp_path / "m"))
    assert info["vocabulary"] == 31
    assert info["parameters"] > 1000
    json.dumps(info)


def test_a_large_file_is_not_copied_into_memory_twice(tmp_path):
    """Loaded float32 weights are the mapped file itself."""
    folder = paraformer_folder(tmp_path / "m")
    network = hub.load_parts(folder).network
    places = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes = {p.untyped_storage().nbytes() for p in network.parameters()}
    assert len(places) == 1 or max(sizes) < (folder / "model.safetensors").stat().st_size


class FakeHub:
    """Stands in for huggingface_hub.snapshot_download."""

    def __init__(self, folder=None, error=None):
        self.folder, self.error, self.calls = folder, error, []

    def __call__(self, repository, **options):
        self.calls.append((repository, options))
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def fake(monkeypatch):
    def install(folder=None, error=None):
        stand_in = FakeHub(folder, error)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
        return stand_in

    return install


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("paraformer-zh", "funasr/paraformer-zh", None),
        ("paraformer-en", "funasr/paraformer-en", None),
        ("SenseVoiceSmall", "FunAudioLLM/SenseVoiceSmall", None),
        ("some-org/some.model", "some-org/some.model", None),
        ("some-org/some-model@v1.0", "some-org/some-model", "v1.0"),
        ("some-org/some-model@refs/pr/1", "some-org/some-model", "refs/pr/1"),
    ],
)
def test_hub_names_are_downloaded(fake, tmp_path, monkeypatch, name, repository, revision):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NAR_SPEECH_CACHE", str(tmp_path / "cache"))
    stand_in = fake(tmp_path)
    assert hub.resolve(name) == tmp_path
    ((called, options),) = stand_in.calls
    assert (called, options["revision"]) == (repository, revision)
    assert options["cache_dir"] == str(tmp_path / "cache")
    assert options["local_files_only"] is False
    hub.resolve(name, cache_dir=tmp_path / "other", offline=True)
    assert stand_in.calls[1][1]["cache_dir"] == tmp_path / "other"
    assert stand_in.calls[1][1]["local_files_only"] is True
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.resolve(name)
    assert stand_in.calls[2][1]["local_files_only"] is True


def test_a_downloaded_folder_is_loaded(fake, tmp_path):
    fake(funasr_folder(tmp_path / "m"))
    assert nar_speech.load_model("paraformer-zh", device="cpu")((noise(), 16000)).duration == 1.0


def answer(kind):
    """An HTTP error of the hub client, whose constructor differs from version to version."""
    error = kind.__new__(kind)
    error.args = ("no",)
    return error


@pytest.mark.parametrize(
    ("error", "offline", "words"),
    [
        (LocalEntryNotFoundError("x"), False, "can't be reached"),
        (LocalEntryNotFoundError("x"), True, "has not been downloaded and offline mode is on"),
        (RuntimeError("an error of the HTTP library"), False, "can't be reached"),
        (ConnectionError("x"), False, "can't be reached"),
        (answer(RepositoryNotFoundError), False, "no such repository"),
        (answer(RevisionNotFoundError), False, "has no revision 'v9'"),
        (answer(GatedRepoError), False, "asks for consent"),
    ],
)
def test_download_errors_are_one_clear_line(fake, error, offline, words):
    fake(error=error)
    text = message_of(hub.resolve, "org/name@v9", offline=offline, error=HubError)
    assert words in text
    assert text.startswith("org/name@v9: ")
    assert text.count("org/name@v9") == 1
    assert "org/name:" not in text


def test_options_of_load_model(tmp_path):
    folder = paraformer_folder(tmp_path / "m", decoding={"beam": 3})
    model = nar_speech.load_model(folder, device="cpu", decoder="ctc_beam", nbest=2)
    assert model.decoding == DecodingConfig(decoder="ctc_beam", beam=3, nbest=2)
    assert "unknown key 'beams'" in message_of(nar_speech.load_model, folder, beams=3, error=ConfigError)
    assert "dtype: got 'float8'" in message_of(nar_speech.load_model, folder, "cpu", "float8")
    assert "device: got 'tpu'" in message_of(nar_speech.load_model, folder, "tpu")
    assert "is not there" in message_of(nar_speech.load_model, folder, "cuda:99")


def test_module_attributes():
    assert nar_speech.__version__
    assert nar_speech.Transcriber.__name__ == "Transcriber"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nar_speech.nothing  # noqa: B018
