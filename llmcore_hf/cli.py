"""The command line: argv -> module -> checked config -> run -> exit code.

Exit codes: 0 the run did what it says; 1 it failed, or a check did; 2 the options are wrong; 130 interrupted.
Nothing heavy is imported before it is needed: `--list`, `--help` and a wrong module name never load torch.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from importlib import import_module

from llmcore_hf import __version__, registry
from llmcore_hf.distributed import check_launch, program, turn_to_speak
from llmcore_hf.errors import ConfigError, UserError

USAGE = """\
usage: {prog} --module NAME --toy                 run a lesson's offline recipe
       {prog} --module NAME [--config FILE] [options]   train on your own model and data
       {prog} --module NAME --help                the options of a module, with defaults
       {prog} --list                              all modules
       {prog} launch --accelerate_config NAME [...]   a module in several processes; `launch --help` shows more
       {prog} data inspect FILE                    what a dataset is, what is wrong with it, what carries loss
       {prog} env                                 versions and hardware, for a bug report
       {prog} roadmap | brief | export | quiz | exercise | cards | cheatsheet | bugzoo | progress   the course, see LEARNING_GUIDE.md

Values come in layers: defaults < recipes/NAME/toy.yaml (with --toy) < --config FILE < command line.
A run leaves its evidence in output/NAME/<run_id>/, and output/NAME/latest points to the newest.
Several processes: {prog} launch --accelerate_config cpu_2 --module NAME --toy, or `accelerate launch` with run.py
"""

# Commands of the course: they read what runs left behind and import nothing heavy.
COURSE = {
    "roadmap": "llmcore_hf.learning.plan",
    "brief": "llmcore_hf.learning.brief",
    "export": "llmcore_hf.learning.export",
    "quiz": "llmcore_hf.learning.quiz",
    "exercise": "llmcore_hf.learning.exercise",
    "cards": "llmcore_hf.learning.cards",
    "cheatsheet": "llmcore_hf.learning.cheatsheet",
    "bugzoo": "llmcore_hf.learning.bugzoo",
    "progress": "llmcore_hf.learning.progress",
}


def entry_point() -> None:
    """The console script `llmcore`, `run.py` and `python -m llmcore_hf`."""
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:  # the reader (`| head`) has left; nothing more can be said to it
        _forget_output()
        code = 141
    sys.exit(code)


def main(argv: list[str]) -> int:
    """Run one command and return the exit code; errors a user can mend are printed without a traceback."""
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        _print_error(str(error))
        return error.exit_code
    except ImportError as error:
        _print_error(f"{error}. Install what this project needs: pip install -c constraints.txt -e .")
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:  # no space, no permission: a run tells its own in its summary, this is all the others
        file = error.filename2 or error.filename  # of a rename, what it was to become
        _print_error(f"{error.strerror or error}" + (f": {file}" if file else ""))
        if error.errno == errno.ENOSPC:
            _forget_output()
        return 1
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130


def _forget_output() -> None:
    """What is still to be written goes nowhere: Python would try it once more when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: list[str]) -> int:
    if argv == ["env"]:
        from llmcore_hf.environment import print_report

        print_report()
        return 0
    if argv[:1] == ["data"]:
        from llmcore_hf.inspection import main as data_command

        _quiet_defaults()
        return data_command(argv[1:], program())
    if argv[:1] == ["launch"]:
        from llmcore_hf.launch import main as launch

        return launch(argv[1:], program())
    if argv and argv[0] in COURSE:
        from llmcore_hf.learning.texts import in_language_of

        with in_language_of(argv):
            return _course(argv)
    if "--version" in argv:
        print(f"llmcore_hf {__version__}")
        return 0
    if "--list" in argv:
        if len(argv) > 1:
            raise ConfigError(["--list stands alone"])
        _print_list()
        return 0
    wants_help = "--help" in argv or "-h" in argv
    if not argv or (wants_help and not any(a.partition("=")[0] in ("--module", "--config") for a in argv)):
        print(USAGE.format(prog=program()))
        return 0 if wants_help else 2
    return _module_command([a for a in argv if a not in ("--help", "-h")], wants_help)


def _course(argv: list[str]) -> int:
    """A command of the course, whose errors are said in its language."""
    return int(import_module(COURSE[argv[0]]).main(argv[1:]))


def _module_command(argv: list[str], wants_help: bool) -> int:
    from llmcore_hf import config

    request = config.read_request(argv)
    module = registry.get(str(request.module))
    _quiet_defaults()
    if wants_help:
        from llmcore_hf.help import print_module_help

        print_module_help(module)
        return 0
    check_launch(module.name)
    resolved = config.resolve(module, request)
    from llmcore_hf.run_dir import execute

    return execute(module, resolved, argv)


def _quiet_defaults() -> None:
    """Nothing is reported to anyone unless the user exports these variables with another value."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_list() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="LLM-Core modules")
    for column in ("day", "level", "module", "title", "标题", "needs"):
        table.add_column(column, no_wrap=column in ("module", "day", "level"))
    for m in sorted(registry.MODULES, key=lambda m: (m.day, m.name)):
        needs = f"pip install 'llmcore-hf[{m.extra}]'" if m.extra else ""
        table.add_row(str(m.day), str(m.level), m.name, m.title_en, m.title_zh, escape(needs))
    Console().print(table)


def _print_error(message: str) -> None:
    time.sleep(turn_to_speak())
    print(f"{program()}: {message}", file=sys.stderr)
