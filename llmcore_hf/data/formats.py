"""Which format a dataset is in, and how a row of it becomes TRL's columns.

Detection looks at column names and, where they do not decide, at the first rows. The result is what TRL calls a dataset
type: language modeling, prompt-completion, preference, unpaired preference, prompt-only
(https://huggingface.co/docs/trl/dataset_formats).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmcore_hf.errors import UserError

Row = dict[str, Any]
Messages = list[dict[str, Any]]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",  # its value is the call, as JSON
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "system": "system",
}
OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")
# role -> roles that may stand before it; None is the beginning
MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
OPTIONAL_COLUMNS = ("input", "system", "history")  # read when they are there
CARRIED_COLUMNS = ("tools", "image", "images")  # handed on as they are
TEXT, MESSAGES, LABEL = "text", "messages", "label"
# Columns that hold the prompt under another name than a format with an implicit prompt could know.
PROMPT_LIKE = ("question", "query", "instruction", "input", "problem", "conversations", "messages")
SHOWN_CHARS = 40  # of a wrong value in a message


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field of a row, and what to change. The caller knows file and row.

    `kind` groups problems in counts: `missing`, `empty`, `type`, `role`, `order`, `equal`, `prompts`, `swapped`, ...
    """

    kind: str
    field: str | None
    text: str
    remedy: str


class Found(list[FieldProblem]):
    """The problems of one row, gathered while it is converted."""

    def add(self, kind: str, field: str, text: str, remedy: str) -> None:
        self.append(FieldProblem(kind, field, text, remedy))


class BadRow(ValueError):
    """A row cannot be used as it is. `problems` has everything that was found in it."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"field `{p.field}` {p.text}" for p in problems))


@dataclass(frozen=True)
class Format:
    """One dataset format.

    Attributes:
        name: shown to the user and stored in the summary.
        task: `sft`, `preference`, `unpaired preference` or `prompt`.
        columns: columns that must be there.
        outputs: TRL's columns that a row becomes, each `text`, `messages` or `label`.
        read: a row -> TRL's columns; adds what is wrong to the list it is given.
        accepts: looks at a row when the columns alone do not decide.
    """

    name: str
    task: str
    columns: tuple[str, ...]
    outputs: dict[str, str]
    read: Callable[[Row, Found], Row]
    accepts: Callable[[Row], bool] = lambda row: True

    @property
    def reads(self) -> set[str]:
        """Every column that is looked at, required or not."""
        return {*self.columns, *OPTIONAL_COLUMNS, *CARRIED_COLUMNS, *(name for pair in SCORES for name in pair)}

    def convert(self, row: Row) -> Row:
        """A row in TRL's columns, with `tools`, `image` and `images` handed on.

        Raises:
            BadRow: fields are missing or wrong; all problems of the row are in it.
        """
        found = Found()
        converted = self.read(row, found)
        carried = {"tools": _tools(row, found), "image": _image(row, found), "images": _images(row, found)}
        stored_as_json = [name for name, kind in self.outputs.items() if kind == MESSAGES]
        for name, value in [*((name, converted.get(name)) for name in stored_as_json), ("tools", carried["tools"])]:
            check_numbers(value, name, found)
        if found:
            raise BadRow(found)
        return converted | {name: value for name, value in carried.items() if value is not None}

    def doubts(self, row: Row) -> Sequence[FieldProblem]:
        """What makes a row suspicious that can be converted all the same."""
        found = Found()
        _check_scores(row, found)
        return found


def _refuse_unread_prompt(fmt: Format, columns: Sequence[str], where: str) -> None:
    """Texts are split into prompt and answer only where no column holds the prompt."""
    is_split = fmt.outputs.get("prompt") == TEXT and "prompt" not in fmt.columns
    unread = [name for name in PROMPT_LIKE if name in columns]
    if is_split and unread:
        raise UserError(
            f"{where}: is `{unread[0]}` the prompt of `chosen` and `rejected`? Map it with --columns prompt={unread[0]}, or "
            f"remove the column: then what both answers begin with is taken for the prompt"
        )


def known_columns() -> set[str]:
    """Every column name that some format reads."""
    return {column for fmt in FORMATS for column in fmt.columns} | {*OPTIONAL_COLUMNS, *CARRIED_COLUMNS}


def detect(columns: Sequence[str], rows: Sequence[Row], where: str, task: str | None = None) -> Format:
    """The format of a dataset with these columns; `rows` are its first few.

    Prompts alone are a dataset only for the task `prompt`; for that task everything that holds prompts is one. Without a
    task any format may be found.

    Raises:
        UserError: no known format has these columns; the message lists the formats.
    """
    fitting = [fmt for fmt in FORMATS if task is None or fmt.task == task or _serves(fmt, task)]
    for fmt in fitting:
        if set(fmt.columns) <= set(columns):
            complete = [row for row in rows if all(row.get(column) is not None for column in fmt.columns)]
            if 2 * sum(map(fmt.accepts, complete)) >= len(complete):  # most of them: a few may be broken
                _refuse_unread_prompt(fmt, columns, where)
                return fmt
    known = "\n".join(f"    {f.task:<20} {f.name:<48} {', '.join(f.columns)}" for f in fitting)
    raise UserError(
        f"{where}: the columns {', '.join(f'`{name}`' for name in columns) or '(none)'} match no known dataset format. "
        f"Rename them, or map them as in --columns prompt=question,completion=answer, to one of these:\n{known}"
    )


def why(fmt: Format) -> str:
    """One sentence that says how `fmt` was recognised."""
    kinds = {kind for name, kind in fmt.outputs.items() if name in fmt.columns}
    where = ", which hold messages rather than texts" if MESSAGES in kinds and len(fmt.columns) > 1 else ""
    return f"it has the column{'s' if len(fmt.columns) > 1 else ''} {', '.join(fmt.columns)}{where}"


def _serves(fmt: Format, task: str) -> bool:
    """Whether a dataset in this format, made for another task, is looked at for `task`, be it to say what it is for."""
    return as_prompts(fmt) is not None if task == PROMPT else fmt.task != PROMPT


def as_prompts(fmt: Format) -> dict[str, str] | None:
    """What is left of a format when the policy writes the answers: the type of `prompt`; None when there are no prompts."""
    if fmt.outputs.keys() <= {TEXT}:
        return None
    return {"prompt": TEXT if fmt.outputs.get("prompt") == TEXT else MESSAGES}


def prompt_of(converted: Row) -> Any:
    """What an answer is given to: a text, or the turns before the first one of the assistant; None in plain text."""
    if "messages" in converted:
        turns = converted["messages"]
        return turns[: next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")]
    return converted.get("prompt")


def kind_of(value: Any) -> str:
    """What a value of a row is, in words."""
    names = {str: "text", dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _tools(row: Row, found: Found) -> list[Any] | None:
    """Tool descriptions, which may be written as JSON text; None when there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            found.add(
                "json", "tools", "is not valid JSON", 'write a list [{"type": "function", ...}], or leave it empty'
            )
            return None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        found.add("type", "tools", f"must be a list of objects, but is {kind_of(tools)}", "list one object per tool")
    return tools or None


def _image(row: Row, found: Found) -> Any:
    """A path, or what `datasets` has read; None when there is none."""
    image = row.get("image") or None
    if image is not None and not _is_image(image):
        found.add("type", "image", f"must be the path of an image, but is {kind_of(image)}", "write the path as text")
    return image


def _images(row: Row, found: Found) -> Any:
    images = row.get("images") or None
    if images is not None and not (isinstance(images, list) and all(_is_image(image) for image in images)):
        text = f"must be a list of image paths, but is {kind_of(images)}"
        remedy = 'write ["a.png", ...], or name the column `image` when each row has one'
        if isinstance(images, list):
            text, remedy = "must hold paths of images", "write each path as text"
        found.add("type", "images", text, remedy)
    return images


def _is_image(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and set(value) == {"bytes", "path"})


def _text(row: Row, field: str, found: Found, *, may_be_empty: bool = False) -> str:
    value = row.get(field)
    if value is None:
        if not may_be_empty:
            found.add("missing", field, "is missing", "fill it in, or remove the row")
        return ""
    if not isinstance(value, str):
        found.add("type", field, f"must be text, but is {kind_of(value)}", "write it as text, in quotes")
        return ""
    if not value.strip() and not may_be_empty:
        found.add("empty", field, "is empty", "fill it in, or remove the row")
    return value


LIST_SHAPES = {
    "messages": '[{"role": "user", "content": ...}, ...]',
    "turns": '[{"from": "human", "value": ...}, ...]',
}


def _list(row: Row, field: str, what: str, found: Found) -> list[Any]:
    value = row.get(field)
    if isinstance(value, list) and value:
        return value
    if value is None:
        found.add("missing", field, "is missing", f"give a list of {what}, or remove the row")
    elif isinstance(value, list):
        found.add("empty", field, "is empty", f"give at least one of its {what}, or remove the row")
    else:
        remedy = f"write {LIST_SHAPES[what]}; a .csv file cannot hold lists, a .jsonl file can"
        found.add("type", field, f"must be a list of {what}, but is {kind_of(value)}", remedy)
    return []


def _messages(row: Row, field: str, found: Found) -> Messages:
    """Check OpenAI-style messages one by one and drop the null fields that Arrow adds; a bad message is left out."""
    read = [_message(item, f"{field}[{i}]", found) for i, item in enumerate(_list(row, field, "messages", found))]
    return [message for message in read if message]


def _message(message: Any, field: str, found: Found) -> dict[str, Any]:
    if not isinstance(message, dict):
        found.add("type", field, f"must be a message, but is {kind_of(message)}", 'write {"role": ..., "content": ...}')
        return {}
    role = message.get("role")
    if role not in OPENAI_ROLES:
        found.add(
            "role", f"{field}.role", f"is {_show(role)}, which is not a role", f"use one of {', '.join(OPENAI_ROLES)}"
        )
        return {}
    _check_content(message, field, found)
    cleaned = {key: value for key, value in message.items() if value is not None}
    if cleaned.get("tool_calls") and role != "assistant":
        text = f"stands in a turn of `{role}`"
        found.add("role", f"{field}.tool_calls", text, "move it to a turn of the assistant, or remove it")
    elif cleaned.get("tool_calls"):
        cleaned["tool_calls"] = [_tool_call(c, f"{field}.tool_calls", found) for c in _as_list(cleaned["tool_calls"])]
    return cleaned


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_content(message: Row, field: str, found: Found) -> None:
    content, role = message.get("content"), message["role"]
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        return  # text and images in parts, for the vision modules
    if not isinstance(content, str):
        if content is None and message.get("tool_calls"):
            return
        kind = "missing" if content is None else "type"
        text = "is missing" if content is None else f"must be text, but is {kind_of(content)}"
        found.add(kind, f"{field}.content", text, "write the content as text, or remove the row")
    elif not content.strip() and role in ("user", "assistant") and not message.get("tool_calls"):
        found.add("empty", f"{field}.content", "is empty", "fill it in, or remove the row")


def _tool_call(call: Any, field: str, found: Found) -> Any:
    """A tool call whose arguments are an object: chat templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        found.add("type", field, "holds a call without a function name", 'write {"function": {"name": ..., ...}}')
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            found.add("json", f"{field}.arguments", "is not valid JSON", "write the arguments as a JSON object")
            return call
        function = {**function, "arguments": arguments}
    if not isinstance(arguments, dict | None):
        text = f"must be an object, but is {kind_of(arguments)}"
        found.add("type", f"{field}.arguments", text, 'write {"name of the argument": its value}')
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def check_numbers(value: Any, field: str, found: Found) -> None:
    """Report numbers that Arrow cannot hold as JSON: it would hand on null, or the whole message as text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_numbers(inner, f"{field}.{name}", found)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_numbers(inner, f"{field}[{i}]", found)
    elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 2**63):
        found.add("type", field, "is NaN, infinite or of more than 64 bits", "write that number as text, in quotes")


def _show(value: Any) -> str:
    text = "".join(char if char.isprintable() else " " for char in str(value))  # nothing that moves a cursor
    return "nothing" if value is None else f"`{text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + '...'}`"


def _turns(row: Row, field: str, found: Found) -> Messages:
    """ShareGPT turns (`from`, `value`) as messages."""
    read = [_turn(item, f"{field}[{i}]", found) for i, item in enumerate(_list(row, field, "turns", found))]
    return [turn for turn in read if turn]


def _turn(turn: Any, field: str, found: Found) -> dict[str, Any]:
    if not isinstance(turn, dict):
        found.add("type", field, f"must be a turn, but is {kind_of(turn)}", 'write {"from": ..., "value": ...}')
        return {}
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        found.add("role", f"{field}.from", f"is {_show(speaker)}, which is not a speaker", f"use one of {known}")
        return {}
    before = len(found)
    text = _text({f"{field}.value": turn.get("value")}, f"{field}.value", found, may_be_empty=speaker == "system")
    if speaker == "function_call" and len(found) == before:
        return {"role": "assistant", "tool_calls": _function_calls(text, f"{field}.value", found)}
    return {"role": SHAREGPT_ROLES[speaker], "content": text}


def _function_calls(text: str, field: str, found: Found) -> list[Any]:
    try:
        calls = _as_list(json.loads(text))
    except ValueError:
        found.add("json", field, "is not valid JSON", 'write the call as {"name": ..., "arguments": {...}}')
        return []
    return [_tool_call(call, field, found) for call in calls]


def _with_system(row: Row, messages: Messages, found: Found) -> Messages:
    system = _text(row, "system", found, may_be_empty=True)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _check_order(messages: Messages, field: str, found: Found, before: str | None = None) -> None:
    """Report the first turn that may not stand where it stands; `before` is the role of the turn before all of them."""
    for i, message in enumerate(messages):
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            place = "stands first" if before is None else f"follows one of `{before}`"
            remedy = {
                "system": "put the system turn first",
                "developer": "put the developer turn first",
                "tool": "put the assistant's tool call before it",
            }.get(role, "merge the two turns, or add the missing one between" if before == role else "")
            found.add(
                "order",
                f"{field}[{i}]",
                f"is a turn of `{role}` and {place}",
                remedy or "user and assistant take turns, the user first: are the speakers swapped?",
            )
            return
        before = role


def _ends_with(messages: Messages, roles: tuple[str, ...], field: str, found: Found) -> Messages:
    if messages and messages[-1]["role"] not in roles:
        wanted = " or ".join(f"`{role}`" for role in roles)
        remedy = "add the missing turn, or remove the last one"
        found.add("order", field, f"must end with a turn of {wanted}, but ends with `{messages[-1]['role']}`", remedy)
    return messages


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _from_prompt(row: Row, found: Found) -> Row:
    return {"prompt": _text(row, "prompt", found)}


def _from_chat_prompt(row: Row, found: Found) -> Row:
    return {"prompt": _prompt(_messages(row, "prompt", found), "prompt", found)}


def _from_text(row: Row, found: Found) -> Row:
    return {"text": _text(row, "text", found)}


def _from_messages(row: Row, found: Found) -> Row:
    return {"messages": _conversation(_messages(row, "messages", found), "messages", found)}


def _conversation(messages: Messages, field: str, found: Found) -> Messages:
    """Turns in order, an answer at the end, and something before it that it answers."""
    if found or not messages:
        return messages  # the order of turns that could not be read says nothing
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        found.add("order", field, "has an answer but no turn before it", "add the question, or remove the row")
        return messages
    _check_order(messages, field, found)
    return messages if found else _ends_with(messages, ("assistant",), field, found)


def _from_sharegpt(row: Row, found: Found) -> Row:
    read = _messages if _is_messages(row.get("conversations")) else _turns
    messages = read(row, "conversations", found)
    return {"messages": _conversation(_with_system(row, messages, found), "conversations", found)}


def _prompt(messages: Messages, field: str, found: Found) -> Messages:
    """Turns in order that wait for an answer."""
    if not found:
        _check_order(messages, field, found)
    return messages if found else _ends_with(messages, ("user", "tool"), field, found)


def _answer(messages: Messages, field: str, found: Found) -> Messages:
    """What follows a prompt: begins and ends with a turn of the assistant."""
    if messages and not found and messages[0]["role"] != "assistant":
        found.add(
            "order",
            field,
            f"begins with a turn of `{messages[0]['role']}`; after the prompt it holds the answer alone",
            "leave out the turns that `prompt` has already",
        )
    if not found:
        _check_order(messages, field, found, before="user")
    return messages if found else _ends_with(messages, ("assistant",), field, found)


def _from_prompt_completion(row: Row, found: Found) -> Row:
    return {"prompt": _text(row, "prompt", found), "completion": _text(row, "completion", found)}


def _from_chat_completion(row: Row, found: Found) -> Row:
    prompt = _messages(row, "prompt", found)
    completion = _messages(row, "completion", found)
    return {"prompt": _prompt(prompt, "prompt", found), "completion": _answer(completion, "completion", found)}


def _with_label(read: Callable[[Row, Found], Row]) -> Callable[[Row, Found], Row]:
    def read_with_label(row: Row, found: Found) -> Row:
        label = {"true": True, "false": False, "1": True, "0": False}.get(str(row.get("label")).lower())
        if label is None:
            kind = "missing" if row.get("label") is None else "type"
            text = f"must be true (a good answer) or false, but is {_show(row.get('label'))}"
            found.add(kind, "label", text, "write true or false")
        return {**read(row, found), "label": bool(label)}

    return read_with_label


HISTORY_SHAPE = "write [[instruction, answer], ...]"


def _alpaca_prompt(row: Row, found: Found) -> Messages:
    messages: Messages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        found.add("type", "history", f"must be a list of pairs, but is {kind_of(history)}", HISTORY_SHAPE)
        history = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            found.add("type", f"history[{i}]", "must be a pair of texts", HISTORY_SHAPE)
        else:
            messages += [_user(pair[0]), _assistant(pair[1])]
    parts = [_text(row, "instruction", found), _text(row, "input", found, may_be_empty=True)]
    return _with_system(row, [*messages, _user("\n".join(part for part in parts if part))], found)


def _from_alpaca(row: Row, found: Found) -> Row:
    return {"prompt": _alpaca_prompt(row, found), "completion": [_assistant(_text(row, "output", found))]}


def _from_alpaca_preference(row: Row, found: Found) -> Row:
    answers = {name: [_assistant(_text(row, name, found))] for name in ("chosen", "rejected")}
    return {"prompt": _alpaca_prompt(row, found), **_different(answers, found)}


def _different(answers: Row, found: Found) -> Row:
    if not found and answers["chosen"] == answers["rejected"]:
        found.add("equal", "rejected", "is the same as `chosen`: the pair holds no preference", "remove the row")
    return answers


def _from_sharegpt_preference(row: Row, found: Found) -> Row:
    prompt = _with_system(row, _turns(row, "conversations", found), found)
    answers = {}
    for name in ("chosen", "rejected"):
        turn = _turn(row.get(name), name, found)
        answers[name] = _answer([turn], name, found) if turn else []
    return {"prompt": _prompt(prompt, "conversations", found), **_different(answers, found)}


def _from_preference(row: Row, found: Found) -> Row:
    texts = {name: _text(row, name, found) for name in ("chosen", "rejected")}
    return {"prompt": _text(row, "prompt", found), **_different(texts, found)}


def _from_chat_preference(row: Row, found: Found) -> Row:
    if not isinstance(row.get("prompt"), list):  # a plain copy of what chosen begins with
        return _same_prompt(row.get("prompt"), _from_implicit_chat_preference(row, found), found)
    prompt = _messages(row, "prompt", found)
    answers = _different({name: _messages(row, name, found) for name in ("chosen", "rejected")}, found)
    answers = {name: _answer(turns, name, found) for name, turns in answers.items()}
    return {"prompt": _prompt(prompt, "prompt", found), **answers}


def _from_implicit_preference(row: Row, found: Found) -> Row:
    texts = _different({name: _text(row, name, found) for name in ("chosen", "rejected")}, found)
    return texts if found else _split_prompt(texts, found)


def _from_implicit_chat_preference(row: Row, found: Found) -> Row:
    answers = _different({name: _messages(row, name, found) for name in ("chosen", "rejected")}, found)
    for name in ("chosen", "rejected"):
        _conversation(answers[name], name, found)
    return answers if found else _split_prompt(answers, found)


def _same_prompt(prompt: Any, split: Row, found: Found) -> Row:
    """Report a plain prompt that is none of the turns which chosen and rejected begin with."""
    turns = [turn.get("content") for turn in split.get("prompt", ())]
    if not found and isinstance(prompt, str) and prompt.strip() and prompt.strip() not in map(_stripped, turns):
        text = f"is {_show(prompt)}, but chosen and rejected answer {_show(turns[-1])}"
        found.add("prompts", "prompt", text, "make it the prompt that both begin with, or leave the column out")
    return split


def _stripped(content: Any) -> Any:
    return content.strip() if isinstance(content, str) else content


def _split_prompt(answers: Row, found: Found) -> Row:
    """The prompt is what chosen and rejected have in common; TRL's own function takes it out."""
    from trl.data_utils import extract_prompt

    split: Row = extract_prompt(answers)
    if not split["prompt"]:
        text = "has no beginning in common with `chosen`, so the prompt is unknown"
        found.add("prompts", "rejected", text, "let both begin with the same prompt, or add a `prompt` column")
    elif isinstance(split["prompt"], list):
        turns = [split[name][0]["role"] for name in ("chosen", "rejected") if split[name]]
        if turns != ["assistant", "assistant"]:
            text = "answers another prompt than `chosen`: a turn before the last answer differs"
            found.add("prompts", "rejected", text, "compare answers to one and the same prompt, or remove the row")
    return split


def _check_scores(row: Row, found: Found) -> None:
    """A pair whose rejected answer has the higher score is suspected to be swapped."""
    for chosen, rejected in SCORES:
        high, low = _number(row.get(chosen)), _number(row.get(rejected))
        if high is not None and low is not None and high < low:
            text = f"has the lower score ({chosen} {row[chosen]} < {rejected} {row[rejected]}): are chosen and rejected swapped?"
            found.add(
                "swapped", "chosen", text, "exchange them (--columns chosen=rejected,rejected=chosen for all rows)"
            )


def _number(value: Any) -> float | None:
    """A number, or the number that a text holds, as in a .csv file."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_list(column: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row[column], list)


def _format(
    name: str, task: str, columns: str, outputs: str, read: Callable[[Row, Found], Row], **options: Any
) -> Format:
    kinds = dict(output.split(":") for output in outputs.split())
    return Format(name, task, tuple(columns.split()), kinds, read, **options)


PAIR = "prompt:text completion:text"
CHAT_PAIR = "prompt:messages completion:messages"
TRIPLE = "prompt:text chosen:text rejected:text"
CHAT_TRIPLE = "prompt:messages chosen:messages rejected:messages"
PREFERENCE, UNPAIRED, PROMPT = "preference", "unpaired preference", "prompt"
# The first that fits is taken: the more columns a format asks for, the earlier it stands.
FORMATS = (
    _format(
        "ShareGPT preference",
        PREFERENCE,
        "conversations chosen rejected",
        CHAT_TRIPLE,
        _from_sharegpt_preference,
        accepts=lambda row: isinstance(row["chosen"], dict),
    ),
    _format("alpaca preference", PREFERENCE, "instruction chosen rejected", CHAT_TRIPLE, _from_alpaca_preference),
    _format(
        "TRL preference (conversational)",
        PREFERENCE,
        "prompt chosen rejected",
        CHAT_TRIPLE,
        _from_chat_preference,
        accepts=_is_list("chosen"),
    ),
    _format("TRL preference", PREFERENCE, "prompt chosen rejected", TRIPLE, _from_preference),
    _format(
        "TRL preference, implicit prompt (conversational)",
        PREFERENCE,
        "chosen rejected",
        CHAT_TRIPLE,
        _from_implicit_chat_preference,
        accepts=_is_list("chosen"),
    ),
    _format("TRL preference, implicit prompt", PREFERENCE, "chosen rejected", TRIPLE, _from_implicit_preference),
    _format(
        "TRL unpaired preference (conversational)",
        UNPAIRED,
        "prompt completion label",
        f"{CHAT_PAIR} label:label",
        _with_label(_from_chat_completion),
        accepts=_is_list("prompt"),
    ),
    _format(
        "TRL unpaired preference",
        UNPAIRED,
        "prompt completion label",
        f"{PAIR} label:label",
        _with_label(_from_prompt_completion),
    ),
    _format(
        "TRL prompt-completion (conversational)",
        "sft",
        "prompt completion",
        CHAT_PAIR,
        _from_chat_completion,
        accepts=_is_list("prompt"),
    ),
    _format("TRL prompt-completion", "sft", "prompt completion", PAIR, _from_prompt_completion),
    _format("alpaca", "sft", "instruction output", CHAT_PAIR, _from_alpaca),
    _format("OpenAI messages", "sft", "messages", "messages:messages", _from_messages),
    _format("ShareGPT", "sft", "conversations", "messages:messages", _from_sharegpt),
    _format("TRL language modeling", "sft", "text", "text:text", _from_text),
    _format(
        "TRL prompt-only (conversational)",
        PROMPT,
        "prompt",
        "prompt:messages",
        _from_chat_prompt,
        accepts=_is_list("prompt"),
    ),
    _format("TRL prompt-only", PROMPT, "prompt", "prompt:text", _from_prompt),
)
