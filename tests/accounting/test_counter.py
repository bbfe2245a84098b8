"""The cost model against PyTorch's FLOP counter and the bytes of real caches, on small twins of real models.

The twins have the structure of LLaVA-1.5-7B, LLaVA-NeXT-7B and Qwen2.5-VL-7B with every width divided by 32 and fewer
layers; ids and pixels are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

import adsc

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
)

IMAGE, TEXT, LAYERS = 3, 40, 6


@dataclass
class Twin:
    model: Any
    inputs: dict[str, Any]
    arguments: dict[str, Any]
    """What cost() is told about the row."""
    tower: str
    projector: str
    tower_has_projector: bool = False

    @property
    def spans(self) -> list[tuple[int, int]]:
        is_image = (self.inputs["input_ids"][0] == IMAGE).tolist()
        edges = [at for at in range(1, len(is_image)) if is_image[at] != is_image[at - 1]]
        return list(zip(edges[::2], edges[1::2], strict=True))


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def ids(*images: int) -> torch.Tensor:
    """Text, an image, text, an image, …, text; ``TEXT`` text tokens in all."""
    parts = [torch.arange(4, 14)]
    for tokens in images:
        parts += [torch.full((tokens,), IMAGE), torch.arange(20, 25)]
    rest = TEXT - sum(int((part != IMAGE).sum()) for part in parts)
    return torch.cat([*parts, torch.arange(30, 30 + rest)])[None]


def clip(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


@cache
def llava() -> Twin:
    model = build(LlavaConfig(vision_config=clip(336), text_config=llama(), image_token_index=IMAGE))
    inputs = {"input_ids": ids(576, 576), "pixel_values": torch.randn(2, 3, 336, 336)}
    arguments = {"vision_tokens": 1152, "text_tokens": TEXT, "images": 2}
    return Twin(model, inputs, arguments, "model.vision_tower", "model.multi_modal_projector")


@cache
def llava_next() -> Twin:
    side = 168  # half a real tile
    config = LlavaNextConfig(
        vision_config=clip(side),
        text_config=llama(),
        image_token_index=IMAGE,
        image_grid_pinpoints=[
            [side * rows, side * columns] for rows, columns in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
        ],
    )
    model = build(config)
    sizes = torch.tensor([[250, 350], [150, 500]])  # in a grid of 2 × 2 tiles, and of 1 × 3, each beside an overview
    pixels = torch.randn(2, 5, 3, side, side)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, image_sizes=sizes)
    counts = [len(each) for each in getattr(features, "pooler_output", features)]
    inputs = {"input_ids": ids(*counts), "pixel_values": pixels, "image_sizes": sizes}
    arguments = {"vision_tokens": sum(counts), "text_tokens": TEXT, "images": counts, "tiles": [5, 4]}
    return Twin(model, inputs, arguments, "model.vision_tower", "model.multi_modal_projector")


@cache
def qwen() -> Twin:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 4750,
            "hidden_size": 112,
            "intermediate_size": 592,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 8,
            "hidden_size": 40,
            "intermediate_size": 107,
            "num_heads": 2,
            "out_hidden_size": 112,
            "fullatt_block_indexes": [1, 3, 5, 7],
        },
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=1,
        vision_end_token_id=0,
    )
    grids = [(22, 30), (16, 10)]  # in vision tokens: neither is a whole number of windows
    patches = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    counts = [rows * columns for rows, columns in grids]
    input_ids = ids(*counts)
    inputs = {
        "input_ids": input_ids,
        "pixel_values": torch.randn(4 * sum(counts), 3 * 2 * 14 * 14),
        "image_grid_thw": patches,
        "mm_token_type_ids": (input_ids == IMAGE).int(),
    }
    arguments = {"vision_tokens": sum(counts), "text_tokens": TEXT, "images": counts, "grids": grids}
    return Twin(build(config), inputs, arguments, "model.visual", "model.visual.merger", tower_has_projector=True)


TWINS: list[Callable[[], Twin]] = [llava, llava_next, qwen]
SCHEDULES = {"dense": None, "reduced": "1:1/2,3:1/3,5:1/4"}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> adsc.Schedule:
    text = SCHEDULES[request.param]
    if text is not None:
        pytest.importorskip("adsc.hf.engine")
    return adsc.Schedule.parse(text or "")


@pytest.fixture(params=TWINS, ids=lambda make: make.__name__)
def twin(request: pytest.FixtureRequest, schedule: adsc.Schedule) -> Iterator[Twin]:
    made = request.param()
    with adsc.compress(made.model, schedule) if schedule else nullcontext():
        yield made


def module_flops(counter: FlopCounterMode, model: Any, name: str, operations: tuple[str, ...] = ()) -> int:
    """FLOPs inside the modules whose name ends in ``name``, of all operations or of those named."""
    root = type(model).__name__
    return sum(
        count
        for module, counts in counter.get_flop_counts().items()
        if module.startswith(root) and module.endswith("." + name)
        for operation, count in counts.items()
        if not operations or str(operation).removeprefix("aten.") in operations
    )


@torch.no_grad()
@pytest.mark.parametrize("logits", ["last", "all"])
def test_prefill_agrees_with_the_counter(twin: Twin, schedule: adsc.Schedule, logits: str) -> None:
    model = twin.model
    with FlopCounterMode(display=False) as counter:
        model(**twin.inputs, logits_to_keep=1 if logits == "last" else 0)
    made = adsc.cost(model.config, **twin.arguments, schedule=schedule, logits=logits, dtype="float32")
    flops = made.reduced.prefill

    tower = module_flops(counter, model, twin.tower)
    projector = module_flops(counter, model, twin.projector)
    if twin.tower_has_projector:
        tower -= projector
    assert flops.vision_encoder == tower
    assert flops.projector == projector
    layers = "language_model.layers."
    attention = sum(module_flops(counter, model, f"{layers}{layer}.self_attn") for layer in range(LAYERS))
    products = sum(
        module_flops(counter, model, f"{layers}{layer}.self_attn", ("bmm", "baddbmm")) for layer in range(LAYERS)
    )
    assert flops.attention_products == products
    assert flops.attention_projections == attention - products
    ffn = sum(module_flops(counter, model, f"{layers}{layer}.mlp") for layer in range(LAYERS))
    assert flops.ffn == ffn
    assert flops.lm_head == module_flops(counter, model, "lm_head")
    assert flops.total == pytest.approx(counter.get_total_flops(), rel=0.005)


def cache_bytes(cache: Any) -> list[int]:
    return [layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in cache.layers]


@torch.no_grad()
def test_decode_and_cache_bytes(twin: Twin, schedule: adsc.Schedule) -> None:
    model, steps = twin.model, 3
    made = adsc.cost(model.config, **twin.arguments, schedule=schedule, decode_tokens=steps, dtype="float32")
    output = model(**twin.inputs, use_cache=True)
    cache = output.past_key_values
    assert cache_bytes(cache) == list(made.reduced.kv_bytes_per_layer)
    token = output.logits[:, -1:].argmax(-1)
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
    assert sum(cache_bytes(cache)) == made.reduced.kv_bytes_decoded
    assert made.reduced.decode.total == pytest.approx(counter.get_total_flops(), rel=0.005)
    products = module_flops(counter, model, "language_model.layers.0.self_attn", ("bmm", "baddbmm"))
    row = twin.inputs["input_ids"].shape[1]
    heads_wide = model.config.text_config.hidden_size
    assert products == 4 * heads_wide * sum(row + step for step in range(1, steps + 1))


def test_a_batch_counts_its_rows(schedule: adsc.Schedule) -> None:
    twin = llava()
    inputs = {
        "input_ids": twin.inputs["input_ids"].repeat(2, 1),
        "pixel_values": twin.inputs["pixel_values"].repeat(2, 1, 1, 1),
    }
    made = adsc.cost(twin.model.config, **twin.arguments, schedule=schedule, batch=2, dtype="float32")
    attached = adsc.compress(twin.model, schedule) if schedule else nullcontext()
    with attached, torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = twin.model(**inputs, logits_to_keep=1, use_cache=True)
    assert made.reduced.prefill.total == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert cache_bytes(output.past_key_values) == list(made.reduced.kv_bytes_per_layer)


def test_the_plan_of_the_row_gives_the_same(schedule: adsc.Schedule) -> None:
    """Where in the row the images are does not matter."""
    for make in TWINS:
        twin = make()
        numbers = adsc.cost(twin.model.config, **twin.arguments, schedule=schedule)
        length = twin.inputs["input_ids"].shape[1]
        plan = adsc.plan(twin.spans, length, schedule, LAYERS, grids=twin.arguments.get("grids"))
        assert adsc.cost(twin.model.config, plan=plan, tiles=twin.arguments.get("tiles")) == numbers
