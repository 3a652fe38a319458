"""Cards: one page per module to review from, in both languages.

A card is the learner's: `--update` makes the ones that are missing, and in the others rewrites only what stands between
markers, the evidence of the latest run and the three-minute answer. All other text survives as it is.
"""

from __future__ import annotations

from pathlib import Path

from llmcore_hf import registry, resources
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import brief, evidence, plan
from llmcore_hf.learning.evidence import Run
from llmcore_hf.learning.plan import replace_between
from llmcore_hf.learning.texts import LANGUAGES, Parser, say
from llmcore_hf.report import show_observed

MARKED = ("evidence", "answer")
WORDS = {
    "run": {
        "zh": "运行 `{run_id}`，状态 **{status}**，种子 {seed}，开始于 {started_at}。命令：`{command}`",
        "en": "Run `{run_id}`, status **{status}**, seed {seed}, started {started_at}. Command: `{command}`",
    },
    "checks": {"zh": "| 检查 | 结果 | 实测 |", "en": "| Check | Result | Observed |"},
    "evaluated": {
        "zh": "| 留出集指标 | 之前 | 之后 | 变化的 95% 区间 |",
        "en": "| Held-out metric | Before | After | 95% interval of the change |",
    },
}


def card_name(module: str, language: str) -> str:
    return f"{module}.md" if language == "zh" else f"{module}.{language}.md"


def template_name(language: str) -> str:
    return "TEMPLATE.md" if language == "zh" else f"TEMPLATE.{language}.md"


def fresh(module: str, language: str) -> str:
    """A card as it is before any run: the template, filled with what the brief says about the module."""
    source = brief.require(module, language)
    row = registry.get(module)
    text = resources.path(f"learning/cards/{template_name(language)}").read_text(encoding="utf-8")
    filled = {
        "title": {"zh": row.title_zh, "en": row.title_en}[language],
        "module": module,
        "sentence": source.definition[language],
        "principle": source.principle[language],
        "formula": source.formula,
        "neighbours": _bullets([text[language] for text in source.neighbours]),
        "pitfalls": _bullets([text[language] for text in source.pitfalls]),
    }
    for name, content in filled.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    return text


def marked(module: str, run: Run | None, language: str) -> dict[str, str]:
    """What belongs between the markers of a card."""
    source = brief.require(module, language)
    no_run = brief.WORDS["no_run"][language].format(module=module)
    spoken = brief.spoken(source, run, language)
    return {"evidence": _evidence(run, language) if run else no_run, "answer": "\n\n".join(spoken.values())}


def _evidence(run: Run, language: str) -> str:
    names = ("run_id", "status", "seed", "started_at", "command")
    parts = [WORDS["run"][language].format(**{name: run.summary.get(name) for name in names})]
    if run.summary.get("error"):
        parts.append(f"> {run.summary['error']}")
    if block := run.summary.get("eval"):
        rows = [_evaluated(name, block) for name in block["after"]]
        parts.append("\n".join([WORDS["evaluated"][language], "| --- | --- | --- | --- |", *rows]))
    rows = [f"| `{c['id']}` | {c['status']} | {_cell(show_observed(c['observed']))} |" for c in run.checks.values()]
    parts.append("\n".join([WORDS["checks"][language], "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def _evaluated(name: str, block: dict[str, dict[str, object]]) -> str:
    before, after, interval = block["before"].get(name), block["after"].get(name), block["ci95"].get(name)
    shown = ", ".join(show_observed(end) for end in interval) if isinstance(interval, list) else ""
    return f"| `{name}` | {show_observed(before)} | {show_observed(after)} | {shown} |"


def _cell(text: str, limit: int = 160) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def updated(text: str, module: str, run: Run | None, language: str, file: str) -> str:
    """The card with what stands between its markers replaced.

    Raises:
        UserError: a marker is missing, or stands there twice.
    """
    for name, content in marked(module, run, language).items():
        text = replace_between(text, name, content, file)
    return text


def main(argv: list[str]) -> int:
    """Show a card, or bring the cards up to date."""
    parser = Parser(
        "cards",
        say(
            zh="每个模块一张卡片：看一张，或填入最新运行的证据。",
            en="One card per module: show it, or fill in the evidence of the latest runs.",
        ),
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help=say(zh="补上缺的卡片，重写标记之间的内容", en="make missing cards, and rewrite what is between markers"),
    )
    parser.add_argument("--module", help=say(zh="只要这个模块", en="one module only"))
    parser.add_argument(
        "--to",
        metavar="DIR",
        default="learning/cards",
        help=say(zh="卡片的目录（默认 learning/cards）", en="the cards' folder (default: learning/cards)"),
    )
    args = parser.parse_args(argv)
    modules = [plan.require(args.module).name] if args.module else with_brief()
    if args.update:
        files, damaged = update(modules, Path(args.to))
        for file in files:
            print(file)
        return evidence.tell_damaged(damaged)
    if not args.module:
        raise UserError(
            say(
                zh="请说要看哪张卡片（--module dpo），或更新全部（--update）",
                en="say which card to show (--module dpo), or bring all up to date (--update)",
            )
        )
    card, run = fresh(args.module, args.lang), evidence.latest(args.module)
    print(updated(card, args.module, run, args.lang, card_name(args.module, args.lang)), end="")
    return 0


def with_brief() -> list[str]:
    return [module.name for module in registry.MODULES if brief.load(module.name)]


def update(modules: list[str], folder: Path) -> tuple[list[Path], list[str]]:
    """Write the cards of the modules, but those whose run is damaged; their paths, and what is damaged.

    Nothing is written when one of them lacks its markers.
    """
    cards: dict[Path, str] = {}
    damaged = []
    for module in modules:
        try:
            run = evidence.latest(module)
        except UserError as error:
            damaged.append(str(error))
            continue
        for language in LANGUAGES:
            file = folder / card_name(module, language)
            text = file.read_text(encoding="utf-8") if file.exists() else fresh(module, language)
            cards[file] = updated(text, module, run, language, str(file))
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in cards.items():
        write_atomically(file, text)
    return list(cards), damaged
