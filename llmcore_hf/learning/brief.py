"""Briefs: what to say about a module in three minutes, with the numbers of the learner's own run.

What does not depend on a run stands in `recipes/<module>/brief.yaml`, and so do the claims: sentences that are made only
when the summary of the run bears them out (`claims`). A run that failed, diverged or was interrupted gets no claims; it is
said plainly what did not hold, and what to look at next.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore_hf import resources
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import evidence, plan
from llmcore_hf.learning.claims import Claim
from llmcore_hf.learning.evidence import Run
from llmcore_hf.learning.texts import Parser, Text, read_yaml, say
from llmcore_hf.report import show_observed

# Longest spoken answer: three minutes and a little, at an easy pace.
LIMIT = {"zh": 750, "en": 480}
PER_MINUTE = {"zh": 240, "en": 130}
ERROR_LENGTH = {"zh": 90, "en": 140}  # characters of an error message that are said aloud
# How the most important checks that failed or warned are said, the fullest first: what fits is taken.
CHECKS_SPOKEN = (
    ("observed", "observed"),
    ("observed", "why"),
    ("why", "why"),
    ("why", "name"),
    ("why",),
    ("name",),
    (),
)

HEADINGS = {
    "definition": {"zh": "一、定义（30 秒）", "en": "1. Definition (30 s)"},
    "principle": {"zh": "二、原理（60 秒）", "en": "2. Principle (60 s)"},
    "result": {"zh": "三、我的结果（60 秒）", "en": "3. My result (60 s)"},
    "engineering": {"zh": "四、工程（30 秒）", "en": "4. Engineering (30 s)"},
    "neighbours": {"zh": "和邻近方法比", "en": "Beside its neighbours"},
    "questions": {"zh": "追问五则", "en": "Five follow-up questions"},
    "limits": {"zh": "这次运行不能说明什么", "en": "What I can't claim from this run"},
    "sources": {"zh": "每个数从哪里来", "en": "Where each number comes from"},
}
SPOKEN = ("definition", "principle", "result", "engineering")
WORDS = {
    "title": {"zh": "三分钟口稿 · {title}", "en": "Three-minute brief: {title}"},
    "run": {
        "zh": "运行 `{run_id}`，状态 {status}，检查 {passed}/{total} 通过，种子 {seed}，{seconds:.0f} 秒。命令：`{command}`",
        "en": "Run `{run_id}`, status {status}, {passed} of {total} checks passed, seed {seed}, {seconds:.0f} s. Command: `{command}`",
    },
    "run_failed": {
        "zh": "**没有成功（状态 {status}；{failed} 条检查没有通过，{warned} 条警告）。** 运行 `{run_id}`，种子 {seed}，{seconds:.0f} 秒；另有 {passed} 条检查通过，但没有成功的运行不算成果。命令：`{command}`",
        "en": "**It did not succeed (status {status}; checks failed: {failed}, warned: {warned}).** Run `{run_id}`, seed {seed}, {seconds:.0f} s; passed: {passed}, but a run that did not succeed is no result. Command: `{command}`",
    },
    "length": {
        "zh": "（口稿共 {n} 字，按每分钟 {rate} 字约 {minutes:.1f} 分钟；公式写在白板上，不计入。）",
        "en": "({n} words to speak, about {minutes:.1f} minutes at {rate} a minute; the formula goes on the whiteboard and is not counted.)",
    },
    "no_success": {
        "zh": "先说结论：这次运行没有成功，它的数字不能当成果讲。",
        "en": "The conclusion first: this run did not succeed, and I don't present its numbers as a result.",
    },
    "diverged": {
        "zh": "训练发散了，损失不再是有限的数，后面的指标都没有意义。下一步先把学习率降到三分之一，再看发散前最后几行日志里的梯度范数。",
        "en": "Training diverged: the loss stopped being a finite number, so every later metric is meaningless. Next I cut the learning rate to a third, and look at the gradient norm in the last rows of the log before it happened.",
    },
    "interrupted": {
        "zh": "它没有跑完，中途的数字不能代表结果。下一步是从最近的完整检查点接着跑完，再下结论。",
        "en": "It did not come to its end, and numbers from half-way are no result. Next I go on from the newest complete checkpoint, finish it, and only then draw conclusions.",
    },
    "error": {"zh": "它报错停下：{error}。", "en": "It stopped with an error: {error}."},
    "no_reason": {"zh": "原因没有记下来", "en": "its reason was not recorded"},
    "fail_observed": {
        "zh": "检查 {id} 没有通过，实测 {observed}。{why}",
        "en": "The check {id} failed: {observed}. {why}",
    },
    "fail_why": {"zh": "检查 {id} 没有通过。{why}", "en": "The check {id} failed. {why}"},
    "fail_name": {"zh": "检查 {id} 没有通过。", "en": "The check {id} failed."},
    "others_passed": {"zh": "其余 {n} 条检查通过了。", "en": "The other {n} checks passed."},
    "more": {
        "zh": "还有 {failed} 条检查没有通过、{warned} 条警告，都列在 summary.json 的 checks 里。",
        "en": "Of the other checks {failed} failed and {warned} warned; `checks` in summary.json lists them all.",
    },
    "warn_observed": {
        "zh": "检查 {id} 只得到警告，实测 {observed}，所以我不说这一点学会了。{why}",
        "en": "The check {id} ended in a warning: {observed}, so I don't say that this was learned. {why}",
    },
    "warn_why": {
        "zh": "检查 {id} 只得到警告，所以我不说这一点学会了。{why}",
        "en": "The check {id} ended in a warning, so I don't say that this was learned. {why}",
    },
    "warn_name": {"zh": "检查 {id} 只得到警告。", "en": "The check {id} ended in a warning."},
    "not_evaluated": {
        "zh": "这次运行跑完了，但没有做评估（summary.json 里 eval 是空的）：训练前后没有比较过，所以我不宣称任何成果。",
        "en": "This run came to its end, but nothing was evaluated (eval in summary.json is empty): before and after were not compared, so I claim no result.",
    },
    "evaluate_next": {
        "zh": "下一步：带着评估集重跑一次，再看变化的 95% 区间是否不含零。",
        "en": "Next: run it again with held-out data, and see whether the 95% interval of the change excludes zero.",
    },
    "next": {"zh": "下一步：{text}", "en": "Next: {text}"},
    "nothing": {
        "zh": "这次运行的记录里没有能支持结论的数，所以这里我什么也不宣称。",
        "en": "The record of this run holds no number that would bear out a conclusion, so I claim nothing here.",
    },
    "no_run": {
        "zh": "（还没有运行过：先执行 `python run.py --module {module} --toy`。）",
        "en": "(Not run yet: `python run.py --module {module} --toy` comes first.)",
    },
    "in_this_run": {"zh": "（本次运行）", "en": "(This run) "},
    "one_seed": {
        "zh": "只有一个种子（{seed}）：一次观察，不知道换个种子会差多少。",
        "en": "One seed ({seed}): a single observation, which does not say how much another seed would differ.",
    },
    "toy": {
        "zh": "这是 toy 配方：它证明实现正确、方法起作用，不说明大模型或大任务上的效果。",
        "en": "This is the toy recipe: it shows that the code is right and the method works, not what happens with large models or tasks.",
    },
    "toy_that_failed": {
        "zh": "这是 toy 配方：不说明大模型或大任务上的效果。",
        "en": "This is the toy recipe: it does not show what happens with large models or tasks.",
    },
    "check_skipped": {
        "zh": "检查 {id} 没有做，与它有关的话都不能说。",
        "en": "The check {id} was not made: nothing that rests on it can be said.",
    },
    "check_warned": {"zh": "检查 {id} 只是警告：{why}", "en": "The check {id} only warned: {why}"},
    "check_failed_limit": {
        "zh": "检查 {id} 没有通过，要求是：{expected}。",
        "en": "The check {id} failed; expected was: {expected}.",
    },
    "not_there": {
        "zh": "没有找到 {module} 的运行（在 output/{module}/ 里找）。先执行：python run.py --module {module} --toy",
        "en": "there is no run of {module} (looked in output/{module}/). First: python run.py --module {module} --toy",
    },
    "no_brief": {
        "zh": "模块 {module} 还没有口稿（缺 recipes/{module}/brief.yaml）",
        "en": "the module {module} has no brief yet (recipes/{module}/brief.yaml is missing)",
    },
}


@dataclass(frozen=True)
class Question:
    ask: Text
    answer: Text
    run: tuple[Claim, ...]  # sentences about the run at hand, added where they hold


@dataclass(frozen=True)
class Source:
    """`recipes/<module>/brief.yaml`; `schema/brief.schema.json` describes it."""

    module: str
    definition: Text
    formula: str
    principle: Text
    result: tuple[Claim, ...]
    engineering: Text
    next: Text
    neighbours: tuple[Text, ...]
    questions: tuple[Question, ...]
    pitfalls: tuple[Text, ...]
    limits: tuple[Claim, ...]

    @property
    def rests_on_evaluation(self) -> bool:
        """Whether its result is read from `eval`; lessons with exact values measure in their checks instead."""
        return any(path[0] == "eval" for claim in self.result for path in claim.values.values())

    def claims(self) -> Iterator[Claim]:
        """Every claim of the brief."""
        yield from self.result
        for question in self.questions:
            yield from question.run
        yield from self.limits


@functools.cache
def load(module: str) -> Source | None:
    """The brief of a module; None when it has none."""
    try:
        source: dict[str, Any] = read_yaml(resources.path(f"recipes/{module}/brief.yaml"))
    except FileNotFoundError:
        return None
    questions = tuple(Question(row["ask"], row["answer"], _claims(row.get("run", ()))) for row in source["questions"])
    return Source(
        module=module,
        result=_claims(source["result"]),
        questions=questions,
        limits=_claims(source["limits"]),
        neighbours=tuple(source["neighbours"]),
        pitfalls=tuple(source["pitfalls"]),
        **{name: source[name] for name in ("definition", "formula", "principle", "engineering", "next")},
    )


def require(module: str, language: str) -> Source:
    """Raises `UserError` when the module has no brief."""
    source = load(module)
    if source is None:
        raise UserError(WORDS["no_brief"][language].format(module=module))
    return source


def _claims(rows: Any) -> tuple[Claim, ...]:
    return tuple(Claim.read(row) for row in rows)


def spoken_length(text: str, language: str) -> int:
    """Characters without white space in Chinese, words in English."""
    return len(re.sub(r"\s", "", text)) if language == "zh" else len(text.split())


# ---------------------------------------------------------------- the parts of a brief


def result_of(source: Source, run: Run, language: str) -> str:
    """What can be said about the run, no longer than the spoken answer may be."""
    fixed = [getattr(source, name)[language] for name in SPOKEN if name != "result"]
    room = LIMIT[language] - _total(fixed, language)
    sentences = (_success if run.succeeded else _failure)(source, run, language, room)
    return _join(sentences or [_word("nothing", language)], language)


def _success(source: Source, run: Run, language: str, room: int) -> list[str]:
    said = [_word("not_evaluated", language)] if _not_evaluated(source, run) else []
    said += _problems(run, language, room - _total(said, language))
    more = [claim.say(run, language) for claim in _result_claims(source, run)]
    if _not_evaluated(source, run):
        more.append(_word("evaluate_next", language))
    elif run.with_status("warn"):
        more.append(_word("next", language, text=source.next[language]))
    return _fill(said, more, language, room)


def _failure(source: Source, run: Run, language: str, room: int) -> list[str]:
    status, failed = run.summary["status"], run.with_status("fail")
    said = [_word("no_success", language)]
    if status in ("diverged", "interrupted"):
        said.append(_word(status, language))
    elif not failed:
        said.append(_word("error", language, error=_error(run, language)))
    said += _problems(run, language, room - _total(said, language))
    more: list[str | None] = []
    if failed and (passed := run.with_status("pass")):
        more.append(_word("others_passed", language, n=len(passed)))
    if status not in ("diverged", "interrupted"):
        more.append(_word("next", language, text=source.next[language]))
    return _fill(said, more, language, room)


def _fill(said: list[str], more: list[str | None], language: str, room: int) -> list[str]:
    """What is said, and of the other sentences each that still fits."""
    for sentence in more:
        if sentence and _total([*said, sentence], language) <= room:
            said = [*said, sentence]
    return said


def _problems(run: Run, language: str, room: int) -> list[str]:
    """The two most important checks that failed or warned, as fully as there is room for, and how many more there are."""
    found = run.with_status("fail") + run.with_status("warn")
    found.sort(key=lambda check: (check["status"] != "fail", check.get("kind") != "invariant"))
    said: list[str] = []
    for forms in CHECKS_SPOKEN if found else ():
        named, rest = found[: len(forms)], found[len(forms) :]
        said = [_check_sentence(check, form, language) for check, form in zip(named, forms, strict=False)]
        if rest:
            counts = [sum(check["status"] == status for check in rest) for status in ("fail", "warn")]
            said.append(_word("more", language, failed=counts[0], warned=counts[1]))
        if _total(said, language) <= room:
            break
    return said


def _check_sentence(check: dict[str, Any], form: str, language: str) -> str:
    values = {"id": check["id"], "observed": show_observed(check["observed"]), "why": check[f"why_{language}"]}
    return _word(f"{check['status']}_{form}", language, **values)


def _error(run: Run, language: str) -> str:
    """The error in a line that can be said aloud."""
    error = " ".join(str(run.summary.get("error") or _word("no_reason", language)).split()).rstrip(".。")
    most = ERROR_LENGTH[language]
    return error if len(error) <= most else f"{error[:most]}…"


def _not_evaluated(source: Source, run: Run) -> bool:
    return run.succeeded and source.rests_on_evaluation and not run.summary.get("eval")


def _result_claims(source: Source, run: Run) -> tuple[Claim, ...]:
    """The claims of a result; none when nothing was evaluated."""
    return () if _not_evaluated(source, run) else source.result


def _word(key: str, language: str, **values: Any) -> str:
    return WORDS[key][language].format(**values)


def _join(sentences: list[str], language: str) -> str:
    return ("" if language == "zh" else " ").join(sentences)


def _total(parts: list[str], language: str) -> int:
    return sum(spoken_length(part, language) for part in parts)


def spoken(source: Source, run: Run | None, language: str) -> dict[str, str]:
    """The four spoken parts by name. Without a run the result says that there is none."""
    result = _word("no_run", language, module=source.module) if run is None else result_of(source, run, language)
    return {name: result if name == "result" else getattr(source, name)[language] for name in SPOKEN}


def limits_of(source: Source, run: Run, language: str) -> list[str]:
    """What this run does not show: said by the module, and read from the summary."""
    said = [sentence for claim in source.limits if (sentence := claim.say(run, language))]
    if _not_evaluated(source, run):
        said.insert(0, _word("not_evaluated", language))
    said.append(_word("one_seed", language, seed=run.summary.get("seed")))
    if run.summary.get("toy"):
        as_promised = run.succeeded and not run.with_status("warn") and not _not_evaluated(source, run)
        said.append(_word("toy" if as_promised else "toy_that_failed", language))
    said += [_word("check_skipped", language, id=check["id"]) for check in run.with_status("skip")]
    said += [
        _word("check_warned", language, id=check["id"], why=check[f"why_{language}"])
        for check in run.with_status("warn")
    ]
    said += [
        _word("check_failed_limit", language, id=check["id"], expected=check["expected"])
        for check in run.with_status("fail")
    ]
    return said


def _answer(question: Question, run: Run, language: str) -> str:
    """The answer, with what this run adds to it. A run that failed adds nothing."""
    said = [s for claim in question.run if run.succeeded and (s := claim.say(run, language))]
    if not said:
        return question.answer[language]
    return _join([question.answer[language], _word("in_this_run", language) + _join(said, language)], language)


def sources_of(source: Source, run: Run) -> dict[str, Any]:
    """Path -> value of every number that the claims of the brief took from the summary."""
    found: dict[str, Any] = {}
    for claim in source.claims():
        if claim in source.result and claim not in _result_claims(source, run):
            continue
        if run.succeeded and (values := claim.found(run)):
            found |= {" / ".join(map(str, path)): values[name] for name, path in claim.values.items()}
    return found


# ---------------------------------------------------------------- the page


def markdown(source: Source, run: Run, language: str) -> str:
    """The whole brief as one Markdown page."""
    module = plan.require(source.module)
    parts, said = [], spoken(source, run, language)
    n = _total(list(said.values()), language)
    title = {"zh": module.title_zh, "en": module.title_en}[language]
    parts += [f"# {_word('title', language, title=title)}", _about(run, language)]
    for name, text in said.items():
        parts += [f"## {HEADINGS[name][language]}", text]
        if name == "principle":
            parts.append(f"```text\n{source.formula}\n```")
    parts.append(_word("length", language, n=n, rate=PER_MINUTE[language], minutes=n / PER_MINUTE[language]))
    parts += ["---", f"## {HEADINGS['neighbours'][language]}", _bullets([row[language] for row in source.neighbours])]
    parts.append(f"## {HEADINGS['questions'][language]}")
    for number, question in enumerate(source.questions, 1):
        parts.append(f"**{number}. {question.ask[language]}**\n\n{_answer(question, run, language)}")
    parts += [f"## {HEADINGS['limits'][language]}", _bullets(limits_of(source, run, language))]
    if found := sources_of(source, run):
        parts += [f"## {HEADINGS['sources'][language]}", _bullets([f"`{path}` = {v}" for path, v in found.items()])]
    return "\n\n".join(parts) + "\n"


def _about(run: Run, language: str) -> str:
    summary = run.summary
    return _word(
        "run" if run.succeeded else "run_failed",
        language,
        **{
            name: len(run.with_status(status))
            for status, name in (("pass", "passed"), ("fail", "failed"), ("warn", "warned"))
        },
        total=len(run.checks),
        seconds=summary.get("wall_seconds") or 0,
        **{name: summary.get(name) for name in ("run_id", "status", "seed", "command")},
    )


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def find_run(module: str, directory: str | None, language: str) -> Run:
    """The run to speak about: the one in `directory`, or the latest.

    Raises:
        UserError: there is none.
    """
    run = evidence.read(Path(directory), module) if directory else evidence.latest(module)
    if run is None:
        raise UserError(_word("not_there", language, module=module))
    return run


def main(argv: list[str]) -> int:
    """Print the brief of one module, or write it to a file."""
    parser = Parser(
        "brief",
        say(
            zh="一个模块的三分钟口稿，数字来自你自己的运行。",
            en="What to say about a module in three minutes, with the numbers of your own run.",
        ),
    )
    parser.add_argument("--module", required=True, help=say(zh="模块", en="the module"))
    parser.add_argument(
        "--run",
        metavar="DIR",
        help=say(
            zh="运行目录；不给时用这个模块最新的运行", en="a run directory; the latest run of the module when not given"
        ),
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help=say(zh="把口稿写到这个文件，不打印", en="write the brief there instead of printing it"),
    )
    args = parser.parse_args(argv)
    source = require(plan.require(args.module).name, args.lang)
    page = markdown(source, find_run(args.module, args.run, args.lang), args.lang)
    if args.save:
        write_atomically(Path(args.save), page)
        print(args.save)
    else:
        print(page, end="")
    return 0
