"""The bug zoo: a run that is really broken beside a healthy one; which bug is it?

A seed decides which bug of `learning/bugzoo/bugs.yaml` it is, the seed of both runs, and the order of the choices. Both
runs are made here, by `specimens`, in a process of their own. The modules check themselves, and their checks often name
the bug: so the run directories stay sealed, and names and texts of checks are left out of what is shown, until the answer
is given. A pair of runs whose evidence does not tell the bug from a healthy run is never asked about.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcore_hf import registry, resources
from llmcore_hf.durability import write_atomically
from llmcore_hf.errors import UserError
from llmcore_hf.learning import evidence, items, quiz, state
from llmcore_hf.learning.evidence import Run
from llmcore_hf.learning.items import Choice, Item
from llmcore_hf.learning.texts import Parser, WrongOptions, read_yaml, say

ROOT = Path("output/bugzoo")
ANSWER = "bugzoo-"  # the ids of answers in the state file begin with it
SEALED, OPEN = ".sealed", "runs"  # folder of both runs, before and after the answer
HIDDEN = ("checks", "status", "error", "artifacts", "run_id", "command")  # of the summaries that are shown
N_SAMPLES = 3
CHART_COLUMNS = 24
WORDS = {
    "making": {
        "zh": "正在真的训练两次（一次健康，一次有错），大约需要半分钟到一分钟……",
        "en": "Training twice for real, once healthy and once broken: half a minute to a minute ...",
    },
    "title": {"zh": "# 找错题 {seed}：模块 {module}", "en": "# Bug zoo {seed}: module {module}"},
    "about": {
        "zh": "同一个配方、同一个种子跑了两次：一次健康，一次代码里有一处错。两次运行自己的检查暂时不给看，因为其中有的会直接说出答案。",
        "en": "One recipe and one seed, run twice: once healthy, once with one bug in the code. What the runs' own checks say is hidden for now, "
        "as some of them would name it.",
    },
    "head": {"zh": "| 量 | 健康 | 有错 |", "en": "| Quantity | Healthy | Broken |"},
    "samples": {
        "zh": "| 提示 | 参考答案 | 健康 | 有错 |",
        "en": "| Prompt | Reference answer | Healthy | Broken |",
    },
    "ask": {"zh": "有错的那次运行，错在哪里？", "en": "What is wrong with the broken run?"},
    "tell": {"zh": "证据：", "en": "What gives it away: "},
    "fix": {"zh": "怎样改：", "en": "How to mend it: "},
    "files": {
        "zh": "图：{picture}；摘要：{folder}/healthy.json、broken.json",
        "en": "Picture: {picture}; summaries: {folder}/healthy.json, broken.json",
    },
    "diff": {"zh": "这次运行的代码改动：", "en": "What was changed in the code for that run:"},
    "noticed": {
        "zh": "它自己的检查发现了：{names}。",
        "en": "Its own checks noticed: {names}.",
    },
    "unnoticed": {
        "zh": "它自己的检查全部通过：没有一条发现这个错，只能靠读指标。",
        "en": "Its own checks all passed: none noticed this bug, only reading the metrics does.",
    },
    "opened": {"zh": "两次运行的完整记录：{folder}", "en": "The whole record of both runs: {folder}"},
    "known": {
        "zh": "这一题的答案已经公开过：可以再做一遍，但不再记入进度。",
        "en": "The answer to this one is open already: answer it again if you like, it is not kept in your progress.",
    },
    "left": {
        "zh": "没有作答，答案还封着。再来：{command}",
        "en": "Not answered, so the answer stays sealed. To come back: {command}",
    },
    "next": {"zh": "下一题：{command}", "en": "The next one: {command}"},
    "list": {"zh": "| 错误 | 模块 | 结果 |", "en": "| Bug | Module | Result |"},
    "found": {"zh": "认出过", "en": "recognized"},
    "missed": {"zh": "答错过", "en": "missed so far"},
    "unseen": {"zh": "还没见过", "en": "not met yet"},
}


@functools.cache
def load() -> dict[str, Any]:
    """The content of `learning/bugzoo/bugs.yaml`."""
    source: dict[str, Any] = read_yaml(resources.path("learning/bugzoo/bugs.yaml"))
    return source


def bug_of(seed: int) -> str:
    """The bug of a seed. As many seeds in a row as there are bugs, from a multiple of that, show each once."""
    order = list(load()["bugs"])
    random.Random(seed // len(order)).shuffle(order)
    return order[seed % len(order)]


def module_of(bug: str) -> str:
    from llmcore_hf.learning.breakages import BREAKAGES

    return BREAKAGES[bug].module


@dataclass(frozen=True)
class Case:
    """A healthy and a broken run of one module with one seed."""

    seed: int
    folder: Path
    bug: str
    healthy: Run
    broken: Run

    @property
    def module(self) -> str:
        return module_of(self.bug)

    def source(self) -> dict[str, Any]:
        bug: dict[str, Any] = load()["bugs"][self.bug]
        return bug


# ---------------------------------------------------------------- making a case


def prepare(seed: int, language: str, root: Path = ROOT) -> Case:
    """The case of a seed: made now, or as it was made before.

    Raises:
        UserError: the runs cannot be made, or tell nothing.
    """
    from filelock import FileLock

    folder, bug = (root / str(seed)).resolve(), bug_of(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        runs = next((folder / name for name in (OPEN, SEALED) if (folder / name).is_dir()), None)
        if runs is None:
            print(WORDS["making"][language], flush=True)
            runs = _make(folder, bug, seed)
    module = module_of(bug)
    try:
        case = Case(seed, folder, bug, *(evidence.read(runs / name, module) for name in ("healthy", "broken")))
    except UserError as error:
        raise UserError(f"{error}\n{_made_again(runs)}") from None
    if unclear := [row for row in telltales(case) if not row.holds]:
        n = f"{len(unclear)}/{len(telltales(case))}"
        raise UserError(
            say(
                zh=f"种子 {seed} 的两次运行看不清它的错（{n} 个特征不明显）：换一个 --seed",
                en=f"the runs of seed {seed} do not show their bug clearly ({n} marks are missing): take another --seed",
            )
        )
    return case


def _make(folder: Path, bug: str, seed: int) -> Path:
    """Run both in a process of their own, whose threads, patches and messages do not reach this one."""
    scratch = folder / ".making"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "llmcore_hf.learning.specimens", bug, str(seed), str(scratch)]
    with open(scratch / "output.txt", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=False).returncode
    if code:
        lines = (scratch / "output.txt").read_text(encoding="utf-8").strip().splitlines()
        why = lines[-1] if lines else f"exit code {code}"
        raise UserError(say(zh=f"这两次运行没有做成：{why}", en=f"the runs could not be made: {why}"))
    os.replace(scratch, folder / SEALED)
    return folder / SEALED


@dataclass(frozen=True)
class Telltale:
    """A value that tells the broken run from the healthy one, and the ranges it has to lie in."""

    name: str
    healthy: Any
    broken: Any
    ranges: dict[str, list[float]]

    @property
    def holds(self) -> bool:
        return all(_within(getattr(self, name), self.ranges[name]) for name in ("healthy", "broken"))


def _within(value: Any, ends: list[float]) -> bool:
    return isinstance(value, int | float) and ends[0] <= value <= ends[1]


def telltales(case: Case) -> list[Telltale]:
    """The marks by which the bug is recognized, in both runs."""
    return [
        Telltale(
            " / ".join(row["path"]),
            case.healthy.look_up(row["path"]),
            case.broken.look_up(row["path"]),
            {"healthy": row["healthy"], "broken": row["broken"]},
        )
        for row in case.source()["telltale"]
    ]


# ---------------------------------------------------------------- what is shown


def shown_summary(run: Run) -> dict[str, Any]:
    """The summary without what would name the bug."""
    return {name: value for name, value in run.summary.items() if name not in HIDDEN}


def table(case: Case, language: str) -> str:
    """What both runs came to, side by side."""
    rows = [
        f"| {row[language].replace('|', chr(92) + '|')} | {_show(case.healthy.look_up(row['path']))} | {_show(case.broken.look_up(row['path']))} |"
        for row in load()["modules"][case.module]["shown"]
    ]
    return "\n".join([WORDS["head"][language], "| --- | --- | --- |", *rows])


def _show(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:.4g}"
    return "—" if value is None else f"`{value}`".replace("|", "\\|")


def samples(case: Case, language: str) -> str:
    """Some held-out prompts with the answers of both models; empty for a module without any."""
    pairs = zip(case.healthy.summary["samples"], case.broken.summary["samples"], strict=False)
    rows = [
        _row([healthy["prompt"], healthy["reference"], healthy["after"], broken["after"]])
        for healthy, broken in list(pairs)[:N_SAMPLES]
    ]
    return "\n".join([WORDS["samples"][language], "| --- | --- | --- | --- |", *rows]) if rows else ""


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def curves(case: Case) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Metric -> run -> points (step, value)."""
    histories = {name: _history(run) for name, run in (("healthy", case.healthy), ("broken", case.broken))}
    return {
        key: {
            name: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            for name, rows in histories.items()
        }
        for key in load()["modules"][case.module]["curves"]
    }


def _history(run: Run) -> list[dict[str, Any]]:
    file = run.path / "log_history.jsonl"
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        said = say(zh=f"{file} 已损坏（{error}）。", en=f"{file} is damaged ({error}).")
        raise UserError(f"{said} {_made_again(run.path.parent)}") from None


def _made_again(runs: Path) -> str:
    return say(zh=f"删掉 {runs}，这两次运行会重新做", en=f"Delete {runs}, and both runs are made again")


def charts(case: Case) -> str:
    """The curves in characters."""
    parts = []
    for key, lines in curves(case).items():
        steps = sorted({step for step, _ in lines["healthy"]} & {step for step, _ in lines["broken"]})
        steps = steps[:: -(-len(steps) // CHART_COLUMNS)]
        series = {name: [dict(points)[step] for step in steps] for name, points in lines.items()}
        parts.append(f"{key}\n{items.chart({'x': steps, 'series': series})}")
    return "\n\n".join(parts)


def picture(case: Case) -> bytes:
    """The curves as a PNG, the broken run over the healthy one."""
    from llmcore_hf.curves import HELD_OUT, TRAIN, png, pyplot

    found = curves(case)
    figure, axes = pyplot().subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(f"Bug zoo {case.seed}: {case.module}", fontsize=13, fontweight="bold")
    for axis, (key, lines) in zip(axes.flat, found.items(), strict=True):
        for (name, points), color, style in zip(lines.items(), (TRAIN, HELD_OUT), ("-", "--"), strict=True):
            axis.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.6, label=name)
        axis.set_title(key, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    return png(figure)


def page(case: Case, language: str) -> str:
    """Everything there is to see before the answer, as Markdown."""
    words = {"seed": case.seed, "module": case.module}
    parts = [WORDS["title"][language].format(**words), WORDS["about"][language], table(case, language)]
    parts += [text for text in (samples(case, language),) if text]
    return "\n\n".join([*parts, "![](evidence.png)", f"```text\n{charts(case)}\n```"]) + "\n"


def item(case: Case) -> Item:
    """The case as a quiz item with five choices."""
    source, names = case.source(), load()["names"]
    right = Choice(names[case.bug], source["explain"], True)
    wrong = [Choice(names[name], why, False) for name, why in source["wrong"].items()]
    explain = {
        language: f"{WORDS['tell'][language]}{source['evidence'][language]}\n{WORDS['fix'][language]}{source['fix'][language]}"
        for language in ("zh", "en")
    }
    return Item(
        id=f"{ANSWER}{case.bug}",
        level=registry.get(case.module).level,
        module=case.module,
        type="single",
        ask=WORDS["ask"],
        explain=explain,
        backing=source["source"],
        choices=(right, *wrong),
    )


def disclosure(case: Case, language: str) -> str:
    """After the answer: the edit of the code, and what the run's own checks had to say."""
    from llmcore_hf.learning.breakages import BREAKAGES

    failed = [check["id"] for check in case.broken.with_status("fail") + case.broken.with_status("warn")]
    noticed = WORDS["noticed"][language].format(names=", ".join(f"`{name}`" for name in failed))
    lines = [WORDS["diff"][language], f"```diff\n{BREAKAGES[case.bug].diff()}\n```"]
    return "\n\n".join([*lines, noticed if failed else WORDS["unnoticed"][language]])


def unseal(case: Case, language: str) -> None:
    """Open the run directories and write down the answer."""
    if (case.folder / SEALED).is_dir():
        os.replace(case.folder / SEALED, case.folder / OPEN)
    choice = item(case).choices[0]
    parts = [f"# {choice.text[language]}", choice.why[language], item(case).explain[language].replace("\n", "\n\n")]
    write_atomically(case.folder / "answer.md", "\n\n".join([*parts, disclosure(case, language)]) + "\n")


# ---------------------------------------------------------------- the command


def standing(answers: list[dict[str, Any]]) -> dict[str, str]:
    """Bug -> `found` once it was named right, `missed` while all its answers were wrong, `unseen`."""
    right, met = quiz.answered_right(answers), {answer["item"] for answer in answers}
    ids = {bug: f"{ANSWER}{bug}" for bug in load()["bugs"]}
    return {bug: "found" if id in right else "missed" if id in met else "unseen" for bug, id in ids.items()}


def overview(language: str) -> str:
    """The bugs of the zoo, and whether the learner has recognized them."""
    rows = [
        _row([load()["names"][bug][language], f"`{module_of(bug)}`", WORDS[word][language]])
        for bug, word in standing(state.read()["answers"]).items()
    ]
    return "\n".join([WORDS["list"][language], "| --- | --- | --- |", *rows])


def next_seed() -> int:
    """The first case that is not open yet, from the number of cases answered so far."""
    seed = sum(answer["item"].startswith(ANSWER) for answer in state.read()["answers"])
    while (ROOT / str(seed) / OPEN).is_dir():
        seed += 1
    return seed


def ask(case: Case, language: str) -> None:
    """Show the evidence, ask, grade, explain, and keep the result."""
    write_atomically(case.folder / "evidence.png", picture(case))
    write_atomically(case.folder / "evidence.md", page(case, language))
    for name, run in (("healthy", case.healthy), ("broken", case.broken)):
        content = json.dumps(shown_summary(run), ensure_ascii=False, indent=2)
        write_atomically(case.folder / f"{name}.json", content + "\n")
    print(page(case, language).replace("![](evidence.png)\n\n", ""))
    print(WORDS["files"][language].format(picture=case.folder / "evidence.png", folder=case.folder))
    known = (case.folder / OPEN).is_dir()
    if known:
        print(WORDS["known"][language])
    result = quiz.ask(item(case), language, random.Random(case.seed))
    if result is None:
        if not known:
            print(WORDS["left"][language].format(command=_command(case.seed, language)))
        return
    if not known:
        state.record_answer(item(case).id, result)
    unseal(case, language)
    print(f"\n{disclosure(case, language)}\n")
    print(WORDS["opened"][language].format(folder=case.folder / OPEN))
    print(WORDS["next"][language].format(command=_command(case.seed + 1, language)))


def _command(seed: int, language: str) -> str:
    return f"python scripts/bugzoo.py --seed {seed}" + (f" --lang {language}" if language != "zh" else "")


def main(argv: list[str]) -> int:
    """Ask about one broken run, or list the bugs."""
    parser = Parser(
        "bugzoo",
        say(
            zh="一次真的出了错的运行，旁边是健康的：读摘要和曲线，说出错在哪里。",
            en="A run that is really broken beside a healthy one: read summary and curves, name the bug.",
        ),
    )
    parser.add_argument(
        "--seed", type=int, help=say(zh="第几题；不给时是下一题", en="which case; the next one when not given")
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help=say(zh="所有错误，和你认出过哪些", en="the bugs of the zoo, and which you have recognized"),
    )
    args = parser.parse_args(argv)
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise WrongOptions(
            say(zh=f"--seed {args.seed}：要在 0 到 {2**32 - 1} 之间", en=f"--seed {args.seed}: 0 to {2**32 - 1}")
        )
    if args.list:
        if args.seed is not None:
            raise WrongOptions(
                say(zh="--list 列出全部错误，不能再加 --seed", en="--list shows all bugs: no --seed with it")
            )
        print(overview(args.lang))
        return 0
    ask(prepare(next_seed() if args.seed is None else args.seed, args.lang), args.lang)
    return 0
