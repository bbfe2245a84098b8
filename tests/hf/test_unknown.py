"""A family that nobody described: it works where it fits the general case, and is refused where it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import adsc
from adsc.hf.families import FAMILIES

from . import tiny
from .oracle import kept_positions
from .test_cache import GREEDY, STEPS, longest, recomputed, storage_tokens
from .test_oracle import check
from .tiny import CASES, IMAGE, SCHEDULE, TINY, Image, batch, case, model


class UnknownConfig(LlavaConfig):
    model_type = "unknown_vlm"


class UnknownForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = UnknownConfig


def build() -> torch.nn.Module:
    known = TINY["llava"].build().config.to_dict()
    return UnknownForConditionalGeneration(UnknownConfig(**known | {"model_type": UnknownConfig.model_type}))


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name in the zoo."""
    llava = TINY["llava"]
    monkeypatch.setitem(TINY, "unknown", tiny.Tiny(build, llava.tokens, llava.pixels))
    assert model("unknown").config.model_type == "unknown_vlm"
    assert "unknown_vlm" not in FAMILIES
    return "unknown"


@pytest.mark.parametrize("name", CASES)
def test_it_just_works(unknown, name):
    check(unknown, case(unknown, name), torch.float32)


def test_decoding(unknown):
    network, made = model(unknown), case(unknown, "left_padding")
    with adsc.compress(network, SCHEDULE):
        out = network.generate(**made.inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, -STEPS:], recomputed(network, made)[0])
    counts = longest(kept_positions(made))
    assert storage_tokens(out.past_key_values)[1:] == [n + STEPS - 1 for n in counts[1:]]


def test_images_of_any_size(unknown):
    """A further input tells sizes: then each image is a run, and two that touch are not told apart."""
    parted, touching = (batch(unknown, [[3, Image(), *between, Image(), 2]]) for between in ([4], []))
    with torch.no_grad(), adsc.compress(model(unknown), SCHEDULE) as handle:
        with handle.planned({**parted.inputs, "image_grid": torch.ones(2, 2)}):
            model(unknown)(**parted.inputs)
            assert [len(span) for span in handle.last_plans[0].layout.spans] == [25, 25]
        with (
            pytest.raises(adsc.InputError, match="1 runs of 50 placeholders for 2 images"),
            handle.planned({**touching.inputs, "image_grid": torch.ones(2, 2)}),
        ):
            pass


@pytest.mark.parametrize(
    ("row", "split"),
    [([3, Image(), 5], 10), ([3, Image(), Image(), 2, Image(), 5], 60)],  # then there are as many runs as images
)
def test_text_inside_images(unknown, row, split):
    made = batch(unknown, [row])
    places = (made.inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    ids = made.inputs["input_ids"][0].tolist()
    ids.insert(places[split], 9)
    made.inputs = {"input_ids": torch.tensor([ids]), "pixel_values": made.inputs["pixel_values"]}
    with adsc.compress(model(unknown), SCHEDULE), pytest.raises(adsc.InputError, match="put text between images"):
        model(unknown)(**made.inputs)


@pytest.mark.parametrize("shape", [(5, 48), (5, 4, 48)])
def test_pixels_that_do_not_tell_images(unknown, shape):
    """Patches in a row: how many of them are one image's is a fact of the family."""
    made = case(unknown, "single")
    inputs = {**made.inputs, "pixel_values": torch.zeros(shape)}
    with adsc.compress(model(unknown), SCHEDULE), pytest.raises(adsc.InputError, match="adsc knows nothing more"):
        model(unknown)(**inputs)


class Weighted(LlamaDecoderLayer):
    """Takes a number for each token."""

    def forward(self, hidden_states, token_weights=None, **kwargs):
        return super().forward(hidden_states * token_weights[..., None], **kwargs)


class Shrinking(LlamaDecoderLayer):
    """Gives the first token no place."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)[:, 1:]


class Silent(LlamaModel):
    """Hands no keywords on."""

    def forward(self, inputs_embeds=None, position_ids=None, past_key_values=None, **kwargs):
        positions = torch.arange(inputs_embeds.shape[1])[None]
        rotary, hidden = self.rotary_emb(inputs_embeds, position_ids=positions), inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        output = super().forward(inputs_embeds=inputs_embeds, use_cache=False)
        output.last_hidden_state = self.norm(hidden)
        return output


class Stacked(LlamaModel):
    """Adds to the hidden states of all tokens behind layer 2, as DeepStack does, and no config says so."""

    def forward(self, inputs_embeds=None, **kwargs):
        def add(layer, args, kwargs):
            return (args[0] + torch.linspace(0, 1, inputs_embeds.shape[1])[:, None], *args[1:]), kwargs

        # Put in front of the engine's own hook, which gets what a decoder's loop would hand on.
        hook = self.layers[3].register_forward_pre_hook(add, with_kwargs=True, prepend=True)
        try:
            return super().forward(inputs_embeds=inputs_embeds, **kwargs)
        finally:
            hook.remove()


def other(unknown, layer=None, decoder=None) -> torch.nn.Module:
    network = copy.deepcopy(model(unknown))
    if decoder is not None:
        network.model.language_model.__class__ = decoder
    if layer is not None:
        network.model.language_model.layers[2].__class__ = layer
    return network


def test_layers_that_take_something_unknown_for_each_token(unknown):
    network, made = other(unknown), case(unknown, "single")
    for layer in network.model.language_model.layers:
        layer.__class__ = Weighted
    weights = torch.rand(made.inputs["input_ids"].shape)
    with torch.no_grad():
        assert (
            network(**made.inputs, token_weights=weights).logits
            != network(**made.inputs, token_weights=2 * weights).logits
        ).any()
        with adsc.compress(network, SCHEDULE), pytest.raises(adsc.UnsupportedModelError, match="takes token_weights"):
            network(**made.inputs, token_weights=weights)


def test_a_decoder_that_hands_no_keywords_on(unknown):
    network, made = other(unknown, decoder=Silent), case(unknown, "single")
    with torch.no_grad():
        network(**made.inputs)
        with (
            adsc.compress(network, SCHEDULE),
            pytest.raises(adsc.UnsupportedModelError, match="does not hand keywords"),
        ):
            network(**made.inputs)


@pytest.mark.parametrize("name", ["single", "text_beside_image"])
def test_a_layer_that_changes_the_number_of_tokens(unknown, name):
    network, made = other(unknown, layer=Shrinking), case(unknown, name)
    refused = pytest.raises(adsc.UnsupportedModelError, match="Shrinking")
    with torch.no_grad(), adsc.compress(network, SCHEDULE), refused:
        network(**made.inputs)


@pytest.mark.parametrize("name", ["single", "text_beside_image"])
def test_hidden_states_that_change_between_layers(unknown, name):
    """Torch itself refuses to add numbers of all tokens to those that stayed, unless a row of text keeps them all."""
    network, made = other(unknown, decoder=Stacked), case(unknown, name)
    kind, words = (RuntimeError, "size") if name == "single" else (adsc.UnsupportedModelError, "between layers 2 and 3")
    with torch.no_grad():
        network(**made.inputs)
        with adsc.compress(network, SCHEDULE), pytest.raises(kind, match=words):
            network(**made.inputs)
