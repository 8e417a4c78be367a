"""Keeps the direction of imports drawn in docs/architecture.md, and ``import nar_speech`` light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nar_speech"

# Lower layers first; a module may import its own layer and those it names here.
BASE = {
    "version",
    "errors",
    "types",
    "compress",
    "config",
    "audio",
    "audio_write",
    "cmvn",
    "spectrum",
    "features",
    "text",
    "metrics",
    "metrics_audio",
    "checkpoint",
    "locate",
    "model_folder",
    "sound_folder",
    "speech_folder",
}
ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    "layers": BASE | {"layers"},
    "codec": BASE | {"layers", "codec"},
    "models": BASE | {"layers", "codec", "models", "losses"},
    "losses": BASE | {"losses"},
    "search": BASE | {"search"},
    "sampling": BASE | {"sampling"},
    "data": BASE | {"data"},
    "train": BASE | {"train", "data"},
    "hub": BASE | {"layers", "codec", "models", "search", "hub", "pipelines"},
    "pipelines": BASE | {"layers", "codec", "models", "search", "sampling", "pipelines", "hub"},
    "engine": BASE | {"layers", "codec", "models", "search", "sampling", "pipelines", "hub", "engine"},
}
# Fit models to the engine; the rest of it is model-neutral.
ENGINE_GLUE = {"asr.py", "asr_hearing.py", "asr_offline.py", "asr_files.py", "vc.py"}
# Sit on top: may import anything, nothing imports them.
TOP = {
    "server",
    "batch",
    "inspection",
    "cli",
    "cli_options",
    "cli_codec",
    "cli_output",
    "cli_stream",
    "cli_generate",
    "cli_phonemize",
    "cli_synthesize",
    "demo",
}
OPTIONAL = {
    "k2",
    "kenlm",
    "ray",
    "gradio",
    "espeakng_loader",
    "pypinyin",
    "jieba",
    "cn2an",
    "pyopenjtalk",
    "perth",
    "onnxruntime",
    "transformers",
    "av",
    "flashlight",
    "fastapi",
    "uvicorn",
    "starlette",
    "websockets",
    "prometheus_client",
}
# The server is loaded after a check for its extra; only what the command line reads for --help is not.
SERVE_EXTRA = {"fastapi", "uvicorn", "starlette", "prometheus_client"}
READ_FOR_HELP = {"__init__.py", "command.py", "settings.py", "auth.py"}
HEAVY = {"matplotlib", "lhotse", "silero_vad", "librosa", "tensorboard"}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(tree: ast.AST, top_level_only: bool = False):
    """Yield (module name, line) of every import; nested ones too unless ``top_level_only``."""
    nodes = ast.walk(tree)
    if top_level_only:
        nested = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
        nodes = (n for n in ast.walk(tree) if id(n) not in nested)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module, node.lineno
            if node.module == "nar_speech":
                yield from ((f"nar_speech.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    layer = layer_of(path)
    if layer in TOP | {"__init__", "__main__"}:
        return
    assert layer in ALLOWED, f"{path}: say in this test which layers '{layer}' may import"
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] in {"recipes", "demo", "benchmarks", "tests", "egs"}:
            pytest.fail(f"{path}:{line} imports {name}, which sits above the package")
        if parts[0] == "nar_speech" and len(parts) > 1:
            assert parts[1] in ALLOWED[layer], f"{path}:{line} imports {name}: not below '{layer}'"


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").glob("*.py")), ids=lambda p: p.name)
def test_the_engine_knows_no_model(path):
    if path.name in ENGINE_GLUE:
        return
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "nar_speech" and len(parts) > 1:
            assert parts[1] in BASE | {"layers", "engine"}, f"{path}:{line} imports {name}"
            assert parts[1] != "engine" or f"{parts[-1]}.py" not in ENGINE_GLUE, f"{path}:{line} {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    forbidden = OPTIONAL | HEAVY
    if layer_of(path) == "server" and path.name not in READ_FOR_HELP:
        forbidden = forbidden - SERVE_EXTRA
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8")), top_level_only=True):
        assert name.split(".")[0] not in forbidden, f"{path}:{line} imports {name} at module level"


def test_help_needs_no_torch():
    code = "import sys, nar_speech.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_are_loaded_safely():
    for path in [
        *modules(),
        *ROOT.glob("recipes/*.py"),
        *ROOT.glob("egs/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
                safe = [
                    k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"
                ]
                assert safe, f"{path}:{node.lineno} torch.load without weights_only=True"
