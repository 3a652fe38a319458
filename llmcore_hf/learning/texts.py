"""Texts in two languages, Chinese first: reading them from YAML, and the command lines of the course."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmcore_hf.distributed import program
from llmcore_hf.errors import ConfigError, UserError

LANGUAGES = ("zh", "en")
Text = dict[str, str]  # one text per language

# PyYAML's parser in C is ten times as fast; a build without libyaml lacks it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Folding a YAML text joins its lines with spaces, which Chinese does not want between its characters.
_FOLD = re.compile(r"(?<=[\u2e80-\u9fff”]) (?=[\u2e80-\u9fff“])|(?<=[，。：；？！、（）“]) | (?=[，。：；？！、）”])")


def read_yaml(file: Path) -> Any:
    """The content of a YAML file of the course, with folded Chinese lines joined.

    Raises:
        UserError: the file is no YAML, or a key is no text: YAML 1.1 takes `on`, `off`, `yes`, `no` for true and false.
    """

    def joined(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            if wrong := [key for key in value if isinstance(key, bool)]:
                raise UserError(
                    f"{file}, {path or 'at the top'}: a key reads as {str(wrong[0]).lower()}, as on, off, yes and no do in "
                    "YAML; put it in quotes or take another word"
                )
            return {key: joined(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [joined(item, f"{path}/{number}") for number, item in enumerate(value)]
        return _FOLD.sub("", value).strip() if isinstance(value, str) else value

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())}") from None
    return joined(content, "")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `ConfigError`s, with `--lang` on board and no abbreviations."""

    def __init__(self, command: str, description: str) -> None:
        name = program() if program().endswith("py") and " " not in program() else f"{program()} {command}"
        super().__init__(prog=name, description=description, allow_abbrev=False)
        self.add_argument("--lang", choices=LANGUAGES, default="zh", help="language of the texts (default: zh)")

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse does; an empty text, such as an unset variable of the shell, is no value."""
        parsed = super().parse_args(*args, **kwargs)
        if empty := [name for name, value in vars(parsed).items() if value == ""]:
            self.error(f"argument --{empty[0]}: expected a value, not an empty text")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message} (`--help` shows the options)"])
