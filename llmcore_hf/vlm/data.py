"""Datasets of images and conversations for the vision modules, read and checked by `llmcore_hf.data`.

Columns: `image` or `images` (paths, or what a parquet file or the hub holds), and any conversation that `--module sft` reads.
Text may say where its images stand, as parts (`{"type": "image"}`) or as `<image>`; otherwise they stand before the first
question. What comes out has TRL's columns `images`, `prompt`, `completion`: the last turn is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcore_hf.data.auditing import RowCheck
from llmcore_hf.data.formats import FieldProblem
from llmcore_hf.data.loading import DataArguments, Splits, load
from llmcore_hf.data.reading import IMAGE_COLUMNS, image_feature
from llmcore_hf.data.shapes import DESCRIBE
from llmcore_hf.data.toy import TOY_DATASETS
from llmcore_hf.errors import UserError
from llmcore_hf.vlm import images
from llmcore_hf.vlm.images import BadImage

if TYPE_CHECKING:
    from datasets import Dataset

MARK = "<image>"  # where an image stands, in text written for LLaVA
IMAGE_PART, GIVE_IMAGES = '{"type": "image"}', "give the images themselves in the column `images`"


def load_splits(
    args: DataArguments, seed: int, images_per_row: int | None, chooses_best: bool, bad_rows_file: Path | None
) -> Splits:
    """Load and check the dataset that `args` names; every image is decoded once, so that none fails in the middle of training.

    Args:
        images_per_row: how many images a row must have; None for any number from one on.

    Raises:
        UserError: it cannot be read, or has no images.
        BadData: rows have problems, and `--on_bad_rows` does not let the run go on.
    """
    name = str(args.dataset_name)
    folder = None if name in TOY_DATASETS else _folder_of(name)

    def row_links(row: dict[str, Any]) -> Iterator[bytes]:
        """Several questions about one image are held out together, or not at all."""
        keys = (images.content_key(located(source, folder)) for source in images_of(row))
        yield from (key for key in keys if key is not None)

    links = None if name in TOY_DATASETS else row_links
    check = row_check_of(name, images_per_row)
    splits = load(args, "sft", seed, None, chooses_best, None, bad_rows_file, check, links)
    if name in TOY_DATASETS:
        return splits
    rows = {role: as_trained(getattr(splits, role), folder) for role in ("train", "validation", "test")}
    return replace(splits, **rows)


def row_check_of(name: str, images_per_row: int | None) -> RowCheck:
    """What finds problems of the images in a row of the dataset `name`; see `check_row`."""
    is_toy = name in TOY_DATASETS
    folder = None if is_toy else _folder_of(name)

    def check(row: dict[str, Any]) -> Iterator[FieldProblem]:
        if not row.keys() & set(IMAGE_COLUMNS):  # the same of each row: said once
            raise UserError(f"{name} has no column `image` or `images`: add one, or map it with --columns images=NAME")
        yield from check_row(row, folder, images_per_row, decode=not is_toy)

    return check


def _folder_of(name: str) -> Path | None:
    """Where relative paths of images begin: beside the file that names them."""
    path = Path(name).expanduser()
    return path if path.is_dir() else path.parent if path.is_file() else None


def check_row(
    row: dict[str, Any], folder: Path | None, images_per_row: int | None, decode: bool
) -> Iterator[FieldProblem]:
    """What is wrong with the images of a converted row, and with the places it gives them."""
    column = "image" if row.get("image") is not None else "images"
    found = images_of(row)
    if not found:
        yield FieldProblem("missing", column, "holds no image", "give one, or remove the row")
    elif images_per_row is not None and len(found) != images_per_row:
        text = f"holds {len(found)} images, but this model takes {images_per_row} for each question"
        yield FieldProblem("images", column, text, "make a row of each, or use a model that reads several images")
    turns = turns_of(row)
    yield from _check_parts(turns)
    if found and (marks := count_marks(turns)) not in (0, len(found)):
        text = f"name {marks} images, but the row has {len(found)}"
        yield FieldProblem("images", "the turns", text, "let each image have one `<image>`, or leave all of them out")
    for i, source in enumerate(found if decode else []):
        try:
            images.read(located(source, folder))
        except BadImage as error:
            text, _, remedy = str(error).partition(": ")
            yield FieldProblem("image", f"{column}[{i}]" if column == "images" else column, text, remedy)


def _check_parts(turns: list[dict[str, Any]]) -> Iterator[FieldProblem]:
    """Images where no model here has any, and parts of turns that no model here reads."""
    for i, turn in enumerate(turns):
        place, content = f"turn {i}", turn.get("content")
        if turn["role"] == "assistant" and count_marks([turn]):
            text = f"puts an image into an answer (`{MARK}` stands for one), and the models here answer in text"
            yield FieldProblem("images", place, text, "move it to the question, or remove the row")
        for part in content if isinstance(content, list) else []:
            if part.get("type") not in ("text", "image"):
                text = f"has a part of type `{part.get('type')}`"
                yield FieldProblem("type", place, text, f"write images as {IMAGE_PART} and {GIVE_IMAGES}")
            elif part["type"] == "text" and not isinstance(part.get("text"), str):
                yield FieldProblem("missing", place, "has a part of type `text` without `text`", "fill it in")
            elif part.get("image") is not None:
                text = "holds an image itself, one more than those of the column"
                yield FieldProblem("images", place, text, f"leave {IMAGE_PART} there and {GIVE_IMAGES}")


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images of a row, whichever column they stand in."""
    if row.get("image") is not None:
        return [row["image"]]
    return list(row.get("images") or [])


def turns_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        list(row["messages"])
        if "messages" in row
        else [*_as_turns(row["prompt"], "user"), *_as_turns(row["completion"], "assistant")]
    )


def _as_turns(text: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def count_marks(turns: list[dict[str, Any]]) -> int:
    """Places of images in a conversation."""
    return sum(
        turn["content"].count(MARK)
        if isinstance(turn.get("content"), str)
        else sum(part.get("type") == "image" for part in turn.get("content") or [])
        for turn in turns
    )


def located(source: Any, folder: Path | None) -> Any:
    """An image with its path made absolute: relative ones begin beside the dataset's file."""
    if isinstance(source, str):
        return str((folder or Path()) / Path(source).expanduser())
    return source


def as_trained(rows: Dataset, folder: Path | None) -> Dataset:
    """The rows in the columns `images`, `prompt`, `completion`."""
    from datasets import Features, Image, Json, List

    for column, feature in rows.features.items():
        if (encoded := image_feature(feature, decode=False)) is not None:
            rows = rows.cast_column(column, encoded)  # images go through as they are

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        found = [located(source, folder) for source in images_of(row)]
        turns = [with_parts(turn) for turn in turns_of(row)]
        return {"images": [images.as_kept(source) for source in found], "prompt": turns[:-1], "completion": turns[-1:]}

    features = Features({"images": List(Image(decode=False)), "prompt": List(Json()), "completion": List(Json())})
    converted = rows.map(convert, remove_columns=rows.column_names, features=features)
    return converted.cast_column("images", List(Image()))


def with_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn, with its content in parts when its text says `<image>`."""
    content = turn.get("content")
    if isinstance(content, list):  # a table fills parts up with nulls, which TRL takes for images
        return {**turn, "content": [{name: v for name, v in part.items() if v is not None} for part in content]}
    if content is None or MARK not in content:
        return turn
    pieces = [piece for piece in re.split(rf"({MARK})\n?", content) if piece]
    parts = [{"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces]
    return {**turn, "content": parts}


def question_of(row: dict[str, Any]) -> str:
    """The text of the last question, without its images."""
    content = row["prompt"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def answer_of(row: dict[str, Any]) -> str:
    content = row["completion"][0]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_caption(row: dict[str, Any]) -> bool:
    """Whether the row asks for a description rather than an answer to a question about the image."""
    return question_of(row) == DESCRIBE
