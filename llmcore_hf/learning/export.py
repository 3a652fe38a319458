"""All briefs at once: one Markdown file per module, an index, and one HTML page to print."""

from __future__ import annotations

import hashlib
import json
import sys
from html import escape
from pathlib import Path

from llmcore_hf import registry
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import brief, evidence, plan
from llmcore_hf.learning.evidence import Run
from llmcore_hf.learning.texts import Parser, say
from llmcore_hf.registry import Module

WORDS = {
    "title": {"zh": "三分钟口稿：全部模块", "en": "Three-minute briefs of all modules"},
    "head": {
        "zh": "| Day | 模块 | 口稿 | 运行 | 状态 | 检查 |",
        "en": "| Day | Module | Brief | Run | Status | Checks |",
    },
    "no_run": {"zh": "还没有运行：`{command}`", "en": "no run yet: `{command}`"},
    "no_brief": {"zh": "这个模块还没有口稿", "en": "this module has no brief yet"},
    "damaged": {"zh": "运行记录已损坏", "en": "the record of its run is damaged"},
    "no_success": {"zh": "没有成功（{status}）", "en": "did not succeed ({status})"},
    "stale": {
        "zh": "{file} 讲的运行已经不在了，但它被改过，所以没有删：不需要了就自己删掉",
        "en": "{file} speaks of a run that is gone, but it was changed by hand and is left there: delete it if you don't need it",
    },
    "removed": {"zh": "删去过时的 {file}", "en": "removed {file}, which was outdated"},
    "unknown": {
        "zh": "{file} 已损坏：不知道这里哪些文件是以前导出的，过时的口稿要自己删",
        "en": "{file} is damaged: which files here are of an earlier export is not known, so delete outdated briefs yourself",
    },
    "planned": {"zh": "尚未加入", "en": "not there yet"},
    "done": {"zh": "{folder}/：{n} 份口稿、index.md、index.html", "en": "{folder}/: {n} briefs, index.md, index.html"},
    "print": {"zh": "[打印版](index.html)", "en": "[page to print](index.html)"},
    "nothing": {
        "zh": "没有找到任何运行（在 output/ 里找）。先跑一个模块，例如：python run.py --module mdp --toy",
        "en": "there is no run at all (looked in output/). Run a module first: python run.py --module mdp --toy",
    },
}
# Fonts that systems have; nothing is fetched. On paper a brief takes two pages: it begins a page, and the list of where
# its numbers come from is small. Formulas are wide: on a screen they may leave the column of text, or scroll.
STYLE = """
body { font: 11pt/1.6 "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Source Han Sans SC", sans-serif;
       max-width: 46em; margin: 2em auto; padding: 0 1em; color: #111; }
h1 { font-size: 1.5em; line-height: 1.3; border-bottom: 2px solid #333; margin: 0 0 .5em; } section { margin-top: 3em; }
h2 { font-size: 1.15em; margin: 1.2em 0 .4em; } p, ul, pre { margin: .5em 0; } hr { border: 0; border-top: 1px solid #bbb; }
table { display: block; overflow-x: auto; border-collapse: collapse; line-height: 1.35; }
td, th { border: 1px solid #999; padding: .2em .5em; text-align: left; white-space: nowrap; }
td:nth-child(3) { white-space: normal; }
pre { background: #f4f4f4; padding: .7em; width: max-content; max-width: min(100vw - 3em, 64em); box-sizing: border-box;
      overflow-x: auto; line-height: 1.4; }
code { font-family: monospace; font-size: .88em; } pre code { font-size: .75em; }
ul.sources { font-size: .8em; line-height: 1.35; overflow-wrap: anywhere; }
@page { size: A4; margin: 13mm 14mm; }
@media print {
  body { margin: 0; padding: 0; max-width: none; font-size: 9.5pt; line-height: 1.45; }
  section { break-before: page; margin: 0; } h2, p:has(> strong:only-child) { break-after: avoid; }
  pre, li, tr, p { break-inside: avoid; }
  table { display: table; font-size: .92em; } a { color: inherit; text-decoration: none; }
  pre { width: auto; max-width: none; white-space: pre-wrap; } pre code { font-size: 6.6pt; }
  ul.sources { columns: 2; column-gap: 2em; font-size: .72em; padding-left: 1.5em; }
}
"""


# In the folder of the briefs: name -> SHA-256 of what the last export wrote there.
WRITTEN = ".written_by_export.json"


def pages(language: str) -> tuple[dict[str, tuple[Run, str]], dict[str, str]]:
    """Module -> its latest run and its brief, for those that have both, in the order of days; module -> what is damaged."""
    found, damaged = {}, {}
    for module in sorted(registry.MODULES, key=lambda module: module.day):
        try:
            source, run = brief.load(module.name), evidence.latest(module.name)
            if source and run:
                found[module.name] = run, brief.markdown(source, run, language)
        except UserError as error:
            damaged[module.name] = str(error)
    return found, damaged


def index(found: dict[str, tuple[Run, str]], damaged: dict[str, str], language: str) -> str:
    """The list of all modules, of those that have no run yet, and of planned days whose module is missing."""
    lines = [f"# {WORDS['title'][language]}", "", WORDS["print"][language], "", WORDS["head"][language]]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    rows: list[tuple[int, str, str]] = []
    for module in registry.MODULES:
        rows.append((module.day, module.name, _row(module, found, damaged, language)))
    for day in plan.load().days:
        if not plan.find(day.module):
            rows.append((day.day, day.module, f"{WORDS['planned'][language]} | | |"))
    lines += [f"| {day} | `{name}` | {rest} |" for day, name, rest in sorted(rows)]
    return "\n".join(lines) + "\n"


def _row(module: Module, found: dict[str, tuple[Run, str]], damaged: dict[str, str], language: str) -> str:
    name, title = module.name, {"zh": module.title_zh, "en": module.title_en}[language]
    if name in found:
        run = found[name][0]
        status, checks = run.summary["status"], f"{len(run.with_status('pass'))}/{len(run.checks)}"
        if not run.succeeded:
            status, checks = f"**{WORDS['no_success'][language].format(status=status)}**", "—"
        return f"[{title}]({name}.md) | `{run.summary['run_id']}` | {status} | {checks}"
    if name in damaged:
        return f"{WORDS['damaged'][language]} | | |"
    if brief.load(name) is None:
        return f"{WORDS['no_brief'][language]} | | |"
    command = f"python run.py --module {name} --toy"
    return f"{WORDS['no_run'][language].format(command=command)} | | |"


def html(found: dict[str, tuple[Run, str]], index_page: str, language: str) -> str:
    """One page with the index and every brief; links of the index lead within the page."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    body = render(index_page.replace(WORDS["print"][language], ""))
    sources = f"<h2>{brief.HEADINGS['sources'][language]}</h2>\n<ul"
    for name, (_, page) in found.items():
        body = body.replace(f'href="{name}.md"', f'href="#{name}"')
        content = render(page).replace(sources, f'{sources} class="sources"')
        body += f'<section id="{name}">\n{content}</section>\n'
    title = escape(WORDS["title"][language])
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += f"<title>{title}</title>\n<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="{language}">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def main(argv: list[str]) -> int:
    """Write the briefs of all modules that have a run, the index, and the page to print."""
    parser = Parser(
        "export",
        say(
            zh="导出所有跑过的模块的口稿、目录和打印版。",
            en="Write the briefs of all modules that have a run, an index, and a page to print.",
        ),
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        help=say(zh="写到哪里（默认 output/briefs/<lang>）", en="where to write (default: output/briefs/<lang>)"),
    )
    args = parser.parse_args(argv)
    found, damaged = pages(args.lang)
    folder = Path(args.to) if args.to else Path("output") / "briefs" / args.lang
    if not found:
        remove_stale(folder, set(), args.lang)
        raise UserError("\n".join(damaged.values()) or WORDS["nothing"][args.lang])
    index_page = index(found, damaged, args.lang)
    files = {f"{name}.md": page for name, (_, page) in found.items()}
    files |= {"index.md": index_page, "index.html": html(found, index_page, args.lang)}
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder, set(files), args.lang)
    hashes = {name: _sha256(content.encode()) for name, content in files.items()}
    write_atomically(folder / WRITTEN, json.dumps(hashes, indent=1) + "\n")
    for name, content in files.items():
        write_atomically(folder / name, content)
    print(WORDS["done"][args.lang].format(folder=folder, n=len(found)))
    return evidence.tell_damaged(list(damaged.values()))


def remove_stale(folder: Path, wanted: set[str], language: str) -> None:
    """Delete what an earlier export wrote and this one does not. A file that was changed since is reported and left there."""
    record = folder / WRITTEN
    if not record.exists():
        return
    try:
        written = json.loads(record.read_text(encoding="utf-8"))
        stale = sorted((folder / name, digest) for name, digest in written.items() if name not in wanted)
    except (ValueError, AttributeError, TypeError):
        print(WORDS["unknown"][language].format(file=record), file=sys.stderr)
        return
    for file, digest in stale:
        if file.parent != folder or not file.is_file():
            continue
        if _sha256(file.read_bytes()) == digest:
            file.unlink()
            print(WORDS["removed"][language].format(file=file))
        else:
            print(WORDS["stale"][language].format(file=file), file=sys.stderr)
    if not wanted:
        record.unlink()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
