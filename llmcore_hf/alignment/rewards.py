"""Reward functions by name: built-in ones, those of TRL, and the user's own from a file or an installed module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from llmcore_hf.errors import UserError
from llmcore_hf.ppo.rewards import OWN_ARGUMENTS, Text

TRL_FUNCTIONS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
# What TRL and `PPOTrainer` hand to every function besides the columns of the dataset.
GIVEN = {"prompts", "log_extra", "log_metric", "environments", *OWN_ARGUMENTS}


def exact_match(completions: list[Text], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """1 where the completion is the text in column `answer`, spaces around it aside; else 0. None without an answer."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(text_of(c).strip() == str(a).strip()) for c, a in pairs]


def same_characters(completions: list[Text], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """1 where the completion has the characters of column `answer` in any order: a permutation that is not sorted yet."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(sorted(text_of(c).strip()) == sorted(str(a).strip())) for c, a in pairs]


def text_of(completion: Text) -> str:
    """The text of a completion, be it plain or the turns of a conversation."""
    return completion if isinstance(completion, str) else "".join(str(turn.get("content") or "") for turn in completion)


BUILT_IN: dict[str, Callable[..., Any]] = {f.__name__: f for f in (exact_match, same_characters)}


@dataclass
class RewardArguments:
    """What completions are rewarded for. With several, `--reward_weights` has one weight for each, the model's first."""

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A sequence classifier with one label: a hub id, a local folder, a run of --module reward."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Functions: {', '.join(BUILT_IN)} (they read a column `answer`); TRL's {', '.join(TRL_FUNCTIONS)}; your "
            "own as file.py:function or package.module.function."
        },
    )


def check(values: dict[str, Any]) -> list[str]:
    """What is wrong with the reward options, one sentence each."""
    names, model, weights = values["reward_funcs"] or [], values["reward_model_name_or_path"], values["reward_weights"]
    if not names and not model:
        return ["what shall be rewarded? Give --reward_funcs, --reward_model_name_or_path, or both"]
    problems = [f"--reward_funcs: `{name}` is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    n = len(names) + bool(model)
    if weights is not None and len(weights) != n:
        problems.append(f"--reward_weights has {len(weights)} weights for {n} rewards (the model's is the first)")
    for name in names:
        try:
            load(name, values["max_completion_length"])
        except UserError as error:
            problems.append(f"--reward_funcs {error}")
    return problems


def load(name: str, max_completion_length: int) -> Callable[..., Any]:
    """The function behind a name.

    Raises:
        UserError: there is none; the message says where it was looked for.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in TRL_FUNCTIONS:
        return _from_trl(name, max_completion_length)
    if ":" in name or name.endswith(".py"):
        return _from_file(name)
    if "." in name:
        return _from_module(name)
    raise UserError(
        f"`{name}`: there is no such function. Built in: {', '.join([*BUILT_IN, *TRL_FUNCTIONS])}; your own: "
        "file.py:function or package.module.function"
    )


def _from_trl(name: str, max_completion_length: int) -> Callable[..., Any]:
    from trl import rewards

    if name == "get_soft_overlong_punishment":  # DAPO: the last fifth of the length is punished
        return rewards.get_soft_overlong_punishment(max_completion_length, max(max_completion_length // 5, 1))
    if "accuracy" in name and importlib.util.find_spec("math_verify") is None:
        raise UserError(f"`{name}` needs the package math-verify: pip install math-verify")
    return getattr(rewards, name)


def _from_file(name: str) -> Callable[..., Any]:
    place, _, function = name.rpartition(":")
    path = Path(place or name).expanduser()
    if not function or not place:
        raise UserError(f"`{name}`: name the function in the file, as in {path}:my_reward")
    if not path.is_file():
        raise UserError(f"`{name}`: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"`{name}`: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    _run(lambda: spec.loader.exec_module(module), name)  # type: ignore[union-attr]
    return _attribute(module, function, name)


def _from_module(name: str) -> Callable[..., Any]:
    place, _, function = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:  # a module beside the data, as TRL's scripts allow
        sys.path.insert(0, str(Path.cwd()))
    return _attribute(_run(lambda: importlib.import_module(place), name), function, name)


def _run(load_module: Callable[[], Any], name: str) -> Any:
    try:
        return load_module()
    except (Exception, SystemExit) as error:  # a script ends when it is done
        raise UserError(f"`{name}` cannot be loaded: {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, function: str, name: str) -> Callable[..., Any]:
    found = getattr(module, function, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UserError(f"`{name}`: {module.__name__} has no function `{function}`, only: {', '.join(there) or 'none'}")
    return found


def check_columns(functions: Sequence[Any], columns: Sequence[str], source: str) -> None:
    """Raises `UserError` when a function asks for a column that the dataset has not, or a column has a taken name."""
    if taken := sorted(set(columns) & set(OWN_ARGUMENTS)):
        raise UserError(f"{source}: rename column {', '.join(taken)}: reward functions get an argument of that name")
    for function in functions:
        if not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        needed = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in GIVEN
        ]
        if missing := [name for name in needed if name not in columns]:
            raise UserError(
                f"reward function `{function.__name__}` needs a column `{missing[0]}`; {source} has: {', '.join(columns)}. "
                f"Map one with --columns {missing[0]}=NAME"
            )
