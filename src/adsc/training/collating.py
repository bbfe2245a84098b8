"""Batches for training, and which of their tokens are learned: by default those of the answers alone.

Vision tokens, and all else that the processor puts where an image goes, never carry labels. So the loss is the same
where the engine sees the labels and where a trainer keeps them from the model, as TRL's fused head does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..errors import InputError
from ..hf.families import family_of

IGNORED = -100  # label that losses ignore
OURS = ("input_ids", "attention_mask", "labels")
Span = tuple[int, int]


@dataclass
class Collator(DataCollatorForVisionLanguageModeling):
    """TRL's collator of ``messages`` and ``images``, with labels where something is to be learned.

    The prompt is what ``apply_chat_template`` makes of it at inference, with the tokenizer's begin-of-sequence token
    where it adds one. Where the template does not end an answer with a special token, the conversation's last answer
    gets the end-of-sequence token: the model is to learn to stop.

    Parameters
    ----------
    processor
        The model's processor, with a chat template and a fast tokenizer.
    config
        The model's config, which names its vision tokens.
    answers_only
        Labels for what the assistant says, with the token that ends it; if not, for all text.
    keeps_last_token
        Whether the method that reduces the model keeps the last token of each image, which predicts what stands behind
        it (``method.keeps_last_token``).
    independent_turns
        Every question of a conversation whose images all come first is asked as if alone: it sees the images, itself
        and its answer, and stands at the positions that it has alone. All of them share one row, so that its images are
        computed once. Batches then have ``position_ids`` and ``segments``, both (rows, tokens): the number of the
        question from 1, 0 for what they share and −1 for padding. :func:`segment_mask` makes the mask of them.

    Raises
    ------
    InputError
        When the answers cannot be told from the rest of the conversation, or for independent turns of a model that
        takes no mask of its own.
    """

    config: PreTrainedConfig = field(kw_only=True)
    answers_only: bool = True
    keeps_last_token: bool = True
    independent_turns: bool = False
    _vision: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_length is not None:
            raise InputError(f"max_length {self.max_length} would cut images apart; set max_length to null")
        if not self.processor.tokenizer.is_fast:
            raise InputError("the answers are found by a fast tokenizer only; load the processor with one")
        family = family_of(self.config)
        self._vision = torch.tensor([attrgetter(kind.token)(self.config) for kind in family.modalities])
        text = self.config.get_text_config()
        layers = set(getattr(text, "layer_types", None) or ())
        if self.independent_turns and (family.axes > 1 or layers - {"full_attention"} or _attends_both_ways(text)):
            raise InputError(
                f"independent_turns need plain causal attention and positions, which {self.config.model_type} does not "
                "have; set it to false"
            )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch some rows: the processor's outputs, and ``labels`` (rows, tokens)."""
        return self._independent(examples) if self.independent_turns else self._batch(examples)

    def _batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        written = [self.write(prepare_multimodal_messages(each["messages"], each["images"])) for each in examples]
        pairs = zip(written, examples, strict=True)
        batch: dict[str, Any] = super().torch_call(
            [{self.dataset_text_field: text, "images": example["images"]} for (text, _), example in pairs]
        )
        ids, labels = batch["input_ids"], torch.full_like(batch["input_ids"], IGNORED)
        for row, (text, answers) in enumerate(written):
            real = batch["attention_mask"][row].nonzero().flatten()
            places = real[self._learned(text, answers, ids[row, real].tolist())]
            labels[row, places] = ids[row, places]
        if not self.keeps_last_token:
            labels[:, 1:][torch.isin(ids, self._vision)[:, :-1]] = IGNORED
        batch["labels"] = labels
        return batch

    def _independent(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        asked = [_alone(example["messages"]) for example in examples]
        pairs = zip(asked, examples, strict=True)
        batch = self._batch([{"messages": turns[0], "images": example["images"]} for turns, example in pairs])
        shape = batch["input_ids"].shape
        others = {name: value for name, value in batch.items() if name not in OURS}
        if odd := [name for name, value in others.items() if getattr(value, "shape", None) == shape]:
            raise InputError(
                f"independent_turns: {type(self.processor).__name__} gives {odd[0]} for each token; set it to false"
            )
        rows = []
        for row, (turns, example) in enumerate(zip(asked, examples, strict=True)):
            real = batch["attention_mask"][row].nonzero().flatten()
            ids, labels = (batch[name][row, real].tolist() for name in ("input_ids", "labels"))
            rows.append(self._joined(ids, labels, turns, example["images"]))
        fills = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED, "segments": -1}
        for name, parts in zip(
            ("input_ids", "labels", "segments", "position_ids"), zip(*rows, strict=True), strict=True
        ):
            each = [torch.tensor(part) for part in parts]
            batch[name] = nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=fills.get(name, 0))
        batch["attention_mask"] = (batch["segments"] >= 0).long()
        return batch

    def _joined(self, ids: list[int], labels: list[int], turns: list[Any], images: Any) -> tuple[list[int], ...]:
        """Ids, labels, segments and positions of a row, to whose first question the others are added."""
        marks, start, head = self._marks(), 0, list[int]()
        segments, positions = list[int](), list[int]()
        for number, turn in enumerate(turns, start=1):
            text, answers = self.write(prepare_multimodal_messages(turn, images))
            short = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            behind = max((i + 1 for i, token in enumerate(short["input_ids"]) if token in marks), default=0)
            if number == 1:
                place = align(short["input_ids"], ids, marks)[behind]
                if place is None:
                    raise InputError(
                        f"independent_turns: {type(self.processor).__name__} joins an image and the text behind it in "
                        "one token; set it to false"
                    )
                start, head = place, short["input_ids"][:behind]
                segments, positions = [0] * start + [1] * (len(ids) - start), list(range(len(ids)))
                continue
            if short["input_ids"][:behind] != head:
                raise InputError("independent_turns: what stands before a question depends on it; set it to false")
            tail = short["input_ids"][behind:]
            learned = [not self.answers_only or _inside(o, answers) for o in short["offset_mapping"][behind:]]
            learned[0] = False  # in the row another question stands before it
            ids = ids + tail
            labels = labels + [token if learn else IGNORED for token, learn in zip(tail, learned, strict=True)]
            segments += [number] * len(tail)
            positions += range(start, start + len(tail))
        return ids, labels, segments, positions

    def write(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
        """A conversation, its content in parts, as its chat template writes it, and where in this the answers are."""
        tokenizer = self.processor.tokenizer
        text = self._render(messages)
        answers: list[Span] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = _shared(text, self._render(messages[:turn], add_generation_prompt=True))
            through = _shared(text, self._render(messages[: turn + 1]))
            end = len(text[:through].rstrip())  # a line end behind the token that ends the answer is nobody's to learn
            said = "".join(part["text"] for part in message["content"]).strip()
            if said not in text[start:end]:
                raise InputError(
                    f"the chat template of {type(self.processor).__name__} hides the answer {said[:40]!r} among other "
                    "text; give a template that writes every message as it stands"
                )
            answers.append((start, end))
        if answers and answers[-1][1] == len(text.rstrip()):
            start, end = answers[-1]
            if not text[:end].endswith(tuple(tokenizer.get_added_vocab())):
                text = text[:end] + tokenizer.eos_token
                answers[-1] = start, len(text)
        first = tokenizer("")["input_ids"][:1]
        if first == [tokenizer.bos_token_id] and not text.startswith(tokenizer.bos_token):
            length = len(tokenizer.bos_token)
            text, answers = tokenizer.bos_token + text, [(start + length, end + length) for start, end in answers]
        return text, answers

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False, **options
        )
        return text

    def _learned(self, text: str, answers: list[Span], ids: list[int]) -> list[int]:
        """Positions among a row's ``ids`` that get a label."""
        short = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = align(short["input_ids"], ids, self._marks())
        found = []
        for (start, end), place in zip(short["offset_mapping"], places, strict=True):
            inside = not self.answers_only or _inside((start, end), answers)
            if place is None and inside and self.answers_only:
                raise InputError(
                    f"{type(self.processor).__name__} rewrites the text around an answer, so that it cannot be found; "
                    "set answers_only to false"
                )
            if place is not None and inside:
                found.append(place)
        return found

    def _marks(self) -> set[int]:
        """Vision tokens, and others of the text alone that the processor replaces by an image."""
        names = ("image_token", "video_token", "boi_token", "start_of_image_token")
        tokens = [getattr(self.processor, name, None) for name in names]
        convert = self.processor.tokenizer.convert_tokens_to_ids
        return {*self._vision.tolist(), *(convert(token) for token in tokens if isinstance(token, str))}


def segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask (rows, 1, tokens, tokens) of the ``segments`` of a :class:`Collator`'s batch: causal, and no
    segment sees another but the shared one, 0."""
    tokens = segments.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril()
    seen = seen & ((segments == 0)[:, None, :] | (segments[:, None, :] == segments[:, :, None]))
    seen &= (segments >= 0)[:, None, :]  # padding is what nobody looks at
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _alone(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Every question of a conversation with the images and instructions before it, as a conversation of its own; the
    whole where images stand elsewhere than in front."""
    before = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    kinds = [part["type"] == "image" for message in turns for part in message["content"]]
    images = [part for part in turns[0]["content"] if part["type"] == "image"]
    if any(kinds[len(images) :]):
        return [list(messages)]
    alone = [[*before, turns[0], turns[1]]]
    for question, answer in zip(turns[2::2], turns[3::2], strict=True):
        alone.append([*before, {**question, "content": [*images, *question["content"]]}, answer])
    return alone


def _attends_both_ways(text: PreTrainedConfig) -> bool:
    """Whether vision tokens see those behind them."""
    return bool(getattr(text, "use_bidirectional_attention", None)) or text.model_type.startswith("gemma")


def _inside(offset: Span, answers: list[Span]) -> bool:
    start, end = offset
    return any(start < b and max(end, start + 1) > a for a, b in answers)


def _shared(text: str, other: str) -> int:
    """How many characters two texts share from the beginning."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def align(short: Sequence[int], long: Sequence[int], marks: set[int]) -> list[int | None]:
    """Where each token of a text stands once images have been put in.

    Parameters
    ----------
    short
        Tokens of the text, with one of ``marks`` for an image.
    long
        The same with some tokens in the place of each mark.

    Returns
    -------
    Of each token of ``short`` its position in ``long``; ``None`` for marks, and for a token beside an image that became
    another there.
    """
    found: list[int | None] = [None] * len(short)
    edges = [-1, *(i for i, token in enumerate(short) if token in marks), len(short)]
    at = 0
    for left, right in pairwise(edges):
        piece = list(short[left + 1 : right])
        # A token may have become another where it touches an image, not at the ends of the text.
        before, after = (0, 1) if left < 0 else (0, 2), (0, 1) if right == len(short) else (0, 2)
        for cut in sorted(((a, b) for a in range(*before) for b in range(*after)), key=sum):
            part = piece[cut[0] : len(piece) - cut[1]]
            if not part:
                break
            where = _position(part, long, at if left < 0 else at + 1, first=left < 0, last=right == len(short))
            if where is not None:
                found[left + 1 + cut[0] : right - cut[1]] = range(where, where + len(part))
                at = where + len(part)
                break
    return found


def _position(part: list[int], long: Sequence[int], at: int, first: bool, last: bool) -> int | None:
    latest = len(long) - len(part)
    places = [at] if first else [latest] if last else range(at, latest + 1)
    return next((i for i in places if i >= at and list(long[i : i + len(part)]) == part), None)
