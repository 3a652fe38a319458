"""Texts in two languages, Chinese first: reading them from YAML, and the command lines of the course."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmcore_hf.distributed import program
from llmcore_hf.errors import ConfigError, UserError

LANGUAGES = ("zh", "en")
Text = dict[str, str]  # one text per language

_language: ContextVar[str] = ContextVar("language of the running command", default="zh")


@contextlib.contextmanager
def in_language_of(argv: list[str]) -> Iterator[None]:
    """Inside, `say` speaks the language that the command line asks for, also about what is wrong with that line."""
    words = [word for option in argv for word in option.split("=", 1)]
    asked = [after for word, after in pairwise(words) if word == "--lang" and after in LANGUAGES]
    token = _language.set(asked[-1] if asked else "zh")
    try:
        yield
    finally:
        _language.reset(token)


def say(zh: str, en: str) -> str:
    """The text in the language of the running command."""
    return {"zh": zh, "en": en}[_language.get()]


def nearest(name: str, known: Iterable[str]) -> str:
    """A question whether another name was meant; empty when none is near."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return say(zh=f"是不是 `{close[0]}`？", en=f" Did you mean `{close[0]}`?") if close else ""


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
                read_as = str(wrong[0]).lower()
                raise UserError(
                    say(
                        zh=f"{file}，{path or '最外层'}：有个键被读成 {read_as}，YAML 里 on、off、yes、no 都会这样；加上引号，或换个词",
                        en=f"{file}, {path or 'at the top'}: a key reads as {read_as}, as on, off, yes and no do in YAML; put it "
                        "in quotes or take another word",
                    )
                )
            return {key: joined(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [joined(item, f"{path}/{number}") for number, item in enumerate(value)]
        return _FOLD.sub("", value).strip() if isinstance(value, str) else value

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise UserError(say(zh=f"{file} 已损坏：{why}", en=f"{file} is damaged: {why}")) from None
    return joined(content, "")


class WrongOptions(ConfigError):
    """Options of a command of the course are wrong: said in the language of the command."""

    def __init__(self, *problems: str) -> None:
        super().__init__(list(problems))
        head, *lines = str(self).split("\n")
        self.args = ("\n".join([say(zh=f"选项有 {len(problems)} 处不对：", en=head), *lines]),)


# What argparse says, and the same in Chinese.
_ARGPARSE_IN_CHINESE = (
    (r"^argument (\S+): ", r"选项 \1："),
    (r"unrecognized arguments: ", "没有这样的选项："),
    (r"the following arguments are required: ", "缺少："),
    (r"expected one argument", "需要一个值"),
    (r"invalid choice: (\S+) \(choose from (.+)\)", r"没有 \1，可选的是 \2"),
    (r"invalid int value: ", "不是整数："),
    (r"invalid float value: ", "不是数："),
    (r"not allowed with argument ", "不能同时用 "),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `ConfigError`s, with `--lang` on board and no abbreviations."""

    def __init__(self, command: str, description: str) -> None:
        name = program() if program().endswith("py") and " " not in program() else f"{program()} {command}"
        super().__init__(prog=name, description=description, allow_abbrev=False, add_help=False)
        self.add_argument("-h", "--help", action="help", help=say(zh="显示这些说明", en="show this and exit"))
        self.add_argument(
            "--lang",
            choices=LANGUAGES,
            default="zh",
            help=say(zh="文字的语言（默认 zh）", en="language of the texts (default: zh)"),
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse does; an empty text, such as an unset variable of the shell, is no value."""
        parsed = super().parse_args(*args, **kwargs)
        if empty := [name for name, value in vars(parsed).items() if value == ""]:
            self.error(f"argument --{empty[0]}: expected one argument")
        return parsed

    def error(self, message: str) -> NoReturn:
        for pattern, chinese in _ARGPARSE_IN_CHINESE:
            message = re.sub(pattern, say(zh=chinese, en=r"\g<0>"), message)
        raise WrongOptions(say(zh=f"{message}（`--help` 列出所有选项）", en=f"{message} (`--help` shows the options)"))
