"""Caches whose layers hold fewer tokens than were fed in.

The layers of a stage that was reduced give way to one of the classes below, which know the original positions that they
hold. Outwards they speak of every token that was fed in, as a dense cache does, so masks, positions and decoding
loops of transformers stay right; inside they store what was kept and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.cache_utils as hf
from torch import Tensor

from ..errors import InputError, UnsupportedModelError


class Held:
    """The original positions that the cache layers of one stage hold. The layers of a stage share one object.

    Parameters
    ----------
    columns
        ``(batch, m)``, −1 for the padding of rows that kept fewer tokens than others.
    length
        Positions of layer 0 that ``columns`` speaks of. Every token fed in later is held by every layer.
    padded
        Whether there is any padding.
    compact
        Whether kept tokens were given new positions.
    """

    def __init__(self, columns: Tensor, length: int, padded: bool, compact: bool) -> None:
        self.columns, self.length, self.padded, self.compact = columns, length, padded, compact
        self.dropped = length - columns.shape[1]
        self._latest: tuple[object, Held] | None = None

    def changed(self, by: object, columns: Callable[[Tensor], Tensor], shorter: int = 0) -> Held:
        """What is held after a change of rows or of the end; the same object for every layer that is changed so."""
        if self._latest is None or self._latest[0] is not by:
            length = self.length - shorter
            self._latest = by, Held(columns(self.columns), length, self.padded, self.compact)
        return self._latest[1]

    def cropped(self, count: int) -> Held:
        """Without the last ``count`` positions of layer 0, which every row must hold."""
        end = torch.arange(self.length - count, self.length, device=self.columns.device)
        if self.columns.shape[1] < count or (self.columns[:, -count:] != end).any():
            raise InputError("the cache was cropped into its images; start with a new cache")
        return self.changed(count, lambda columns: columns[:, :-count], count)


class Reduced:
    """Mixed into a layer class of transformers.

    Parameters
    ----------
    layer
        The layer that it takes the place of.
    held
        What it holds; ``None`` after a reset, when it is like any other.
    """

    held: Held | None
    expected = False  # whether the call in progress was laid out for what is held

    def __init__(self, layer: Any, held: Held) -> None:
        for name, value in vars(layer).items():
            setattr(self, name, value)
        self.held = held

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values, and return those to attend to."""
        if self.held is not None and not self.expected:  # it would meet positions and masks of dense layers
            raise InputError("the cache was reduced by a method that is not attached any more; start with a new cache")
        self.expected = False
        return super().update(*args, **kwargs)  # type: ignore[misc]

    @property
    def dropped(self) -> int:
        """How many of the tokens that were fed in are not here."""
        return self.held.dropped if self.held else 0

    def get_seq_length(self) -> Any:
        """Positions fed in, as layer 0 counts them."""
        return super().get_seq_length() + self.dropped  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        if (
            self.held and (excess := self.held.length - int(self.get_seq_length()) - min(tokens_to_remove, 0)) > 0
        ):  # as assisted decoding does with candidates that came with the prompt
            self.held = self.held.cropped(excess)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick and repeat rows."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.held = self.held and self.held.changed(beam_idx, lambda columns: columns[beam_idx.to(columns.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.held = self.held and self.held.changed(indices, lambda columns: columns[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.held = self.held and self.held.changed(repeats, lambda columns: columns.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Empty, and ready for any prompt."""
        super().reset()  # type: ignore[misc]
        self.held = None


class ReducedDynamicLayer(Reduced, hf.DynamicLayer):
    """Grows by concatenation."""


class ReducedSlidingLayer(Reduced, hf.DynamicSlidingWindowLayer):
    """Holds no more than a window of the tokens it was given, which may reach further back than the dense one does."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the dense layer's keys."""
        seen, window = self.get_seq_length(), self.sliding_window
        return (window - 1 if seen >= window else seen) + query_length, max(seen - window + 1, 0)


class ReducedStatic(Reduced):
    """Allocated at its stage's own length; ``full`` is that of a dense one."""

    full: int

    def __init__(self, layer: Any, held: Held) -> None:
        super().__init__(layer, held)
        self.full = vars(layer).get("full", layer.max_cache_len)  # another length since it was allocated

    def reset(self) -> None:
        """Empty, and as long again as a dense one."""
        super().reset()
        _resize(self, self.full)


class ReducedStaticLayer(ReducedStatic, hf.StaticLayer):
    """Holds every token that it was given."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the dense layer's keys."""
        return self.full, 0


class ReducedStaticSlidingLayer(ReducedStatic, hf.StaticSlidingWindowLayer):
    """Holds no more than a window of the tokens it was given."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the dense layer's keys."""
        seen, window = self.get_seq_length(), self.full
        length = seen + query_length - (seen >= window) * (seen - window + 1)
        return max(length, window), max(seen - window + 1, 0)


class ReducedQuantized(Reduced):
    """Its quantized part can grow, but be neither cut nor, in every version of transformers, picked from."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        if tokens_to_remove:
            self._refuse("cropped")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick and repeat rows."""
        if super(Reduced, self).reorder_cache.__func__ is hf.CacheLayerMixin.reorder_cache:  # type: ignore[misc]
            self._refuse("reordered by beam search in this version of transformers")
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick rows."""
        self._refuse("picked from")
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        self._refuse("repeated")
        super().batch_repeat_interleave(repeats)

    def _refuse(self, what: str) -> None:
        if self.held is not None:
            raise InputError(f"a quantized cache cannot be {what}; use a dynamic one")


class ReducedQuantoLayer(ReducedQuantized, hf.QuantoQuantizedLayer):
    """Quantized by optimum-quanto."""


class ReducedHQQLayer(ReducedQuantized, hf.HQQQuantizedLayer):
    """Quantized by HQQ."""


CACHES = (hf.DynamicCache, hf.StaticCache, hf.QuantizedCache)
LAYERS: dict[type, type] = {
    hf.DynamicLayer: ReducedDynamicLayer,
    hf.DynamicSlidingWindowLayer: ReducedSlidingLayer,
    hf.StaticLayer: ReducedStaticLayer,
    hf.StaticSlidingWindowLayer: ReducedStaticSlidingLayer,
    hf.QuantoQuantizedLayer: ReducedQuantoLayer,
    hf.HQQQuantizedLayer: ReducedHQQLayer,
}
if hasattr(hf, "Fp8QuantizedLayer"):  # not in the oldest transformers

    class ReducedFp8Layer(ReducedQuantized, hf.Fp8QuantizedLayer):
        """Quantized to 8-bit floating point."""

    LAYERS[hf.Fp8QuantizedLayer] = ReducedFp8Layer


def check(cache: Any) -> None:
    """Refuse a cache whose layers cannot be reduced.

    Raises
    ------
    UnsupportedModelError
        With what can be used instead.
    """
    kinds = {type(layer) for layer in getattr(cache, "layers", ())} - LAYERS.keys() - set(LAYERS.values())
    kinds -= {getattr(hf, "DummyLayer", None)}  # of layers that share the keys of others
    if type(cache) not in CACHES or kinds:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedModelError(
            f"a {type(cache).__name__}{names and ' of ' + names} cannot be reduced; "
            "use a dynamic (the default), static or quantized cache of transformers"
        )


def held(cache: Any, layer: int) -> Held | None:
    """What a layer of a cache holds; ``None`` for everything."""
    if cache is None or layer >= len(cache.layers):
        return None
    return getattr(cache.layers[layer], "held", None)


def expect(layer: Any) -> None:
    """Before a call that was laid out for what a layer holds."""
    if isinstance(layer, Reduced):
        layer.expected = True


def allocate(cache: Any, index: int, dropped: int) -> None:
    """Before the first call: size a static layer for a stage that drops so many tokens."""
    layer = cache.layers[index]
    if isinstance(layer, hf.StaticLayer):
        layer.full = full = vars(layer).get("full", layer.max_cache_len)  # type: ignore[attr-defined]
        if layer.is_sliding:  # how long the cache may become only the others know
            others = [vars(x).get("full", x.max_cache_len) for x in cache.layers if not x.is_sliding]
            _resize(layer, min(full, *(length - dropped for length in others)) if others else full)
        else:
            _resize(layer, full - dropped)


def _resize(layer: Any, length: int) -> None:
    layer.max_cache_len, layer.keys, layer.values, layer.is_initialized = length, None, None, False


def reduce(cache: Any, index: int, held: Held) -> None:
    """After a call: tell a layer of a cache what it holds from now on."""
    layer = cache.layers[index]
    if isinstance(layer, Reduced):
        layer.held = held
    elif type(layer) in LAYERS:  # layers that share the keys of others have nothing to hold
        cache.layers[index] = LAYERS[type(layer)](layer, held)


def kind(layer: Any) -> tuple[type, int | None, int | None]:
    """What layers must have in common to meet the same keys."""
    return type(layer), getattr(layer, "sliding_window", None), getattr(layer, "max_cache_len", None)


def present(layer: Any, given: Tensor, width: int, end: int) -> tuple[Tensor, int]:
    """The keys that a layer's attention meets in a call, and where among them this call's begin.

    Parameters
    ----------
    layer
        The cache layer, ``None`` without a cache.
    given
        ``(batch, n)`` original positions of all tokens that the layer was given, the ``width`` of this call among them.
    end
        Positions fed in by the end of the call.
    """
    past = given.shape[1] - width
    if isinstance(layer, hf.DynamicSlidingWindowLayer):
        past = min(past, layer.sliding_window - 1)
    elif isinstance(layer, hf.StaticSlidingWindowLayer) and given.shape[1] > layer.max_cache_len:
        past = min(past, layer.max_cache_len - 1)
    elif isinstance(layer, hf.StaticLayer):  # slots for tokens to come are seen too, and masked
        return _ahead(given, layer.max_cache_len, end), past
    return given[:, given.shape[1] - past - width :], past


def slots(layer: Any) -> Tensor:
    """All positions that a static layer will ever hold, when it is given no more than text: these fill it in order."""
    return _ahead(layer.held.columns, layer.max_cache_len, layer.held.length)


def _ahead(columns: Tensor, size: int, start: int) -> Tensor:
    later = torch.arange(start, start + max(size - columns.shape[1], 0), device=columns.device)
    return torch.cat((columns, later.expand(columns.shape[0], -1)), 1)
