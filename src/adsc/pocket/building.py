"""The model in the box, untrained: a LLaVA with a CLIP tower and a deep, thin Llama decoder; and its processor."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from adsc.pocket.questions import vocabulary
from adsc.pocket.scenes import IMAGE_SIZE, PATCH_SIZE

SPECIAL = ("<pad>", "<image>", "<s>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, IMAGE, BOS, USER, ASSISTANT, END = range(len(SPECIAL))

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the questions is one token, and every digit one of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    words = [word for text in vocabulary() for word in text.lower().split()]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", padding_side="left",
        extra_special_tokens=["<image>", "<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor() -> LlavaProcessor:
    """The processor that belongs to :func:`build_model`."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor, build_tokenizer(), patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def build_model(vocab_size: int, seed: int = 0, **decoder: Any) -> LlavaForConditionalGeneration:
    """A fresh model: 5 CLIP layers of width 128 over 16 x 16 patches, 24 Llama layers of width 128."""
    torch.manual_seed(seed)
    text = {
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 24, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 4096, "initializer_range": 0.04,
        "tie_word_embeddings": False,
        # With heads of 32, the usual base of 10,000 leaves few rotations slow enough for 250 tokens of distance.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **decoder,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=vocab_size, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END, **text
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE, initializer_range=0.04, projection_dim=128,
        ),
        image_token_index=IMAGE, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2, vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END, max_new_tokens=16, do_sample=False
    )
    return model
