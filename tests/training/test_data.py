from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import re
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate import skip_first_batches
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from adsc.errors import InputError
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.splits import load
from adsc.training.collating import Collator
from adsc.training.data import Conversations, PocketQuestions, as_dataset, open_rows

# TRL sets the older of two names by itself.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

COLORS = ("red", "lime", "blue")
PART = {"type": "image"}


def say(text: str) -> dict:
    return {"type": "text", "text": text}


def encoded(color: str, size=(6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for color in COLORS:
        (tmp_path / "images" / f"{color}.png").write_bytes(encoded(color))
    return tmp_path


def asked(*colors: str, roles=("user", "assistant"), answer="a fine color") -> list[dict]:
    images = "".join("<image>\n" for _ in colors)
    return [{"role": roles[0], "content": f"{images}what is it?"}, {"role": roles[1], "content": answer}]


def row(*colors: str, **options) -> dict:
    return {"messages": asked(*colors, **options), "images": [f"images/{color}.png" for color in colors]}


def colors(found: dict) -> list[tuple[int, ...]]:
    return [np.array(image)[0, 0].tolist() for image in found["images"]]


def lines(path: Path, *given: object) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in given))
    return path


RGB = {"red": [255, 0, 0], "lime": [0, 255, 0], "blue": [0, 0, 255]}


def write(shape: str, folder: Path) -> Path:
    """The same three rows in a shape: one image, two, none."""
    given = [row("red"), row("lime", "blue"), row()]
    if shape == "jsonl":
        return lines(folder / "rows.jsonl", *given)
    if shape == "json":
        (folder / "rows.json").write_text(json.dumps(given, indent=2))
        return folder / "rows.json"
    if shape == "llava":
        talks = [
            {
                "id": str(number),
                "conversations": [
                    {"from": "human", "value": each["messages"][0]["content"]},
                    {"from": "gpt", "value": each["messages"][1]["content"]},
                ],
            }
            | ({"image": each["images"][0] if len(each["images"]) == 1 else each["images"]} if each["images"] else {})
            for number, each in enumerate(given)
        ]
        (folder / "llava.json").write_text("\ufeff" + json.dumps(talks))
        return folder / "llava.json"
    if shape == "data_urls":
        for each in given:
            parts = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(path)}"}}
                for path in each.pop("images")
            ]
            each["messages"][0]["content"] = [*parts, say("what is it?")]
        return lines(folder / "urls.jsonl", *given)
    if shape == "inside":
        for each in given:
            parts = [PART | {"path": path} for path in each.pop("images")]
            each["messages"][0]["content"] = [*parts, say("what is it?")]
        return lines(folder / "inside.jsonl", *given)
    table = {
        "messages": [each["messages"] for each in given],
        "images": [[(folder / path).read_bytes() for path in each["images"]] for each in given],
    }
    if shape == "parquet_paths":
        table["images"] = [each["images"] for each in given]
    made = datasets.Dataset.from_dict(table)
    if shape == "parquet_images":
        made = made.cast_column("images", datasets.List(datasets.Image()))
    if shape == "folder":
        pictures = [[Image.open(folder / path) for path in each["images"]] for each in given]
        features = datasets.Features(
            {
                "messages": datasets.List(
                    {
                        "role": datasets.Value("string"),
                        "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                    }
                ),
                "images": datasets.List(datasets.Image()),
            }
        )
        for each in table["messages"]:  # parts, of which those of images have a text of None
            texts = each[0]["content"].split("<image>\n")
            each[0]["content"] = [*[PART] * (len(texts) - 1), say(texts[-1])]
            each[1]["content"] = [say(each[1]["content"])]
        datasets.Dataset.from_dict(table | {"images": pictures}, features).save_to_disk(folder / "saved")
        return folder / "saved"
    made.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def coded(path: str) -> str:
    return base64.b64encode(encoded(Path(path).stem)).decode()


SHAPES = ["jsonl", "json", "llava", "data_urls", "inside", "parquet", "parquet_paths", "parquet_images", "folder"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_rows(shape, folder):
    rows = Conversations(write(shape, folder), bad_rows="fail")
    assert len(rows) == 3
    for found, given in zip(rows, (("red",), ("lime", "blue"), ()), strict=True):
        content = [*[PART] * len(given), say("what is it?")]
        assert found["messages"] == [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [say("a fine color")]},
        ]
        assert colors(found) == [RGB[color] for color in given]
        assert all(image.mode == "RGB" and image.size == (6, 4) for image in found["images"])
    assert rows.report.summary() == "3 rows, none bad"


def test_images_stand_where_the_conversation_says(folder):
    talk = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "is <image> as\n<image>?"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "why"},
        {"from": "gpt", "value": "look"},
    ]
    path = lines(
        folder / "rows.jsonl",
        {"conversations": talk, "image": ["images/red.png", "images/blue.png"]},
        {"messages": asked(), "images": ["images/red.png"]},  # nothing says where: before the question
        {"messages": [{"role": "user", "content": [PART, say("x"), PART | {"image": "images/lime.png"}]}, asked()[1]],
         "images": ["images/red.png"]},
    )  # fmt: skip
    first, second, third = Conversations(path, bad_rows="fail")
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert first["messages"][1]["content"] == [say("is"), PART, say("as"), PART, say("?")]
    assert second["messages"][0]["content"] == [PART, say("what is it?")]
    assert third["messages"][0]["content"] == [PART, say("x"), PART]
    assert [colors(each) for each in (first, second, third)] == [
        [RGB["red"], RGB["blue"]],
        [RGB["red"]],
        [RGB["red"], RGB["lime"]],
    ]


BAD = {
    "not JSON": '{"messages": [',
    "empty": "{}",
    "not a row": "[1, 2]",
    "not a conversation": {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
    "image file missing": {"messages": asked("x"), "images": ["images/none.png"]},
    "broken image": {"messages": asked("x"), "images": ["images/broken.png"]},
    "broken image, cut": {"messages": asked("x"), "images": ["data:image/png;base64," + coded("red.png")[:20]]},
    "broken image, no base64": {"messages": asked("x"), "images": ["data:image/png;base64,?"]},
    "broken image, no name": {"messages": asked("x"), "images": [None]},
    "no answer": {"messages": asked()[:1], "images": []},
    "no answer, blank": {"messages": asked(answer=" \n"), "images": []},
    "wrong roles": {"messages": asked(roles=("assistant", "assistant")), "images": []},
    "wrong roles, unknown": {"messages": asked(roles=("tool", "assistant")), "images": []},
    "images do not match": {"messages": asked("red", "red"), "images": ["images/red.png"]},
    "images do not match, none": {"messages": asked("red")},
    "images do not match, answered": {"messages": asked(answer="<image>"), "images": ["images/red.png"]},
    "reserved word": {"messages": asked(answer="<|image_pad|>"), "images": []},
    "empty, blank line": "",
    "empty, no question": {"messages": [{"role": "user", "content": ""}, asked()[1]]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_left_out_or_fatal(name, folder, caplog):
    (folder / "images" / "broken.png").write_bytes(b"<html>not found</html>")
    path = lines(folder / "rows.jsonl", row("red"), BAD[name], row("blue"))
    with caplog.at_level(logging.WARNING):
        rows = Conversations(path, reserved=["<|image_pad|>"])
    assert [colors(each) for each in rows] == [[RGB["red"]], [RGB["blue"]]]
    kind = name.split(", ")[0]
    (bad,) = rows.report.bad
    assert (bad.file, bad.row, bad.kind) == (str(path), 2, kind)
    assert f"{path}, row 2: {kind} (" in caplog.text
    assert rows.report.summary().startswith(f"2 rows, 1 bad left out ({kind}: 1; first: {path}, row 2: ")
    with pytest.raises(InputError, match=f"{re.escape(str(path))}, row 2: {kind} .*bad_rows: skip") as caught:
        Conversations(path, reserved=["<|image_pad|>"], bad_rows="fail")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"rows.jsonl has no row to train on \(.* bad; first: .*, row 1: "):
        Conversations(lines(path, BAD[name], BAD[name], {}), reserved=["<|image_pad|>"])


def test_an_image_that_ends_early_has_its_row_replaced(folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "images" / "cut.png")
    whole = (folder / "images" / "cut.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    path = lines(folder / "rows.jsonl", row("red"), row("cut"), row("cut"), row("blue"))
    rows = Conversations(path)
    assert len(rows) == 4  # its head is fine
    assert not rows.report.bad
    assert [colors(rows[i])[0] for i in (1, 0, 3, 1)] == [RGB["blue"], RGB["red"], RGB["blue"], RGB["blue"]]
    assert [bad.row for bad in rows.report.bad] == [2, 3]
    with pytest.raises(InputError, match="row 2: broken image"):
        Conversations(path, bad_rows="fail")[1]
    rows = Conversations(lines(path, row("cut")))
    with pytest.raises(InputError, match=r"no row of 1 has images that can be read; first: .*row 1: broken image"):
        rows[0]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_broken_bytes_are_a_bad_row(folder, monkeypatch):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    images = [encoded("red")]
    for shape in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        file = io.BytesIO()
        noise.save(file, shape)
        for _ in range(60):
            damaged = bytearray(file.getvalue())
            for place in rng.integers(0, len(damaged), 20):
                damaged[place] = rng.integers(256)
            images.append(bytes(damaged[: rng.integers(len(damaged))]))
    table = {"messages": [asked("x")] * len(images), "images": [[image] for image in images]}
    datasets.Dataset.from_dict(table).to_parquet(folder / "rows.parquet")
    rows = Conversations(folder / "rows.parquet")
    found = [each["images"][0].size for each in rows]
    assert {bad.kind for bad in rows.report.bad} == {"broken image"}
    assert len(rows.report.bad) > 150
    assert found[0] == (6, 4)

    def surprised(*given):
        raise struct.error("required argument is not an integer")  # as for some damaged EXIF

    path = lines(folder / "rows.jsonl", row("red"), row("lime"))
    monkeypatch.setattr(ImageOps, "exif_transpose", surprised)
    with pytest.raises(InputError, match=r"broken image .*red.png: required argument is not an integer"):
        Conversations(path)[0]


def test_remote_images_are_fetched_when_asked(folder):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=folder)

        def log_message(self, *given):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/images"
        given = [{"messages": asked("x"), "images": [f"{address}/{name}.png"]} for name in ("none", "lime")]
        rows = Conversations(lines(folder / "rows.jsonl", *given), remote_images=True)
        assert [colors(each)[0] for each in rows] == [RGB["lime"], RGB["lime"]]
        server.shutdown()
    (bad,) = rows.report.bad
    assert re.fullmatch(r"broken image \(http://127.*/none.png: HTTP Error 404.*\)", bad.reason)


def test_remote_images_only_when_asked(folder):
    path = lines(folder / "rows.jsonl", row("red"), {"messages": asked("x"), "images": ["https://host.invalid/a.png"]})
    with pytest.raises(InputError, match=r"rows.jsonl, row 2: the image https://host.invalid/a.png is remote; .*"):
        Conversations(path)
    assert len(Conversations(path, remote_images=True)) == 2


def test_a_long_array_of_rows(folder):
    """Longer than what is read at once, letters of two to four bytes, brackets and quotes inside."""
    given = [row("red", answer=f'{i} é 你 🙂 ]}}[{{ " \\ ' * (i % 50 + 1)) for i in range(4000)]
    path = folder / "rows.json"
    path.write_text(json.dumps(given, ensure_ascii=False, indent=1))
    assert path.stat().st_size > 3 << 20
    rows = Conversations(path, bad_rows="fail")
    assert len(rows) == 4000
    for i in (0, 1, 1999, 3999):
        assert rows[i]["messages"][1]["content"] == [say(given[i]["messages"][1]["content"])]
    path.write_text(json.dumps(given[:3])[:-40])
    with pytest.raises(InputError, match=r"rows.json, row 3: not JSON .*; nothing after it can be read"):
        Conversations(path)


def test_several_files_and_globs(folder):
    (folder / "one").mkdir()
    lines(folder / "one" / "a.jsonl", row("red"))
    lines(folder / "one" / "b.jsonl", row("lime"), {}, row("blue"))
    rows = open_rows([str(folder / "one" / "*.jsonl"), folder / "one" / "a.jsonl"], images=folder)
    assert [colors(each)[0] for each in rows] == [RGB[c] for c in ("red", "lime", "blue", "red")]
    assert [(Path(bad.file).name, bad.row) for bad in rows.report.bad] == [("b.jsonl", 2)]
    again = pickle.loads(pickle.dumps(rows))  # as worker processes get it
    assert colors(again[2]) == [RGB["blue"]]


def test_files_that_cannot_be_read(folder):
    (folder / "rows.txt").write_text("x")
    (folder / "rows.parquet").write_text("x")
    (folder / "none.jsonl").write_text("")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(folder / "splits")
    for name, message in {
        "rows.txt": "is of no known kind; give a .jsonl",
        "missing.jsonl": "does not exist; give a .jsonl",
        "*.nothing": "does not exist; give a .jsonl",
        "rows.parquet": "cannot be read",
        "images": "cannot be read",
        "none.jsonl": r"has no row to train on \(it is empty\)",
        "splits": "holds several splits; name one of them: .*/splits/train",
    }.items():
        with pytest.raises(InputError, match=message):
            Conversations(folder / name)
    with pytest.raises(InputError, match="no data is named"):
        Conversations([])
    with pytest.raises(InputError, match="bad_rows 'ignore' is unknown; choose skip or fail"):
        Conversations(folder / "rows.txt", bad_rows="ignore")


def test_pocket_rows_are_functions_of_their_numbers():
    one, other = open_rows({"pocket": "train", "rows": 50}), PocketQuestions("train")
    assert (len(one), len(other)) == (50, 100_000)
    assert one[7]["messages"] == other[7]["messages"]
    assert np.array_equal(one[7]["images"][0], other[7]["images"][0])
    assert not np.array_equal(one[7]["images"][0], one[8]["images"][0])
    assert [message["role"] for message in one[7]["messages"]] == ["user", "assistant"]
    assert len({each["messages"][1]["content"][0]["text"] for each in one}) > 10
    three = PocketQuestions("train", 50, turns=3)[7]["messages"]
    assert three[:2] == one[7]["messages"]
    assert [part["type"] for message in three for part in message["content"]] == ["image", *["text"] * 6]
    named = PocketQuestions("train", 50, turns=4, tasks=["reading", "grounding", "grounding"])
    asked = [message["content"][-1]["text"] for row in named for message in row["messages"][::2]]
    where = sum(text.startswith("where is the") for text in asked)
    assert 180 < len(asked) <= 200  # some scenes have too few things to ask about
    assert where + sum("printed" in text for text in asked) == len(asked)
    assert where > 100  # a scene has two things to read


def test_pocket_validation_is_the_balanced_split():
    rows = PocketQuestions("validation")
    expected = [(image, question) for image, asked in load("validation") for question in asked]
    assert len(rows) == len(expected)
    for i in (0, 17, len(rows) - 1):
        image, question = expected[i]
        assert np.array_equal(rows[i]["images"][0], image)
        assert [m["content"][-1]["text"] for m in rows[i]["messages"]] == [question.text, question.answer]
    few = PocketQuestions("validation", 40)
    assert len(few) == 40
    assert len({each["images"][0].tobytes() for each in few}) >= 35


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pocket": "test"}, "no split 'test' to train with"),
        ({"pocket": "train", "rows": 0}, "must be at least 1"),
        ({"pocket": "train", "images": 3}, "is not understood; give paths, or pocket: train"),
        ({"pocket": "validation", "turns": 2}, "one question a prompt"),
        ({"pocket": "validation", "tasks": ["reading"]}, "are stored; leave tasks out"),
        ({"pocket": "train", "tasks": ["singing"]}, "no task 'singing'; its tasks are existence, "),
    ],
)
def test_bad_pocket(given, message):
    with pytest.raises(InputError, match=message):
        open_rows(given)


def trainer(folder: Path, rows, **arguments) -> SFTTrainer:
    processor = transformers.AutoProcessor.from_pretrained(MODEL_FOLDER)
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER)
    settings = {"per_device_train_batch_size": 2, "max_length": None, "report_to": "none", "use_cpu": True} | arguments
    return SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **settings),
        Collator(processor, config=model.config),
        as_dataset(rows),
        processing_class=processor,
    )


class Counted(PocketQuestions):
    """Counts the rows that are opened."""

    opened: list[int]

    def __getitem__(self, index):
        self.opened.append(index)
        return super().__getitem__(index)


def test_batches_of_the_trainer_are_shuffled_alike_and_skipped_unopened(tmp_path):
    rows = Counted("train", 12)
    rows.opened = []
    whole, again = ([b["input_ids"] for b in trainer(tmp_path, rows).get_train_dataloader()] for _ in range(2))
    assert len(whole) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    data = trainer(tmp_path, rows).get_train_dataloader()
    rows.opened.clear()
    rest = [batch["input_ids"] for batch in skip_first_batches(data, 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert len(rows.opened) == 4
    assert rows.opened != sorted(rows.opened)


def test_trl_trains_on_it(tmp_path):
    made = trainer(tmp_path, PocketQuestions("train", 2), max_steps=1, logging_steps=1, bf16=False, learning_rate=0.0)
    processor, model = made.processing_class, made.model
    model.eval()
    batch = Collator(processor, config=model.config)([PocketQuestions("train", 2)[i] for i in range(2)])
    with torch.no_grad():
        expected = float(model(**batch).loss)
    made.train()
    assert abs(made.state.log_history[0]["loss"] - expected) <= 1e-4  # rounded in the log
    assert expected > 0


def test_trl_refuses_to_pack_it(tmp_path):
    for name in ("packing", "padding_free"):
        with pytest.raises(ValueError, match=r"(?i)(packing|padding-free).* not supported"):
            trainer(tmp_path, PocketQuestions("train", 2), **{name: True, "max_length": 512})


def test_worker_processes(folder):
    rows = as_dataset(Conversations(lines(folder / "rows.jsonl", row("red"), {}, row("blue"))))
    found = [each for batch in DataLoader(rows, num_workers=2, collate_fn=list) for each in batch]
    assert [colors(each)[0] for each in found] == [RGB["red"], RGB["blue"]]
