"""The scripts of egs/mini_en for its tests, and git repositories to stand for GitHub's."""

import importlib
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "egs" / "mini_en"
SCRIPTS = (
    "asterisk books common development everyday export filter_speechocean find_books make_cuts make_text "
    "overlap pack prepare_eval prepare_real reserved results score synthesize templates voices words"
)


@contextmanager
def recipe_scripts() -> Iterator[Namespace]:
    """Scripts of egs/mini_en/local as attributes; other recipes may have modules of the same names."""
    names = SCRIPTS.split()
    kept = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(RECIPE / "local"))
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(RECIPE / "local"))
        for name in names:
            sys.modules.pop(name, None)
            if kept[name] is not None:
                sys.modules[name] = kept[name]


def git(*words: str, cwd: Path) -> None:
    """Run git as a made-up author in `cwd`."""
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=cwd, check=True, capture_output=True
    )


def commit_all(folder: Path) -> None:
    """Make `folder` a repository whose newest commit has all its files."""
    git("init", "-q", ".", cwd=folder)
    git("add", ".", cwd=folder)
    git("commit", "-q", "-m", "Add files", cwd=folder)
