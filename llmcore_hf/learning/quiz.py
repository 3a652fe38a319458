"""The quiz in the terminal: it asks, grades, explains each choice, and keeps a history for spaced repetition.

Spaced repetition: an item that was answered wrong comes back at once, and after the n-th right answer in a row since
then once `INTERVALS[n - 1]` days have passed; after the last interval it is done (the boxes of Leitner, 1972).
"""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmcore_hf.errors import UserError
from llmcore_hf.learning import items, plan, state
from llmcore_hf.learning.evidence import tell_damaged
from llmcore_hf.learning.items import LETTERS, LEVELS, Item, Unreadable
from llmcore_hf.learning.texts import Parser, WrongOptions, say

INTERVALS = (1, 3, 7, 14)  # days
TRIES = 3  # answers to an item that may be of another form than it asks for
WORDS = {
    "single": {"zh": "单选，输入一个字母", "en": "one letter"},
    "curve": {"zh": "读图，输入一个字母", "en": "read the curve, one letter"},
    "multiple": {"zh": "多选，输入所有对的字母", "en": "all letters that are right"},
    "numeric": {"zh": "输入一个数", "en": "a number"},
    "ordering": {"zh": "排序，按先后输入字母", "en": "the letters in order"},
    "short": {"zh": "用一两句话回答，按要点判分", "en": "a sentence or two; graded by the points it makes"},
    "again": {"zh": "看不懂这个答案，请输入：{form}", "en": "I can't read that; expected: {form}"},
    "gave_up": {
        "zh": "{n} 次都看不懂，这题算没答对。答案：{answer}",
        "en": "Could not be read {n} times, which counts as not right. The answer: {answer}",
    },
    "right": {"zh": "对。", "en": "Right."},
    "wrong": {"zh": "不对。答案：{answer}", "en": "Not right. The answer: {answer}"},
    "unknown": {
        "zh": "不知道，算没答对。答案：{answer}",
        "en": "Passed, which counts as not right. The answer: {answer}",
    },
    "backing": {"zh": "依据：{backing}", "en": "Backed by: {backing}"},
    "score": {"zh": "答对 {right}/{asked}。", "en": "{right} of {asked} right."},
    "stopped": {"zh": "提前结束，还有 {left} 题没有问。", "en": "Stopped with {left} items to go."},
    "help": {
        "zh": "回车表示不知道，q 结束；答过的都已记下。",
        "en": "Enter passes, q ends; what was answered is kept.",
    },
    "none_due": {"zh": "现在没有要复习的题。", "en": "Nothing is due for review now."},
    "no_items": {"zh": "模块 {module} 还没有题目。", "en": "There are no items on {module} yet."},
}


def due(answers: list[dict[str, Any]], at: datetime) -> list[str]:
    """Ids of the items to review at that time, those answered wrong most recently last."""
    streaks: dict[str, tuple[int, datetime]] = {}  # right answers in a row since an item was wrong, and the last answer
    for answer in answers:
        when = datetime.fromisoformat(answer["at"])
        if not answer["right"]:
            streaks.pop(answer["item"], None)
            streaks[answer["item"]] = 0, when
        elif answer["item"] in streaks:
            streaks[answer["item"]] = streaks[answer["item"]][0] + 1, when
    return [
        item
        for item, (streak, last) in streaks.items()
        if streak == 0 or (streak <= len(INTERVALS) and at - last >= timedelta(days=INTERVALS[streak - 1]))
    ]


def answered_right(answers: list[dict[str, Any]]) -> set[str]:
    """Ids of the items that were answered right at least once."""
    return {answer["item"] for answer in answers if answer["right"]}


# ---------------------------------------------------------------- asking


def ask(item: Item, language: str, shuffle: random.Random) -> bool | None:
    """Ask one item and explain it. True, False, or None when the learner leaves."""
    item = _about_run(item)
    shown = list(range(len(item.choices)))
    shuffle.shuffle(shown)
    if item.type == "ordering" and shown == sorted(shown):
        shown.reverse()
    print(f"\n[{item.level} · {item.module}] {item.ask[language]}")
    if item.curve:
        print(items.chart(item.curve), f"\n({item.curve['produced_by']})")
    for letter, index in zip(LETTERS, shown, strict=False):
        print(f"  {letter}. {item.choices[index].text[language]}")
    answer = items.solution(item, language)
    for tries_left in reversed(range(TRIES)):
        typed = _typed(f"({WORDS[item.type][language]}) > ")
        if typed is None or typed.lower() == "q":
            return None
        if not typed:
            print(WORDS["unknown"][language].format(answer=answer))
            break
        try:
            verdict = items.grade(item, typed, language, shown)
        except Unreadable as form:
            word = "again" if tries_left else "gave_up"
            print(WORDS[word][language].format(form=form, n=TRIES, answer=answer))
            continue
        print(WORDS["right" if verdict.right else "wrong"][language].format(answer=answer))
        _explain(item, verdict.notes, language)
        return verdict.right
    _explain(item, [], language)
    return False


def _about_run(item: Item) -> Item:
    """The item about the learner's own run. A damaged run is reported, and the general question asked."""
    try:
        return items.about_run(item)
    except UserError as error:
        tell_damaged([str(error)])
        return item


def _explain(item: Item, notes: list[str], language: str) -> None:
    for note in notes:
        print(f"  {note}")
    print(item.explain[language])
    print(WORDS["backing"][language].format(backing=item.backing))


def _typed(prompt: str) -> str | None:
    """One line from the terminal; None at its end."""
    print(prompt, end="", flush=True)
    line = sys.stdin.readline()
    if not sys.stdin.isatty():
        print()
    return line.strip() if line else None


def session(chosen: list[Item], language: str, shuffle: random.Random) -> None:
    """Ask the items one by one; each answer is kept at once."""
    print(WORDS["help"][language])
    right = asked = 0
    for item in chosen:
        result = ask(item, language, shuffle)
        if result is None:
            break
        state.record_answer(item.id, result)
        asked, right = asked + 1, right + result
    print()
    if asked < len(chosen):
        print(WORDS["stopped"][language].format(left=len(chosen) - asked))
    print(WORDS["score"][language].format(right=right, asked=asked))


def main(argv: list[str]) -> int:
    """Ask a level, a module, or what is due; or export the items."""
    parser = Parser(
        "quiz",
        say(
            zh="测验：作答、判分，每个选项都有解释。",
            en="Questions with graded answers, and an explanation of every choice.",
        ),
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--level", type=int, choices=LEVELS, help=say(zh="问一关的题", en="ask the items of a level"))
    what.add_argument("--module", help=say(zh="问一个模块的题", en="ask the items of a module"))
    what.add_argument(
        "--review",
        action="store_true",
        help=say(zh="再问答错过、到期该复习的题", en="ask again what was answered wrong and is due"),
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=say(zh="最多问 N 题，没答对过的在前", en="ask N items at most, those not yet answered right first"),
    )
    parser.add_argument("--seed", type=int, help=say(zh="选项顺序的种子", en="of the order of the choices"))
    parser.add_argument(
        "--export",
        nargs="?",
        const="output/quizzes",
        metavar="DIR",
        help=say(zh="不提问，写出 Markdown 和 Anki 卡组", en="write Markdown and an Anki deck instead"),
    )
    args = parser.parse_args(argv)
    if args.export is None and not (args.level or args.module or args.review):
        raise WrongOptions(
            say(
                zh="请选要问什么：--level N、--module 模块、--review；或者 --export 导出",
                en="choose what to ask: --level N, --module NAME, --review; or --export",
            )
        )
    if args.count is not None and args.count < 1:
        raise WrongOptions(say(zh=f"--count {args.count}：至少是 1", en=f"--count {args.count}: at least 1"))
    if args.export is not None:
        from llmcore_hf.learning.quiz_export import export

        if args.review or args.count is not None or args.seed is not None:
            raise WrongOptions(
                say(
                    zh="--export 导出一关（--level）、一个模块（--module）或全部的题：不能再加别的选项",
                    en="--export writes all items of a --level, of a --module, or of the quiz: no other option",
                )
            )
        some = args.level or args.module
        chosen = _chosen(args.level, args.module, language=args.lang) if some else items.all_items()
        for path in export(chosen, Path(args.export), args.lang):
            print(path)
        return 0
    answers = state.read()["answers"]
    chosen = _due(answers) if args.review else _chosen(args.level, args.module, language=args.lang)
    if not chosen:
        print(WORDS["none_due"][args.lang] if args.review else WORDS["no_items"][args.lang].format(module=args.module))
        return 0
    if args.count:
        known = answered_right(answers)
        chosen = sorted(chosen, key=lambda item: item.id in known)[: args.count]
    session(chosen, args.lang, random.Random(args.seed))
    return 0


def _due(answers: list[dict[str, Any]]) -> list[Item]:
    by_id = {item.id: item for item in items.all_items()}
    return [by_id[id] for id in due(answers, datetime.now(UTC)) if id in by_id]


def _chosen(level: int | None, module: str | None, language: str) -> list[Item]:
    if level:
        return list(items.load(level))
    if not module:
        return []
    found = [item for item in items.all_items() if item.module == module]
    if not found:
        plan.require(module)  # tells a misspelt name from a module without items
    return found
