"""The cheat sheet: `learning/CHEATSHEET.md` and `.en.md`, written from `learning/cheatsheet.yaml` and `formulas`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llmcore_hf import resources
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning.formulas import evaluate
from llmcore_hf.learning.texts import LANGUAGES, Parser, Text, read_yaml, say

PAGES = {"zh": "CHEATSHEET.md", "en": "CHEATSHEET.en.md"}
SECTIONS = {
    "memory": {"zh": "一、内存", "en": "1. Memory"},
    "compute": {"zh": "二、计算量与速度", "en": "2. Compute and speed"},
    "attention": {"zh": "三、注意力的变体", "en": "3. Variants of attention"},
    "algorithms": {"zh": "四、算法对照", "en": "4. Algorithms side by side"},
    "losses": {"zh": "五、损失与优势，逐个算", "en": "5. Losses and advantages, worked out"},
    "metrics": {"zh": "六、读指标", "en": "6. Reading metrics"},
    "wrong": {"zh": "七、常见的错误公式", "en": "7. Common wrong formulas"},
}
HEADS = {
    "formulas": {
        "zh": "| 什么 | 公式 | 值 | 怎么算的 | 来源 |",
        "en": "| What | Formula | Value | Computed by | Source |",
    },
    "attention": {
        "zh": "| 变体 | 共享什么 | 每 token 每序列缓存的元素 | 缓存 | 例子 | 取舍 | 来源 |",
        "en": "| Variant | What is shared | Cached elements per token | Cache | Found in | Trade-off | Source |",
    },
    "algorithms": {
        "zh": "| 算法 | 数据 | 内存中的模型 | 7B 时 | 损失 | 在策略还是离线 | 来源 |",
        "en": "| Algorithm | Data | Models in memory | At 7B | Loss | On-policy or offline | Source |",
    },
    "metrics": {
        "zh": "| 日志里的名字 | 含义 | 例子的值 | 健康 | 警报 |",
        "en": "| Name in the log | Meaning | Value of the example | Healthy | Alarm |",
    },
    "wrong": {
        "zh": "| 问题 | 对 | 错 | 错算成了 | 为什么 | 来源 |",
        "en": "| Question | True | Wrong | The wrong formula | Why | Source |",
    },
}
OTHER = {"zh": "[English](CHEATSHEET.en.md)", "en": "[中文](CHEATSHEET.md)"}


@functools.cache
def load() -> dict[str, Any]:
    """The content of `learning/cheatsheet.yaml`."""
    source: dict[str, Any] = read_yaml(resources.path("learning/cheatsheet.yaml"))
    return source


def computed(expression: str) -> Any:
    """The value of an expression of the sheet: a number, or a list of them."""
    return evaluate(expression, {})


BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


def show(value: Any, unit: str) -> str:
    """A value in its unit, four digits."""
    if isinstance(value, list):
        return f"({', '.join(show(item, unit) for item in value)})"
    if unit == "bytes":
        name, size = next(((name, size) for name, size in BYTES if abs(value) >= size), ("B", 1))
        return f"{value / size:.4g} {name}"
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit == "flops":
        return f"{value:.3g} FLOPs"
    if unit == "number":
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.4g} {unit}"


def page(language: str) -> str:
    """The whole sheet as Markdown."""
    source = load()
    parts = [f"# {source['title'][language]}", OTHER[language], source["intro"][language]]
    for name, title in SECTIONS.items():
        section = source[name]
        parts.append(f"## {title[language]}")
        if isinstance(section, dict):
            parts.append(section["intro"][language])
            section = section["rows"]
        kind = name if name in HEADS else "formulas"
        head = HEADS[kind][language]
        rows = [_row([*CELLS[kind](row, language)]) for row in section]
        parts.append("\n".join([head, _row(["---"] * (head.count("|") - 1)), *rows]))
    return "\n\n".join(parts) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _text(text: Text, language: str) -> str:
    return text[language].replace("|", "\\|")


def _formula(row: dict[str, Any], language: str) -> list[str]:
    value = show(computed(row["compute"]), row["unit"])
    return [_text(row["name"], language), _code(row["formula"]), value, _code(row["compute"]), row["source"]]


def _attention(row: dict[str, Any], language: str) -> list[str]:
    value = show(computed(row["compute"]), "bytes")
    shares, trade = (_text(row[name], language) for name in ("shares", "trade"))
    return [f"**{row['name']}**", shares, _code(row["formula"]), value, row["models"], trade, row["source"]]


def _algorithm(row: dict[str, Any], language: str) -> list[str]:
    memory = "—" if row["compute"] is None else show(computed(row["compute"]), "bytes")
    data, models, policy = (_text(row[name], language) for name in ("data", "models", "policy"))
    return [f"**{row['name']}**", data, models, memory, _code(row["loss"]), policy, row["source"]]


def _metric(row: dict[str, Any], language: str) -> list[str]:
    value = "—" if row["compute"] is None else f"{computed(row['compute']):.4g} {_code(row['compute'])}"
    return [_code(row["name"]), _text(row["meaning"], language), value, *(_text(row[n], language) for n in ("healthy", "alarm"))]  # fmt: skip


def _wrong(row: dict[str, Any], language: str) -> list[str]:
    right, wrong = (show(computed(row[name]), row["unit"]) for name in ("right", "wrong"))
    return [
        _text(row["ask"], language), f"**{right}** {_code(row['right'])}", wrong, _code(row["wrong"]),
        _text(row["why"], language), row["source"],
    ]  # fmt: skip


CELLS = {
    "formulas": _formula,
    "attention": _attention,
    "algorithms": _algorithm,
    "metrics": _metric,
    "wrong": _wrong,
}


def main(argv: list[str]) -> int:
    """Print the sheet, or write both pages into a checkout."""
    parser = Parser(
        "cheatsheet",
        say(
            zh="内存、计算量、注意力、损失和指标的公式，都算出了值。",
            en="Formulas of memory, compute, attention, losses and metrics, with their values.",
        ),
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help=say(zh="重写 learning/CHEATSHEET.md 和 .en.md", en="rewrite learning/CHEATSHEET.md and .en.md"),
    )
    args = parser.parse_args(argv)
    if not args.update:
        print(page(args.lang), end="")
        return 0
    folder = Path("learning")
    if not folder.is_dir():
        raise UserError(
            say(
                zh="这里没有 learning/ 目录：请在项目的代码目录里执行",
                en="there is no folder learning/ here: run this in a checkout of the project",
            )
        )
    for language in LANGUAGES:
        write_atomically(folder / PAGES[language], page(language))
        print(folder / PAGES[language])
    return 0
