"""Attach a reduction to a live transformers model, run with it, and take it off again without a trace.

A hook on the base model finds the vision tokens in the inputs and plans; a hook on the decoder lays out what each
layer will see and hands it to the layers as a keyword; a hook on each layer swaps hidden states, mask and rotary
embeddings for those of its stage; and behind the decoder's final norm everything is put back at full length. Classes
and module-level tables are never touched.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..config import ADSCConfig
from ..errors import InputError, UnsupportedModelError
from ..methods import Method, as_method
from ..planning import Plan
from ..schedule import Ratio, Schedule
from .families import check_text, family_of, has_vision, layouts, real_positions
from .views import Call, Extent, Ints, Memory, continue_call, plan_call

KEYWORD = "adsc"  # under which a call travels from the decoder to its layers
MEMORY = "_adsc_memory"  # attribute of a cache
FLASH = ("flash_attention_2", "flash_attention_3")
ATTENTION = ("eager", "sdpa", *FLASH)
IGNORED = -100  # label that losses ignore

Hooked = tuple[tuple[Any, ...], dict[str, Any]] | None


class _Thread(threading.local):
    """What belongs to one thread. A copied handle starts with none of it."""

    def __init__(self) -> None:
        self.methods: list[Method] = []
        self.plans: list[Plan] = []
        self.planned: tuple[list[Plan], list[Ints]] | None = None

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        return type(self), ()


class Handle:
    """A method attached to a model, also found as ``model.adsc``. Made by :func:`attach`.

    Attributes
    ----------
    model
        The model that it is attached to.
    num_layers
        Its decoder layers.
    """

    def __init__(self, model: PreTrainedModel, method: Method) -> None:
        self.model = model
        self._base = model.base_model
        self._family = family_of(model.config)
        self._decoder = _decoder(self._base)
        self.num_layers = len(self._decoder.layers)
        self._check(method)
        self._method = method
        self._thread = _Thread()
        self._hooks = [
            self._base.register_forward_pre_hook(self._enter_base, with_kwargs=True),
            self._base.register_forward_hook(self._leave_base, always_call=True),
            self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            self._decoder.register_forward_hook(self._leave_decoder, with_kwargs=True),
        ]
        for index, layer in enumerate(self._decoder.layers):
            hook = partial(self._enter_layer, index)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self._base is not model:
            self._hooks.append(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        setattr(model, KEYWORD, self)

    @property
    def method(self) -> Method:
        """The method that this thread's calls use."""
        return self._thread.methods[-1] if self._thread.methods else self._method

    @property
    def last_plans(self) -> list[Plan]:
        """One plan per row of this thread's latest prefill, padding not counted; empty when it reduced nothing."""
        return self._thread.plans

    @contextmanager
    def budget(self, retained: Ratio) -> Iterator[Handle]:
        """Use another budget in this block, in this thread only; ``handle.budget(1)`` is the dense model.

        Raises
        ------
        InputError
            When no schedule reaches the budget (see :meth:`adsc.Schedule.for_budget`).
        """
        method = self._method.for_budget(self.num_layers, retained)
        self._check(method)
        self._thread.methods.append(method)
        try:
            yield self
        finally:
            self._thread.methods.pop()

    def remove(self) -> None:
        """Take the method off the model. Nothing of it stays; doing it twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.model.__dict__.get(KEYWORD) is self:  # another one may have been attached since
            delattr(self.model, KEYWORD)

    def _check(self, method: Method) -> None:
        method.validate(self.num_layers)
        rope = getattr(self._decoder.config, "rope_parameters", None) or {}
        if method.positions == "compact" and rope.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"positions 'compact' with rope type {rope['rope_type']}, which depends on the length; use 'original'"
            )

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Outermost model: where labels are seen, those that no token can predict any more are masked."""
        inputs = _named(module, args, kwargs)
        targets = [name for name in ("labels", "shift_labels") if inputs.get(name) is not None]
        if not (targets and self.method.reduces and has_vision(self._family, inputs)):
            return None
        ignored = self._unpredicted(inputs)
        for name in targets:  # shifted labels stand one position to the left
            mask = ignored if name == "labels" else nn.functional.pad(ignored, (0, 1))[:, 1:]
            inputs[name] = inputs[name].masked_fill(mask.to(inputs[name].device), IGNORED)
        return (), inputs

    def _unpredicted(self, inputs: dict[str, Any]) -> Tensor:
        """``(batch, tokens)``: labels of vision tokens and padding, and labels after a token that may be dropped."""
        batch, tokens = _shape(inputs)
        real = real_positions(inputs.get("attention_mask"), batch, tokens)
        ignored = np.ones((batch, tokens), dtype=bool)
        silent = np.ones((batch, tokens), dtype=bool)
        for row, layout in enumerate(layouts(self._family, self.model.config, inputs, real)):
            ignored[row, real[row][layout.text]] = silent[row, real[row]] = False
            for span in layout.spans:
                silent[row, real[row][span[:-1] if self.method.keeps_last_token else span]] = True
        ignored[:, 1:] |= silent[:, :-1]
        return torch.from_numpy(ignored)

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Base model: ids and images are seen here, so this is where calls are planned."""
        inputs, method = _named(module, args, kwargs), self.method
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if not method.reduces:
            self._thread.plans = []
        elif has_vision(self._family, inputs):
            self._check_call(cache)
            real = real_positions(inputs.get("attention_mask"), *_shape(inputs))
            rows = layouts(self._family, self.model.config, inputs, real)
            plans = [method.plan(layout, self.num_layers) for layout in rows]
            self._thread.plans, self._thread.planned = plans, (plans, real)
        elif ids is None:
            if inputs.get("inputs_embeds") is not None and (cache is None or cache.get_seq_length() == 0):
                raise InputError("inputs_embeds may hide vision tokens; pass input_ids and pixel_values instead")
        elif ids.shape[1] > 1 and not (cache is not None and hasattr(cache, MEMORY) and cache.get_seq_length()):
            # A prompt, not candidates of assisted decoding: those found by prompt look-up may be placeholders.
            check_text(self._family, self.model.config, ids)
            self._thread.plans = []

    def _leave_base(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._thread.planned = None  # also after an error before the decoder

    def _check_call(self, cache: object) -> None:
        attention = self._decoder.config._attn_implementation
        if attention not in ATTENTION:
            raise UnsupportedModelError(f"attention {attention!r} is not supported; use one of {', '.join(ATTENTION)}")
        if cache is not None and not (type(cache) is DynamicCache and _is_plain(cache)):
            raise InputError(f"this {type(cache).__name__} cannot be reduced; use a plain DynamicCache, the default")

    def _check_packing(self, inputs: dict[str, Any], real: list[Ints], extent: Extent) -> None:
        """FlashAttention reads packed sequences off lengths or gaps in position ids, which reduced layers lack."""
        if self._decoder.config._attn_implementation not in FLASH:
            return  # the others have a mask, which is gathered
        positions = inputs.get("position_ids")
        if positions is not None and positions.ndim == 3:  # M-RoPE has a fourth axis in front for this purpose
            positions = positions[0] if len(positions) == 4 else None
        gaps = positions is not None and bool((positions.diff() != 1).any())
        if inputs.get("cu_seq_lens_q") is not None or (gaps and extent.batch == 1 and len(real[0]) == extent.tokens):
            raise InputError("packed sequences cannot be reduced with FlashAttention; pad them, or use eager or sdpa")

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Decoder: lay the call out, when it is planned or continues from a reduced cache."""
        planned, self._thread.planned = self._thread.planned, None
        inputs = _named(module, args, kwargs)
        cache = inputs.get("past_key_values")
        memory: Memory | None = getattr(cache, MEMORY, None)
        if planned is None and memory is None:
            return None
        tokens = _tokens(inputs)
        past = 0 if cache is None else cache.get_seq_length()
        if memory is not None and past == 0:  # the cache was reset
            delattr(cache, MEMORY)
            memory = None
        if cache is not None and memory is not None:
            self._check_call(cache)
            memory = _checked(memory, cache, past, len(tokens))
        batch, width = tokens.shape[:2]
        extent = Extent(batch, width, past, memory.length if memory else past, tokens.device)
        numbered = _not_padding(inputs.get("attention_mask"), extent) if self.method.positions == "compact" else None
        if planned is not None:
            self._check_packing(inputs, planned[1], extent)
            inputs[KEYWORD] = plan_call(extent, memory, *planned, self.num_layers, numbered)
        elif memory is not None:
            inputs[KEYWORD] = continue_call(extent, memory, numbered)
        return (), inputs

    def _enter_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Decoder layer: swap in what its stage sees. Runs again under checkpointing, so only the call counts."""
        call: Call | None = kwargs.pop(KEYWORD, None)
        if call is None:
            return None
        call.reached = call.reached or index == self.num_layers - 1
        view = call.views[index]
        if view is None:
            return args, kwargs
        hidden = view.advance(args[0]) if view.first == index else args[0]
        flash = self._decoder.config._attn_implementation in FLASH
        kwargs["attention_mask"] = view.mask(kwargs.get("attention_mask"), flash)
        # Rotary embeddings carry the positions. Ids with gaps would look like packed sequences to FlashAttention.
        kwargs["position_ids"] = None
        rotary = kwargs["position_embeddings"]
        if (ranks := view.ranks) is not None:
            kwargs["position_embeddings"] = view.once(rotary, lambda: self._compact_rotary(hidden, ranks))
        elif view.rows is not None:
            kwargs["position_embeddings"] = view.once(rotary, lambda: tuple(view.gather(part) for part in rotary))
        return (hidden, *args[1:]), kwargs

    def _compact_rotary(self, hidden: Tensor, ranks: Tensor) -> Any:
        if self._family.axes > 1:
            ranks = ranks.expand(self._family.axes, -1, -1)
        return self._decoder.rotary_emb(hidden, position_ids=ranks)

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Behind the final norm: full length again, and the cache learns what it holds."""
        call: Call | None = kwargs.get(KEYWORD)
        if call is None:
            return None
        if not call.reached:
            raise UnsupportedModelError(f"{type(module).__name__} does not hand keywords on to its layers")
        if output.past_key_values is not None:
            setattr(output.past_key_values, MEMORY, call.memory())
        last = call.views[-1]
        if last is None:
            return output
        output.last_hidden_state = last.restore(output.last_hidden_state)
        if output.hidden_states is not None:  # entry i is the output of layer i − 1, the last one that of the norm
            first, *inner, normed = output.hidden_states  # None where only some were asked for
            inner = [
                x if x is None or view is None else view.restore(x) for x, view in zip(inner, call.views, strict=False)
            ]
            output.hidden_states = (first, *inner, normed if normed is None else output.last_hidden_state)
        if output.attentions is not None:
            pairs = zip(output.attentions, call.views, strict=True)
            output.attentions = tuple(x if view is None else view.restore_attention(x) for x, view in pairs)
        return output


def attach(model: PreTrainedModel, method: Schedule | ADSCConfig | Method | str) -> Handle:
    """Reduce the vision tokens of a model from now on, in every way it is called.

    Parameters
    ----------
    model
        A transformers image-text-to-text model, or its base model; there no labels are seen, and so none are masked.
    method
        A schedule (or its text), an :class:`adsc.ADSCConfig`, or a method of :mod:`adsc.methods`.

    Returns
    -------
    The handle, also ``model.adsc``; ``handle.remove()`` undoes it.

    Raises
    ------
    InputError
        When the model has a method attached already, or lacks a layer of the schedule.
    UnsupportedModelError
        When the model cannot be served exactly.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} is not a transformers model; give what from_pretrained returns")
    for module in model.modules():
        if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in module._forward_pre_hooks.values()):
            raise InputError("the model has a method attached already; call remove() on its handle (model.adsc) first")
    return Handle(model, as_method(method))


@contextmanager
def compress(model: PreTrainedModel, method: Schedule | ADSCConfig | Method | str) -> Iterator[Handle]:
    """:func:`attach` for the length of a ``with`` block."""
    handle = attach(model, method)
    try:
        yield handle
    finally:
        handle.remove()


def _decoder(base: nn.Module) -> Any:
    decoder = base.get_decoder()  # type: ignore[operator]
    if decoder is base or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(f"{type(base).__name__} has no decoder with a list of layers; adsc cannot serve it")
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise UnsupportedModelError(f"{type(decoder).__name__} has no shared rotary embedding; adsc cannot serve it")
    return decoder


def _named(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward pass by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _tokens(inputs: dict[str, Any]) -> Tensor:
    tokens: Tensor = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    return tokens


def _shape(inputs: dict[str, Any]) -> tuple[int, int]:
    batch, tokens = _tokens(inputs).shape[:2]
    return batch, tokens


def _is_plain(cache: DynamicCache) -> bool:
    return not cache.offloading and all(type(layer) is DynamicLayer for layer in cache.layers)


def _not_padding(mask: Tensor | None, extent: Extent) -> Tensor:
    """Which positions of layer 0, ``(batch, past + tokens)``, hold tokens."""
    shape = extent.batch, extent.past + extent.tokens
    if mask is None or mask.shape != shape:
        return torch.ones(shape, dtype=torch.bool, device=extent.device)
    return mask.to(extent.device).bool()


def _checked(memory: Memory, cache: DynamicCache, past: int, batch: int) -> Memory:
    """The memory of a cache whose end may have been cropped; refused when it is unknown what its layers hold."""
    if (excess := memory.length - past) > 0:  # as assisted decoding does with candidates that came with the prompt
        memory = memory.cropped(excess)
    for layer, slots in enumerate(memory.slots):
        held = past if slots is None else slots.columns.shape[1] + past - memory.length
        if past < memory.length or cache.get_seq_length(layer) != held:
            raise InputError("the cache was cropped into its images or filled elsewhere; start with a new cache")
        if slots is not None and len(slots.columns) != batch:
            raise InputError(f"the cache was reduced for {len(slots.columns)} rows, but this call has {batch}")
    return memory
