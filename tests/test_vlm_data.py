"""The toy tasks, reading images, and what is wrong with rows that hold them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from llmcore_hf.data import digits, shapes
from llmcore_hf.data.loading import DataArguments
from llmcore_hf.data.problems import BadData
from llmcore_hf.errors import UserError
from llmcore_hf.vlm import images, tiny
from llmcore_hf.vlm.data import answer_of, count_marks, is_caption, load_splits, question_of
from llmcore_hf.vlm.images import BadImage


def pairs(triples: list[shapes.Triple]) -> set[tuple[str, str]]:
    return {pair for triple in triples for pair in combinations(triple, 2)}


def test_no_held_out_triple_is_trained_on_and_every_triple_has_one_split() -> None:
    splits = shapes.split_triples()
    everything = [triple for triples in splits.values() for triple in triples]
    assert len(everything) == len(set(everything)) == 6 * 4 * 4


def test_held_out_combinations_are_of_known_pairs_and_the_hard_split_of_unknown_ones() -> None:
    splits = shapes.split_triples()
    known = pairs(splits["train"])
    assert pairs(splits["test"]) | pairs(splits["validation"]) <= known
    hard = {(color, shape) for color, shape, _ in splits["hard"]}
    assert len(hard) == 4 and not hard & known
    assert {value for triple in splits["hard"] for value in triple} <= {v for triple in splits["train"] for v in triple}


def test_the_task_is_the_same_every_time_and_no_two_pictures_are_equal() -> None:
    first, again = shapes.pictures("test", 40), shapes.pictures("test", 40)
    assert [image.tobytes() for image, _ in first] == [image.tobytes() for image, _ in again]
    assert len({image.tobytes() for image, _ in first}) == 40
    assert {triple for _, triple in first} == set(shapes.split_triples()["test"])


@pytest.mark.parametrize("triple", shapes.split_triples()["test"], ids=" ".join)
def test_a_picture_shows_its_object_where_it_says(triple: shapes.Triple) -> None:
    import random

    import numpy as np

    color, _, position = triple
    pixels = np.asarray(shapes.render([triple], random.Random(0))).astype(int)
    painted = np.abs(pixels - shapes.COLORS[color]).sum(-1) < 30
    rows, columns = np.nonzero(painted)
    assert len(rows) > 20
    assert ("bottom" if rows.mean() > 15.5 else "top") + (" right" if columns.mean() > 15.5 else " left") == position


def test_questions_and_captions() -> None:
    asked = shapes.questions(("orange", "cross", "top left"))
    assert asked["caption"] == ("Describe the image.", "an orange cross at the top left")
    assert {kind: answer for kind, (_, answer) in asked.items() if kind != "caption"} == {
        "color": "orange",
        "shape": "cross",
        "position": "top left",
    }


def test_digits_are_stratified_real_scans() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, of the extra `digits`, is not installed")
    splits = digits.toy_digits()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1397, "test": 300, "validation": 100}
    assert Counter(answer_of(row) for row in splits["test"]) == dict.fromkeys("0123456789", 30)
    row = splits["train"][0]
    assert row["images"][0].size == (32, 32) and question_of(row) == "What digit is it?"
    everything = [row["images"][0].tobytes() for rows in splits.values() for row in rows]
    assert len(everything) == 1797 and len(set(everything)) > 1790  # a few scans are equal in the source


# --- images ---


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 7).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG whose header says 20,000 x 20,000; it holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png()[33:]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a.png").write_bytes(png(mode=mode))
    for source in (str(tmp_path / "a.png"), png(mode=mode), {"bytes": png(mode=mode), "path": None}):
        image = images.read(source)
        assert (image.mode, image.size) == ("RGB", (8, 8))


def ramp(height: int = 64) -> np.ndarray:
    return np.linspace(0, 65535, height * 64).reshape(height, 64).astype(np.uint16)


ODD = {
    "16 bits": lambda file: Image.fromarray(ramp()).save(file, "PNG"),
    "16 bits as TIFF": lambda file: Image.fromarray(ramp()).save(file, "TIFF"),
    "32-bit integers": lambda file: Image.fromarray(ramp().astype(np.int32)).save(file, "TIFF"),
    "turned": lambda file: Image.fromarray((ramp(32) >> 8).astype(np.uint8)).save(file, "PNG", exif=turned()),
    "turned 16 bits": lambda file: Image.fromarray(ramp(32)).save(file, "PNG", exif=turned()),
    "transparent": lambda file: Image.merge(
        "LA", [Image.new("L", (64, 64)), Image.linear_gradient("L").resize((64, 64))]
    ).save(file, "PNG"),
}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    return exif


@pytest.mark.parametrize("kind", ODD)
def test_training_sees_what_is_seen_when_asking(tmp_path: Path, kind: str) -> None:
    """Through an image processor, which is the last to change something: within one part in 255."""
    ODD[kind](tmp_path / "odd.png")
    splits = load(write(tmp_path, [{**good_rows()[0], "image": "odd.png"}, *good_rows()[1:]]))
    asked = images.read(tmp_path / "odd.png")
    (trained,) = (row["images"][0] for row in [*splits.train, *splits.test] if row["images"][0].size[1] > 8)
    assert asked.size == trained.size == ((32, 64) if "turned" in kind else (64, 64))
    process = tiny.image_processor("blip2")
    pixels = [process([image], return_tensors="pt")["pixel_values"] for image in (asked, trained)]
    assert (pixels[0] - pixels[1]).abs().max() < 0.02
    values = np.asarray(asked)
    assert len(np.unique(values)) >= 64 and 120 < values.mean() < 135, "a ramp over the whole range"


@pytest.mark.parametrize("values", [np.ones((8, 8), np.float32), np.full((8, 8), 70_000, np.int32)])
def test_values_of_an_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(
        BadImage, match=r"a\.tiff has values whose range is not known \(mode .\): save it with 8 or 16 bits"
    ):
        images.read(tmp_path / "a.tiff")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no file"),
        (b"hello", "not an image"),
        (b"", "not an image"),
        (png((64, 64), "RGB")[:60], "damaged or cut off"),
        (huge_png(), "scale it down"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "a.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadImage, match=reason) as caught:
        images.read(file)
    assert str(file) in str(caught.value)


def test_the_guard_stands_below_what_pillow_decodes() -> None:
    """An image that Pillow would decode without a word is refused by its header, before anything is decoded."""
    assert Image.MAX_IMAGE_PIXELS is not None and images.MAX_PIXELS < 9_000 * 8_000 < Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match="has 9000 x 8000 pixels, more than the 64,000,000 that are decoded"):
        images.read(huge_png(9_000, 8_000))
    with pytest.raises(BadImage, match="damaged or cut off"):  # within the limit it is decoded
        images.read(huge_png(800, 800))


# --- datasets of a user ---


def write(folder: Path, rows: list[dict]) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    for i in range(6):
        (folder / "pictures" / f"{i}.png").write_bytes(png((8 + i, 8)))
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "mine.jsonl")


def turns(question, answer="a thing") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def good_rows(n: int = 6) -> list[dict]:
    return [{"image": f"pictures/{i}.png", "messages": turns("What is it?", f"thing {i}")} for i in range(n)]


def load(name: str, per_row: int | None = None, **options):
    return load_splits(DataArguments(dataset_name=name, **options), 0, per_row, False, None)


FORMATS = {
    "messages": lambda i: {"image": f"pictures/{i}.png", "messages": turns("What is it?")},
    "images": lambda i: {"images": [f"pictures/{i}.png"], "messages": turns("What is it?")},
    "prompt-completion": lambda i: {"image": f"pictures/{i}.png", "prompt": "What is it?", "completion": "a thing"},
    "parts": lambda i: {
        "image": f"pictures/{i}.png",
        "messages": turns([{"type": "image"}, {"type": "text", "text": "What is it?"}]),
    },
    "llava": lambda i: {
        "image": f"pictures/{i}.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a thing"}],
    },
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_way_to_write_a_row_is_read_the_same(tmp_path: Path, kind: str) -> None:
    splits = load(write(tmp_path, [FORMATS[kind](i) for i in range(6)]))
    assert splits.train.column_names == ["images", "prompt", "completion"]
    rows = [*splits.train, *splits.test]
    assert sorted(row["images"][0].size[0] for row in rows) == list(range(8, 14))
    assert {(question_of(row), answer_of(row), count_marks(row["prompt"])) for row in rows} <= {
        ("What is it?", "a thing", 0),  # the collator puts the image first
        ("What is it?", "a thing", 1),
    }
    assert not any(is_caption(row) for row in rows)


def test_the_same_question_about_two_images_is_no_leak(tmp_path: Path) -> None:
    splits = load(write(tmp_path, good_rows()))
    assert len(splits.train) + len(splits.test) == 6 and not splits.report.counts


def several_questions(n_images: int, n_each: int = 3) -> list[dict]:
    return [
        {"image": f"pictures/{i}.png", "messages": turns(f"Question {q}?", f"{i} {q}")}
        for i in range(n_images)
        for q in range(n_each)
    ]


def widths(rows) -> set[int]:
    """Which of the images of `write` the rows show."""
    return {image.size[0] for row in rows for image in row["images"]}


@pytest.mark.parametrize("kind", ["paths", "copies", "parquet"])
def test_all_questions_about_an_image_are_on_one_side(tmp_path: Path, kind: str) -> None:
    """An image is its content: a copy under another name is the same, and so are equal bytes in a parquet file."""
    rows = several_questions(6)
    name = write(tmp_path, rows)
    if kind == "copies":
        for i, row in enumerate(rows):
            copy = Path(f"pictures/copy{i}.png")
            (tmp_path / copy).write_bytes((tmp_path / row["image"]).read_bytes())
            row["image"] = str(copy)
        name = write(tmp_path, rows)
    if kind == "parquet":
        encoded = [{**row, "image": {"bytes": (tmp_path / row["image"]).read_bytes(), "path": None}} for row in rows]
        features = Features(
            {"image": ImageFeature(), "messages": List({"role": Value("string"), "content": Value("string")})}
        )
        name = str(tmp_path / "mine.parquet")
        Dataset.from_list(encoded, features).to_parquet(name)
    splits = load(name, test_split_size=0.3)
    assert len(splits.train) + len(splits.test) == 18 and len(splits.test) == 3
    assert not widths(splits.train) & widths(splits.test)


def test_rows_that_share_an_image_with_one_of_several_stay_together(tmp_path: Path) -> None:
    """0 and 1 stand in one row, 1 and 2 in another: the three are one group."""
    rows = [
        {"images": [f"pictures/{i}.png" for i in pair], "messages": turns(f"Which, {pair}?")}
        for pair in ((0, 1), (1, 2), (2, 0), (3, 4), (4, 5))
    ]
    for share in (0.2, 0.4, 0.6):
        splits = load(write(tmp_path, rows), test_split_size=share)
        assert widths(splits.test) in ({8, 9, 10}, {11, 12, 13}) and not widths(splits.train) & widths(splits.test)


def test_questions_about_one_image_alone_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"with 1 different prompt\(s\) about images of their own"):
        load(write(tmp_path, several_questions(1)))


def test_an_image_of_a_given_test_split_in_a_training_row_is_a_leak(tmp_path: Path) -> None:
    rows = several_questions(6)
    write(tmp_path, rows)
    (tmp_path / "mine.jsonl").unlink()
    for split, part in (("train", rows[:16]), ("test", rows[16:])):  # one question about the last image is trained on
        lines = "".join(json.dumps({**row, "image": str(tmp_path / row["image"])}) + "\n" for row in part)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    with pytest.raises(BadData, match=r"line 16: .*shows the same image as .*test\.jsonl, .*line 1"):
        load(str(tmp_path))
    splits = load(str(tmp_path), on_bad_rows="drop")
    assert (len(splits.train), len(splits.test)) == (15, 2)


BAD_ROWS = {
    "a mark in an answer": (
        {"messages": turns("What is it?", "a <image>")},
        "line 3: `turn 1` puts an image into an answer",
    ),
    "an image in an answer": (
        {"messages": turns("What is it?", [{"type": "image"}, {"type": "text", "text": "a thing"}])},
        "line 3: `turn 1` puts an image into an answer",
    ),
    "another kind of part": (
        {"messages": turns([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}])},
        "line 3: `turn 0` has a part of type `image_url`",
    ),
    "a part without text": (
        {"messages": turns([{"type": "text"}])},
        "line 3: `turn 0` has a part of type `text` without",
    ),
    "an image within a part": (
        {"messages": turns([{"type": "image", "image": "pictures/2.png"}, {"type": "text", "text": "?"}])},
        "line 3: `turn 0` holds an image itself",
    ),
    "no such file": ({"image": "pictures/9.png"}, r"line 3: `image` there is no file .*9\.png"),
    "no image": ({"image": None}, r"line 3: `images` holds no image"),
    "more marks than images": ({"messages": turns("<image> and <image>?")}, r"name 2 images, but the row has 1"),
    "more parts than images": (
        {"messages": turns([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}])},
        r"name 2 images, but the row has 1",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_told_with_its_place(tmp_path: Path, kind: str) -> None:
    change, reason = BAD_ROWS[kind]
    rows = good_rows()
    rows[2] = {**rows[2], **change}
    with pytest.raises(BadData, match=reason):
        load(write(tmp_path, rows))


def test_truncated_text_and_huge_files_are_told_together(tmp_path: Path) -> None:
    name = write(tmp_path, good_rows())
    (tmp_path / "pictures" / "1.png").write_bytes(png((64, 64))[:50])
    (tmp_path / "pictures" / "3.png").write_text("not an image")
    (tmp_path / "pictures" / "4.png").write_bytes(huge_png())
    with pytest.raises(BadData) as caught:
        load(name)
    told = str(caught.value).split("\n")
    for number, reason in ((2, "cut off"), (4, "not an image"), (5, "scale it down")):
        assert any(f"line {number}: `image`" in line and reason in line for line in told), told
    splits = load(name, on_bad_rows="drop")
    assert len(splits.train) + len(splits.test) == 3 and splits.report.rows_dropped == 3


def test_two_images_are_refused_where_the_model_takes_one(tmp_path: Path) -> None:
    rows = [{"images": [f"pictures/{i}.png", f"pictures/{i + 1}.png"], "messages": turns("Which?")} for i in (0, 2, 4)]
    name = write(tmp_path, rows)
    assert len(load(name).train) == 2
    with pytest.raises(BadData, match="holds 2 images, but this model takes 1"):
        load(name, per_row=1)


def test_data_without_an_image_column_are_refused_once_and_for_all(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has no column `image` or `images`: add one, or map it with --columns"
    ) as caught:
        load(write(tmp_path, [{"picture": f"pictures/{i}.png", "messages": turns(f"What? {i}")} for i in range(4)]))
    assert not isinstance(caught.value, BadData) and "\n" not in str(caught.value)


def test_parts_of_a_table_are_read_as_those_of_a_text_file(tmp_path: Path) -> None:
    """A table gives every part the fields of all: an image has a `text`, and a text an `image`, that hold nothing."""
    from datasets import Dataset

    parts = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "What is it?", "image": None}]
    answer = [{"type": "text", "text": "a thing", "image": None}]
    write(tmp_path, [])
    rows = [{"image": str(tmp_path / f"pictures/{i}.png"), "messages": turns(parts, answer)} for i in range(4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    row = load(str(tmp_path / "mine.parquet")).train[0]
    content = prepare_multimodal_messages(row["prompt"], images=row["images"])[0]["content"]
    assert [part["type"] for part in content] == ["image", "text"] and content[0]["image"] is row["images"][0]
