"""`python scripts/bugzoo.py`: the same as `python run.py bugzoo`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmcore_hf.cli import entry_point

if __name__ == "__main__":
    sys.argv.insert(1, "bugzoo")
    entry_point()
