"""A reduced forward pass equals a dense one that masks what was dropped."""

from __future__ import annotations

import pytest
import torch
import transformers

import adsc

from .oracle import TOLERANCE, attention, difference, kept_positions, masked_dense, shifted
from .tiny import CASES, CORE, IMAGE, KINDS, SCHEDULE, TEXT, TINY, Image, Tiny, batch, case, model, one_row

FAMILIES = CORE
DTYPES = [torch.float32, torch.float64]


def check(family, made, dtype, implementation="sdpa", schedule=SCHEDULE, grids=None, **options):
    """Reduced equals masked dense at every kept position, and dense is far from both."""
    network = model(family, dtype)
    pattern, compact = options.get("pattern", "last"), options.get("positions") == "compact"
    kept = kept_positions(made, schedule, pattern, grids)
    expected = masked_dense(network, made.inputs, kept, TINY[family].axes if compact else None)
    config = adsc.ADSCConfig(adsc.Schedule.parse(schedule), **options)
    with attention(network, implementation), torch.no_grad():
        dense = network(**made.inputs).logits
        with adsc.compress(network, config):
            reduced = network(**made.inputs).logits
    assert reduced.shape == dense.shape
    assert difference(reduced, expected, kept[-1]) <= TOLERANCE[dtype]
    with_images = [places if spans else [] for places, spans in zip(kept[-1], made.spans, strict=True)]
    assert difference(dense, expected, with_images) >= 100 * TOLERANCE[dtype]
    return reduced, kept


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reduced_equals_masked_dense(family, implementation, dtype, name):
    if (implementation, dtype, name) == ("eager", torch.float64, "left_padding"):
        with torch.no_grad(), attention(model(family, dtype), "eager") as network:
            assert network(**case(family, name, dtype).inputs).logits.isnan().any()  # dense has no answer either
        return
    check(family, case(family, name, dtype), dtype, implementation)


@pytest.mark.parametrize("name", ["single", "left_padding", "text_beside_image"])
@pytest.mark.parametrize("family", KINDS)
def test_compact_positions(family, name):
    check(family, case(family, name), torch.float32, positions="compact")


@pytest.mark.parametrize("pattern", ["first", "random"])
@pytest.mark.parametrize("family", KINDS)
def test_patterns(family, pattern):
    check(family, case(family, "several_images"), torch.float32, pattern=pattern)


@pytest.mark.parametrize("family", [family for family in FAMILIES if TINY[family].grids])
def test_grid_pattern_gets_its_grids(family):
    grids = [(5, 5)] * 3 if family == "llava" else [(i.height, i.width) for i in TINY[family].images]
    check(family, case(family, "several_images"), torch.float32, pattern="grid", grids=grids)


def test_grid_pattern_without_grids_is_an_error():
    network = model("llava_next")
    config = adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), pattern="grid")
    with adsc.compress(network, config), pytest.raises(adsc.InputError, match="needs the grid"):
        network(**case("llava_next", "single").inputs)


def test_every_frame_of_a_video_is_a_span():
    video = batch("qwen2_5_vl", [[3, Image(2, 4, frames=3), 4, Image(3, 3), 2]])
    assert len(video.spans[0]) == 4
    check("qwen2_5_vl", video, torch.float32)


@pytest.mark.parametrize("family", KINDS)
def test_a_schedule_that_begins_late_and_one_that_drops_almost_all(family):
    check(family, case(family, "left_padding"), torch.float32, schedule="5:1/2")
    check(family, case(family, "left_padding"), torch.float32, schedule="1:1/100")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shifting_one_kept_index_fails_the_oracle(family, implementation):
    made, network = case(family, "left_padding"), model(family)
    kept = shifted(kept_positions(made), made)
    expected = masked_dense(network, made.inputs, kept)
    with attention(network, implementation), torch.no_grad(), adsc.compress(network, SCHEDULE):
        reduced = network(**made.inputs).logits
    common = [sorted(set(a) & set(b)) for a, b in zip(kept[-1], kept_positions(made)[-1], strict=True)]
    assert difference(reduced, expected, common) >= 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", KINDS)
def test_full_length_outside_with_zeros_where_dropped(family):
    made, network = case(family, "right_padding"), model(family)
    kept = kept_positions(made)[-1]
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        hidden = network.model(**made.inputs).last_hidden_state  # the base model, as fused losses call it
        logits = network(**made.inputs).logits
    assert torch.equal(network.lm_head(hidden), logits)
    for row, places in enumerate(kept):
        dropped = torch.ones(hidden.shape[1], dtype=torch.bool)
        dropped[places] = False
        assert (hidden[row, dropped] == 0).all()
        assert (hidden[row, places] != 0).all()


@pytest.mark.parametrize("family", KINDS)
def test_batch_equals_one_by_one(family):
    network, made = model(family), case(family, "left_padding")
    images = [0, 1, 3, 3]  # the rows hold images 0; 1 and 2; none
    with torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        together = network(**made.inputs).logits
        plans = handle.last_plans
        for row, places in enumerate(made.real):
            alone = one_row(family, made, row, images[row], images[row + 1])
            logits = network(**alone).logits
            assert difference(together[row : row + 1, places], logits, [range(len(places))]) <= 1e-5
            if made.spans[row]:
                assert handle.last_plans[0].layout == plans[row].layout
                spans = [list(range(*span)) if isinstance(span, tuple) else span for span in made.spans[row]]
                assert [span.tolist() for span in plans[row].layout.spans] == spans
        assert handle.last_plans == []  # the latest prefill was text alone


def test_llava_with_a_tower_for_any_resolution(monkeypatch):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

    def build():
        config = transformers.LlavaConfig(
            vision_config=transformers.PixtralVisionConfig(**vision, image_size=16, patch_size=2, head_dim=16),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return transformers.LlavaForConditionalGeneration(config)

    def pixels(images, generator):
        sizes = [(2 * image.height, 2 * image.width) for image in images]
        return {
            "pixel_values": torch.randn(len(images), 3, 16, 16, generator=generator),
            "image_sizes": torch.tensor(sizes),
        }

    # Sizes whose mean is a whole number, so that images of equal size would fit as well.
    images = (Image(4, 8), Image(4, 4), Image(6, 4))
    monkeypatch.setitem(TINY, "pixtral", Tiny(build, lambda image: [image.height * image.width], pixels, images))
    check("pixtral", batch("pixtral", [[3, *images, 5]]), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_the_caller_s_own_making(family):
    """A 4-D mask: here two blocks of text beside the image that do not see each other."""
    made, network = case(family, "single"), model(family)
    length = made.inputs["input_ids"].shape[1]
    visible = torch.ones(length, length).tril().bool()
    visible[-3:, :3] = False
    mask = torch.zeros(1, 1, length, length).masked_fill(~visible, torch.finfo(torch.float32).min)
    if family == "qwen2_5_vl":
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        made.inputs["position_ids"] = network.model.get_rope_index(**{n: made.inputs[n] for n in names})[0]
    made.inputs["attention_mask"] = mask
    check(family, made, torch.float32)
    check(family, made, torch.float32, "eager")
    del made.inputs["attention_mask"]
    seen, _ = check(family, made, torch.float32)
    made.inputs["attention_mask"] = mask
    hidden, kept = check(family, made, torch.float32)
    assert difference(seen, hidden, kept[-1]) > 1e-3


@pytest.mark.parametrize("name", ["single", "no_mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_the_caller_s_own_making(family, name):
    """Wide gaps; and, without a mask, a number that begins anew, which transformers reads as packed sequences."""
    made = case(family, name)
    length = made.inputs["input_ids"].shape[1]
    positions = 2 * torch.arange(length)[None] + 3
    if name == "no_mask":
        positions = torch.cat((torch.arange(length - 4), torch.arange(4)))[None]
    if family == "qwen2_5_vl":  # with the positions in the text in front
        positions = positions.expand(4, 1, -1) if name == "no_mask" else torch.stack([positions] * 3)
    made.inputs |= {"position_ids": positions, "use_cache": False}
    dense_inputs = {key: value for key, value in made.inputs.items() if key != "use_cache"}
    kept = kept_positions(made)
    expected = masked_dense(model(family), dense_inputs, kept)
    with torch.no_grad(), adsc.compress(model(family), SCHEDULE):
        reduced = model(family)(**made.inputs).logits
        if name == "no_mask":
            plain = model(family)(**case(family, name).inputs).logits
            assert difference(reduced, plain, kept[-1]) > 1e-3
    assert difference(reduced, expected, kept[-1]) <= 1e-5
