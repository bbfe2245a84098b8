"""A tiny LLaVA as a checkpoint, rows to train it on, and runs in processes of their own.

python running.py RECIPE [resume]      # trains, saying every step that begins
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast, TrainerCallback

sys.path[:0] = [str(Path(__file__).parent.parent)]
from hf.tiny import IMAGE, model  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}{{ 'user ' if message['role'] == 'user' else 'assistant ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROWS = 24
BUDGETS = {"1": "", "1/2": "1:1/2,4:1/2", "1/3": "1:1/4,3:1/2"}  # over 6 layers of 25 vision tokens
VOLATILE = ("runtime", "per_second", "total_flos")  # what is logged and differs from run to run


def make_checkpoint(folder: Path) -> None:
    """A model that sees: the weights of its projector are large enough for images to matter."""
    words = {f"w{i}": i for i in range(IMAGE)} | {"<image>": IMAGE}
    for number, word in enumerate(("<pad>", "<unk>", "<end>", "user", "assistant")):
        words[word] = words.pop(f"w{number}")
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", padding_side="left",
        extra_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 10, "width": 10}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=2, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    model("llava").save_pretrained(folder)
    processor.save_pretrained(folder)


def make_rows(folder: Path, rows: int = ROWS) -> Path:
    """``messages`` and ``images``, as JSON lines with images beside them; rows differ in length."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = []
    for row in range(rows):
        pixels = draw.integers(0, 255, (10, 10, 3), dtype=np.uint8)
        Picture.fromarray(pixels).save(folder / f"{row}.png")
        asked, said = (" ".join(f"w{n}" for n in draw.integers(5, IMAGE, count)) for count in draw.integers(1, 7, 2))
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        answer = [{"type": "text", "text": said}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "images": [f"{row}.png"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def values(folder: Path, output: Path, **training: Any) -> dict[str, Any]:
    """A recipe for what :func:`make_checkpoint` and :func:`make_rows` wrote into ``folder``."""
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 2e-3,
        "logging_steps": 1, "save_steps": 2, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return {
        "model": str(folder / "model"),
        "output": str(output),
        "data": {"train": str(folder / "rows" / "rows.jsonl")},
        "method": {"retained": "1/2", "vision_tokens": 25},
        "curriculum": {"kind": "elastic", "budgets": list(BUDGETS), "schedules": BUDGETS},
        "lora": {"rank": 4, "alpha": 8},
        "training": settings | training,
    }


def told(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, without what the clock decides."""
    return [{key: value for key, value in entry.items() if not key.endswith(VOLATILE)} for entry in history]


class _Say(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("step", state.global_step, flush=True)


class _Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if f"stop={state.global_step}" in sys.argv and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    from adsc.training.recipe import read
    from adsc.training.trainer import train

    torch.set_num_threads(1)
    outcome = train(read(sys.argv[1]), resume="resume" in sys.argv[2:], callbacks=[_Say(), _Stop()])
    if int(os.environ.get("RANK", 0)) == 0:
        print("stopped" if outcome.stopped else "finished", outcome.step, flush=True)
        Path(sys.argv[1]).with_suffix(".history").write_text(json.dumps(outcome.history))


if __name__ == "__main__":
    main()
