"""Which format a dataset is in, and how a row of it becomes TRL's columns.

Detection looks at column names and, where they do not decide, at the first row. The result is what TRL calls a
dataset type: language modeling, prompt-completion, preference
(https://huggingface.co/docs/trl/dataset_formats).
"""

from __future__ import annotations

from collections.abc import Callable
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
    "system": "system",
}
OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")


class FieldError(ValueError):
    """A field of a row cannot be used; the caller adds file and row number."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field `{field}`: {problem}")


@dataclass(frozen=True)
class Format:
    """One dataset format.

    Attributes:
        name: shown to the user and stored in the summary.
        task: `sft` or `preference`.
        columns: columns that must be there.
        convert: a row -> TRL's columns.
        accepts: looks at the first row when the columns alone do not decide.
    """

    name: str
    task: str
    columns: frozenset[str]
    convert: Callable[[Row], Row]
    accepts: Callable[[Row], bool] = lambda row: True


def detect(columns: list[str], first_row: Row, where: str) -> Format:
    """The format of a dataset.

    Raises:
        UserError: no known format has these columns; the message lists the formats.
    """
    for fmt in FORMATS:
        if fmt.columns <= set(columns) and fmt.accepts(first_row):
            return fmt
    known = "\n".join(f"    {f.task:<10} {f.name:<30} {', '.join(sorted(f.columns))}" for f in FORMATS)
    raise UserError(
        f"{where}: the columns {', '.join(columns) or '(none)'} match no known dataset format. "
        f"Rename them to one of these:\n{known}"
    )


def _text(row: Row, field: str, *, may_be_empty: bool = False) -> str:
    value = row.get(field)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise FieldError(field, f"expected text, found {_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise FieldError(field, "is empty")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _messages(value: Any, field: str) -> Messages:
    """Check OpenAI-style messages and drop the null fields that Arrow adds."""
    if not isinstance(value, list) or not value:
        raise FieldError(field, f"expected a non-empty list of messages, found {_kind(value)}")
    cleaned = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in OPENAI_ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise FieldError(f"{field}[{i}]", f"role {role!r} is not one of {', '.join(OPENAI_ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise FieldError(f"{field}[{i}].content", f"expected text, found {_kind(message.get('content'))}")
        cleaned.append({key: item for key, item in message.items() if item is not None})
    return cleaned


def _turns(value: Any, field: str) -> Messages:
    """ShareGPT turns (`from`, `value`) as messages."""
    if not isinstance(value, list) or not value:
        raise FieldError(field, f"expected a non-empty list of turns, found {_kind(value)}")
    return [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: Any, field: str) -> dict[str, Any]:
    speaker = turn.get("from") if isinstance(turn, dict) else turn
    if speaker not in SHAREGPT_ROLES:
        raise FieldError(f"{field}.from", f"{speaker!r} is not one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(turn.get("value"), str):
        raise FieldError(f"{field}.value", f"expected text, found {_kind(turn.get('value'))}")
    return {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}


def _with_system(row: Row, messages: Messages) -> Messages:
    system = _text(row, "system", may_be_empty=True)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _ends_with(messages: Messages, role: str, field: str) -> Messages:
    if messages[-1]["role"] != role:
        raise FieldError(field, f"must end with a turn of the {role}, ends with {messages[-1]['role']}")
    return messages


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _keep_tools(row: Row, converted: Row) -> Row:
    return converted | ({"tools": row["tools"]} if row.get("tools") else {})


def _from_text(row: Row) -> Row:
    return {"text": _text(row, "text")}


def _from_messages(row: Row) -> Row:
    messages = _messages(row["messages"], "messages")
    return _keep_tools(row, {"messages": _conversation(messages, "messages")})


def _conversation(messages: Messages, field: str) -> Messages:
    """An answer at the end, and something before it that it answers."""
    if len(_ends_with(messages, "assistant", field)) == 1:
        raise FieldError(field, "has an answer but no turn before it")
    return messages


def _from_sharegpt(row: Row) -> Row:
    value = row["conversations"]
    if _is_messages(value):
        messages = _messages(value, "conversations")
    else:
        messages = _turns(value, "conversations")
    return _keep_tools(row, {"messages": _conversation(_with_system(row, messages), "conversations")})


def _from_prompt_completion(row: Row) -> Row:
    if isinstance(row["prompt"], list):
        prompt = _ends_with(_messages(row["prompt"], "prompt"), "user", "prompt")
        return _keep_tools(row, {"prompt": prompt, "completion": _messages(row["completion"], "completion")})
    return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}


def _alpaca_prompt(row: Row) -> Messages:
    messages: Messages = []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise FieldError(f"history[{i}]", "expected a pair of texts [instruction, answer]")
        messages += [_user(pair[0]), _assistant(pair[1])]
    parts = [_text(row, "instruction"), _text(row, "input", may_be_empty=True)]
    return _with_system(row, [*messages, _user("\n".join(part for part in parts if part))])


def _from_alpaca(row: Row) -> Row:
    return {"prompt": _alpaca_prompt(row), "completion": [_assistant(_text(row, "output"))]}


def _from_alpaca_preference(row: Row) -> Row:
    answers = {name: [_assistant(_text(row, name))] for name in ("chosen", "rejected")}
    return {"prompt": _alpaca_prompt(row), **_different(answers)}


def _different(answers: Row) -> Row:
    if answers["chosen"] == answers["rejected"]:
        raise FieldError("rejected", "is the same as `chosen`: such a pair holds no preference; remove it")
    return answers


def _from_sharegpt_preference(row: Row) -> Row:
    prompt = _with_system(row, _turns(row["conversations"], "conversations"))
    _ends_with(prompt, "user", "conversations")
    answers = {name: _ends_with([_turn(row[name], name)], "assistant", name) for name in ("chosen", "rejected")}
    return {"prompt": prompt, **_different(answers)}


def _from_preference(row: Row) -> Row:
    if isinstance(row["chosen"], list):
        answers = _different({name: _messages(row[name], name) for name in ("chosen", "rejected")})
        if not isinstance(row.get("prompt"), list):  # no prompt, or a plain copy of what chosen begins with
            return _keep_tools(row, _split_prompt(answers))
        return _keep_tools(row, {"prompt": _messages(row["prompt"], "prompt"), **answers})
    texts = _different({name: _text(row, name) for name in ("chosen", "rejected")})
    return {"prompt": _text(row, "prompt"), **texts} if "prompt" in row else _split_prompt(texts)


def _split_prompt(answers: Row) -> Row:
    """The prompt is what chosen and rejected have in common; TRL's own function takes it out."""
    from trl.data_utils import extract_prompt

    split: Row = extract_prompt(answers)
    if not split["prompt"]:
        raise FieldError("chosen", "has no beginning in common with `rejected`, so the prompt is unknown")
    return split


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_sharegpt_answer(row: Row) -> bool:
    return isinstance(row["chosen"], dict)


def _format(name: str, task: str, columns: str, convert: Callable[[Row], Row], **options: Any) -> Format:
    return Format(name, task, frozenset(columns.split()), convert, **options)


# The first that fits is taken: the more columns a format asks for, the earlier it stands.
FORMATS = (
    _format(
        "ShareGPT preference",
        "preference",
        "conversations chosen rejected",
        _from_sharegpt_preference,
        accepts=_is_sharegpt_answer,
    ),
    _format("alpaca preference", "preference", "instruction chosen rejected", _from_alpaca_preference),
    _format("TRL preference", "preference", "prompt chosen rejected", _from_preference),
    _format("TRL preference, implicit prompt", "preference", "chosen rejected", _from_preference),
    _format("TRL prompt-completion", "sft", "prompt completion", _from_prompt_completion),
    _format("alpaca", "sft", "instruction output", _from_alpaca),
    _format("OpenAI messages", "sft", "messages", _from_messages),
    _format("ShareGPT", "sft", "conversations", _from_sharegpt),
    _format("TRL language modeling", "sft", "text", _from_text),
)
