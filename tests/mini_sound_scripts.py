"""The scripts of egs/mini_sound for its tests."""

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "egs" / "mini_sound"
SCRIPTS = "base captions classifier compose effects heard make_cuts midi real_sounds"
SCRIPTS += " make_sounds render render_music results synthesis"
# Of mini_en, which these import.
OTHERS = "asterisk common development prepare_eval prepare_real reserved words speech"


@contextmanager
def sound_scripts() -> Iterator[Namespace]:
    """Scripts of egs/mini_sound/local as attributes; other recipes may have modules of the same names."""
    names, others = SCRIPTS.split(), OTHERS.split()
    kept = {name: sys.modules.pop(name, None) for name in names + others}
    path = list(sys.path)
    sys.path.insert(0, str(RECIPE / "local"))
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name in names + others:
            sys.modules.pop(name, None)
            if kept[name] is not None:
                sys.modules[name] = kept[name]
