"""Many questions about one image in one sequence, each seeing the image and itself alone.

A packed question gets the logits it would get alone: it stands at the positions it has alone and is masked from the
other questions. So vision tokens, most of the work, are computed once an image, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from adsc.pocket.building import ASSISTANT, END, PAD, around_image, vision_tokens
from adsc.pocket.questions import Question

Turn = tuple[list[int], list[int]]
"""Token ids of a question (up to and with ``<|assistant|>``) and of its answer (with ``<|end|>``)."""


def turn(tokenizer: PreTrainedTokenizerFast, question: Question) -> Turn:
    """Token ids as the chat template gives them, without what stands before the question."""
    return tokenizer(question.text)["input_ids"] + [ASSISTANT], tokenizer(question.answer)["input_ids"] + [END]


@dataclass
class Packed:
    """The text of some rows; every tensor is (rows, length).

    Ids, labels (-100 where not an answer), number of the question (from 1; -1 in the padding), and position (that of
    the question's first token is 0).
    """

    text: Tensor
    labels: Tensor
    segment: Tensor
    position: Tensor

    def to(self, device: torch.device) -> Packed:
        return Packed(*(t.to(device) for t in (self.text, self.labels, self.segment, self.position)))

    def correct(self, logits: Tensor) -> list[list[bool]]:
        """For each row and question: is each token of the answer the likeliest? (Then greedy decoding gives it.)"""
        hits = torch.ones_like(self.labels, dtype=torch.bool)
        asked = self.labels != -100
        hits[asked] = logits.argmax(-1) == self.labels[asked]
        return [
            [bool(h[s == number].all()) for number in range(1, int(s.max()) + 1)]
            for h, s in zip(hits, self.segment, strict=True)
        ]


def pack(rows: list[list[Turn]]) -> Packed:
    """Lay the questions of each row behind one another, padded on the right."""
    length = max(sum(len(q) + len(a) for q, a in turns) for turns in rows)
    length += -length % 32  # few different shapes: each new one costs a CPU its kernel choice again
    text = torch.full((len(rows), length), PAD)
    labels, segment, position = torch.full_like(text, -100), torch.full_like(text, -1), torch.zeros_like(text)
    for row, turns in enumerate(rows):
        at = 0
        for number, (question, answer) in enumerate(turns, start=1):
            end = at + len(question) + len(answer)
            text[row, at:end] = torch.tensor(question + answer)
            labels[row, at + len(question) : end] = torch.tensor(answer)
            segment[row, at:end] = number
            position[row, at:end] = torch.arange(end - at)
            at = end
    return Packed(text, labels, segment, position)


def answer_logits(
    model: PreTrainedModel,
    features: Tensor,
    packed: Packed,
    places: Tensor | None = None,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) and their targets, over all questions of the batch.

    Parameters
    ----------
    model : PreTrainedModel
        One that :func:`adsc.pocket.building.build_model` makes.
    features : Tensor
        Projected vision tokens (rows, n, width); n may be 0.
    packed : Packed
    places : Tensor, optional
        Index of each of them among the image's vision tokens (rows, n), where not all are there.
    tokens : int, optional
        How many vision tokens the image has; by default n.
    """
    (rows, count), (before, behind) = features.shape[:2], around_image(model.config)
    embed = model.get_input_embeddings()

    def each_row(ids: list[int]) -> Tensor:
        return embed(torch.tensor([ids], dtype=torch.long, device=features.device)).expand(rows, -1, -1)

    parts = [each_row(before), features, each_row(behind), embed(packed.text)]
    mask, position = _around(model.config, packed, count, features.dtype, places, tokens)
    output = model.get_decoder()(
        inputs_embeds=torch.cat([part.to(features.dtype) for part in parts], dim=1),
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
    ).last_hidden_state
    return _at_answers(model, output, packed)


def image_logits(model: PreTrainedModel, images: Mapping[str, Tensor], packed: Packed) -> tuple[Tensor, Tensor]:
    """As :func:`answer_logits`, but of ``images`` (what the image processor returns for them, one a row), and through
    all of the model, so that a method which is attached reduces it. (One that renumbers positions would take a row for
    a single question.)"""
    (before, behind), count = around_image(model.config), vision_tokens(model.config.model_type)
    shared = torch.tensor([*before, *[model.config.image_token_id] * count, *behind], device=packed.text.device)
    mask, position = _around(model.config, packed, count, model.dtype)
    output = model.model(
        input_ids=torch.cat([shared.expand(len(packed.text), -1), packed.text], dim=1),
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
        **images,
    ).last_hidden_state
    return _at_answers(model, output, packed)


def _around(
    config: PreTrainedConfig,
    packed: Packed,
    count: int,
    dtype: torch.dtype,
    places: Tensor | None = None,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive mask (rows, 1, length, length) and position ids (rows, length), the image's part included."""
    device, rows = packed.text.device, len(packed.text)
    start, end = map(len, around_image(config))
    if places is None:
        places = torch.arange(count, device=device).expand(rows, -1)
    following = start + (count if tokens is None else tokens)
    before, behind = (torch.arange(n, device=device).expand(rows, -1) for n in (start, end))
    position = torch.cat([before, start + places, following + behind, following + end + packed.position], dim=1)
    shared = torch.zeros(rows, start + count + end, dtype=torch.long, device=device)
    segment = torch.cat([shared, packed.segment], dim=1)
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen = causal & ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None]))
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None], position


def _at_answers(model: PreTrainedModel, output: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    asked = packed.labels != -100
    before = output[:, -packed.text.shape[1] - 1 : -1]  # the position before each text token predicts it
    return model.lm_head(before[asked]), packed.labels[asked]
