"""Lessons that are one file, `recipes/<name>/<name>.py`: how such a file becomes a module, and runs on its own.

The file offers a docstring that explains the problem, `Args` (a subclass of `LessonArguments`) and `run(args, run_dir)`,
and ends with `if __name__ == "__main__": lesson.main(__file__)`. Nothing here imports transformers.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmcore_hf import distributed, resources
from llmcore_hf.config import Config, RunArguments
from llmcore_hf.curves import png, pyplot
from llmcore_hf.errors import ConfigError

if TYPE_CHECKING:
    from llmcore_hf.run_dir import RunDirectory

__all__ = ["Lesson", "LessonArguments", "environment_problems", "launch_problems", "load", "main", "png", "pyplot"]


@dataclass
class LessonArguments(RunArguments):
    """Options every lesson has. A lesson's `Args` adds its own and overrides `problems`."""

    seed: int = field(default=42, metadata={"help": "Seed of every random number."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the run writes; output/<module>/<run_id> when not given."}
    )

    def __post_init__(self) -> None:
        found = self.problems()
        if not 0 <= self.seed < 2**32:
            found.append(f"--seed {self.seed}: numpy takes 0 to {2**32 - 1}")
        if found:
            raise ConfigError(found)

    def problems(self) -> list[str]:
        """What is wrong with the options, one sentence each, naming the option and what it may be."""
        return []

    def below(self, **least: int) -> list[str]:
        """The options that are less than they may be."""
        return [f"--{name} {getattr(self, name)}: at least {n}" for name, n in least.items() if getattr(self, name) < n]

    def no_multiples(self, **factors: tuple[int, str]) -> list[str]:
        """The options that are no positive multiple of a factor, given with the reason for it."""
        return [
            f"--{name} {getattr(self, name)}: a positive multiple of {factor} ({why})"
            for name, (factor, why) in factors.items()
            if getattr(self, name) < 1 or getattr(self, name) % factor
        ]

    def not_positive(self, *names: str) -> list[str]:
        """The options that are no positive, finite number."""
        return [
            f"--{name} {getattr(self, name)}: a positive number"
            for name in names
            if not 0 < getattr(self, name) < float("inf")
        ]


def environment_problems(env_id: str, *, tabular: bool = False, time_limit: bool = False) -> list[str]:
    """Why a lesson cannot use this Gymnasium environment: at most one sentence. All lessons need discrete actions.

    Args:
        tabular: it must have numbered states and a transition table; otherwise its observations must be a flat Box.
        time_limit: an episode must end after a known number of steps at the latest.
    """
    import gymnasium
    from gymnasium.spaces import Box, Discrete

    try:
        env = gymnasium.make(env_id)
    except Exception as error:  # the constructor of an environment may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        return [f"--env_id {env_id}: Gymnasium cannot make it ({reason})"]
    env.close()
    actions, observations, spec = env.action_space, env.observation_space, env.spec
    fits = (
        isinstance(observations, Discrete)
        if tabular
        else isinstance(observations, Box) and len(observations.shape) == 1
    )
    needed = "Discrete ones" if tabular else "a Box of one dimension"
    wrong = {
        f"its actions are {actions}, and this lesson needs Discrete ones": not isinstance(actions, Discrete),
        f"its observations are {observations}, and this lesson needs {needed}": not fits,
        "it has no `P` and `initial_state_distrib`, which this lesson computes with": tabular
        and not all(hasattr(env.unwrapped, name) for name in ("P", "initial_state_distrib")),
        "it has no time limit (`max_episode_steps`), so an episode might never end": time_limit
        and (spec is None or spec.max_episode_steps is None),
    }
    return [f"--env_id {env_id}: {text}" for text, is_wrong in wrong.items() if is_wrong][:1]


def launch_problems(module: str) -> list[str]:
    """Why a lesson cannot run under this launcher: at most one sentence."""
    if distributed.world_size() > 1:
        return [f"`{module}` runs in one process: start it with `python`, not with a launcher"]
    return []


def house_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    """None: the defaults of a lesson are those of its options."""
    return {}


def check(config: Config) -> list[str]:
    return launch_problems(config.module)


class Lesson:
    """A lesson's file, seen as the code of a module (`registry.Module`)."""

    def __init__(self, file: ModuleType) -> None:
        self.file = file
        self.__doc__ = file.__doc__

    def argument_classes(self) -> tuple[type, ...]:
        return (self.file.Args,)

    house_defaults, check = staticmethod(house_defaults), staticmethod(check)

    def run(self, config: Config, run_dir: RunDirectory) -> None:
        """Run the lesson in one thread: small tensors gain nothing from more and lose much when the cores are busy.

        Also, the same seed then gives the same numbers however many cores there are.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.file.run(config.part(self.file.Args), run_dir)
        finally:
            torch.set_num_threads(before)


def load(name: str) -> Lesson:
    """The lesson in `recipes/<name>/<name>.py`, executed once per process."""
    key = f"{__name__}.{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, resources.path(f"recipes/{name}/{name}.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return Lesson(sys.modules[key])


def main(file: str) -> None:
    """`python recipes/mdp/mdp.py --toy` is `run.py --module mdp --toy`."""
    from llmcore_hf import cli

    sys.argv[1:1] = ["--module", Path(file).stem]
    cli.entry_point()
