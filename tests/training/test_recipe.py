"""Recipes: what they mean, and that a mistake is one line that names file, key, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import transformers

from adsc import InputError, Schedule, plan
from adsc.training.curriculum import KINDS, Curriculum
from adsc.training.recipe import MANAGED, Pocket, Recipe, check_training, image_tokens, read

PLAIN = """
model: owner/name
output: runs/x
data: {train: [a.jsonl, "b/*.parquet"]}
"""
FULL = """
model: src/adsc/pocket/model
output: runs/y
data: {train: {pocket: train}, validation: {pocket: validation, rows: 9}, bad_rows: fail}
method: {retained: 1/9, pattern: grid, positions: compact, vision_tokens: 256}
curriculum:
  kind: elastic
  warm: 0.25
  budgets: [1, 1/3, 1/9]
  schedules:
    1/3: 4:1/2,8:1/2,12:1/2,16:1/2
distillation: {weight: 0.5, temperature: 2, hidden: 0}
lora: {rank: 8, alpha: 16, dropout: 0.1, targets: [q_proj, v_proj], projector: true}
training: {learning_rate: 2e-4, max_steps: 10, seed: 5, bf16: false}
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def llama(layers: int = 24) -> transformers.PreTrainedConfig:
    """A decoder alone, for what depends on the number of layers."""
    return transformers.LlamaConfig(num_hidden_layers=layers)


def test_plain(write: Write) -> None:
    recipe = read(write(PLAIN))
    assert recipe.data.train == ("a.jsonl", "b/*.parquet")
    assert recipe.method.retained == Fraction(1, 3)
    assert recipe.distillation.on
    assert recipe.lora.targets == "all-linear"


def test_full(write: Write) -> None:
    recipe = read(write(FULL))
    assert recipe.data.train == Pocket(pocket="train")
    assert recipe.data.validation == Pocket(pocket="validation", rows=9)
    assert recipe.curriculum.warm == Fraction(1, 4)
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.training["learning_rate"] == 2e-4  # which YAML 1.1 takes for text
    assert recipe.seed == 5


@pytest.mark.parametrize("text", [PLAIN, FULL])
def test_written_and_read_again(write: Write, text: str) -> None:
    recipe = read(write(text))
    assert read(write(recipe.to_yaml())) == recipe


def test_reduction_has_a_schedule_for_each_budget(write: Write) -> None:
    method = read(write(FULL)).reduction(llama())
    assert dict(method.budgets) == {
        Fraction(1): Schedule.none(),
        Fraction(1, 3): Schedule.parse("4:1/2,8:1/2,12:1/2,16:1/2"),
        Fraction(1, 9): Schedule.for_budget(24, "1/9", 256),
    }
    assert method.schedule == Schedule.for_budget(24, "1/9", 256)
    assert (method.pattern, method.positions) == ("grid", "compact")
    assert method.for_budget(24, "1/3").schedule == Schedule.parse("4:1/2,8:1/2,12:1/2,16:1/2")


def test_schedule_wins_over_retained(write: Write) -> None:
    method = read(write(PLAIN), ["method.schedule=3:1/2,5:1/4"]).reduction(llama())
    assert str(method.schedule) == "3:1/2,5:1/4"
    assert method.budgets == ()


def test_dense_training_is_a_recipe_too(write: Write) -> None:
    recipe = read(write(PLAIN), ["method.retained=1", "curriculum.kind=constant", "distillation.weight=0"])
    assert recipe.reduction(llama()).schedule == Schedule.none()
    assert not recipe.distillation.on


@pytest.mark.parametrize("kind", KINDS)
def test_curriculum(write: Write, kind: str) -> None:
    changes = [f"curriculum.kind={kind}", "curriculum.budgets=[1, 1/2]", "training.seed=9", "curriculum.warm=1/2"]
    made = read(write(PLAIN), changes).curriculum_for(llama())
    target = Schedule.for_budget(24, "1/3")
    budgets = [Schedule.none(), Schedule.for_budget(24, "1/2")] if kind == "elastic" else []
    assert made == Curriculum(kind, target, 24, "1/2", budgets, 9)


def test_image_tokens() -> None:
    vision = {"image_size": 128, "patch_size": 8}
    assert image_tokens(transformers.LlavaConfig(vision_config={"model_type": "clip_vision_model", **vision})) == 256
    assert image_tokens(transformers.Qwen2_5_VLConfig()) is None
    assert image_tokens(llama()) is None


@pytest.mark.parametrize(("change", "said"), [
    ("methd.pattern=last", "methd is unknown; did you mean method?"),
    ("method.patern=last", "method.patern is unknown; did you mean pattern?"),
    ("lora.xyz=1", "lora.xyz is unknown; the keys here are rank, alpha, dropout, targets, projector"),
    ("method.pattern=middle", "method.pattern is middle; it can be last, first, grid, rows or random"),
    ("curriculum.kind=steep", "curriculum.kind is steep; it can be constant, light_to_heavy, heavy_to_light, "
     "deep_to_shallow or elastic"),
    ("method.retained=0", "method.retained: fraction 0 is outside (0, 1]"),
    ("method.retained=a third", "method.retained: fraction 'a third' is not a number; write it like 1/3"),
    ("method.schedule=0:1/2", "method.schedule: reduction at layer 0; the first decoder layer that can reduce is 1"),
    ("method.schedule=[1]", "method.schedule is [1]; it must be text like '8:1/2,16:1/2'"),
    ("data.train=3", "data.train is 3; it must be a path or pattern of files, a list of them, or {pocket: train}"),
    ("data.train={pocket: train, rows: 0}", "data.train is {'pocket': 'train', 'rows': 0}; it must be a path"),
    ("data.train=[]", "data.train is []; it must be a path"),
    ("data.train={pocket: trian}", "data.train is {'pocket': 'trian'}; it must be a path"),
    ("data={}", "data.train is missing"),
    ("data=3", "data is 3; it must be a mapping of keys"),
    ("data.bad_rows=drop", "data.bad_rows is drop; it can be skip or fail"),
    ("lora.rank=many", "lora.rank is 'many'; it must be a valid integer"),
    ("lora.rank=0", "lora.rank is 0; it must be greater than or equal to 1"),
    ("lora.targets=3", "lora.targets is 3; it must be all-linear or a list of names"),
    ("distillation.temperature=0", "distillation.temperature is 0; it must be greater than 0"),
    ("curriculum.budgets=[1, 2]", "curriculum.budgets.1: fraction 2 is outside (0, 1]"),
    ("curriculum.schedules={1/3: 4}", "curriculum.schedules.1/3 is 4; it must be text"),
    ("training=3", "training is 3; it must be a mapping of keys"),
    *((f"training.{key}=1", f"training.{key} cannot be set: {why}") for key, why in MANAGED.items()),
])  # fmt: skip
def test_a_mistake_is_one_line(write: Write, change: str, said: str) -> None:
    path = write(PLAIN)
    with pytest.raises(InputError) as error:
        read(path, [change])
    assert str(error.value).startswith(f"{path}: {said}")
    assert "\n" not in str(error.value)


def test_several_mistakes_are_one_line(write: Write) -> None:
    path = write("model: a/b\ndata: {train: x}\nlora: {rank: 0}\n")
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == f"{path}: output is missing; lora.rank is 0; it must be greater than or equal to 1"


@pytest.mark.parametrize(("text", "said"), [
    ("model: [a", "line 1: not valid YAML"),
    ("- a\n- b\n", "a recipe is a mapping of keys"),
    ("", "a recipe is a mapping of keys"),
    (PLAIN + "model: other\n", "line 5: not valid YAML: key 'model' is there twice"),
    ("{[a]: b}", "not valid YAML"),
])  # fmt: skip
def test_no_recipe(write: Write, text: str, said: str) -> None:
    path = write(text)
    with pytest.raises(InputError, match=said) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: No such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        read(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "image.yaml")


@pytest.mark.parametrize("change", ["training.max_steps", "=3", "a..b=3", ""])
def test_bad_change(write: Write, change: str) -> None:
    with pytest.raises(InputError, match="is not KEY=VALUE; write it like"):
        read(write(PLAIN), [change])


def test_changes_are_yaml_and_leave_the_rest(write: Write) -> None:
    changes = ["training.max_steps=3", "training.learning_rate=1e-5", "model=other/one", "lora.targets=[q_proj]"]
    recipe = read(write(FULL), changes)
    assert recipe.training == {"learning_rate": 1e-5, "max_steps": 3, "seed": 5, "bf16": False}
    assert read(write(FULL), ["training.eval_strategy=no"]).training["eval_strategy"] == "no"  # YAML 1.1's false
    assert (recipe.model, recipe.lora.targets, recipe.lora.rank) == ("other/one", ("q_proj",), 8)


@pytest.mark.parametrize(("changes", "said"), [
    (["method.retained=1/100"], "nearest is retained"),
    (["method.schedule=30:1/2"], "layers 1 to 23"),
    (["curriculum.schedules={1/9: '1:1/4,2:1/4'}"], "has one for budget 1/9, which is not trained; the budgets are"),
    (["curriculum.schedules={1/3: '4:1/2,8:1/2'}", "method.vision_tokens=256"],
     "4:1/2,8:1/2 retains 0.4167 of 256 vision tokens over 24 layers, not 1/3; write it under the budget that it has"),
])  # fmt: skip
def test_what_only_the_model_tells(write: Write, changes: list[str], said: str) -> None:
    recipe = read(write(PLAIN), changes)
    for make in (recipe.reduction, recipe.curriculum_for):
        with pytest.raises(InputError, match=said.replace("(", r"\(")):
            make(llama())


def test_a_schedule_is_of_its_budget(write: Write) -> None:
    recipe = read(write(PLAIN), ["curriculum.schedules={1/3: '4:1/2,8:1/2,12:1/2,16:1/2'}"])
    chosen = recipe.reduction(llama()).schedule
    assert abs(plan([(0, 576)], 576, chosen, 24).retained - Fraction(1, 3)) * 576 <= 1


@pytest.mark.parametrize(("change", "said"), [
    ("training.learning_rat=1", "training.learning_rat is unknown; did you mean learning_rate?"),
    ("training.learning_rate=fast", "training.learning_rate is 'fast'; it must be float"),
    ("training.bf16='false'", "training.bf16 is 'false'; it must be bool | None"),
    ("training.max_steps=1.5", "training.max_steps is 1.5; it must be int"),
])  # fmt: skip
def test_training_is_checked_against_trl(write: Write, change: str, said: str) -> None:
    good = ["training.learning_rate=1e-4", "training.lr_scheduler_type=cosine", "training.report_to=[tensorboard]"]
    check_training(read(write(PLAIN), good))
    with pytest.raises(InputError) as error:
        check_training(read(write(PLAIN), [*good, change]), "r.yaml")
    assert str(error.value) == f"r.yaml: {said}"


def test_recipes_cannot_be_changed(write: Write) -> None:
    recipe = read(write(PLAIN))
    with pytest.raises(ValueError, match="frozen"):
        recipe.method.pattern = "first"  # type: ignore[misc]
    assert isinstance(recipe, Recipe)
