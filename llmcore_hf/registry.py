"""The table of modules: one row each. `--list`, the roadmap and the parametrised tests read it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from llmcore_hf.errors import ConfigError


@dataclass(frozen=True)
class Module:
    """One lesson and training job.

    The code behind `code` offers four functions: `argument_classes()` gives the dataclasses of its options,
    `house_defaults(explicit)` the defaults that depend on the machine, `check(config)` names impossible combinations,
    and `run(config, run_dir)` does the work. One that trains on datasets also offers `as_trained(job, rows, max_length)`,
    what its trainer makes of rows, and `prompt_limit_of(job, max_length)`, for `data inspect`.
    """

    name: str
    day: int
    level: int
    title_zh: str
    title_en: str
    code: str
    extra: str | None = None  # the optional dependency group it needs
    trains_on: str | None = None  # task of its datasets, as `data.formats` names them

    def load(self) -> ModuleType:
        return import_module(self.code)


MODULES = (
    Module("sft", 5, 3, "SFT 入门：监督微调", "Supervised fine-tuning", "llmcore_hf.alignment.sft", trains_on="sft"),
    Module(
        "dpo",
        6,
        3,
        "DPO 对齐：直接偏好优化",
        "Direct preference optimization",
        "llmcore_hf.alignment.dpo",
        trains_on="preference",
    ),
)


def get(name: str) -> Module:
    """The row called `name`.

    Raises:
        ConfigError: there is no such module; the message suggests the nearest name.
    """
    for module in MODULES:
        if module.name == name:
            return module
    names = [module.name for module in MODULES]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    raise ConfigError([f"there is no module `{name}`.{hint} `--list` shows: {', '.join(names)}"])


def for_task(task: str) -> Module | None:
    """The first module that trains on datasets of that task; None when there is none."""
    return next((module for module in MODULES if module.trains_on == task), None)
