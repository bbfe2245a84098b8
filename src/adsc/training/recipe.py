"""What to train, as a YAML file. Mistakes end in one line that names the file and the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from ..errors import InputError
from ..methods import ADSC
from ..planning import Pattern, plan
from ..schedule import Schedule, fraction
from .curriculum import WARM, Curriculum, Kind

SLACK = Fraction(1, 256)  # between a budget and what its schedule retains; of small images one token
IMAGE_TOKENS = 576  # of one image, where neither the recipe nor the config tells

#: Keys of ``training`` that the recipe sets by itself, and what to do in their place.
MANAGED = {
    "output_dir": "the recipe's own output says where to",
    "max_length": "rows with images cannot be cut; leave it out",
    "packing": "rows with images cannot be packed; leave it out",
    "eval_packing": "rows with images cannot be packed; leave it out",
    "padding_free": "rows with images cannot be packed; leave it out",
}


def _must_be(what: str) -> WrapValidator:
    """One sentence for a union, where Pydantic says what is wrong with each part of it."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {what}") from None

    return WrapValidator(check)


def _schedule(value: Any) -> Any:
    if not isinstance(value, (str, Schedule)):
        raise ValueError("must be text like '8:1/2,16:1/2'")
    return Schedule.parse(value) if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Pocket(_Part):
    """Scenes of the model in the box: a split, how many rows of how many questions each (all, and one), and of which
    tasks (all; one named twice is asked twice as often)."""

    pocket: Literal["train", "validation"]
    rows: int | None = Field(default=None, ge=1)
    turns: int | None = Field(default=None, ge=1)
    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)


Ratio = Annotated[Fraction, BeforeValidator(fraction), PlainSerializer(str)]
Text = Annotated[Schedule, BeforeValidator(_schedule), PlainSerializer(str)]
Names = tuple[Annotated[str, Field(min_length=1)], ...]
Sources = Annotated[
    Annotated[Names, BeforeValidator(_listed), Field(min_length=1)] | Pocket,
    _must_be("a path or pattern of files, a list of them, or {pocket: train} (or validation; rows, turns, tasks)"),
]
Targets = Annotated[Literal["all-linear"] | Names, _must_be("all-linear or a list of names like [q_proj, v_proj]")]


class Data(_Part):
    """Rows to learn from.

    Attributes
    ----------
    train, validation
        Files or patterns of files, or a split of the model in the box.
    bad_rows
        Whether a row that cannot be read is skipped (and counted) or ends the training.
    images
        Folder that the images' paths start from; by default that of the file which names them.
    remote_images
        Whether images may be fetched from the net.
    independent_turns
        Whether the questions of a conversation are asked as if each were alone, in one row that computes the images
        once (see :class:`adsc.training.collating.Collator`). For merged conversations of short questions.
    """

    train: Sources
    validation: Sources | None = None
    bad_rows: Literal["skip", "fail"] = "skip"
    images: str | None = None
    remote_images: bool = False
    independent_turns: bool = False


class Method(_Part):
    """The reduction that the training is for.

    Attributes
    ----------
    retained, schedule
        A budget, or a schedule in its place.
    pattern, positions, seed
        As in :class:`adsc.ADSCConfig`.
    vision_tokens
        Of one image: budgets are solved for images of this size. By default what the model's config says, else 576.
    """

    retained: Ratio = Fraction(1, 3)
    schedule: Text | None = None
    pattern: Pattern = "last"
    positions: Literal["original", "compact"] = "original"
    seed: int = Field(default=0, ge=0)
    vision_tokens: int | None = Field(default=None, ge=1)


class CurriculumPart(_Part):
    """See :class:`adsc.training.curriculum.Curriculum`.

    Attributes
    ----------
    kind, warm
        Of the curriculum.
    budgets
        What ``elastic`` draws from; one named twice is drawn twice as often.
    schedules
        Budget → schedule, where :meth:`adsc.Schedule.for_budget`'s is not wanted.
    """

    kind: Kind = "light_to_heavy"
    warm: Ratio = WARM
    budgets: tuple[Ratio, ...] = Field(
        default=tuple(Fraction(*each) for each in ((1, 1), (2, 3), (1, 2), (1, 3), (2, 9), (1, 9), (1, 18))),
        min_length=1,
    )
    schedules: dict[Ratio, Text] = Field(default_factory=dict)


class Distillation(_Part):
    """From the same model, dense and with its adapter off.

    Attributes
    ----------
    weight, temperature
        Of the loss between logits; a weight of 0 turns it off.
    hidden
        Weight of the loss between hidden states.
    """

    weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=0.0, ge=0)

    @property
    def on(self) -> bool:
        """Whether the teacher is run at all."""
        return self.weight > 0 or self.hidden > 0


class Lora(_Part):
    """The adapter: on matrices of the language model only, never on the vision tower.

    Attributes
    ----------
    rank, alpha, dropout
        As in PEFT's ``LoraConfig``.
    targets
        Names of the matrices, or ``all-linear``.
    projector
        Whether the projector between vision tower and language model is trained too, in full.
    """

    rank: int = Field(default=64, ge=1)
    alpha: int = Field(default=128, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Targets = "all-linear"
    projector: bool = False


class Estimate(_Part):
    """A typical row and the hardware, for ``--dry-run`` alone.

    Attributes
    ----------
    gpu, gpus, utilisation
        Name of the GPU, how many of them share the batch, and the part of its peak that the training reaches.
    images, text_tokens
        Of a row.
    tiles
        LLaVA-NeXT: of one image, the overview included, where its vision tokens do not tell.
    rows
        Of the training data; needed where ``training`` counts epochs in place of steps.
    """

    gpu: str = "A100-80GB"
    gpus: int = Field(default=1, ge=1)
    utilisation: float = Field(default=0.35, gt=0, le=1)
    images: int = Field(default=1, ge=0)
    text_tokens: int = Field(default=128, ge=1)
    tiles: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)


class Recipe(_Part):
    """One training, from data to the folder that :func:`adsc.load` opens. Read it with :func:`read`.

    Attributes
    ----------
    model
        Folder of a checkpoint, or hub id.
    output
        Folder for checkpoints, logs and the result.
    data, method, curriculum, distillation, lora, estimate
        The parts.
    training
        Passed to ``trl.SFTConfig`` as it is.
    """

    model: str = Field(min_length=1)
    output: str = Field(min_length=1)
    data: Data
    method: Method = Method()
    curriculum: CurriculumPart = CurriculumPart()
    distillation: Distillation = Distillation()
    lora: Lora = Lora()
    training: dict[str, Any] = Field(default_factory=dict)
    estimate: Estimate = Estimate()

    @property
    def seed(self) -> int:
        """The one seed of the run (``training.seed``): of weights, order of rows, and draws of budgets."""
        return int(self.training.get("seed", 42))

    def reduction(self, config: Any) -> ADSC:
        """The method to attach and to save beside the adapter, with a schedule for each budget that is trained.

        Parameters
        ----------
        config
            The model's transformers config.

        Raises
        ------
        InputError
            When a budget is out of reach, a schedule names a layer that the model lacks, or one is not of its budget.
        """
        layers, tokens = _depth(config), self.vision_tokens(config)
        elastic = self.curriculum.kind == "elastic"
        wanted = set(self.curriculum.budgets) if elastic else set[Fraction]()
        if self.method.schedule is None:
            wanted.add(self.method.retained)
        if unused := self.curriculum.schedules.keys() - wanted:
            raise InputError(
                f"curriculum.schedules has one for budget {min(unused)}, which is not trained; "
                f"the budgets are {', '.join(map(str, sorted(wanted, reverse=True)))}"
            )
        budgets = {retained: self._schedule(retained, layers, tokens) for retained in wanted}
        schedule = self.method.schedule
        method = ADSC(
            budgets[self.method.retained] if schedule is None else schedule,
            self.method.pattern,
            self.method.positions,
            self.method.seed,
            tuple(budgets.items()),
        )
        method.validate(layers)
        return method

    def curriculum_for(self, config: Any) -> Curriculum:
        """The curriculum of this recipe for a model (errors as in :meth:`reduction`)."""
        method, kind = self.reduction(config), self.curriculum.kind
        budgets = dict(method.budgets)
        return Curriculum(
            kind,
            method.schedule,
            _depth(config),
            self.curriculum.warm,
            [budgets[retained] for retained in self.curriculum.budgets] if kind == "elastic" else (),
            self.seed,
        )

    def vision_tokens(self, config: Any) -> int:
        """Of one image, for which budgets are solved."""
        return self.method.vision_tokens or image_tokens(config) or IMAGE_TOKENS

    def _schedule(self, retained: Fraction, layers: int, tokens: int) -> Schedule:
        given = self.curriculum.schedules.get(retained)
        if given is None:
            return Schedule.for_budget(layers, retained, tokens)
        real = plan([(0, tokens)], tokens, given, layers).retained
        if abs(real - retained) > max(Fraction(1, tokens), SLACK):
            raise InputError(
                f"curriculum.schedules: {given} retains {float(real):.4f} of {tokens} vision tokens over {layers} "
                f"layers, not {retained}; write it under the budget that it has"
            )
        return given

    def to_yaml(self) -> str:
        """The recipe with every default written out; :func:`read` gives it back."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def image_tokens(config: Any) -> int | None:
    """Vision tokens of one image, where a model's config says that all have the same number."""
    if config.model_type != "llava" or not isinstance(getattr(config.vision_config, "image_size", None), int):
        return None
    vision = config.vision_config
    count: int = (vision.image_size // vision.patch_size) ** 2
    return count + int(config.vision_feature_select_strategy == "full")


def _depth(config: Any) -> int:
    from ..hf.checkpoint import depth  # loads transformers

    return depth(config)


def read(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    path
        The YAML file.
    changes
        Like ``"training.max_steps=10"``: the value, YAML too, takes the place of what the file says.

    Raises
    ------
    InputError
        When the file cannot be read, a key is unknown or missing, or a value is not allowed; one line for them all.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the recipe {path}: {reason}") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys, like 'model: owner/name'")
    for change in changes:
        _change(values, change)
    return check(values, str(path))


def check(values: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Make a recipe of plain values; ``name`` begins the line of an error."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{name}: {'; '.join(_say(each) for each in error.errors())}") from None
    for key in recipe.training.keys() & MANAGED.keys():
        raise InputError(f"{name}: training.{key} cannot be set: {MANAGED[key]}")
    if recipe.data.independent_turns and recipe.method.positions == "compact":
        raise InputError(f"{name}: data.independent_turns needs method.positions original; set one of them otherwise")
    return recipe


def check_training(recipe: Recipe, name: str = "recipe") -> None:
    """Check keys and types of ``training`` against ``trl.SFTConfig``, without making one: that asks for the GPU.

    Raises
    ------
    InputError
        For an unknown key or a value of another type, or when TRL is missing.
    """
    from dataclasses import fields
    from typing import get_type_hints

    from pydantic import TypeAdapter

    try:
        from trl.trainer.sft_config import SFTConfig
    except ImportError:
        raise InputError("training needs trl and peft; pip install 'adsc-vlm[train]'") from None
    allowed = sorted({field.name for field in fields(SFTConfig) if field.init} - MANAGED.keys())
    hints = get_type_hints(SFTConfig)
    for key, value in recipe.training.items():
        if key not in allowed:
            raise InputError(f"{name}: training.{_unknown(key, allowed, 'the fields of trl.SFTConfig')}")
        try:
            types = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
            types.validate_python(value, strict=True)
        except ValidationError:
            kind = re.sub(r"<class '(\w+)'>|(?:\w+\.)+", r"\1", str(hints[key]))
            raise InputError(f"{name}: training.{key} is {value!r}; it must be {kind}") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as people mean it: 2e-5 is a number, no is a word, and a key that is written twice is a mistake."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys: list[Any] = []
        for part, _ in node.value:
            keys.append(self.construct_object(part, deep=True))
            if keys[-1] in keys[:-1]:
                raise yaml.constructor.ConstructorError(None, None, f"key {keys[-1]!r} is there twice", part.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that cannot be one
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{name}{place}: not valid YAML: {' '.join(problem.split())}") from None


def _change(values: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {change!r} is not KEY=VALUE; write it like training.max_steps=10")
    inner: Any = values
    for key in keys[:-1]:
        inner[key] = inner = dict(inner.get(key) or {}) if isinstance(inner.get(key), dict | None) else {}
    inner[keys[-1]] = _parse(text, f"--set {path}")


def _say(error: Any) -> str:
    """One mistake: the key, what was given, what is allowed."""
    place = [str(part) for part in error["loc"] if part != "[key]" and "function-" not in str(part)]
    key, given, kind = ".".join(place), error["input"], error["type"]
    if kind == "extra_forbidden":
        inner: Any = Recipe
        for part in place[:-1]:
            inner = inner.model_fields[part].annotation
        return ".".join([*place[:-1], _unknown(place[-1], list(inner.model_fields), "the keys here")])
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":  # raised by ourselves
        said = str(error["ctx"]["error"])
        return f"{key} is {given!r}; it {said}" if said.startswith("must") else f"{key}: {said}"
    if kind == "literal_error":
        return f"{key} is {given!r}; it can be {error['ctx']['expected']}".replace("'", "")
    said = "must be a mapping of keys" if kind in ("model_type", "dict_type") else error["msg"].partition(",")[0]
    return f"{key} is {given!r}; it {said.replace('Input should', 'must')}"


def _unknown(key: str, allowed: list[str], what: str) -> str:
    near = difflib.get_close_matches(key, allowed, 1)
    rest = f"did you mean {near[0]}?" if near else f"{what} are {', '.join(allowed)}"
    return f"{key} is unknown; {rest}"
