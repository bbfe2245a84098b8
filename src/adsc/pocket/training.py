"""Train the model in the box as real multimodal LLMs are made: decoder on text, tower on patches, then both together.

Trained whole from scratch, so small a model stands at the language prior for thousands of steps. In three stages it
learns at once:

1. ``decoder``: the decoder answers questions about scenes whose vision tokens are written out as *codes*, one fixed
   orthonormal vector for each fact (row, column, colour, shape, size, character) that a patch holds. Sequences are
   short, since most empty patches are left out.
2. ``tower``: the CLIP tower with its projector learns to turn pixels into those same codes.
3. ``join``: decoder, projector and tower are trained together on images and answers.

A second architecture (``architecture: idefics3``) is trained the same way, in less time since it begins from the
weights of the model in the box (``start``). Each of its vision tokens stands for 2 x 2 patches: its code is the sum of
what they hold, characters of the right half under codes of their own, and the mean of their places.

Questions about one image share its vision tokens in one sequence: each question sees the image and itself, never
another question, and stands at the positions it has when it is asked alone.

    python -m adsc.pocket.training recipes/pocket.yaml --stage decoder

Steps are seeded by their number, checkpoints are safetensors, and a killed run goes on where it was. Several processes
share each batch (on two cores, two of one thread are faster than one of two):

    torchrun --nproc-per-node 2 -m adsc.pocket.training recipes/pocket.yaml --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from adsc.evaluation.record import store
from adsc.pocket.building import build_model, build_processor, vision_tokens
from adsc.pocket.packing import Packed, answer_logits, pack, turn
from adsc.pocket.questions import TASKS, questions
from adsc.pocket.scenes import CHARACTERS, COLORS, GRID, PATCH_SIZE, SHAPES, SIZES, SPLIT_SEEDS, Scene, render, scene

TOKENS = GRID * GRID

FACTS: dict[str, int] = {}
"""Name of each fact a patch can hold, and its index in the codebook.

All are yes or no, but for ``across`` and ``down``: where the patch lies, from -1 to 1, so that places can be compared.
"""
for _name in (
    *(f"row {i}" for i in range(GRID)),
    *(f"column {i}" for i in range(GRID)),
    *COLORS,
    *SHAPES,
    *SIZES,
    *(f"character {c}" for c in CHARACTERS),
    "across",
    "down",
):
    FACTS[_name] = len(FACTS)
CONTENT = slice(2 * GRID, len(FACTS) - 2)  # facts of what is drawn, not of where
CHARACTER = slice(FACTS[f"character {CHARACTERS[0]}"], FACTS[f"character {CHARACTERS[-1]}"] + 1)
SECOND = {f"second character {c}": len(FACTS) + i for i, c in enumerate(CHARACTERS)}
"""Further facts, of a vision token that merges patches: a character in its right half, beside one in its left."""
LOOK_UPS = ("existence", "attribute", "reading", "grounding")
GROUPS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": SIZES,
    "character": tuple(f"character {c}" for c in CHARACTERS),
    "second character": tuple(SECOND),
}


def codebook(width: int, count: int = len(FACTS)) -> Tensor:
    """One orthonormal code for each fact, (facts, width): fixed, so that decoder and tower can be trained apart."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return q[:count].contiguous()


def facts(scene: Scene) -> Tensor:
    """What each patch holds, (256, facts): its place, the object or the character centred in it."""
    held = torch.zeros(TOKENS, len(FACTS))
    place = torch.arange(TOKENS)
    held[place, place // GRID] = 1
    held[place, GRID + place % GRID] = 1
    held[:, FACTS["across"]] = 2 * (place % GRID) / (GRID - 1) - 1
    held[:, FACTS["down"]] = 2 * (place // GRID) / (GRID - 1) - 1
    for thing in scene.things:
        patch = (thing.y // PATCH_SIZE) * GRID + thing.x // PATCH_SIZE
        for fact in (thing.color, thing.shape, thing.size):
            held[patch, FACTS[fact]] = 1
    for sign in (scene.number, scene.word):
        for character, (x, y) in zip(sign.text, sign.centers(), strict=True):
            held[(y // PATCH_SIZE) * GRID + x // PATCH_SIZE, FACTS[f"character {character}"]] = 1
    return held


def merged(held: Tensor) -> Tensor:
    """What 2 x 2 patches hold together, (256, facts) → (64, facts and second facts)."""
    half = GRID // 2
    square = held.view(half, 2, half, 2, -1).transpose(1, 2).flatten(0, 1)  # tokens, two rows, two columns, facts
    together = square.sum((1, 2))
    together[:, CHARACTER] = square[:, :, 0, CHARACTER].sum(1)
    together[:, : CONTENT.start] /= 4
    together[:, CONTENT.stop :] /= 4
    return torch.cat([together, square[:, :, 1, CHARACTER].sum(1)], dim=1)


def groups(held: Tensor) -> dict[str, Tensor]:
    """Indices of each group of facts that vision tokens (…, facts) may hold."""
    known = FACTS | SECOND
    indices = {group: [known[name] for name in names] for group, names in GROUPS.items()}
    return {g: torch.tensor(i, device=held.device) for g, i in indices.items() if max(i) < held.shape[-1]}


def content(held: Tensor) -> Tensor:
    """How much is drawn on vision tokens (…, facts): an empty one has 0."""
    return held[..., CONTENT].sum(-1) + held[..., len(FACTS) :].sum(-1)


def importance(held: Tensor) -> Tensor:
    """Weight of vision tokens (…, facts) in the code loss: tenfold where something is drawn."""
    return 1 + 9 * (content(held) > 0).float()


def pixels(image: Image.Image) -> Tensor:
    """(3, 128, 128), scaled as the image processor does it (tested)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@dataclasses.dataclass
class Recipe:
    """One stage of the training; read from a YAML file."""

    steps: int
    batch: int
    architecture: str = "llava"
    start: str | None = None
    """Checkpoint of the model in the box to begin from (architecture ``idefics3``); by default from nothing."""
    layers: int = 24
    """Decoder layers; weights of fewer are grown on loading."""
    questions: int = 16
    tasks: tuple[str, ...] = tuple(TASKS)
    """What is asked; a task named twice is asked twice as often."""
    learning_rate: float = 1e-3
    decay: float = 0.25
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    warmup: int = 100
    vision_tokens: tuple[int, int] = (TOKENS, TOKENS)
    """Fewest and most vision tokens a batch feeds the decoder: patches that hold something, and a random rest."""
    full_from: float = 1.0
    """Share of the steps after which all vision tokens are fed."""
    code_loss: float = 0.0
    """Weight of the tower's code loss beside the answers' (stage ``join``)."""
    easy_scenes: int = 0
    """Scenes over which objects and vision tokens grow from few to all: the first look-ups are learned among few."""
    bf16: bool = True
    workers: int = 0
    evaluate_every: int = 100
    minutes: float | None = None
    """Stop (and decay) by the clock instead of by steps."""

    @property
    def tokens(self) -> int:
        """Vision tokens of an image."""
        return vision_tokens(self.architecture)

    def tokens_fed(self, step: int, done: float) -> int:
        """Vision tokens of step ``step``, a multiple of 16; ``done`` is the share of the training that lies behind."""
        if done >= self.full_from:
            return self.tokens
        ease = min(1.0, step * self.batch / self.easy_scenes) if self.easy_scenes else 1.0
        count = random.Random(step).uniform(*self.vision_tokens)
        return 16 * round((16 + (count - 16) * ease) / 16)


class Scenes(Dataset[dict[str, Any]]):
    """Item i is scene ``first + i``: its facts, pixels and questions, a pure function of i.

    Over the first ``easy`` items the objects grow from two to all, and only what can be looked up is asked. ``tasks``
    are drawn evenly, one named twice twice as often.
    """

    def __init__(
        self,
        first: int,
        tokenizer: PreTrainedTokenizerFast | None,
        per_scene: int,
        images: bool,
        easy: int = 0,
        tasks: tuple[str, ...] = tuple(TASKS),
        tokens: int = TOKENS,
    ) -> None:
        self.first, self.tokenizer, self.per_scene, self.images = first, tokenizer, per_scene, images
        self.easy, self.tasks, self.tokens = easy, tasks, tokens

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, i: int) -> dict[str, Any]:
        drawn = scene(self.first + i, 9 if i >= self.easy else 2 + 7 * i // self.easy)
        item: dict[str, Any] = {"facts": facts(drawn) if self.tokens == TOKENS else merged(facts(drawn))}
        if self.images:
            item["pixels"] = pixels(render(drawn))
        if self.tokenizer is not None:
            asked = questions(drawn, self.per_scene, tasks=self.tasks if i >= self.easy else LOOK_UPS)
            item["tasks"] = [q.task for q in asked]
            item["turns"] = [turn(self.tokenizer, q) for q in asked]
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the items' tensors and pack their questions."""
    batch: dict[str, Any] = {
        key: torch.stack([item[key] for item in items]) for key in ("facts", "pixels") if key in items[0]
    }
    if "turns" in items[0]:
        batch |= {"packed": pack([item["turns"] for item in items]), "tasks": [item["tasks"] for item in items]}
    return batch


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, (Tensor, Packed)) else v for k, v in batch.items()}


def choose_tokens(held: Tensor, count: int, seed: int) -> Tensor:
    """Indices (rows, count), sorted: the patches that hold something and a random rest of the empty ones."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(held.shape[:2], generator=generator) + content(held).cpu()
    return score.topk(count, dim=1).indices.sort(dim=1).values.to(held.device)


def code_loss(projected: Tensor, held: Tensor, codes: Tensor) -> Tensor:
    """How far projected vision tokens (rows, tokens, width) are from the codes of what their patches hold.

    Mean square in code space, patches that hold something counted tenfold, and cross-entropy within each group of
    facts over the patches that hold one of them.
    """
    loss = ((projected - held @ codes).square().sum(-1) * importance(held)).mean()
    scores = 8 * projected @ codes.T
    for index in groups(held).values():
        there = held[..., index].sum(-1) > 0
        if there.any():
            loss = loss + 0.25 * F.cross_entropy(scores[..., index][there], held[..., index][there].argmax(-1))
    return loss


def see(model: Any, images: Tensor) -> Tensor:
    """Projected vision tokens (rows, tokens, width) of pixels (rows, 3, 128, 128)."""
    if model.config.model_type == "idefics3":
        return model.model.connector(model.model.vision_model(images).last_hidden_state)
    hidden = model.model.vision_tower(images).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(hidden)


@torch.no_grad()
def name_codes(model: Any, tokenizer: PreTrainedTokenizerFast, codes: Tensor) -> None:
    """Start the embeddings of words and digits at the codes they name: no dictionary has to be learned first."""
    for fact, index in FACTS.items():
        word = fact.removeprefix("character ").lower()
        for text in (word, f" {word}", f" {word}s", f" {word}es"):
            ids = tokenizer(text)["input_ids"]
            if len(ids) == 1 and (len(word) > 1 or word.isdigit()):
                model.get_input_embeddings().weight[ids[0]] = codes[index]
                model.lm_head.weight[ids[0]] = codes[index]


@torch.no_grad()
def adopt(model: Any, source: Any, data: Scenes, codes: Tensor) -> None:
    """Begin an Idefics3 from the model in the box, whose decoder and tower have the same widths.

    The decoder starts as it is, queries, keys and values with biases of 0. The tower has neither the class token nor
    the norm in front of the layers: the norm is folded into the patches' embedding, at its mean over the first scenes
    of ``data``. The connector is the least-squares solution from what the tower then says of these to their ``codes``.
    """
    weights = {
        name.replace(".language_model.", ".text_model.").replace(".vision_tower.", ".vision_model."): value
        for name, value in source.state_dict().items()
    }
    images, held = (torch.stack([data[i][key] for i in range(128)]) for key in ("pixels", "facts"))
    tower = source.model.vision_tower
    embedding, norm = tower.embeddings, tower.pre_layrnorm
    deviation = embedding(images)[:, 1:].std(-1, correction=0).mean()
    centred = torch.eye(len(norm.weight)) - 1 / len(norm.weight)
    fold = norm.weight[:, None] * centred / deviation
    prefix = "model.vision_model.embeddings."
    weights[f"{prefix}patch_embedding.weight"] = torch.einsum("oi,i...->o...", fold, embedding.patch_embedding.weight)
    weights[f"{prefix}patch_embedding.bias"] = norm.bias
    weights[f"{prefix}position_embedding.weight"] = embedding.position_embedding.weight[1:] @ fold.T
    for name, value in model.state_dict().items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # the special tokens differ
            old, new = (build_processor(a).tokenizer.get_vocab() for a in ("llava", "idefics3"))
            rows = value.clone()
            rows[[new[token] for token in old]] = weights[name][list(old.values())]
            weights[name] = rows
        if "post_layernorm" in name:  # of the class token alone
            weights[name] = value
    own = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)

    patches = model.model.vision_model(images).last_hidden_state
    seen = model.model.connector.pixel_shuffle(patches, model.config.scale_factor).flatten(0, 1)
    weight = importance(held).flatten()[:, None]
    solution = torch.linalg.lstsq(weight.sqrt() * seen, weight.sqrt() * (held @ codes).flatten(0, 1)).solution
    model.model.connector.modality_projection.proj.weight.copy_(solution.T)


def grow(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a deeper decoder that computes the same: behind each layer copies of it that add nothing yet."""
    pattern = re.compile(r"(.*(?:language|text)_model\.layers\.)(\d+)(\..*)")
    depth = 1 + max((int(m[2]) for n in weights if (m := pattern.match(n))), default=layers - 1)
    if depth > layers:
        raise ValueError(f"weights of {depth} decoder layers cannot shrink to {layers}")
    source = [layer * depth // layers for layer in range(layers)]
    grown: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not (match := pattern.match(name)):
            grown[name] = value
            continue
        copies = [layer for layer, old in enumerate(source) if old == int(match[2])]
        adds = match[3] in (".self_attn.o_proj.weight", ".mlp.down_proj.weight")
        for layer in copies:
            copy = torch.zeros_like(value) if adds and layer != copies[0] else value.clone()
            grown[f"{match[1]}{layer}{match[3]}"] = copy
    return grown


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the rest; one learning rate for both."""

    def __init__(self, modules: list[nn.Module], recipe: Recipe) -> None:
        named = [(n, p) for m in modules for n, p in m.named_parameters()]
        inner = [p for n, p in named if p.ndim == 2 and ".layers." in f".{n}"]
        outer = [p for n, p in named if not (p.ndim == 2 and ".layers." in f".{n}")]
        self.recipe, self.parameters = recipe, inner + outer
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=recipe.learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def step(self, step: int, progress: float) -> None:
        recipe = self.recipe
        rate = recipe.learning_rate * min(
            1.0, (step + 1) / recipe.warmup, (1 - progress) / recipe.decay if recipe.decay else 1.0
        )
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def average(self) -> None:
        """Average the gradients over the processes, all in one message."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{i}.{index}.{key}": value.contiguous()
            for i, part in enumerate(self.parts)
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                number, index, key = name.split(".", 2)
                if int(number) == i:
                    state.setdefault(int(index), {})[key] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


@torch.no_grad()
def validate(
    model: Any,
    data: DataLoader[Any],
    stage: str,
    codes: Tensor,
    device: torch.device,
    tokens: int,
) -> dict[str, float]:
    """Validation figures: accuracy of each task and overall, or of each group of facts for the tower."""
    right: dict[str, list[bool]] = {}
    model.eval()
    for batch in data:
        batch = moved(batch, device)
        if stage == "tower":
            scores = see(model, batch["pixels"]) @ codes.T
            for group, index in groups(batch["facts"]).items():
                there = batch["facts"][..., index].sum(-1) > 0
                found = scores[..., index][there].argmax(-1) == batch["facts"][..., index][there].argmax(-1)
                right.setdefault(group, []).extend(found.tolist())
                right.setdefault(f"{group} present", []).extend(
                    ((scores[..., index].amax(-1) > 0.5) == there)[there].tolist()
                )
            continue
        features = see(model, batch["pixels"]) if stage == "join" else batch["facts"] @ codes
        chosen = None
        if stage == "decoder":
            chosen = choose_tokens(batch["facts"], min(tokens, batch["facts"].shape[1]), seed=0)
            features = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1]))
        logits, _ = answer_logits(model, features, batch["packed"], chosen, batch["facts"].shape[1])
        for tasks, correct in zip(batch["tasks"], batch["packed"].correct(logits), strict=True):
            for task, hit in zip(tasks, correct, strict=True):
                right.setdefault(task, []).append(hit)
    model.train()
    figures = {name: sum(r) / len(r) for name, r in sorted(right.items())}
    if stage != "tower":
        figures["overall"] = sum(map(sum, right.values())) / sum(map(len, right.values()))
    return figures


def train(stage: str, recipe: Recipe, folder: Path, starts: list[Path], seed: int = 0, device: str = "cpu") -> None:
    """Run one stage in ``folder`` (resuming what is there), beginning from the weights in ``starts``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if recipe.batch % world:
        raise ValueError(f"a batch of {recipe.batch} cannot be shared by {world} processes; make it a multiple")
    folder.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    tokenizer = build_processor(recipe.architecture).tokenizer
    model: Any = build_model(len(tokenizer), seed, recipe.architecture, num_hidden_layers=recipe.layers)
    model.set_attn_implementation("eager")
    codes = codebook(model.lm_head.in_features, len(FACTS) + (len(SECOND) if recipe.tokens < TOKENS else 0))
    first = SPLIT_SEEDS["train"] + {"decoder": 0, "tower": 5_000_000, "join": 10_000_000}[stage] + seed * 50_000_000
    if recipe.start:
        source = AutoModelForImageTextToText.from_pretrained(recipe.start, dtype=torch.float32)
        adopt(model, source, Scenes(first, None, 0, images=True, tokens=recipe.tokens), codes)
    elif not starts:
        name_codes(model, tokenizer, codes)
    for start in starts:
        model.load_state_dict(grow(load_file(start), recipe.layers), strict=False)
    model.to(where).train()
    codes = codes.to(where)
    language = model.get_decoder()
    decoder: list[nn.Module] = [language, model.lm_head]
    tower: list[nn.Module] = [m for m in model.model.children() if m is not language]  # with its projector
    modules = {"decoder": decoder, "tower": tower, "join": decoder + tower}[stage]
    optimizer = Optimizer(modules, recipe)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
    weights, moments, progress_file = (
        folder / "model.safetensors",
        folder / "optimizer.safetensors",
        folder / "state.json",
    )
    if progress_file.exists():
        state = json.loads(progress_file.read_text())
        model.load_state_dict(load_file(weights, device=device), strict=False)
        optimizer.load(load_file(moments, device=device))

    def save() -> None:
        if rank:
            return
        owned = {id(p) for m in modules for p in m.parameters()}
        write_tensors(weights, {n: p.detach().contiguous() for n, p in model.named_parameters() if id(p) in owned})
        write_tensors(moments, optimizer.tensors())
        write_json(progress_file, state)

    asks, images = stage != "tower", stage != "decoder"
    data = Scenes(
        first, tokenizer if asks else None, recipe.questions, images, recipe.easy_scenes, recipe.tasks, recipe.tokens
    )
    batches: Iterator[dict[str, Any]] = iter(
        DataLoader(
            data,
            recipe.batch // world,
            sampler=range(state["step"] * recipe.batch + rank, len(data), world),
            collate_fn=collate,
            num_workers=recipe.workers,
        )
    )
    held_out = Scenes(
        SPLIT_SEEDS["validation"], tokenizer if asks else None, recipe.questions, images, tokens=recipe.tokens
    )
    validation: DataLoader[Any] = DataLoader(held_out, 32, sampler=range(128), collate_fn=collate)
    begun, saved, losses = time.monotonic() - state["seconds"], time.monotonic(), list[float]()
    columns = (
        TextColumn(stage),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=rank > 0) as bar:
        line = bar.add_task("", total=recipe.steps, completed=state["step"])
        try:
            while state["step"] < recipe.steps:
                step = state["step"]
                done = step / recipe.steps
                if recipe.minutes is not None:
                    clock = torch.tensor((time.monotonic() - begun) / 60 / recipe.minutes)
                    if world > 1:
                        dist.broadcast(clock, 0)
                    done = max(done, clock.item())
                    if done >= 1:
                        break
                batch = moved(next(batches), where)
                with torch.autocast(where.type, dtype=torch.bfloat16, enabled=recipe.bf16):
                    loss = torch.zeros((), device=where)
                    features = see(model, batch["pixels"]) if images else batch["facts"] @ codes
                    if images and (stage == "tower" or recipe.code_loss):
                        with torch.autocast(where.type, enabled=False):
                            part = code_loss(features.float(), batch["facts"], codes)
                        loss = loss + part * (1.0 if stage == "tower" else recipe.code_loss)
                    if asks:
                        count = recipe.tokens_fed(step, done)
                        chosen = None
                        if count < recipe.tokens:
                            chosen = choose_tokens(batch["facts"], count, seed=step)
                            features = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1]))
                        logits, targets = answer_logits(model, features, batch["packed"], chosen, recipe.tokens)
                        answers = F.cross_entropy(logits.float(), targets)
                        loss = loss + answers
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {step}; lower learning_rate in the recipe"
                    )
                loss.backward()
                if world > 1:
                    optimizer.average()
                optimizer.step(step, done)
                losses.append((answers if asks else loss).item())
                state["step"], state["seconds"] = step + 1, time.monotonic() - begun
                bar.update(line, completed=step + 1, description=f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
                if (step + 1) % recipe.evaluate_every == 0 and rank == 0:
                    figures = validate(model, validation, stage, codes, where, max(recipe.vision_tokens))
                    mean = sum(losses) / len(losses)
                    losses.clear()
                    state["curve"].append(
                        {"step": step + 1, "seconds": round(state["seconds"]), "loss": round(mean, 4)} | figures
                    )
                    bar.console.print(
                        f"{stage} {step + 1} loss {mean:.3f} " + " ".join(f"{k} {v:.3f}" for k, v in figures.items())
                    )
                if rank == 0 and time.monotonic() - saved > 120:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    if world > 1:
        dist.barrier()  # the next stage begins with what was saved


def export(weights: Path, folder: Path, architecture: str = "llava") -> None:
    """Write a checkpoint that loads like any from the hub: weights in half precision, loaded as float32."""
    processor = build_processor(architecture)
    tensors = load_file(weights)
    layers = 1 + max(int(m[1]) for n in tensors if (m := re.search(r"(?:language|text)_model\.layers\.(\d+)", n)))
    model: Any = build_model(len(processor.tokenizer), architecture=architecture, num_hidden_layers=layers)
    model.load_state_dict(tensors)
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    for part in ("text_config", "vision_config"):
        config[part].pop("dtype", None)
    write_json(folder / "config.json", config)
    processor.save_pretrained(folder)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--stage", choices=("decoder", "tower", "join"), action="append", help="default: all of the recipe, in order"
    )
    parser.add_argument("--folder", type=Path, help="default: runs/ and the name of the recipe")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write the checkpoint here and the curves to results/, and end"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
        if arguments.device == "cuda":
            arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipes = yaml.safe_load(arguments.recipe.read_text())
    shared = {name: recipes.pop(name) for name in ("architecture", "start") if name in recipes}
    folder = arguments.folder or Path("runs") / arguments.recipe.stem
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill saves a checkpoint, as Ctrl-C does
    if arguments.export:
        export(
            folder / "join" / "model.safetensors", arguments.export, **{k: shared[k] for k in shared if k != "start"}
        )
        states = {stage: json.loads((folder / stage / "state.json").read_text()) for stage in recipes}
        trained = {"recipe": shared | recipes, "stages": states}
        store(Path("results") / arguments.recipe.stem / "training.json", trained, arguments.seed)
        return
    for stage in arguments.stage or recipes:
        starts = [folder / s / "model.safetensors" for s in recipes if s != "join"] if stage == "join" else []
        train(stage, Recipe(**shared, **recipes[stage]), folder / stage, starts, arguments.seed, arguments.device)


if __name__ == "__main__":
    main()
