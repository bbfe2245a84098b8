"""The model in the box, untrained: a LLaVA with a CLIP tower and a deep, thin Llama decoder; and its processor.

A second architecture sees the same scenes, to show what holds of more than one: an Idefics3 with a SigLIP tower, whose
connector merges 2 x 2 patches into one vision token (pixel shuffle), and a Qwen2 decoder. It does not ship.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from adsc.pocket.questions import vocabulary
from adsc.pocket.scenes import IMAGE_SIZE, PATCH_SIZE

SPECIAL = ("<pad>", "<image>", "<s>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, IMAGE, BOS, USER, ASSISTANT, END = range(len(SPECIAL))
SPECIAL_IDEFICS3 = (*SPECIAL, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
AROUND_IMAGE, WHOLE_IMAGE = 6, 7

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def around_image(config: PreTrainedConfig) -> tuple[list[int], list[int]]:
    """Token ids that stand before and behind the vision tokens in a prompt, up to the question."""
    if config.model_type == "idefics3":
        return [BOS, USER, AROUND_IMAGE, WHOLE_IMAGE], [AROUND_IMAGE]
    return [BOS, USER], []


def build_tokenizer(special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
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
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", padding_side="left",
        extra_special_tokens=["<image>", "<|user|>", "<|assistant|>", *special[len(SPECIAL) :]],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor(architecture: str = "llava") -> LlavaProcessor | Idefics3Processor:
    """The processor that belongs to :func:`build_model`."""
    if architecture == "idefics3":
        # Tiling off: every image is seen once, whole.
        tiles = Idefics3ImageProcessorPil(
            size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=False,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip
        return Idefics3Processor(
            tiles, build_tokenizer(SPECIAL_IDEFICS3), image_seq_len=vision_tokens(architecture),
            chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor, build_tokenizer(), patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def vision_tokens(architecture: str = "llava") -> int:
    """How many vision tokens an image has: one for each patch, or for 2 x 2 of them."""
    return (IMAGE_SIZE // PATCH_SIZE // (2 if architecture == "idefics3" else 1)) ** 2


def build_model(
    vocab_size: int, seed: int = 0, architecture: str = "llava", **decoder: Any
) -> LlavaForConditionalGeneration | Idefics3ForConditionalGeneration:
    """A fresh model: a tower of 5 layers of width 128 over 16 x 16 patches, and 24 decoder layers of width 128."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": vocab_size, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": END,
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 24, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 4096, "initializer_range": 0.04,
        "tie_word_embeddings": False,
        # With heads of 32, the usual base of 10,000 leaves few rotations slow enough for 250 tokens of distance.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **decoder,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "initializer_range": 0.04,
    }  # fmt: skip
    model: LlavaForConditionalGeneration | Idefics3ForConditionalGeneration
    if architecture == "idefics3":
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                text_config=Qwen2Config(**text),
                vision_config=Idefics3VisionConfig(**vision),
                image_token_id=IMAGE,
                scale_factor=2,
                tie_word_embeddings=False,
            )
        )
    else:
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=LlamaConfig(**text),
                vision_config=CLIPVisionConfig(**vision, projection_dim=128),
                image_token_index=IMAGE,
                image_seq_length=vision_tokens(),
                vision_feature_layer=-1,
                vision_feature_select_strategy="default",
                tie_word_embeddings=False,
            )
        )
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END, max_new_tokens=16, do_sample=False
    )
    return model
