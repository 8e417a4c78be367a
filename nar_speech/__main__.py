"""``python -m nar_speech`` is the command line."""

import sys

from nar_speech.cli import main

if __name__ == "__main__":
    sys.exit(main())
