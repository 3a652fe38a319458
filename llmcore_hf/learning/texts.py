"""Texts in two languages, Chinese first: reading them from YAML, and the command lines of the course."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmcore_hf.distributed import program
from llmcore_hf.errors import ConfigError

LANGUAGES = ("zh", "en")
Text = dict[str, str]  # one text per language

# PyYAML's parser in C is ten times as fast; a build without libyaml lacks it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Folding a YAML text joins its lines with spaces, which Chinese does not want between its characters.
_FOLD = re.compile(r"(?<=[\u2e80-\u9fff]) (?=[\u2e80-\u9fff])|(?<=[，。：；？！、（“]) | (?=[，。：；？！、）”])")


def read_yaml(file: Path) -> Any:
    """The content of a YAML file of the course, with folded Chinese lines joined."""
    return _joined(yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader))


def _joined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _joined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_joined(item) for item in value]
    return _FOLD.sub("", value).strip() if isinstance(value, str) else value


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `ConfigError`s, with `--lang` on board and no abbreviations."""

    def __init__(self, command: str, description: str) -> None:
        name = program() if program().endswith("py") and " " not in program() else f"{program()} {command}"
        super().__init__(prog=name, description=description, allow_abbrev=False)
        self.add_argument("--lang", choices=LANGUAGES, default="zh", help="language of the texts (default: zh)")

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message} (`--help` shows the options)"])
