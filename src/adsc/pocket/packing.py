"""Many questions about one image in one sequence, each seeing the image and itself alone.

A packed question gets the logits it would get alone: it stands at the positions it has alone and is masked from the
other questions. So vision tokens, most of the work, are computed once an image, in training and in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from adsc.pocket.building import ASSISTANT, BOS, END, PAD, USER
from adsc.pocket.questions import Question

Turn = tuple[list[int], list[int]]
"""Token ids of a question (up to and with ``<|assistant|>``) and of its answer (with ``<|end|>``)."""


def turn(tokenizer: PreTrainedTokenizerFast, question: Question) -> Turn:
    """Token ids as the chat template gives them, without what stands before the question."""
    return tokenizer(question.text)["input_ids"] + [ASSISTANT], tokenizer(question.answer)["input_ids"] + [END]


@dataclass
class Packed:
    """The text of some rows; every tensor is (rows, length).

    Ids, labels (-100 where not an answer), number of the question (from 1; -1 in the padding), and position (the first
    one after the image is 0).
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
    model: LlavaForConditionalGeneration,
    features: Tensor,
    packed: Packed,
    places: Tensor | None = None,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (answer tokens, vocabulary) and their targets, over all questions of the batch.

    Parameters
    ----------
    model : LlavaForConditionalGeneration
    features : Tensor
        Projected vision tokens (rows, n, width); n may be 0.
    packed : Packed
    places : Tensor, optional
        Index of each of them among the image's vision tokens (rows, n), where not all are there.
    tokens : int, optional
        How many vision tokens the image has; by default n.
    """
    device, (rows, count) = features.device, features.shape[:2]
    embed = model.get_input_embeddings()
    head = embed(torch.tensor([[BOS, USER]], device=device)).expand(rows, -1, -1)
    hidden = torch.cat([head.to(features.dtype), features, embed(packed.text).to(features.dtype)], dim=1)
    if places is None:
        places = torch.arange(count, device=device).expand(rows, -1)
    start = torch.arange(2, device=device).expand(rows, -1)
    position = torch.cat([start, 2 + places, 2 + (count if tokens is None else tokens) + packed.position], dim=1)
    segment = torch.cat([torch.zeros(rows, 2 + count, dtype=torch.long, device=device), packed.segment], dim=1)
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen = causal & ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None]))
    mask = torch.zeros_like(seen, dtype=features.dtype).masked_fill(~seen, torch.finfo(features.dtype).min)
    output = model.model.language_model(
        inputs_embeds=hidden, attention_mask=mask[:, None], position_ids=position, use_cache=False
    ).last_hidden_state
    asked = packed.labels != -100
    before = output[:, 1 + count : -1]  # the position before each text token predicts it
    return model.lm_head(before[asked]), packed.labels[asked]
