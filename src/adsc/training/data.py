"""Training data: conversations about images, out of files in the field's usual shapes or out of the model in the box.

What is read is a map from numbers to rows, not a stream of them: only offsets into the files stay in memory, a row and
its images are opened when a batch needs them. Trainers then shuffle, shard and resume by number. A run that goes on
after a kill skips the numbers it has seen, where a stream would have to open every image again, and gets the rows that
it would have got.
"""

from __future__ import annotations

import base64
import binascii
import glob
import io
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import datasets
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

PLACEHOLDER = "<image>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PARTS = ("image", "image_url", "url", "path", "base64", "bytes")  # keys under which a part may carry its image
SHAPES = "a .jsonl, .json or .parquet file, a glob of such, or a folder written by save_to_disk"
POLICIES = ("skip", "fail")
SHOWN = 10  # bad rows that are logged one by one
# Scenes from here on were not drawn for the training of the shipped model.
FRESH_SCENES = 30_000_000

Row = dict[str, Any]
"""``messages``, each with a role and a list of parts of text and ``{"type": "image"}``; ``images``, RGB, in order."""

log = logging.getLogger(__name__)


class _Bad(Exception):
    """Why a row cannot be used: the kind, by which bad rows are counted, and the particular."""

    def __init__(self, kind: str, particular: str) -> None:
        super().__init__(f"{kind} ({particular})")
        self.kind = kind


@dataclass(frozen=True)
class BadRow:
    """A row that was left out.

    Attributes
    ----------
    file
        Path of the file or folder.
    row
        Its line, or its number in the file, from 1.
    kind
        What bad rows are counted by: ``"broken image"``.
    reason
        The kind and the particular.
    """

    file: str
    row: int
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


@dataclass
class Report:
    """The bad rows met so far, and what to do with one: ``"skip"`` or ``"fail"``.

    Rows that turn out bad only when their pixels are read in another process are logged there and not counted here.
    """

    policy: str = "skip"
    bad: list[BadRow] = field(default_factory=list)
    good: int = 0
    _known: set[BadRow] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"bad_rows {self.policy!r} is unknown; choose {' or '.join(POLICIES)}")

    def add(self, file: str, row: int, bad: _Bad) -> None:
        """Note a bad row."""
        found = BadRow(file, row, bad.kind, str(bad))
        if self.policy == "fail":
            raise InputError(f"{found}; mend the row, or leave such rows out with bad_rows: skip")
        if found in self._known:
            return
        self._known.add(found)
        self.bad.append(found)
        if len(self.bad) <= SHOWN:
            log.warning("left out: %s", found)

    def summary(self) -> str:
        """One line: how many rows are used, and how many of each kind are not."""
        if not self.bad:
            return f"{self.good:,} rows, none bad"
        kinds = Counter(bad.kind for bad in self.bad)
        shares = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common())
        return f"{self.good:,} rows, {len(self.bad):,} bad left out ({shares}; first: {self.bad[0]})"


# Files


class _File(ABC):
    """Rows of one file, by number from 0."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def scan(self) -> Iterator[Any]:
        """All rows in order; a ``_Bad`` for one that cannot be read. To be run through once before any is got."""

    @abstractmethod
    def __getitem__(self, row: int) -> Any: ...


class _Json(_File):
    """JSON objects, one a line or in one array: offset and length of each are kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places: Any = np.zeros((0, 2), dtype=np.int64)

    def __getitem__(self, row: int) -> Any:
        offset, length = self._places[row].tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.read(length))

    def scan(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        places: list[tuple[int, int]] = []
        for offset, length, value in self._array() if head.startswith(b"[") else self._lines():
            places.append((offset, length))
            yield value
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def _lines(self) -> Iterator[tuple[int, int, Any]]:
        offset, blank = 0, list[tuple[int, int, Any]]()
        with self.path.open("rb") as file:
            for line in file:
                skipped = 3 if offset == 0 and line.startswith(b"\xef\xbb\xbf") else 0
                place = offset + skipped, len(line) - skipped
                offset += len(line)
                if not line[skipped:].strip():
                    blank.append((*place, _Bad("empty", "a blank line")))
                    continue
                yield from blank  # those at the end of a file are no rows
                blank.clear()
                try:
                    yield *place, json.loads(line[skipped:])
                except ValueError as error:
                    yield *place, _Bad("not JSON", str(error))

    def _array(self) -> Iterator[tuple[int, int, Any]]:
        decoder, number, amount = json.JSONDecoder(), 0, 1 << 20
        offset = 3 if self.path.open("rb").read(3) == b"\xef\xbb\xbf" else 0
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            text, at = file.read(amount), 0
            while True:
                start = at
                while at < len(text) and text[at] in " \t\r\n,[" and (text[at] != "[" or number == 0):
                    at += 1
                offset += at - start
                if text[at : at + 1] == "]":
                    return
                try:
                    value, end = decoder.raw_decode(text, at)
                except ValueError as error:  # the text may only be too short yet
                    reason: Exception = error
                    try:
                        more = file.read(amount)
                    except UnicodeDecodeError as undecodable:
                        reason, more = undecodable, ""
                    if not more:
                        raise InputError(
                            f"{self.path}, row {number + 1}: not JSON ({reason}); nothing after it can be read, "
                            "mend the file"
                        ) from None
                    text, at = text[at:] + more, 0
                    amount *= 2
                    continue
                length, amount = len(text[at:end].encode()), 1 << 20
                yield offset, length, value
                number, at, offset = number + 1, end, offset + length


class _Table(_File):
    """Parquet, or a datasets folder: Arrow, mapped into memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            read = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_parquet
            table = read(str(path))
        except Exception as error:  # whatever pyarrow and datasets make of a broken file
            raise InputError(f"{path} cannot be read ({str(error).splitlines()[0]}); give {SHAPES}") from None
        if isinstance(table, datasets.DatasetDict):
            raise InputError(
                f"{path} holds several splits; name one of them: {', '.join(str(path / s) for s in table)}"
            )
        self._table = table.with_format("arrow")  # images stay encoded

    def scan(self) -> Iterator[Any]:
        for start in range(0, len(self._table), 32):
            yield from self._table[start : start + 32].to_pylist()

    def __getitem__(self, row: int) -> Any:
        return self._table[row : row + 1].to_pylist()[0]


def _open(path: Path) -> _File:
    if path.suffix in (".jsonl", ".ndjson", ".json") and path.is_file():
        return _Json(path)
    if (path.suffix == ".parquet" and path.is_file()) or path.is_dir():
        return _Table(path)
    raise InputError(f"{path} {'is of no known kind' if path.exists() else 'does not exist'}; give {SHAPES}")


# One row


def _conversation(row: Any, reserved: Sequence[str]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in one form, and what their images are given as."""
    if not isinstance(row, Mapping):
        raise _Bad("not a row", f"{type(row).__name__} where an object is expected")
    turns = row.get("messages") or row.get("conversations")
    if not turns:
        raise _Bad("empty", "neither messages nor conversations")
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise _Bad("not a conversation", "messages must be a list of objects")
    messages = [_message(turn, reserved) for turn in turns]
    _check_roles([message["role"] for message in messages])
    given = row.get("images") if row.get("images") is not None else row.get("image")
    images = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if not parts:  # nothing says where they go: before the first question
        parts = [{"type": "image"} for _ in images]
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [*parts, *first["content"]]
    inside = [part.pop("given", None) for part in parts]
    if (free := inside.count(None)) != len(images):
        raise _Bad("images do not match", f"{free} {PLACEHOLDER} for {len(images)} images")
    rest = iter(images)
    for message in messages:
        if not any(part["type"] == "image" or part["text"].strip() for part in message["content"]):
            raise _Bad("no answer" if message["role"] == "assistant" else "empty", f"a {message['role']} says nothing")
    return messages, [next(rest) if image is None else image for image in inside]


def _message(turn: Mapping[str, Any], reserved: Sequence[str]) -> dict[str, Any]:
    role = turn.get("role") or turn.get("from")
    if role not in ROLES:
        raise _Bad("wrong roles", f"{role!r} is none of {', '.join(ROLES)}")
    said = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if said is None:
        said = []
    parts: list[dict[str, Any]] = []
    for part in [said] if isinstance(said, str) else said:
        parts += _parts(part)
    if ROLES[role] != "user" and any(part["type"] == "image" for part in parts):
        raise _Bad("images do not match", f"an image where {role} speaks")
    if ROLES[role] != "user":  # chat templates read the first part alone
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    for text in (part["text"] for part in parts if part["type"] == "text"):
        if word := next((word for word in reserved if word in text), None):
            raise _Bad("reserved word", f"{word} in a text: the model would take it for a vision token")
    return {"role": ROLES[role], "content": parts}


def _parts(part: Any) -> list[dict[str, Any]]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        key = next((key for key in PARTS if part.get(key) is not None), None)
        given = f"data:;base64,{part[key]}" if key == "base64" else None if key is None else part[key]
        if isinstance(given, Mapping) and "url" in given:
            given = given["url"]
        return [{"type": "image", "given": given}]
    if kind != "text" or not isinstance(part.get("text"), str):
        raise _Bad("not a conversation", f"content of type {kind!r}; text and images are read")
    pieces = part["text"].split(PLACEHOLDER)
    if len(pieces) == 1:
        return [{"type": "text", "text": pieces[0]}]
    found: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):  # line ends around an image are the chat template's business
        found += [{"type": "image"}] if number else []
        piece = (piece.lstrip() if number else piece).rstrip() if number < len(pieces) - 1 else piece.lstrip()
        found += [{"type": "text", "text": piece}] if piece else []
    return found


def _check_roles(roles: list[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[-1] != "assistant":
        raise _Bad("no answer", "the conversation ends without one")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise _Bad("wrong roles", f"{' '.join(roles)}; user and assistant must take turns")


def _source(given: Any, folder: Path, remote: bool) -> Any:
    """A path, an address, or encoded bytes."""
    if isinstance(given, Mapping):
        given = given.get("bytes") if given.get("bytes") is not None else given.get("path")
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str) or not given:
        raise _Bad("broken image", f"{type(given).__name__} where a path, bytes or a data URL is expected")
    if given.startswith("data:"):
        try:
            return base64.b64decode(given.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise _Bad("broken image", f"a data URL that is not base64: {error}") from None
    if given.startswith(("http://", "https://")):
        if not remote:
            raise InputError(f"the image {given} is remote; download it first, or allow it with remote_images: true")
        return given
    return folder / given.removeprefix("file://")


def _image(source: Any, whole: bool = True) -> Image.Image:
    """Open an image, RGB and upright; not ``whole``: look at its head alone."""
    try:
        file: Any = urlopen(source, timeout=30) if isinstance(source, str) else nullcontext(source)
        with file as opened:
            read = opened.read() if isinstance(source, str) else opened
        with Image.open(io.BytesIO(read) if isinstance(read, bytes) else read) as image:
            return ImageOps.exif_transpose(image).convert("RGB") if whole else image
    except FileNotFoundError:
        raise _Bad("image file missing", str(source)) from None
    except Exception as error:  # decoders raise whatever broken bytes lead them to, struct.error among others
        name = f"{source}: " if isinstance(source, (str, Path)) and str(source) not in str(error) else ""
        raise _Bad("broken image", f"{name}{str(error) or type(error).__name__}") from None


# All rows


class Conversations(Sequence[Row]):
    """The good rows of some files, by number.

    Every row is looked at once in the beginning: its conversation, and the head of its images. An image that shows
    only later that it is broken has its row replaced by the next good one, the same in every run.

    Parameters
    ----------
    paths
        JSON lines, JSON arrays (LLaVA's instruction files), parquet, or folders written by ``save_to_disk``; each a
        path or a glob.
    images
        Folder that the images' paths start from; by default that of the file.
    bad_rows
        ``"skip"`` or ``"fail"``.
    remote_images
        Fetch images from the net.
    reserved
        What no text may hold: the model's own placeholders.

    Raises
    ------
    InputError
        When nothing good is found in a file; when a row is bad and ``bad_rows`` is ``"fail"``; when an image is remote.
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        images: str | Path | None = None,
        bad_rows: str = "skip",
        remote_images: bool = False,
        reserved: Sequence[str] = (),
    ) -> None:
        self.report = Report(bad_rows)
        self._images, self._remote = None if images is None else Path(images), remote_images
        self._reserved = tuple({PLACEHOLDER, *reserved})
        self._files = [_open(path) for path in _found([paths] if isinstance(paths, (str, Path)) else paths)]
        self._rows = np.concatenate([self._scanned(number) for number in range(len(self._files))])
        self.report.good = len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        for at in range(index, index + len(self)):
            number, row = self._rows[at % len(self)].tolist()
            file = self._files[number]
            try:
                messages, images = _conversation(file[row], self._reserved)
                return {"messages": messages, "images": [_image(self._source(file, given)) for given in images]}
            except _Bad as bad:
                self.report.add(str(file.path), row + 1, bad)
        raise InputError(f"no row of {len(self):,} has images that can be read; first: {self.report.bad[0]}")

    def _source(self, file: _File, given: Any) -> Any:
        inside = file.path if file.path.is_dir() else file.path.parent
        return _source(given, self._images or inside, self._remote)

    def _scanned(self, number: int) -> Any:
        file, good, before, checked = self._files[number], list[int](), len(self.report.bad), set[Path]()
        for row, value in enumerate(file.scan()):
            try:
                if isinstance(value, _Bad):
                    raise value
                for given in _conversation(value, self._reserved)[1]:
                    source = self._source(file, given)
                    if isinstance(source, str) or (isinstance(source, Path) and source in checked):
                        continue
                    _image(source, whole=False)
                    if isinstance(source, Path):
                        checked.add(source)
                good.append(row)
            except _Bad as bad:
                self.report.add(str(file.path), row + 1, bad)
            except InputError as error:
                raise InputError(f"{file.path}, row {row + 1}: {error}") from None
        if not good:
            left = self.report.bad[before:]
            found = f"{len(left):,} bad; first: {left[0]}" if left else "it is empty"
            raise InputError(f"{file.path} has no row to train on ({found})")
        return np.stack([np.full(len(good), number), np.array(good)], axis=1)


def _found(paths: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        matches = [str(path)] if Path(path).exists() else sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"{path} does not exist; give {SHAPES}")
        found += map(Path, matches)
    if not found:
        raise InputError(f"no data is named; give {SHAPES}")
    return found


class PocketQuestions(Sequence[Row]):
    """Questions of the model in the box's own splits.

    A row of ``train`` is a scene of its own, drawn from its number. One question a row, since the model answers one
    question a prompt and is measured so; more ``turns`` make a conversation, in which a question also sees those before
    it and their answers. ``validation`` has the balanced questions of 500 scenes.

    Parameters
    ----------
    split
        ``"train"`` or ``"validation"``.
    rows
        How many; by default 100,000, or all of the validation split. Fewer of it are spread over its scenes.
    turns
        Questions a row.
    tasks
        What is asked in ``train``, by default all tasks evenly; one named twice is asked twice as often.
    """

    def __init__(self, split: str, rows: int | None = None, turns: int = 1, tasks: Sequence[str] | None = None) -> None:
        from ..pocket.questions import TASKS
        from ..pocket.splits import load

        if split not in ("train", "validation"):
            raise InputError(f"pocket has no split {split!r} to train with; choose train or validation")
        if (rows is not None and rows < 1) or turns < 1:
            raise InputError(f"pocket rows ({rows}) and turns ({turns}) must be at least 1")
        if split == "validation" and turns > 1:
            raise InputError("pocket: validation asks one question a prompt, as the model is measured; leave turns out")
        if unknown := [task for task in tasks or () if task not in TASKS]:
            raise InputError(f"pocket has no task {unknown[0]!r}; its tasks are {', '.join(TASKS)}")
        if split == "validation" and tasks is not None:
            raise InputError("pocket: the questions of validation are stored; leave tasks out")
        self.turns, self.tasks, self.report = turns, tuple(TASKS if tasks is None else tasks), Report()
        self._stored = [(i, q) for i, asked in load("validation") for q in asked] if split == "validation" else None
        most = len(self._stored) if self._stored is not None else 100_000 if rows is None else rows
        self.report.good = self._rows = most if rows is None else min(rows, most)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Any:
        from ..pocket.questions import questions
        from ..pocket.scenes import SPLIT_SEEDS, render, scene

        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._stored is not None:
            image, question = self._stored[index * len(self._stored) // len(self)]
            asked = [question]
        else:
            drawn = scene(SPLIT_SEEDS["train"] + FRESH_SCENES + index)
            image, asked = render(drawn), questions(drawn, self.turns, tasks=self.tasks)
        messages: list[dict[str, Any]] = []
        for question in asked:
            before = [] if messages else [{"type": "image"}]
            messages.append({"role": "user", "content": [*before, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        return {"messages": messages, "images": [image]}


Rows = Conversations | PocketQuestions


def open_rows(given: str | Path | Iterable[str | Path] | Mapping[str, Any], **options: Any) -> Rows:
    """What a recipe names as data: paths and globs, or ``{"pocket": "train"}`` with ``rows``, ``turns`` and ``tasks``.

    Options are those of :class:`Conversations`.
    """
    if not isinstance(given, Mapping):
        return Conversations(given, **options)
    unknown = sorted(given.keys() - {"pocket", "rows", "turns", "tasks"})
    if unknown or "pocket" not in given:
        raise InputError(
            f"data {dict(given)} is not understood; give paths, or pocket: train (with rows, turns, tasks)"
        )
    return PocketQuestions(given["pocket"], given.get("rows"), given.get("turns", 1), given.get("tasks"))


def as_dataset(rows: Rows) -> datasets.Dataset:
    """The rows as TRL's trainers want them: a ``datasets.Dataset``, here of numbers, that makes rows as it is read."""

    def read(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        found = [rows[number] for number in batch["messages"]]
        return {name: [row[name] for row in found] for name in ("messages", "images")}

    # The numbers stand in a column that the trainer knows, so that it does not remove them as unused.
    table = datasets.Dataset.from_dict({"messages": np.arange(len(rows))})
    return table.with_transform(read)
