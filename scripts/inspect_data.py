"""`python scripts/inspect_data.py FILE`: the same as `python run.py data inspect FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmcore_hf.cli import entry_point

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "inspect"]
    entry_point()
