"""Every attention kernel gives the same answers, within its precision."""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, modeling_flash_attention_utils

import adsc

from .oracle import decoder_of, difference, kept_positions, masked_dense
from .test_cache import OLD, grown, longer
from .tiny import CASES, CORE, KINDS, LAYERS, SCHEDULE, TINY, Batch, batch, case, model

# What transformers calls create_block_mask with.
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
STEPS = 4
KERNELS = ["eager", "sdpa", "flash", "flex_attention"]


@contextmanager
def kernel(network, name: str, compiled: bool = False):
    """The decoder's attention by this kernel, whatever the config of the whole model says; ``flash`` is PyTorch's own,
    forced."""
    decoder = decoder_of(network)
    before = decoder.config._attn_implementation
    # Set past transformers' list of models that it lets use flex attention: the decoders of all of them can.
    decoder.config._attn_implementation = "sdpa" if name == "flash" else name
    try:
        with ExitStack() as stack:
            if name == "flash":
                stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
            if name == "flex_attention" and not compiled:  # the same masks and formula, without minutes of compiling
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield network
    finally:
        decoder.config._attn_implementation = before


class Forced(LogitsProcessor):
    """Makes ``generate`` say given tokens, ``(batch, n)``, so that runs of different precision stay comparable."""

    def __init__(self, tokens: torch.Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, ids, scores):
        step = self.tokens[:, ids.shape[1] - self.start, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, step, 0)


@cache
def reference(family: str, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Four tokens, the logits of the masked dense forward pass for the prompt and for what precedes each of the four;
    and by how much those of the dense model change with bfloat16."""
    network, made = model(family), case(family, name)
    kept, length = kept_positions(made), made.inputs["input_ids"].shape[1]
    tokens = torch.arange(11, 11 + len(made.real) * STEPS).view(-1, STEPS)
    whole = masked_dense(network, grown(made, tokens[:, :-1]), longer(kept, length, length + STEPS - 1))
    rough, half = model(family, torch.bfloat16), case(family, name, torch.bfloat16)
    with torch.no_grad():
        lost = difference(rough(**half.inputs).logits.float(), network(**made.inputs).logits, made.real)
    return tokens, whole[:, :length], whole[:, length - 1 :], lost


def answers(network, made, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from a reduced model: of a plain forward pass, and of decoding on its cache."""
    inputs = {name: value.to(network.device) for name, value in made.inputs.items()}
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    forced = LogitsProcessorList([Forced(tokens, inputs["input_ids"].shape[1])])
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        prompt = network(**inputs).logits
        out = network.generate(**inputs, **options, do_sample=False, logits_processor=forced)
    assert torch.equal(out.sequences[:, -STEPS:].cpu(), tokens)
    return prompt.cpu(), torch.stack(out.logits, 1).cpu()


def check(family: str, by: str, dtype: torch.dtype, name: str, device: str = "cpu") -> None:
    tokens, prompt, steps, lost = reference(family, name)
    made, kept = case(family, name, dtype), kept_positions(case(family, name))[-1]
    network = model(family, dtype) if device == "cpu" else copy.deepcopy(model(family, dtype)).to(device)
    with kernel(network, by, compiled=device == "cuda"):
        found, decoded = answers(network, made, tokens)
    error = max(difference(found.float(), prompt, kept), float((decoded.float() - steps).abs().max()))
    exact = 1e-5 if device == "cpu" else 1e-4
    assert error <= (exact if dtype == torch.float32 else 2 * lost)


@pytest.mark.parametrize("name", ["single", "left_padding"])
@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("family", KINDS)
def test_all_kernels_agree(family, by, name):
    check(family, by, torch.float32, name)


@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("family", CORE)
def test_all_kernels_agree_in_bfloat16(family, by):
    check(family, by, torch.bfloat16, "left_padding")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("by", KERNELS)
@pytest.mark.parametrize("family", CORE)
def test_all_kernels_agree_on_a_gpu(family, by):
    check(family, by, torch.bfloat16, "single", "cuda")
    if by != "flash":  # which takes neither masks nor float32 there
        check(family, by, torch.bfloat16, "left_padding", "cuda")
        check(family, by, torch.float32, "left_padding", "cuda")


class Seen(TorchDispatchMode):
    """Notes what PyTorch's FlashAttention is called with in the language model: keys, and whether with a mask."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.keys, self.masked = heads, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "scaled_dot_product_attention_math" not in str(func)
        if "scaled_dot_product_flash_attention_for_cpu" in str(func) and args[0].shape[1] == self.heads:
            self.keys.append(args[1].shape[2])
            self.masked.append(kwargs.get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", CORE)
def test_flash_attention_gets_fewer_keys_and_no_mask(family):
    """One prompt without padding needs no mask, so neither do its reduced layers."""
    network, made = model(family), case(family, "single")
    counts = [len(rows[0]) for rows in kept_positions(made)]
    with torch.no_grad(), kernel(network, "flash"), adsc.compress(network, SCHEDULE), Seen(heads=4) as seen:
        cache = network(**made.inputs).past_key_values
        assert seen.keys == counts
        network(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert seen.keys[LAYERS:] == [count + 1 for count in counts]
    assert not any(seen.masked)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", [*CORE, "gemma3", "cohere2_vision"])
def test_flex_attention_is_exact(family, name):
    """Block masks are made anew for each stage."""
    network, made = model(family), case(family, name)
    kept = kept_positions(made)
    with torch.no_grad(), kernel(network, "flex_attention"), adsc.compress(network, SCHEDULE):
        reduced = network(**made.inputs).logits
    assert difference(reduced, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "cohere2_vision"])
def test_flex_attention_in_a_second_turn(family):
    """With padding of two kinds: in the inputs, and of rows that kept fewer tokens. An image comes in one row only."""
    if OLD and family == "gemma3":
        pytest.skip("this version takes no token_type_ids on a cache")
    network, image = model(family), TINY[family].images[0]
    turns = [batch(family, [[3, image, 5], [9]]), batch(family, [[4], [2, image, 3]], seed=1)]
    masks = torch.cat([made.inputs["attention_mask"] for made in turns], 1)
    found = []
    for by in ("eager", "flex_attention"):
        with torch.no_grad(), kernel(network, by), adsc.compress(network, SCHEDULE):
            cache = network(**turns[0].inputs).past_key_values
            logits = network(**{**turns[1].inputs, "attention_mask": masks}, past_key_values=cache).logits
            mask = torch.nn.functional.pad(masks, (0, 1), value=1)
            step = network(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=cache).logits
            found.append((logits, step))
    kept = kept_positions(turns[1])[-1]
    assert difference(found[0][0], found[1][0], kept) <= 1e-5
    assert (found[0][1] - found[1][1]).abs().max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's compiler for CPUs may make code that is not C++")
@pytest.mark.parametrize("name", ["single", "left_padding"])
def test_flex_attention_compiled(name):
    """As transformers compiles it by itself."""
    network, made = model("llava"), case("llava", name)
    kept = kept_positions(made)
    expected = masked_dense(network, made.inputs, kept)
    moved = copy.deepcopy(network).cuda()
    inputs = {key: value.cuda() for key, value in made.inputs.items()}
    with torch.no_grad(), kernel(moved, "flex_attention", compiled=True), adsc.compress(moved, SCHEDULE):
        reduced = moved(**inputs).logits.cpu()
    assert difference(reduced, expected, kept[-1]) <= 1e-3


class Flash:
    """The two kernels of the flash-attn package in plain PyTorch; everything around them is transformers' own."""

    def __init__(self) -> None:
        self.whole = self.ragged = 0

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        self.whole += 1
        queries, keys = q.shape[1], k.shape[1]
        ends = torch.arange(keys - queries, keys)[:, None]  # causal from the bottom right
        visible = torch.arange(keys) <= ends if causal else torch.ones(queries, keys, dtype=torch.bool)
        if window_size[0] >= 0:
            visible &= torch.arange(keys) >= ends - window_size[0]
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, **options
    ):
        self.ragged += 1
        outputs = []
        for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
            outputs.append(self.flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0])
        self.whole -= len(outputs)
        return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    kernels, home = Flash(), modeling_flash_attention_utils
    functions = (kernels.flash_attn_func, kernels.flash_attn_varlen_func, None, home._pad_input, home._unpad_input)
    monkeypatch.setattr(home, "_lazy_imports", lambda *args, **options: functions)
    for name in [name for name in vars(home) if name.endswith("_fn")]:
        monkeypatch.setattr(home, name, None)  # put back what was there when the test ends
    monkeypatch.setattr(home, "_loaded_implementation", None)
    return kernels


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", [*CORE, "qwen3_vl", "idefics3", "mistral3"])
def test_the_flash_attention_package(family, name, flash):
    network, made = model(family), case(family, name)
    kept = kept_positions(made)
    expected = masked_dense(network, made.inputs, kept)
    with torch.no_grad(), kernel(network, "flash_attention_2"), adsc.compress(network, SCHEDULE):
        assert difference(network(**made.inputs).logits, expected, kept[-1]) <= 1e-5
    assert flash.whole + flash.ragged == LAYERS
    ragged = {"left_padding": LAYERS, "right_padding": LAYERS, "text_beside_image": LAYERS - 1}
    assert flash.ragged == ragged.get(name, 0)  # the others may not look like packed sequences


@pytest.mark.parametrize("name", ["single", "left_padding"])
@pytest.mark.parametrize("family", [*CORE, "qwen3_vl", "idefics3", "mistral3"])
def test_decoding_with_the_flash_attention_package(family, name, flash):
    tokens, _, steps, _ = reference(family, name)
    network = model(family)
    with kernel(network, "flash_attention_2"):
        _, decoded = answers(network, case(family, name), tokens)
    assert (decoded - steps).abs().max() <= 1e-5
    assert flash.whole + flash.ragged == (1 + STEPS) * LAYERS


def talk(network, made: Batch, new: int, hand_positions_on: bool = False) -> torch.Tensor:
    """Logits of the last ``new`` tokens of one prompt, fed on the cache of what comes before."""
    length = made.inputs["input_ids"].shape[1]
    first, second = {}, {}
    for name, value in made.inputs.items():
        if value.shape == made.inputs["input_ids"].shape:
            first[name], second[name] = value[:, :-new], value[:, -new:]
        else:
            first[name] = value
    second["attention_mask"] = made.inputs["attention_mask"]
    if hasattr(network.model, "get_rope_index"):  # what a serving loop that feeds turn by turn passes along
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        positions = network.model.get_rope_index(**{name: made.inputs[name] for name in names})[0]
        first["position_ids"], second["position_ids"] = positions[..., :-new], positions[..., -new:]
    with torch.no_grad(), adsc.compress(network, SCHEDULE), ExitStack() as hooks:
        if hand_positions_on:  # what a reduced layer may not get
            gaps = torch.arange(length)[None, 5::2]

            def hand_on(module, args, kwargs):
                return args, {**kwargs, "position_ids": gaps[:, :new] if args[0].shape[1] == new else None}

            for layer in decoder_of(network).layers[1:]:
                hooks.callback(layer.register_forward_pre_hook(hand_on, with_kwargs=True).remove)
        cache = network(**first).past_key_values
        return network(**second, past_key_values=cache).logits


@pytest.mark.parametrize("family", [*CORE, "qwen3_vl", "idefics3", "mistral3"])
def test_gaps_in_positions_are_not_read_as_packed_sequences(family, flash):
    """The flash trap: transformers takes gaps in the position ids of one row for the beginnings of sequences, which in
    a second turn cuts off the keys of the first."""
    network, made = model(family), case(family, "single")
    expected = masked_dense(network, made.inputs, kept_positions(made))[:, -3:]
    with kernel(network, "flash_attention_2"):
        assert (talk(network, made, 3) - expected).abs().max() <= 1e-5
        assert flash.ragged == 0
        wrong = talk(network, made, 3, hand_positions_on=True)
    assert flash.ragged == LAYERS - 1
    assert (wrong - expected).abs().max() > 1e-2  # the trap is real


@pytest.mark.parametrize("family", CORE)
def test_packed_sequences_are_refused_with_flash_attention(family, flash):
    """There the layers read them off position ids, or off lengths, that those of a reduced stage do not have."""
    network, made = model(family), case(family, "no_mask")
    length = made.inputs["input_ids"].shape[1]
    packed = torch.cat((torch.arange(length - 4), torch.arange(4)))[None]
    plain = torch.arange(length)[None]
    if TINY[family].axes == 3:
        packed, plain = packed.expand(4, 1, -1), plain.expand(4, 1, -1)
    ends = torch.tensor([0, length - 4, length], dtype=torch.int32)
    with torch.no_grad(), kernel(network, "flash_attention_2"), adsc.compress(network, SCHEDULE):
        for wrong in ({"position_ids": packed}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}):
            with pytest.raises(adsc.InputError, match="packed sequences"):
                network(**made.inputs, **wrong)
        assert flash.whole == 0
        network(**made.inputs, position_ids=plain)
        assert flash.whole == LAYERS


@pytest.mark.parametrize("family", ["gemma3", "cohere2_vision"])
def test_sliding_windows_are_refused_with_flash_attention(family, flash):
    """It counts the keys that are left, where a window means positions."""
    network, made = model(family), case(family, "single")
    refused = pytest.raises(adsc.UnsupportedModelError, match="sliding window")
    with kernel(network, "flash_attention_2"), adsc.compress(network, SCHEDULE), torch.no_grad(), refused:
        network(**made.inputs)
    assert flash.whole == 0


def test_a_window_that_no_token_leaves_is_no_obstacle(flash):
    network, made = copy.deepcopy(model("cohere2_vision")), case("cohere2_vision", "single")
    length, kept = made.inputs["input_ids"].shape[1], kept_positions(made)
    decoder = decoder_of(network)
    decoder.config.sliding_window = length + 2
    for layer in decoder.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and length + 2
    expected = masked_dense(network, made.inputs, kept)
    greedy = {"do_sample": False, "min_new_tokens": 3}
    with torch.no_grad(), kernel(network, "flash_attention_2"), adsc.compress(network, SCHEDULE):
        assert difference(network(**made.inputs).logits, expected, kept[-1]) <= 1e-5
        network.generate(**made.inputs, **greedy, max_new_tokens=3)  # the last one is not fed back
        with pytest.raises(adsc.UnsupportedModelError, match="sliding window"):
            network.generate(**made.inputs, **greedy, max_new_tokens=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["single", "left_padding"])
@pytest.mark.parametrize("family", CORE)
def test_the_real_flash_attention_package(family, name):
    pytest.importorskip("flash_attn")
    check(family, "flash_attention_2", torch.bfloat16, name, "cuda")
