"""Quiz items on paper: Markdown with folded answers, and a deck that Anki imports.

The deck is Anki's text format (https://docs.ankiweb.net/importing/text-files.html): its first column is a stable id, so
that a later import updates the cards and keeps their schedule.
"""

from __future__ import annotations

import csv
import hashlib
import io
from html import escape
from pathlib import Path

from llmcore_hf.durability import write_atomically
from llmcore_hf.learning import items
from llmcore_hf.learning.items import LETTERS, Item
from llmcore_hf.learning.quiz import WORDS

PAGE = {
    "title": {"zh": "# Level {level} 测验", "en": "# Quiz, level {level}"},
    "head": {
        "zh": "[English](level{level}.en.md) · 在终端里作答、判分：`python scripts/quiz.py --level {level}`。本页由 [level{level}.yaml](level{level}.yaml) 生成。",
        "en": "[中文](level{level}.md) · To answer in the terminal, graded: `python scripts/quiz.py --level {level} --lang en`. Generated from [level{level}.yaml](level{level}.yaml).",
    },
    "answer": {"zh": "答案", "en": "Answer"},
}


def page_name(level: int, language: str) -> str:
    return f"level{level}.md" if language == "zh" else f"level{level}.{language}.md"


def markdown(level: int, chosen: list[Item], language: str) -> str:
    """The items of a level; the answers are folded."""
    parts = [PAGE[name][language].format(level=level) for name in ("title", "head")]
    for number, item in enumerate(chosen, 1):
        parts.append(f"## {number}. {item.ask[language]}")
        parts.append(f"*{item.module} · {WORDS[item.type][language]}* · `{item.id}`")
        if item.curve:
            parts.append(f"```text\n{items.chart(item.curve)}\n```\n\n`{item.curve['produced_by']}`")
        shown = _shown(item)
        if shown:
            parts.append("\n".join(f"- {LETTERS[i]}. {item.choices[k].text[language]}" for i, k in enumerate(shown)))
        answer = "\n".join(f"- {line}" for line in _answer_lines(item, shown, language))
        parts.append(f"<details><summary>{PAGE['answer'][language]}</summary>\n\n{answer}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _shown(item: Item) -> list[int]:
    """A fixed order of choices that does not depend on where the right one stands in the source."""
    return sorted(range(len(item.choices)), key=lambda i: hashlib.sha256(f"{item.id}{i}".encode()).digest())


def _answer_lines(item: Item, shown: list[int], language: str) -> list[str]:
    lines = [f"**{items.solution(item, language)}**"]
    if item.type == "ordering":
        lines += [f"{step.text[language]}: {step.why[language]}" for step in item.choices]
    elif shown:
        lines += [
            f"{LETTERS[i]} {'✓' if item.choices[k].right else '✗'} {item.choices[k].why[language]}"
            for i, k in enumerate(shown)
        ]
    lines += [f"{trap['value']:g}: {trap[f'why_{language}']}" for trap in item.traps]
    return [*lines, item.explain[language], WORDS["backing"][language].format(backing=item.backing)]


def anki(chosen: list[Item], language: str) -> str:
    """The deck as text: id, front, back, tags."""
    out = io.StringIO()
    out.write("#separator:tab\n#html:true\n#notetype:Basic\n#deck:LLM-Core\n#guid column:1\n#tags column:4\n")
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    for item in chosen:
        shown = _shown(item)
        front = [item.ask[language], *(f"{LETTERS[i]}. {item.choices[k].text[language]}" for i, k in enumerate(shown))]
        if item.curve:
            front.insert(1, items.chart(item.curve))
        back = _answer_lines(item, shown, language)
        sides = ["<br>".join(escape(line).replace("\n", "<br>") for line in side) for side in (front, back)]
        sides[0] = f"<pre>{sides[0]}</pre>" if item.curve else sides[0]
        writer.writerow([f"llmcore-{item.id}-{language}", *sides, f"level{item.level} {item.module}"])
    return out.getvalue()


def export(chosen: list[Item], folder: Path, language: str) -> list[Path]:
    """Write one page per level and one deck; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for level in sorted({item.level for item in chosen}):
        files[page_name(level, language)] = markdown(level, [i for i in chosen if i.level == level], language)
    files[f"anki-{language}.txt"] = anki(chosen, language)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
