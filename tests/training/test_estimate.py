"""``adsc train --dry-run``: what it says is what a real step does, and every recipe in the repository passes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import adsc
from adsc import InputError, Schedule
from adsc.cli import main
from adsc.training.estimate import GPUS, HEAD_POSITIONS, estimate
from adsc.training.recipe import Recipe, check, read
from adsc.training.trainer import lora_config
from hf.tiny import TINY, batch

# PEFT asks transformers for checkpointing by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
RECIPES = Path(__file__).parents[2] / "recipes"
LAYERS, TEXT = 12, 40
FAMILIES = {"llava": 25, "llava_next": 49, "qwen2_5_vl": 24}  # and vision tokens of an image
SCHEDULE = "2:1/2,4:1/2"


def tiny(family: str, layers: int = LAYERS) -> Any:
    """The config of a tiny model, but for its depth."""
    config = TINY[family].build().config
    text = config.text_config
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * layers
    return config


def recipe(family: str = "llava", schedule: str = SCHEDULE, **parts: Any) -> Recipe:
    training = {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "bf16": False, "max_steps": 7}
    return check(
        {
            "model": "x",
            "output": "y",
            "data": {"train": "z"},
            "method": {"schedule": schedule, "vision_tokens": FAMILIES[family]},
            "curriculum": {"kind": "constant"},
            "distillation": {"weight": 0},
            "lora": {"rank": 4, "alpha": 8, **parts.pop("lora", {})},
            "training": training | parts.pop("training", {}),
            "estimate": {"text_tokens": TEXT, **parts.pop("estimate", {})},
        }
        | parts
    )


def stepped(family: str, asked: Recipe, schedule: str, attention: str = "eager") -> tuple[int, int, int]:
    """Trained parameters, FLOPs of a real step, and bytes that autograd keeps outside of parameters.

    Products of attention are counted in eager alone.
    """
    torch.manual_seed(0)
    config = tiny(family)
    made = TINY[family].build()._from_config(config, attn_implementation=attention)
    model = get_peft_model(made, lora_config(made, asked.lora))
    rows = batch(family, [[TEXT // 2, TINY[family].images[0 if family != "llava_next" else 1], TEXT // 2]] * 2)
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with adsc.compress(model, Schedule.parse(schedule)), FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**rows.inputs, labels=rows.inputs["input_ids"], use_cache=False).loss
        loss.backward()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, counter.get_total_flops(), sum(each.untyped_storage().nbytes() for each in kept.values())


@pytest.mark.parametrize("schedule", ["", SCHEDULE])
@pytest.mark.parametrize("projector", [False, True])
def test_flops_and_parameters_are_those_of_a_real_step(projector: bool, schedule: str) -> None:
    asked = recipe(schedule=schedule, lora={"projector": projector})
    report = estimate(asked, tiny("llava"))
    trained, flops, _ = stepped("llava", asked, schedule)
    assert report.trainable == trained
    # The real step has no need of gradients in front of the first trained matrices; its head sees vision tokens too.
    assert report.reduced.flops == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_flops_of_other_families(family: str) -> None:
    asked = recipe(family)
    trained, flops, _ = stepped(family, asked, SCHEDULE)
    report = estimate(asked, tiny(family))
    assert report.trainable == trained
    assert report.reduced.flops == pytest.approx(flops, rel=0.05)


@pytest.mark.parametrize("schedule", ["", SCHEDULE])
def test_activations_are_about_what_autograd_keeps(schedule: str) -> None:
    asked = recipe(schedule=schedule)
    _, _, kept = stepped("llava", asked, schedule, "sdpa")
    assert estimate(asked, tiny("llava")).reduced.memory.activations == pytest.approx(kept, rel=0.1)


def test_weights_and_optimiser() -> None:
    asked = recipe()
    report = estimate(asked, tiny("llava"))
    assert report.parameters == sum(parameter.numel() for parameter in TINY["llava"].build()._from_config(
        tiny("llava")).parameters())  # fmt: skip
    assert report.reduced.memory.weights == 4 * report.parameters
    assert estimate(recipe(training={"bf16": True}), tiny("llava")).reduced.memory.weights == 2 * report.parameters
    assert report.reduced.memory.trained == 16 * report.trainable
    assert report.reduced.memory.logits == 2 * TEXT * 256 * 4 * 2
    many = estimate(recipe(training={"per_device_train_batch_size": 500}), tiny("llava"))
    assert many.reduced.memory.logits == HEAD_POSITIONS * 256 * 4 * 2


def test_checkpointing_runs_layers_again_and_keeps_less() -> None:
    plain = estimate(recipe(), tiny("llava")).reduced
    again = estimate(recipe(training={"gradient_checkpointing": True}), tiny("llava")).reduced
    assert 1.2 < again.flops / plain.flops < 1.5
    assert again.memory.activations < plain.memory.activations / 3


def test_teacher_is_a_dense_forward_pass_more() -> None:
    without = estimate(recipe(), tiny("llava"))
    report = estimate(recipe(distillation={"weight": 1}), tiny("llava"))
    assert without.reduced.teacher_flops == report.dense.teacher_flops == 0
    forward = adsc.cost(tiny("llava"), vision_tokens=25, text_tokens=TEXT).dense.prefill
    head = forward.lm_head * (3 * TEXT - 1)
    assert report.reduced.teacher_flops == 2 * (forward.total + head)
    assert report.reduced.student_flops == without.reduced.student_flops
    assert estimate(recipe(distillation={"weight": 0, "hidden": 1}), tiny("llava")).reduced.teacher_flops > 0


def test_reduced_is_the_mean_over_the_curriculum() -> None:
    elastic = {"kind": "elastic", "budgets": [1, "1/2"], "schedules": {"1/2": "6:1/16"}}
    report = estimate(recipe(curriculum=elastic), tiny("llava"))
    half = estimate(recipe(schedule="6:1/16"), tiny("llava"))
    assert report.reduced.flops == pytest.approx((report.dense.flops + half.reduced.flops) / 2, abs=1)
    assert report.reduced.memory == report.dense.memory  # its heaviest schedule is dense
    assert [(part.share, part.schedule) for part in report.parts] == [(0.5, ""), (0.5, "6:1/16")]
    assert report.reduced.vision_tokens == pytest.approx(sum(part.vision_tokens for part in report.parts) / 2)
    warm = estimate(recipe(curriculum={"kind": "light_to_heavy", "warm": "1/2"}), tiny("llava"))
    assert sum(part.share for part in warm.parts) == 1
    target = estimate(recipe(), tiny("llava"))
    assert target.reduced.flops < warm.reduced.flops < warm.dense.flops


def test_steps_rows_and_hours() -> None:
    report = estimate(recipe(estimate={"gpus": 4}, training={"gradient_accumulation_steps": 3}), tiny("llava"))
    assert (report.rows, report.steps) == (24, 7)
    gpu = GPUS["A100-80GB"]
    assert report.dense.seconds == pytest.approx(report.dense.flops / (4 * gpu.flops * 0.35))
    assert report.dense.hours == pytest.approx(7 * report.dense.seconds / 3600)
    epochs = {"training": {"max_steps": -1, "num_train_epochs": 2}}
    assert estimate(recipe(**epochs, estimate={"rows": 101}), tiny("llava")).steps == 101
    unknown = estimate(recipe(**epochs), tiny("llava"))
    assert unknown.steps is unknown.dense.hours is None


def test_gpu_by_name() -> None:
    assert estimate(recipe(estimate={"gpu": "h200"}), tiny("llava")).gpu == "H200"
    with pytest.raises(InputError, match=r"estimate\.gpu is 'GTX'; it can be RTX-4090, .*, H100-80GB"):
        estimate(recipe(estimate={"gpu": "GTX"}), tiny("llava"))


def test_target_that_the_decoder_lacks() -> None:
    with pytest.raises(InputError, match=r"lora\.targets: 'w_proj'"):
        estimate(recipe(lora={"targets": ["w_proj"]}), tiny("llava"))


def test_a_model_that_the_cost_model_does_not_know() -> None:
    report = estimate(recipe(), tiny("gemma3"))
    assert report.dense is report.reduced is None
    assert "not in the cost model" in report.unknown
    assert report.trainable > 0


# A recipe of the repository: the family of its model, the layers of its decoder, and vision tokens of the tiny image.
FILES = {
    "llava-1.5-7b-66.7.yaml": ("llava", 32, None),
    "llava-1.5-7b-77.8.yaml": ("llava", 32, None),
    "llava-1.5-7b-88.9.yaml": ("llava", 32, None),
    "llava-next-7b.yaml": ("llava_next", 32, 49),
    "qwen2.5-vl-7b.yaml": ("qwen2_5_vl", 28, None),
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["train", *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_no_recipe_is_left_out() -> None:
    others = {"pocket.yaml", "pocket-idefics3.yaml", "pocket-elastic.yaml", "ablations.yaml"}  # tested elsewhere
    assert {path.name for path in RECIPES.glob("*.yaml")} == {*FILES, *others}


@pytest.mark.parametrize("name", FILES)
def test_dry_run_of_a_recipe(run: Run, tmp_path: Path, name: str) -> None:
    family, layers, tokens = FILES[name]
    tiny(family, layers).save_pretrained(tmp_path)  # a config is all it takes
    changes = ["--set", f"model={tmp_path}"]
    if tokens:
        changes += ["--set", f"method.vision_tokens={tokens}"]
    status, out, err = run(RECIPES / name, "--dry-run", "--json", *changes)
    assert (status, err) == (0, "")
    found = yaml.safe_load(out)
    budget = Fraction(found["recipe"]["method"]["retained"])
    dense, reduced = found["dense"], found["reduced"]
    assert found["steps"] >= 5000
    assert found["trainable"] > 0
    assert reduced["student_flops"] < dense["student_flops"]
    last = found["parts"][-1]["vision_tokens"] / found["vision_tokens"]
    if found["curriculum"] == "light_to_heavy":
        assert last * found["vision_tokens"] == pytest.approx(budget * found["vision_tokens"], abs=1)
    status, shown, _ = run(RECIPES / name, "--dry-run", *changes)
    assert status == 0
    for word in ("million trained parameters", "teacher", "memory of a GPU", "all steps on 8 x A100-80GB"):
        assert word in shown


def test_recipes_of_one_model_differ_in_budget_alone() -> None:
    read_ = [read(path).model_dump() for path in sorted(RECIPES.glob("llava-1.5-7b-*.yaml"))]
    budgets = [each["method"].pop("retained") for each in read_]
    assert budgets == ["1/3", "2/9", "1/9"]
    assert [list(each["curriculum"].pop("schedules")) for each in read_] == [[budget] for budget in budgets]
    assert len({each.pop("output") for each in read_}) == 3
    assert read_[0] == read_[1] == read_[2]


@pytest.mark.parametrize("name", FILES)
def test_comments_of_a_recipe(name: str) -> None:
    """What is claimed beside a schedule is what it gives."""
    lines = [line for line in (RECIPES / name).read_text().splitlines() if "vision tokens on average" in line]
    assert len(lines) == len(read(RECIPES / name).curriculum.schedules) > 0
    for line in lines:
        text, claimed = line.split("#")
        mean, of, left = (float(word.strip(",")) for word in claimed.split() if word[0].isdigit())
        tokens, schedule = int(of), Schedule.parse(text.strip().partition(": ")[2])
        held = adsc.plan([(0, tokens)], tokens, schedule, FILES[name][1]).vision_tokens_per_layer()
        assert (f"{sum(held) / len(held):.1f}", held[-1]) == (f"{mean:.1f}", left)


def test_pocket_recipe(run: Run) -> None:
    """The budgets that its comments claim are those of its schedules."""
    path = RECIPES / "pocket-elastic.yaml"
    lines = [line.split("#") for line in path.read_text().splitlines() if line.startswith("    ") and ":1/" in line]
    pocket = Path(adsc.__file__).parent / "pocket" / "model"
    asked = read(path, [f"model={pocket}"])
    assert len(lines) == len(asked.curriculum.schedules) == 6
    for text, claimed in lines:
        budget, _, schedule = text.strip().partition(": ")
        plan = adsc.plan([(0, 256)], 256, Schedule.parse(schedule.strip()), 24)
        tokens, retained, left = claimed.split()
        assert f"{sum(plan.vision_tokens_per_layer()) / 24:.1f}" == tokens
        assert f"{float(plan.retained):.4f}" == retained
        assert str(plan.vision_tokens_per_layer()[-1]) == left
        assert asked.curriculum.schedules[Fraction(budget)] == plan.schedule
    method = asked.reduction(AutoConfig.from_pretrained(pocket))
    assert str(method.schedule) == "6:1/2,9:1/4,11:1/8"
    status, out, err = run(path, "--dry-run", "--json", "--set", f"model={pocket}")
    assert (status, err) == (0, "")
    assert yaml.safe_load(out)["vision_tokens"] == 256


@pytest.mark.parametrize(("changes", "said"), [
    (["lora.rnk=3"], "lora.rnk is unknown; did you mean rank?"),
    (["training.max_step=3"], "training.max_step is unknown; did you mean max_steps?"),
    (["model=/nowhere"], "there is no folder '/nowhere'"),
    (["method.schedule=99:1/2"], "layers 1 to 23"),
    (["estimate.gpu=GTX"], "estimate.gpu is 'GTX'"),
    (["oops"], "is not KEY=VALUE"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(run: Run, changes: list[str], said: str) -> None:
    pocket = Path(adsc.__file__).parent / "pocket" / "model"
    options = [part for change in [f"model={pocket}", *changes] for part in ("--set", change)]
    status, out, err = run(RECIPES / "pocket-elastic.yaml", "--dry-run", *options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_no_such_recipe(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "none.yaml")[::2] == (2, f"error: cannot read the recipe {tmp_path}/none.yaml: No such file "
                                                   "or directory\n")  # fmt: skip


def test_dry_run_writes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(RECIPES / "pocket-elastic.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    pocket = Path(adsc.__file__).parent / "pocket" / "model"
    assert run("pocket-elastic.yaml", "--dry-run", "--set", f"model={pocket}")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pocket-elastic.yaml"]


@pytest.mark.parametrize(
    ("name", "kind", "key"), [("fsdp2", "FSDP", "fsdp"), ("deepspeed-zero3", "DEEPSPEED", "deepspeed")]
)
def test_accelerate_takes_its_configs(name: str, kind: str, key: str) -> None:
    """An unknown key raises in accelerate; keys of the parts are those of TRL's own configs."""
    import trl

    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert str(config.distributed_type).endswith(kind)
    model = {"fsdp2": "fsdp2", "deepspeed-zero3": "zero3"}[name]
    theirs = yaml.safe_load((Path(trl.__file__).parent / "accelerate_configs" / f"{model}.yaml").read_text())
    assert getattr(config, f"{key}_config").keys() == theirs[f"{key}_config"].keys()


DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def test_schedules_of_the_docs() -> None:
    """The table of schedules is arithmetic; what it calls the latest is for_budget's."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text().splitlines() if "| `" in line and ":1/" in line]
    assert len(rows) >= 16
    for budget, shape, schedule, tokens, retained, left in rows:
        plan = adsc.plan([(0, 256)], 256, Schedule.parse(schedule.strip("`")), 24)
        held = plan.vision_tokens_per_layer()
        assert (tokens, retained, left) == (f"{sum(held) / 24:.1f}", f"{float(plan.retained):.4f}", str(held[-1]))
        assert abs(plan.retained - Fraction(budget)) * 256 <= 1
        if "for_budget" in shape:
            assert plan.schedule == Schedule.for_budget(24, budget, 256)


def test_recipe_of_the_docs_is_the_default(tmp_path: Path) -> None:
    text = next(part for part in DOCS.read_text().split("```") if part.startswith("yaml")).removeprefix("yaml")
    (tmp_path / "shown.yaml").write_text(text)
    shown = read(tmp_path / "shown.yaml")
    assert shown == check({"model": shown.model, "output": shown.output, "data": {"train": "data/rows.jsonl"}})
