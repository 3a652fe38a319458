"""`--module NAME --help`: the options of a module, grouped, with their defaults."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

from llmcore_hf import resources
from llmcore_hf.config import HOUSE, Options, choices_of, type_name
from llmcore_hf.registry import Module


def print_module_help(module: Module) -> None:
    from rich.console import Console
    from rich.table import Table

    code = module.load()
    options = Options(code.argument_classes())
    house = code.house_defaults({})
    recipe = f"recipes/{module.name}/toy.yaml"
    toy = options.from_yaml(resources.path(recipe), recipe, [])

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"[bold]{module.name}[/bold]  {module.title_en} · {module.title_zh}\n", soft_wrap=True)
    console.print((code.__doc__ or "").strip() + "\n", markup=False, soft_wrap=True)
    console.print(f"--toy uses {recipe}; its values are shown as (toy: ...).\n", markup=False, soft_wrap=True)
    for title, names in groups(code.argument_classes()).items():
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1)
        )
        table.add_column(no_wrap=True, style="cyan", min_width=32)
        table.add_column(overflow="fold")
        for name in names:
            table.add_row(f"--{name}", _describe(options, name, house, toy))
        console.print(table)
        console.print()


def groups(classes: tuple[type, ...]) -> dict[str, list[str]]:
    """Option names by group: one group per dataclass, a trainer's own options apart from the inherited ones."""
    found: dict[str, list[str]] = {}
    for cls in classes:
        # by name, so that the help of a lesson does not import transformers
        base = next((base for base in cls.__mro__ if base.__name__ == "TrainingArguments"), None)
        inherited = {f.name for f in dataclasses.fields(base)} if base else set()
        for f in dataclasses.fields(cls):
            if not f.init:
                continue
            title = cls.__name__
            if base:
                title = "TrainingArguments" if f.name in inherited else f"{cls.__name__} (method)"
            found.setdefault(title, []).append(f.name)
    # the method's own options first, the long list of training options last
    return dict(sorted(found.items(), key=lambda item: item[0] == "TrainingArguments"))


def _describe(options: Options, name: str, house: dict[str, Any], toy: dict[str, Any]) -> Any:
    from rich.text import Text

    f, hint = options.fields[name], options.hints[name]
    text = Text()
    text.append(f"{type_name(hint)}  ", style="magenta")
    text.append(re.sub(r"\s+", " ", str(f.metadata.get("help", ""))).replace("%%", "%").strip() + " ")
    if choices := choices_of(f, hint):
        text.append(f"One of: {', '.join(map(str, choices))}. ")
    default = house.get(name, options.defaults[name])
    origin = f", {HOUSE}" if name in house else ""
    text.append(f"(default: {getattr(default, 'value', default)}{origin})", style="green")
    if name in toy:
        text.append(f" (toy: {toy[name]})", style="yellow")
    return text
