"""The cost model: published figures, and refusals instead of wrong numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adsc import InputError, Layout, Schedule, cost, plan

VICUNA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "dtype": "float16",
}
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
}
LLAVA = {
    "model_type": "llava",
    "text_config": VICUNA,
    "vision_config": CLIP_LARGE,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LLAVA_NEXT = {
    **LLAVA,
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
QWEN = {  # flat, as on the hub
    "model_type": "qwen2_5_vl",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
HALVES = Schedule.parse("3:1/2,11:1/2,21:1/2,29:1/2")  # 192.4 of 576 on average


def test_published_figures_of_llava_7b() -> None:
    """In tera multiply-accumulates, where FLOPs are twice that: CLIP-L/336, projector, and three figures in use."""
    vision_only = cost(LLAVA, 576, 0).dense.prefill
    assert vision_only.vision_encoder / 2e12 == pytest.approx(0.191, abs=0.0005)
    assert vision_only.projector / 2e12 == pytest.approx(0.012, abs=0.0005)
    assert vision_only.llm / 2e12 == pytest.approx(3.82, abs=0.005)
    assert cost(LLAVA, 576, 88).dense.prefill.total / 2e12 == pytest.approx(4.62, abs=0.005)
    assert cost(LLAVA, 576, 87).dense.prefill.llm / 1e12 == pytest.approx(8.82, abs=0.005)
    assert cost(LLAVA, 576, 0).dense.kv_bytes / 576 / 1e6 == pytest.approx(0.524, abs=0.0005)


@pytest.mark.parametrize(("text", "llm", "total", "kv"), [(50, 62, 59, 61), (88, 58, 56, 58), (101, 57, 55, 57)])
def test_expected_savings_at_192_tokens(text: int, llm: int, total: int, kv: int) -> None:
    made = cost(LLAVA, 576, text, HALVES)
    ratios = made.ratios
    assert made.retained * 576 == pytest.approx(192.4, abs=0.05)
    assert round(100 * (1 - ratios["llm_prefill_flops"])) == llm
    assert round(100 * (1 - ratios["prefill_flops"])) == total
    assert round(100 * (1 - ratios["kv_bytes"])) == kv


def test_kv_saving_of_the_paper_is_at_101_text_tokens() -> None:
    saved = {text: 1 - cost(LLAVA, 576, text, Schedule.for_budget(32, "1/3")).ratios["kv_bytes"] for text in (99, 101)}
    assert saved[101] == pytest.approx(0.567, abs=0.0005)
    assert saved[99] != pytest.approx(0.567, abs=0.0005)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("8:1/2,10:1/2,11:1/2,13:1/2", 192.4),
        ("4:1/3,20:1/3", 192.0),
        ("8:1/4,16:1/4,24:1/4", 191.25),
        ("4:1/2,6:1/2,8:1/2,10:1/2", 128.25),
        ("2:1/2,7:1/2,11:1/2,16:1/2", 128.25),
        ("2:1/3,10:1/3", 128.0),
        ("2:1/4,6:1/4,9:1/4", 63.8),
    ],
)
def test_published_schedules(text: str, tokens: float) -> None:
    assert cost(LLAVA, 576, 50, Schedule.parse(text)).retained * 576 == pytest.approx(tokens, abs=0.05)


def test_qwen_7b() -> None:
    """Grouped-query attention, a flat config, and windows that cost less than full attention."""
    made = cost(QWEN, 1024, 100, grids=[(32, 32)])
    flops = made.dense.prefill
    weights = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)
    assert flops.attention_projections + flops.ffn == 2 * 1124 * weights
    assert made.dense.kv_bytes == 28 * 1124 * 2 * 4 * 128 * 2
    all_full = {**QWEN, "vision_config": {**QWEN["vision_config"], "fullatt_block_indexes": list(range(32))}}
    full = cost(all_full, 1024, 100, grids=[(32, 32)]).dense.prefill.vision_encoder
    # 28 of 32 layers attend to 64 patches instead of 4096.
    assert full - flops.vision_encoder == 2 * 2 * 28 * 4096 * (4096 - 64) * 1280


def test_an_unknown_grid_is_taken_as_the_most_square() -> None:
    assert cost(QWEN, 480, 9) == cost(QWEN, 480, 9, grids=[(20, 24)])
    assert cost(QWEN, 480, 9) != cost(QWEN, 480, 9, grids=[(2, 240)])


def test_images_and_plans() -> None:
    three = cost(LLAVA, 1728, 60, HALVES, images=3)
    assert three == cost(LLAVA, 1728, 60, HALVES, images=[576, 576, 576])
    assert three.images == 3
    assert three.dense.prefill.vision_encoder == 3 * cost(LLAVA, 576, 60).dense.prefill.vision_encoder
    made = plan(Layout(1788, [(9, 585), (585, 1161), (1200, 1776)]), schedule=HALVES, num_layers=32)
    assert cost(LLAVA, plan=made) == three
    assert three.reduced.tokens_per_layer == tuple(made.tokens_per_layer())


def test_tiles() -> None:
    one = cost(LLAVA, 576, 20).dense.prefill
    five = cost(LLAVA_NEXT, 2880, 20).dense.prefill  # only 2 × 2 tiles and the overview can make as many
    assert five.vision_encoder == 5 * one.vision_encoder
    assert five.projector == 5 * one.projector
    assert cost(LLAVA_NEXT, 1500, 20, tiles=3).dense.prefill.vision_encoder == 3 * one.vision_encoder
    # Each of the 48 rows of patches of 2 × 2 tiles may end in a newline token.
    assert cost(LLAVA_NEXT, 2880 + 48, 20).dense.prefill.vision_encoder == 5 * one.vision_encoder
    with pytest.raises(InputError, match="5 tiles of 576 cannot give 2929"):
        cost(LLAVA_NEXT, 2880 + 49, 20)
    with pytest.raises(InputError, match=r"give tiles, of \[3, 4, 5\]"):
        cost(LLAVA_NEXT, 1500, 20)
    with pytest.raises(InputError, match="3 tiles of 576 cannot give 2880"):
        cost(LLAVA_NEXT, 2880, 20, tiles=3)
    with pytest.raises(InputError, match="for 2 images"):
        cost(LLAVA_NEXT, 5760, 20, images=2, tiles=[5])
    with pytest.raises(InputError, match="tiles belong"):
        cost(LLAVA, 576, 20, tiles=1)


def test_text_alone_and_a_decoder_alone() -> None:
    text = cost(LLAVA, 0, 100, HALVES)
    assert text.dense == text.reduced
    assert text.dense.prefill.vision_encoder == text.dense.prefill.projector == 0
    decoder = cost(VICUNA, 576, 100, HALVES)
    assert decoder.dense.prefill.total == cost(LLAVA, 576, 100).dense.prefill.llm
    assert decoder.ratios["prefill_flops"] == decoder.ratios["llm_prefill_flops"]


def test_dtypes() -> None:
    half = cost(LLAVA, 576, 20).dense.kv_bytes
    assert cost(LLAVA, 576, 20).dtype == "float16"
    assert cost(LLAVA, 576, 20, dtype="float32").dense.kv_bytes == 2 * half
    assert cost(LLAVA, 576, 20, dtype="float8_e4m3fn").dense.kv_bytes == half // 2
    assert cost(QWEN, 480, 20).dtype == "bfloat16"
    torch = pytest.importorskip("torch")
    assert cost(LLAVA, 576, 20, dtype=torch.float64).dense.kv_bytes == 4 * half


def test_decode() -> None:
    made = cost(LLAVA, 576, 100, HALVES, decode_tokens=7)
    assert made.dense.kv_bytes_decoded - made.dense.kv_bytes == 7 * 524288
    assert made.reduced.kv_bytes_decoded - made.reduced.kv_bytes == 7 * 524288
    assert made.dense.decode.ffn == made.reduced.decode.ffn == 2 * 7 * 32 * 3 * 4096 * 11008
    step = cost(LLAVA, 576, 100, HALVES, decode_tokens=1)
    assert step.reduced.decode.attention_products == 4 * 4096 * sum(n + 1 for n in step.reduced.tokens_per_layer)
    assert step.ratios["decode_flops"] < 1
    assert "decode_flops" not in cost(LLAVA, 576, 100, HALVES).ratios


def test_json() -> None:
    made = cost(LLAVA, 576, 100, HALVES, decode_tokens=2)
    values = json.loads(json.dumps(made.to_dict()))
    assert values["dense"]["prefill_flops"]["total"] == made.dense.prefill.total
    assert values["reduced"]["kv_bytes"] == made.reduced.kv_bytes
    assert values["schedule"] == "3:1/2,11:1/2,21:1/2,29:1/2"
    assert values["ratios"] == made.ratios


@pytest.mark.parametrize(
    ("config", "arguments", "match"),
    [
        ({**LLAVA, "model_type": "fuyu"}, {}, "'fuyu' is not in the cost model"),
        ({**LLAVA, "text_config": {**VICUNA, "model_type": "mixtral"}}, {}, "decoder 'mixtral'"),
        ({**LLAVA, "vision_config": {**CLIP_LARGE, "model_type": "siglip_vision_model"}}, {}, "siglip_vision_model"),
        ({**LLAVA, "vision_config": None}, {}, "vision encoder of 'llava'"),
        ({**LLAVA, "text_config": {"model_type": "llama", "vocab_size": 32064}}, {}, "no num_hidden_layers"),
        ({**VICUNA, "sliding_window": 600}, {}, "sliding window of 600"),
        (LLAVA, {"images": 2}, "576 vision tokens in this model"),
        (LLAVA, {"images": 5}, "5 images cannot share 576"),
        (LLAVA, {"images": [500]}, "500 vision tokens together"),
        (LLAVA, {"vision_tokens": -1}, "-1 vision"),
        (LLAVA, {"text_tokens": None}, "needs vision_tokens and text_tokens"),
        (LLAVA, {"schedule": Schedule.parse("32:1/2")}, "layers 1 to 31"),
        (LLAVA, {"plan": plan([(0, 576)], 600, HALVES, 32)}, "either a plan or the numbers"),
        (LLAVA, {"dtype": "int4"}, "dtype 'int4'"),
        (LLAVA, {"logits": "some"}, "logits is 'some'"),
        (LLAVA, {"batch": 0}, "batch 0"),
        (LLAVA, {"pattern": "grid", "schedule": HALVES}, "grid of span 0"),
    ],
)
def test_refusals(config: dict[str, Any], arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        cost(config, **{"vision_tokens": 576, "text_tokens": 100, **arguments})


def test_a_plan_for_another_model() -> None:
    with pytest.raises(InputError, match="40 layers, but the model has 32"):
        cost(LLAVA, plan=plan([(0, 576)], 600, HALVES, 40))
