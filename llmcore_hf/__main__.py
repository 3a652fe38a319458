from llmcore_hf.cli import entry_point

entry_point()
