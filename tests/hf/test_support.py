"""Every class mapped to AutoModelForImageTextToText is under test in the zoo, or refused with its reason."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPED

import adsc
from adsc.hf.families import FAMILIES, family_of

from .tiny import SCHEDULE, TINY, case, model
from .zoo.glm import build_dots3_note, build_minimax_m3_vl

ENCODER_DECODER = "encoder-decoder"
CROSS_ATTENTION = "cross-attention"
NO_VISION_TOKENS = "no vision tokens in the sequence"
LINEAR = "linear attention"
INDEXER = "an indexer that picks keys"
ALTUP = "several hidden states of each token"
OWN_CACHE = "a cache of their own"
NOT_CAUSAL = "no causal generation"

# Model type → words of the error line.
REFUSED = {
    **dict.fromkeys(
        ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), ENCODER_DECODER
    ),
    **dict.fromkeys(("blip", "idefics", "mllama"), CROSS_ATTENTION),
    **dict.fromkeys(("evolla", "git", "kosmos-2", "kosmos-2.5", "mistral4", "pi0"), NO_VISION_TOKENS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), LINEAR),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl", "inkling_mm_model", "inkling2", "nemotron_h_omni"), LINEAR),
    **dict.fromkeys(("glm5_next", "qwen4_exp"), f"{INDEXER} and {LINEAR}"),
    **dict.fromkeys(("dots3_note", "mistral_large4"), INDEXER),
    "gemma3n": ALTUP,
    "unlimited_ocr": OWN_CACHE,
    "diffusion_gemma": NOT_CAUSAL,
}
# Types that are served, but not every checkpoint or call of theirs.
NOTES = {
    "fast_vlm": "its vision tower comes from the package timm; another one stands in for it in the tests",
    "perception_lm": "its vision tower comes from the package timm; another one stands in for it in the tests",
    "gemma4": "E2B and E4B reduce no later than at the layer whose keys and values their last layers use",
    "minimax_m3_vl": "layers with block-sparse attention (minimax_m3_sparse) are refused",
    "exaone4_5": "generate with a video needs handle.planned(inputs): features computed beforehand do not tell frames",
    "hyperclovax_vision_v2": "generate with a video needs handle.planned(inputs): features computed beforehand do not "
    "tell frames",
    "gemma4-shared": "Gemma 4 whose last layer shares keys and values, as in E2B and E4B",
    "llama4": "sequences of 8192 tokens and more are refused: from there on it scales attention by position",
    "phi4_multimodal": "not mapped to AutoModelForImageTextToText by this version of transformers",
    "blip-2": "generate needs handle.planned(inputs): it runs the language model by itself",
    "instructblip": "generate needs handle.planned(inputs): it runs the language model by itself",
    "instructblipvideo": "generate needs handle.planned(inputs): it runs the language model by itself",
}


def smallest(name: str) -> transformers.PreTrainedConfig:
    """The default config of a type, or where that is none, one as checkpoints have it."""
    kind = CONFIG_MAPPING[name]
    if name == "vision-encoder-decoder":
        return kind.from_encoder_decoder_configs(transformers.ViTConfig(), transformers.GPT2Config())
    if name == "lfm2_vl":  # all layers of the default have full attention
        return kind(text_config={"model_type": "lfm2", "full_attn_idxs": [2, 5, 8, 10, 12, 14]})
    return kind()


def refusal(config: transformers.PreTrainedConfig) -> str:
    with pytest.raises(adsc.UnsupportedModelError) as caught:
        family_of(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & MAPPED.keys()))
def test_refused_with_its_reason(name):
    line = refusal(smallest(name))
    assert line.startswith(f"{name} ")
    assert REFUSED[name] in line


def with_sparse_layers():
    network = build_minimax_m3_vl()
    network.config.text_config.layer_types[3] = "minimax_m3_sparse"
    return network


@pytest.mark.parametrize(
    ("name", "build", "words"),
    [
        ("minimax_m3_vl", with_sparse_layers, OWN_CACHE),
        ("dots3_note", build_dots3_note, INDEXER),
    ],
)
def test_some_checkpoints_of_a_type_are_refused(name, build, words):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    network = build()
    assert words in refusal(network.config)
    with pytest.raises(adsc.UnsupportedModelError, match=words):
        adsc.attach(network, SCHEDULE)


def test_llama_4_from_8192_tokens_on():
    assert transformers.Llama4Config().text_config.floor_scale == 8192
    made, network = case("llama4", "single"), copy.deepcopy(model("llama4"))
    with adsc.compress(network, SCHEDULE):
        network(**made.inputs)
        network.config.text_config.floor_scale = 16
        with pytest.raises(adsc.UnsupportedModelError, match="scales attention by position from 16 tokens on"):
            network(**made.inputs)


@pytest.mark.parametrize("name", ["blip-2", "instructblip", "instructblipvideo"])
def test_models_that_run_their_language_model_in_generate(name):
    with adsc.compress(model(name), SCHEDULE), pytest.raises(adsc.InputError, match=r"handle\.planned"):
        model(name).generate(**case(name, "single").inputs, max_new_tokens=2)


def test_what_the_notes_say():
    assert NOTES.keys() & CONFIG_MAPPING.keys() <= TINY.keys()
    assert "phi4_multimodal" not in MAPPED
    for name in ("fast_vlm", "perception_lm"):
        assert CONFIG_MAPPING[name]().vision_config.model_type == "timm_wrapper"


def test_nothing_is_left_out():
    assert not REFUSED.keys() & TINY.keys()
    untested = (MAPPED.keys() | FAMILIES.keys() & CONFIG_MAPPING.keys()) - TINY.keys() - REFUSED.keys()
    # It cannot be tested with old versions: there images without attention mask are read as packed sequences.
    assert untested == ({"cosmos3_edge"} if Version(transformers.__version__) < Version("5.20") else set())
    assert len(TINY) >= 60


PAGE = (Path(__file__).parents[2] / "docs" / "support.md").read_text()


def test_the_table_is_that_of_these_tests():
    version = re.search(r"transformers (\S+)\.$", PAGE, re.MULTILINE)[1]
    if version != transformers.__version__:
        pytest.skip(f"the table is that of transformers {version}")
    rows = re.findall(r"^\| `([^`]*)` \|(.*)\|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == sorted(TINY) + sorted(REFUSED)
    counted = sum(int(n) for _, cells in rows for n in re.findall(r"✓ (\d+)", cells))
    served = sum(name in CONFIG_MAPPING for name in TINY)
    assert f"{served} model types are served: **{counted} checks passed, 0 failed, 0 skipped**" in PAGE
    assert f"**{len(REFUSED)} types are refused**" in PAGE
    for name, cells in rows[: len(TINY)]:
        counts = [cell.strip() for cell in cells.split("|")][3:]
        assert counts == ["✓ 6", "✓ 1", "✓ 1", "✓ 1" if TINY[name].video else "–", "✓ 2", "✓ 1", "✓ 1"], name
    for name, cells in rows[len(TINY) :]:
        assert REFUSED[name] in cells
        assert cells.endswith("| ⊘ 1 ")
    for note in NOTES.values():
        assert note in PAGE
