"""`python run.py --module dpo --toy`: the same command line as `llmcore` and `python -m llmcore_hf`."""

from llmcore_hf.cli import entry_point

if __name__ == "__main__":
    entry_point()
