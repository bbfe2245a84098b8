"""Attach a reduction to a live transformers model, run with it, and take it off again without a trace.

A hook on the base model finds the vision tokens in the inputs and plans; a hook on the decoder lays out what each
layer will see and hands it to the layers as a keyword; a hook on each layer swaps hidden states, mask and rotary
embeddings for those of its stage; and behind the decoder's final norm everything is put back at full length. Classes
and module-level tables are never touched.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import ADSCConfig
from ..errors import InputError, UnsupportedModelError
from ..layout import Layout
from ..methods import Method, as_method
from ..planning import Plan
from ..schedule import Ratio, Schedule
from . import caches
from .decoders import decoder_of, sources, whole_until, windows
from .families import FAMILIES, family_of
from .spans import check_text, has_vision, layouts, real_positions, row_layout, spans_of_rows
from .views import Call, Extent, Ints, choose, continue_call, plan_call, remember

KEYWORD = "adsc"  # under which a call travels from the decoder to its layers
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
ATTENTION = ("eager", "sdpa", "flex_attention", *FLASH)
PER_TOKEN = ("per_layer_input", "moe_mm_token_type_ids")  # inputs of layers, besides those below, that tokens have each
SWAPPED = ("hidden_states", "attention_mask", "position_ids", "position_embeddings")
IGNORED = -100  # label that losses ignore

Hooked = tuple[tuple[Any, ...], dict[str, Any]] | None


class _Planned:
    """What is known of a call before its decoder runs: where the tokens of each row are, and which of them stay."""

    def __init__(
        self, real: list[Ints], rows: list[Layout], plans: list[Plan], tokens: int, device: torch.device
    ) -> None:
        self.real, self.rows, self.plans, self.tokens, self.device = real, rows, plans, tokens, device
        self.chosen = choose(plans, real, tokens, device)

    def repeated(self, times: int) -> _Planned:
        """Every row so many times in a row, as beams and samples need it."""
        if times == 1:
            return self
        real, rows, plans = (
            [item for item in items for _ in range(times)] for items in (self.real, self.rows, self.plans)
        )
        return _Planned(real, rows, plans, self.tokens, self.device)  # type: ignore[arg-type]


class _Ahead(NamedTuple):
    """A prompt planned before the model is called."""

    batch: int
    ids: Tensor | None
    planned: _Planned


class _State:
    """What belongs to one thread."""

    def __init__(self) -> None:
        self.methods: list[Method] = []
        self.plans: list[Plan] = []
        self.inside = False  # whether the base model is running
        self.planned: _Planned | None = None  # from the base model to its decoder
        self.ahead: _Ahead | None = None  # before the model is called
        self.before: _Ahead | None = None  # the same of the user, while a hook has put its own there
        self.own = False  # whether it has


class _Thread(threading.local):
    """A state for each thread, in an object of its own: graphs may change that. A copied handle starts with none."""

    def __init__(self) -> None:
        self.state = _State()

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        return type(self), ()


class _Forward:
    """The outermost model's ``forward``: where labels are seen, those that no token can predict any more are masked.

    No hook, since wrappers (PEFT, for one) call ``forward`` and pass hooks by.
    """

    def __init__(self, handle: Handle, forward: Any) -> None:
        self.handle, self.__wrapped__ = handle, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(**self.handle._without_labels(_named(self.__wrapped__, args, kwargs)))


class Handle:
    """A method attached to a model, also found as ``model.adsc``. Made by :func:`attach`.

    Attributes
    ----------
    model
        The model that it is attached to.
    num_layers
        Its decoder layers.
    """

    def __init__(self, model: PreTrainedModel, method: Method, compiled: nn.Module | None = None) -> None:
        self.model = model
        self._base = model.base_model
        self._family = family_of(model.config)
        self._decoder = decoder_of(self._base)
        self.num_layers = len(self._decoder.layers)
        self._known = model.config.model_type in FAMILIES
        self._whole_until = whole_until(model.config)
        self._windows = windows(self._decoder.config)
        self._sources = sources(self._decoder.config)
        self._parameters = list(inspect.signature(type(self._decoder.layers[0]).forward).parameters)[1:]
        self._others = [name for name in self._parameters if name not in SWAPPED]
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
            enter, leave = partial(self._enter_layer, index), partial(self._leave_layer, index)
            self._hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            if index < self._whole_until or not self._known:
                self._hooks.append(layer.register_forward_hook(leave, with_kwargs=True, prepend=True))
        if compiled is not None:
            self._hooks += [
                compiled.register_forward_pre_hook(self._enter_compiled, with_kwargs=True),
                compiled.register_forward_hook(self._leave_compiled, always_call=True),
            ]
        if "labels" in inspect.signature(model.forward).parameters:
            model.forward = _Forward(self, model.forward)
        setattr(model, KEYWORD, self)

    @property
    def method(self) -> Method:
        """The method that this thread's calls use."""
        return self._thread.state.methods[-1] if self._thread.state.methods else self._method

    @property
    def last_plans(self) -> list[Plan]:
        """One plan per row of this thread's latest prefill, padding not counted; empty when it reduced nothing."""
        return self._thread.state.plans

    @contextmanager
    def using(self, method: Schedule | ADSCConfig | Method | str) -> Iterator[Handle]:
        """Use another method, or another schedule, in this block, in this thread only.

        Raises
        ------
        InputError
            When the model lacks a layer of the schedule.
        """
        method = as_method(method)
        self._check(method)
        if method.reduces and self._thread.state.ahead is not None and not self._thread.state.own:
            raise InputError("the prompt is planned already; say handle.planned(...) inside of handle.budget(...)")
        methods = self._thread.state.methods
        methods.append(method)
        try:
            yield self
        finally:
            methods.pop()

    @contextmanager
    def budget(self, retained: Ratio) -> Iterator[Handle]:
        """Use another budget in this block, in this thread only; ``handle.budget(1)`` is the dense model.

        Raises
        ------
        InputError
            When no schedule reaches the budget (see :meth:`adsc.Schedule.for_budget`), and inside :meth:`planned`.
        """
        with self.using(self._method.for_budget(self.num_layers, retained)):
            yield self

    @contextmanager
    def planned(
        self, inputs: Mapping[str, Any], spans: Sequence[Iterable[Any]] | Tensor | None = None
    ) -> Iterator[Handle]:
        """Plan before the model is called, for the prompts of this block, in this thread only.

        A compiled forward pass needs it, because planning reads numbers that its graph cannot know; and so does a
        prompt of ``inputs_embeds`` alone, where nothing tells which embeddings are vision tokens. Other prompts are not
        mistaken for it by their ids; inside a graph, and as embeddings, by their length alone.

        Parameters
        ----------
        inputs
            What the model will be called with.
        spans
            Where they are, when ``inputs`` do not tell: of each row its spans, padding counted in positions, as
            :func:`adsc.plan` takes them; or a mask ``(batch, tokens)``, where 0 is text and every other number a
            span (of a boolean mask: every run).

        Raises
        ------
        InputError
            When spans are not inside the rows.
        """
        batch, tokens = _shape(inputs)
        real = real_positions(inputs.get("attention_mask"), batch, tokens)
        if spans is None:
            rows = layouts(self._family, self.model.config, inputs, real)
        else:
            rows = [row_layout(places, found) for places, found in zip(real, spans_of_rows(spans, batch), strict=True)]
        before = self._thread.state.ahead
        self._thread.state.ahead = _Ahead(batch, inputs.get("input_ids"), self._plan(real, rows, inputs))
        try:
            yield self
        finally:
            self._thread.state.ahead = before

    def remove(self) -> None:
        """Take the method off the model. Nothing of it stays; doing it twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.model.__dict__.get(KEYWORD) is self:  # another one may have been attached since
            delattr(self.model, KEYWORD)
        forward = self.model.__dict__.get("forward")
        if isinstance(forward, _Forward) and forward.handle is self:  # if not, somebody wrapped it: it passes on
            if forward.__wrapped__ == type(self.model).forward.__get__(self.model):
                del self.model.forward
            else:
                self.model.forward = forward.__wrapped__

    def _check(self, method: Method) -> None:
        method.validate(self.num_layers)
        shared = min((source for layer, source in enumerate(self._sources) if source != layer), default=self.num_layers)
        last = method.plan(Layout(2, [(0, 1)], [(1, 1)]), self.num_layers).stages[-1].start
        if last > shared:
            raise UnsupportedModelError(
                f"the last layers of {self.model.config.model_type} use the keys and values of layer {shared}, so they "
                f"have to hold the same tokens; reduce at layers up to {shared}, not at {last}"
            )
        rope = getattr(self._decoder.config, "rope_parameters", None) or {}
        if method.positions == "compact":
            rotary = [name for name, _ in self._decoder.named_children() if name.startswith("rotary")]
            if rotary != ["rotary_emb"]:
                raise UnsupportedModelError(
                    f"positions 'compact' need one rotary embedding, but {type(self._decoder).__name__} has "
                    f"{len(rotary)}; use 'original'"
                )
            if rope.get("rope_type") in ("dynamic", "longrope"):
                raise UnsupportedModelError(
                    f"positions 'compact' with rope type {rope['rope_type']}, which depends on the length; "
                    "use 'original'"
                )

    def _plan(self, real: list[Ints], rows: list[Layout], inputs: Mapping[str, Any]) -> _Planned:
        plans = [self.method.plan(layout, self.num_layers) for layout in rows]
        tokens = _tokens(inputs)
        return _Planned(real, rows, plans, tokens.shape[1], tokens.device)

    def _ahead(self, inputs: Mapping[str, Any]) -> _Planned | None:
        """What the user had planned, if it is for this call."""
        if self._thread.state.ahead is None:
            return None
        batch, ids, planned = self._thread.state.ahead
        rows, length = _shape(inputs)
        cache, given = inputs.get("past_key_values"), inputs.get("input_ids")
        if length != planned.tokens or rows % batch or (cache is not None and cache.get_seq_length()):
            return None
        if ids is None or given is None or torch.compiler.is_compiling():
            return planned.repeated(rows // batch)
        if not torch.equal(ids.to(given.device).repeat_interleave(rows // batch, 0), given):
            return None
        return planned.repeated(rows // batch)

    def _enter_compiled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of a compiled model: what its graph cannot do."""
        inputs, state = _named(self.model.forward, args, kwargs), self._thread.state
        if not state.own:  # an interrupted call may have left its own
            state.before, state.own = state.ahead, True
        state.ahead = state.before
        if self.method.reduces and self._ahead(inputs) is None:
            state.ahead = None  # the graph knows a prompt by its length alone
            if has_vision(self._family, inputs):
                state.ahead = _Ahead(len(_tokens(inputs)), inputs.get("input_ids"), self._plan_call(inputs))

    def _leave_compiled(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state = self._thread.state
        if state.own:
            state.ahead, state.before, state.own = state.before, None, False

    def _without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the outermost model with those labels ignored that no token can predict any more."""
        targets = [name for name in ("labels", "shift_labels") if inputs.get(name) is not None]
        if not (targets and self._hooks and self.method.reduces):
            return inputs
        if self._ahead(inputs) is None and not has_vision(self._family, inputs):
            return inputs
        ignored = self._unpredicted(inputs)
        for name in targets:  # shifted labels stand one position to the left
            mask = ignored if name == "labels" else nn.functional.pad(ignored, (0, 1))[:, 1:]
            inputs[name] = inputs[name].masked_fill(mask.to(inputs[name].device), IGNORED)
        return inputs

    def _unpredicted(self, inputs: dict[str, Any]) -> Tensor:
        """``(batch, tokens)``: labels of vision tokens and padding, and labels after a token that may be dropped."""
        batch, tokens = _shape(inputs)
        planned = self._ahead(inputs) or self._plan_call(inputs)
        ignored = np.ones((batch, tokens), dtype=bool)
        silent = np.ones((batch, tokens), dtype=bool)
        for row, (places, layout) in enumerate(zip(planned.real, planned.rows, strict=True)):
            ignored[row, places[layout.text]] = silent[row, places] = False
            for span in layout.spans:
                silent[row, places[span[:-1] if self.method.keeps_last_token else span]] = True
        ignored[:, 1:] |= silent[:, :-1]
        return torch.from_numpy(ignored)

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Base model: ids and images are seen here, so this is where calls are planned."""
        # Hooks behind a module do not run after an interrupt from the keyboard, so something may be left from before.
        self._thread.state.inside, self._thread.state.planned = True, None
        inputs, method = _named(module.forward, args, kwargs), self.method
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if not method.reduces:
            self._thread.state.plans = []
        elif (ahead := self._ahead(inputs)) is not None:
            self._check_call(cache)
            self._thread.state.plans, self._thread.state.planned = ahead.plans, ahead
        elif has_vision(self._family, inputs):
            self._check_call(cache)
            planned = self._plan_call(inputs)
            self._thread.state.plans, self._thread.state.planned = planned.plans, planned
        elif ids is None:
            self._check_embeds(inputs)
        elif ids.shape[1] > 1 and not (cache is not None and _is_reduced(cache) and cache.get_seq_length()):
            # A prompt, not candidates of assisted decoding: those found by prompt look-up may be placeholders.
            if not torch.compiler.is_compiling():
                check_text(self._family, self.model.config, ids)
            self._thread.state.plans = []

    def _check_embeds(self, inputs: dict[str, Any]) -> None:
        cache = inputs.get("past_key_values")
        if inputs.get("inputs_embeds") is not None and (cache is None or cache.get_seq_length() == 0):
            raise InputError(
                "inputs_embeds may hide vision tokens; pass input_ids and pixel_values, or say where the vision tokens "
                "are: with handle.planned(inputs, spans)"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _plan_call(self, inputs: dict[str, Any]) -> _Planned:
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        real = real_positions(inputs.get("attention_mask"), *_shape(inputs), past)
        return self._plan(real, layouts(self._family, self.model.config, inputs, real), inputs)

    def _leave_base(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._thread.state.inside, self._thread.state.planned = False, None  # also after an error before the decoder

    def _check_call(self, cache: object) -> None:
        attention = self._decoder.config._attn_implementation
        if attention not in ATTENTION:
            raise UnsupportedModelError(f"attention {attention!r} is not supported; use one of {', '.join(ATTENTION)}")
        if cache is not None:
            caches.check(cache)

    def _check_length(self, extent: Extent) -> None:
        """Llama 4 scales the queries of layers without rotary embeddings by their place among the keys they have."""
        config, length = self._decoder.config, extent.past + extent.tokens
        if getattr(config, "attn_temperature_tuning", False) and length >= config.floor_scale:
            raise UnsupportedModelError(
                f"{config.model_type} scales attention by position from {config.floor_scale} tokens on, so a sequence "
                f"of {length} cannot be reduced exactly"
            )

    def _check_flash(self, inputs: dict[str, Any], planned: _Planned | None, extent: Extent) -> None:
        """FlashAttention has no mask: it counts keys where windows mean positions, and reads packed sequences off
        lengths or gaps in position ids, which reduced layers lack."""
        if self._decoder.config._attn_implementation not in FLASH:
            return  # the others have a mask, which is gathered
        window = min(filter(None, self._windows), default=None)
        if window is not None and extent.past + extent.tokens > window:
            raise UnsupportedModelError(
                f"FlashAttention counts the kept tokens of a sliding window ({window}), not their positions, so a "
                f"sequence of {extent.past + extent.tokens} cannot be reduced exactly; use sdpa"
            )
        if planned is None:
            return
        positions = inputs.get("position_ids")
        if positions is not None and positions.ndim == 3:  # M-RoPE has a fourth axis in front for this purpose
            positions = positions[0] if len(positions) == 4 else None
        gaps = positions is not None and bool((positions.diff() != 1).any())
        whole = extent.batch == 1 and len(planned.real[0]) == extent.tokens
        if inputs.get("cu_seq_lens_q") is not None or (gaps and whole):
            raise InputError("packed sequences cannot be reduced with FlashAttention; pad them, or use eager or sdpa")

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Decoder: lay the call out, when it is planned or continues from a reduced cache."""
        planned, self._thread.state.planned = self._thread.state.planned, None
        inputs = _named(module.forward, args, kwargs)
        cache = inputs.get("past_key_values")
        if (
            not self._thread.state.inside and self.method.reduces
        ):  # generate of BLIP-2, for one, runs its language model
            planned = self._ahead(inputs)
            if planned is not None or not _is_reduced(cache):  # a decoding step leaves the plans of its prompt
                self._thread.state.plans = planned.plans if planned else []
            if planned is not None:
                self._check_call(cache)
            elif inputs.get("input_ids") is None and not _is_reduced(cache):
                self._check_embeds(inputs)
        if planned is None and not _is_reduced(cache):
            return None
        tokens = _tokens(inputs)
        batch, width = tokens.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if planned is not None:
            extent = Extent(batch, width, int(past), tokens.device)
            self._check_held(cache, extent, self.method.positions)
            self._check_length(extent)
            self._check_flash(inputs, planned, extent)
            numbered = _not_padding(inputs.get("attention_mask"), extent) if self._renumbers(cache) else None
            inputs[KEYWORD] = plan_call(extent, cache, planned.chosen, self._sources, numbered)
        else:
            extent = Extent(batch, width, past, tokens.device)
            self._check_call(cache)
            self._check_held(cache, extent)
            self._check_length(extent)
            self._check_flash(inputs, None, extent)
            real = partial(_not_padding, inputs.get("attention_mask"), extent)
            inputs[KEYWORD] = continue_call(extent, cache, self._sources, real)
        if "logits_to_keep" in inputs and self._sources[-1] != self.num_layers - 1:
            inputs["logits_to_keep"] = 0  # the decoder would leave tokens out where keys begin to be shared
        return (), inputs

    def _renumbers(self, cache: Any) -> bool:
        compact = self.method.positions == "compact"
        if compact and getattr(cache, "is_compileable", False):
            raise InputError("positions 'compact' cannot be had with a static cache; use a dynamic one, or 'original'")
        return compact

    def _check_held(self, cache: Any, extent: Extent, positions: str | None = None) -> None:
        for layer in range(self.num_layers):
            held = caches.held(cache, layer)
            if held is None:
                continue
            if len(held.columns) != extent.batch:
                raise InputError(
                    f"the cache was reduced for {len(held.columns)} rows, but this call has {extent.batch}"
                )
            if positions is not None and held.compact != (positions == "compact"):
                raise InputError(
                    f"positions {positions!r} cannot go on where the cache has others; start with a new cache"
                )
            if isinstance(extent.past, int) and cache.layers[layer].get_seq_length() != extent.past:
                raise InputError("a call on this cache failed halfway through its layers; start with a new cache")

    def _enter_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Decoder layer: swap in what its stage sees. Runs again under checkpointing, so only the call counts."""
        call: Call | None = kwargs.get(KEYWORD)
        if call is None:
            return None
        kwargs = {**kwargs, **dict(zip(self._parameters[1:], args[1:], strict=False))}
        if index >= self._whole_until and self._known:  # if not, it is needed once more when the layer is left
            del kwargs[KEYWORD]
        if call.output is not None and call.left == index - 1 and call.output != _state(args[0]):
            raise UnsupportedModelError(
                f"{type(self._decoder).__name__} changes hidden states between layers {index - 1} and {index}, where "
                "it would have to know which tokens stayed"
            )
        call.reached = call.reached or index == self.num_layers - 1
        view = call.views[index]
        if view is None:
            return args[:1], kwargs
        part = view.part
        hidden = part.enter(args[0], index, whole=index <= self._whole_until)
        flash = self._decoder.config._attn_implementation in FLASH
        kwargs["attention_mask"] = view.mask(kwargs.get("attention_mask"), flash)
        # Rotary embeddings carry the positions. Ids with gaps would look like packed sequences to FlashAttention.
        kwargs["position_ids"] = None
        rotary = kwargs.get("position_embeddings")  # absent where positions are added to the embeddings
        tensor = rotary[0] if isinstance(rotary, tuple) else rotary
        if (ranks := part.ranks) is not None and rotary is not None:
            kwargs["position_embeddings"] = view.once(tensor, lambda: self._compact_rotary(index, hidden, ranks))
        elif part.rows is not None and rotary is not None:
            kwargs["position_embeddings"] = view.once(tensor, lambda: _each(part.gather, rotary))
        if part.rows is not None:
            for name in self._others:
                if isinstance(value := kwargs.get(name), Tensor):
                    if name not in PER_TOKEN:
                        raise UnsupportedModelError(f"{type(layer).__name__} takes {name}, which adsc does not know")
                    kwargs[name] = part.gather(value) if value.ndim > 2 else part.gather(value[..., None])[..., 0]
        return (hidden,), kwargs

    def _leave_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """A layer behind which the decoder touches hidden states itself: it expects all of them. In a family that
        nobody described it must not touch them."""
        call: Call | None = kwargs.get(KEYWORD)
        if call is None:
            return None
        if index >= self._whole_until:
            out = out[0] if isinstance(out, tuple) else out
            if out.shape != args[0].shape:
                raise UnsupportedModelError(
                    f"{type(layer).__name__} makes {tuple(out.shape)} out of {tuple(args[0].shape)}; adsc serves "
                    "layers that keep (batch, tokens, features)"
                )
            call.left, call.output = index, None if torch.compiler.is_compiling() else _state(out)
            return None
        view = call.views[index]
        return None if view is None or view.part.rows is None else view.part.restore(out)

    def _compact_rotary(self, index: int, hidden: Tensor, ranks: Tensor) -> Any:
        rotary, config = self._decoder.rotary_emb, self._decoder.config
        if self._family.axes > 1:
            ranks = ranks.expand(self._family.axes, -1, -1)
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, ranks, config.layer_types[index])
        return rotary(hidden, position_ids=ranks)

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Behind the final norm: full length again, and the cache learns what it holds."""
        call: Call | None = kwargs.get(KEYWORD)
        if call is None:
            return None
        if not call.reached:
            raise UnsupportedModelError(f"{type(module).__name__} does not hand keywords on to its layers")
        cache = kwargs.get("past_key_values")
        cache = output.past_key_values if cache is None else cache  # use_cache=False fills a given one all the same
        if call.planned and cache is not None:
            remember(call, cache)
        last = call.views[-1]
        if last is None:
            return output
        output.last_hidden_state = last.part.restore(output.last_hidden_state)
        if output.hidden_states is not None:  # entry i is the output of layer i − 1, the last one that of the norm
            first, *inner, normed = output.hidden_states  # None where only some were asked for
            inner = [
                x if x is None or view is None or index < self._whole_until else view.part.restore(x)
                for index, (x, view) in enumerate(zip(inner, call.views, strict=False))
            ]
            output.hidden_states = (first, *inner, normed if normed is None else output.last_hidden_state)
        if output.attentions is not None:
            pairs = zip(output.attentions, call.views, strict=True)
            output.attentions = tuple(x if view is None else view.restore_attention(x) for x, view in pairs)
        return output


def attach(model: Any, method: Schedule | ADSCConfig | Method | str) -> Handle:
    """Reduce the vision tokens of a model from now on, in every way it is called.

    Parameters
    ----------
    model
        A transformers image-text-to-text model, or its base model; there no labels are seen, and so none are masked.
        One that is wrapped by PEFT or ``torch.compile`` is found inside; a compiled one then plans outside its graph.
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
    compiled = model if isinstance(model, torch._dynamo.OptimizedModule) else None
    inner = model if compiled is None else compiled._orig_mod
    if hasattr(inner, "get_base_model"):  # PEFT
        inner = inner.get_base_model()  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} is not a transformers model; give what from_pretrained returns")
    for module in inner.modules():
        if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in module._forward_pre_hooks.values()):
            raise InputError("the model has a method attached already; call remove() on its handle (model.adsc) first")
    return Handle(inner, as_method(method), compiled)


@contextmanager
def compress(model: Any, method: Schedule | ADSCConfig | Method | str) -> Iterator[Handle]:
    """:func:`attach` for the length of a ``with`` block."""
    handle = attach(model, method)
    try:
        yield handle
    finally:
        handle.remove()


def _named(forward: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward pass by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs}


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    tokens: Tensor = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    return tokens


def _shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    batch, tokens = _tokens(inputs).shape[:2]
    return batch, tokens


def _each(gather: Any, rotary: Any) -> Any:
    return tuple(map(gather, rotary)) if isinstance(rotary, tuple) else gather(rotary)


def _state(x: Tensor) -> tuple[object, ...]:
    """Tells whether a tensor is another one by now, or was changed in place (which inference mode does not count)."""
    return x.shape, x.data_ptr(), None if x.is_inference() else x._version


def _is_reduced(cache: Any) -> bool:
    return cache is not None and any(getattr(layer, "held", None) is not None for layer in cache.layers)


def _not_padding(mask: Any, extent: Extent) -> Tensor:
    """Which positions of layer 0, ``(batch, past + tokens)``, hold tokens."""
    length = extent.past + extent.tokens
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < length:
        return torch.ones((extent.batch, length), dtype=torch.bool, device=extent.device)
    return mask[:, :length].to(extent.device).bool()
