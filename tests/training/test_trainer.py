"""Training a tiny LLaVA: what a step learns from, and that a run can be stopped, killed and shared."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

import adsc
from adsc.pocket import MODEL_FOLDER
from adsc.training import trainer as module
from adsc.training.collating import Collator
from adsc.training.curriculum import Curriculum
from adsc.training.data import as_dataset, open_rows
from adsc.training.distillation import Distillation
from adsc.training.recipe import Lora, check
from adsc.training.trainer import ADSCTrainer, last_checkpoint, lora_config, train
from hf.tiny import KINDS, case, model
from training.running import BUDGETS, make_checkpoint, make_rows, told, values

pytestmark = [
    # Names of 5.16, which TRL and PEFT still use.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    make_checkpoint(path / "model")
    make_rows(path / "rows")
    return path


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Eight steps at three budgets, evaluated twice."""
    return train(check(recipe_values(folder, folder / "undisturbed")))


def recipe_values(folder, output, **training):
    made = values(folder, output, **{"eval_strategy": "steps", "eval_steps": 4, **training})
    made["data"]["validation"] = made["data"]["train"]
    return made


def made_trainer(folder, output, schedule=BUDGETS["1/2"], lora=None, distillation=None, curriculum=None, **training):
    """A trainer, whose first step can be looked at."""
    options = values(folder, output, **training)["training"]
    network = copy.deepcopy(model("llava"))
    processor = AutoProcessor.from_pretrained(folder / "model")
    return ADSCTrainer(
        network,
        SFTConfig(output_dir=str(output), report_to="none", max_length=None, **options),
        method=adsc.methods.ADSC(adsc.Schedule.parse(schedule)),
        curriculum=curriculum,
        distillation=distillation,
        peft_config=lora_config(network, lora or Lora(rank=4, alpha=8)),
        processing_class=processor,
        data_collator=Collator(processor, config=network.config),
        train_dataset=as_dataset(open_rows(folder / "rows" / "rows.jsonl")),
    )


def unlike_base(trainer, seed=0):
    """Adapter weights as after some training: new ones change nothing."""
    torch.manual_seed(seed)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)


def losses(outcome_or_trainer):
    history = getattr(outcome_or_trainer, "history", None) or outcome_or_trainer.state.log_history
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a step learns from


@pytest.mark.parametrize("projector", [False, True])
def test_the_loss_is_of_labels_and_of_the_dense_model_without_adapter(folder, tmp_path, projector):
    weighed = Distillation(weight=0.7, temperature=2.0, hidden=0.3)
    trainer = made_trainer(folder, tmp_path, lora=Lora(rank=4, alpha=8, projector=projector), distillation=weighed)
    unlike_base(trainer)
    if projector:
        for name, weight in trainer.model.named_parameters():
            if "modules_to_save" in name:
                weight.data += 0.1 * torch.randn_like(weight)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.state.max_steps = 8
    trainer.model.train()
    count = (batch["labels"][:, 1:] != -100).sum()
    found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    found.backward()

    # By hand: full logits of the reduced student and of a model that never had an adapter.
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    gradient = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    trainer.model.zero_grad()
    student = trainer.model(**inputs, output_hidden_states=True)
    plans = trainer.handle.last_plans
    with torch.no_grad():
        teacher = model("llava")(**inputs, output_hidden_states=True)
    label, predicts = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    p, q = ((each.logits[:, :-1][predicts] / 2).log_softmax(-1) for each in (teacher, student))
    divergence = 4 * (p.exp() * (p - q)).sum()
    entropy = -student.logits[:, :-1].log_softmax(-1).gather(-1, label.clamp(min=0)[..., None])[..., 0][predicts].sum()
    errors = 0
    for row, kept in enumerate(plans):
        at = batch["attention_mask"][row].nonzero().flatten()[torch.tensor(kept.kept(5).tolist())]
        a, b = (trainer.handle.model.base_model(**inputs).last_hidden_state[row, at], hidden(inputs)[row, at])
        errors += ((a - b).square().sum(-1) / b.square().sum(-1)).mean() * predicts[row].sum()
    expected = (entropy + 0.7 * divergence + 0.3 * errors) / count
    assert min(entropy, divergence, errors) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    for name, weight in trainer.model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(gradient[name], weight.grad, rtol=1e-3, atol=1e-5)
    assert any("modules_to_save" in name for name in gradient) == projector


def hidden(inputs):
    with torch.no_grad():
        return model("llava").base_model(**inputs).last_hidden_state


def test_independent_turns_share_their_image_and_change_nothing(folder, tmp_path):
    rows = open_rows(folder / "rows" / "rows.jsonl")
    merged, alone = [], []
    for first in range(0, 12, 3):  # the questions of three rows about the image of the first
        images, turns = rows[first]["images"], [rows[first + more]["messages"] for more in range(3)]
        asked = [[{**turn[0], "content": turn[0]["content"][-1:]}, turn[1]] for turn in turns]
        merged.append({"messages": [*turns[0], *asked[1], *asked[2]], "images": images})
        image = turns[0][0]["content"][:1]
        alone += [
            {"messages": [{**q, "content": [*image, *q["content"]]}, answer], "images": images} for q, answer in asked
        ]
    trainer = made_trainer(folder, tmp_path, distillation=Distillation(hidden=0.0))
    unlike_base(trainer)
    trainer.state.max_steps = 8
    trainer.model.train()
    found, gradients = [], []
    for examples, independent in ((merged, True), (alone, False), (merged, False)):
        trainer.data_collator.independent_turns = independent
        batch = trainer.data_collator(examples)
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        found.append((int(count), float(loss.detach())))
        gradients.append({n: w.grad.clone() for n, w in trainer.model.named_parameters() if w.grad is not None})
        trainer.model.zero_grad()
    assert found[0] == (found[1][0], pytest.approx(found[1][1], rel=1e-5))
    assert found[2][1] != pytest.approx(found[1][1], rel=1e-3)  # a conversation is something else
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert trainer.model.training
    with torch.no_grad():
        trainer.model.eval()
        trainer.data_collator.independent_turns = True
        batch = trainer.data_collator(merged)
        evaluated = float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=found[0][0]))
    assert 0 < evaluated < found[0][1]  # the reduced model's, without the teacher's part


def test_independent_turns_want_a_mask(folder, tmp_path):
    made = recipe_values(folder, tmp_path / "out", model_init_kwargs={"attn_implementation": "flash_attention_2"})
    made["data"]["independent_turns"] = True
    with pytest.raises(adsc.InputError, match="flash_attention_2 does not take"):
        train(check(made))
    made["method"]["positions"] = "compact"
    with pytest.raises(adsc.InputError, match=r"needs method\.positions original"):
        check(made)


def test_a_dense_student_without_an_adapter_has_nothing_to_learn_from_itself(folder, tmp_path):
    trainer = made_trainer(folder, tmp_path, schedule="", distillation=Distillation(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["distillation"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[0]["retained"] == 1


def test_dense_training_is_trls(folder, tmp_path):
    trainer = made_trainer(folder, tmp_path / "ours", schedule="", max_steps=3)
    trainer.train()
    network = copy.deepcopy(model("llava"))
    processor = AutoProcessor.from_pretrained(folder / "model")
    plain = SFTTrainer(
        network,
        trainer.args,
        peft_config=lora_config(network, Lora(rank=4, alpha=8)),
        processing_class=processor,
        data_collator=Collator(processor, config=network.config),
        train_dataset=as_dataset(open_rows(folder / "rows" / "rows.jsonl")),
    )
    plain.train()
    assert losses(plain) == losses(trainer)
    assert len(set(losses(trainer))) == 3


def test_every_step_has_its_schedule(folder, tmp_path):
    schedules = [adsc.Schedule.parse(text) for text in BUDGETS.values()]
    curriculum = Curriculum("elastic", schedules[1], 6, budgets=schedules, seed=3)
    seen, steps = [], 5

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([])

    trainer = made_trainer(
        folder, tmp_path, curriculum=curriculum, max_steps=steps, gradient_accumulation_steps=3,
        per_device_train_batch_size=2, distillation=Distillation(),
    )  # fmt: skip
    trainer.add_callback(Watch())

    def note(*_):
        seen[-1].append(str(trainer.handle.method.schedule))

    trainer.handle.model.base_model.register_forward_hook(note)
    trainer.train()
    # Teacher and student in turn, three times a step.
    expected = [str(curriculum.schedule(step / steps, draw=step)) for step in range(steps)]
    assert seen == [["", schedule] * 3 for schedule in expected]
    assert set(expected) == {str(schedule) for schedule in schedules}
    logged = [entry["retained"] for entry in trainer.state.log_history if "retained" in entry]
    plans = [adsc.plan([(1, 26)], 30, adsc.Schedule.parse(schedule), 6) for schedule in expected]
    assert logged == pytest.approx([float(plan.retained) for plan in plans])


def test_accumulation_and_batches_of_other_sizes_change_nothing(folder, tmp_path):
    found = []
    for batch, steps in ((4, 1), (1, 4), (2, 2)):
        trainer = made_trainer(
            folder, tmp_path / str(batch), max_steps=4, per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps, distillation=Distillation(hidden=0.5),
        )  # fmt: skip
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(folder, tmp_path, reentrant):
    found = []
    for name, more in {"off": {}, "on": {"gradient_checkpointing": True}}.items():
        more = {**more, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if more else {}
        trainer = made_trainer(folder, tmp_path / name, max_steps=3, distillation=Distillation(), **more)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_bf16(folder, tmp_path):
    found = []
    for bf16 in (False, True):
        trainer = made_trainer(folder, tmp_path / str(bf16), max_steps=3, distillation=Distillation(), bf16=bf16)
        trainer.train()
        found.append(losses(trainer))
        assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters() if weight.requires_grad)
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.05)


# The adapter


@pytest.mark.parametrize("family", KINDS)
def test_only_the_decoders_linear_layers_are_trained(family):
    import peft

    network = copy.deepcopy(model(family))
    inside = {name for name, each in network.named_modules() if isinstance(each, torch.nn.Linear)}
    adapted = peft.get_peft_model(network, lora_config(network, Lora(rank=2)))
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert all("lora_" in name and ".layers." in name for name in trained)
    assert not any(word in name for name in trained for word in ("vision", "visual", "lm_head", "projector", "merger"))
    towers = ("vision", "visual", "projector", "merger", "connector", "lm_head")
    decoder = {name for name in inside if not any(word in name for word in towers)}
    covered = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained}
    assert covered == decoder
    assert len(covered) >= 6 * 6


@pytest.mark.parametrize("family", KINDS)
def test_the_projector_is_trained_on_request(family):
    import peft

    network = copy.deepcopy(model(family))
    made = case(family, "single")
    adapted = peft.get_peft_model(network, lora_config(network, Lora(rank=2, projector=True)))
    whole = {name for name, weight in adapted.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert whole
    assert all(any(f".{part}." in name for part in module.PROJECTORS) for name in whole)
    adapted(**made.inputs).logits.sum().backward()
    got = {name for name, weight in adapted.named_parameters() if weight.requires_grad and weight.grad is not None}
    assert whole <= got


def test_named_targets():
    network = copy.deepcopy(model("llava"))
    import peft

    adapted = peft.get_peft_model(network, lora_config(network, Lora(rank=2, targets=["q_proj", "v_proj"])))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == 6 * 2 * 2
    with pytest.raises(adsc.InputError, match="'qkv' is no linear layer of the decoder; it has q_proj"):
        lora_config(copy.deepcopy(model("llava")), Lora(targets=["q_proj", "qkv"]))


def test_a_teacher_needs_an_adapter(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder / "model")
    network = copy.deepcopy(model("llava"))
    with pytest.raises(adsc.InputError, match="needs an adapter"):
        ADSCTrainer(
            network,
            SFTConfig(output_dir=str(tmp_path), report_to="none", max_length=None, use_cpu=True, bf16=False),
            method=adsc.methods.ADSC(adsc.Schedule.parse("1:1/2")),
            distillation=Distillation(),
            processing_class=processor,
            data_collator=Collator(processor, config=network.config),
            train_dataset=as_dataset(open_rows(folder / "rows" / "rows.jsonl")),
        )


# Evaluation


def test_every_budget_is_evaluated(folder, undisturbed):
    entries = [entry for entry in undisturbed.history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [4, 8]
    network, processor = adsc.load(undisturbed.folder)
    rows = open_rows(folder / "rows" / "rows.jsonl")
    batch = Collator(processor, config=network.config)([rows[number] for number in range(len(rows))])
    found = {}
    with torch.no_grad():
        for name in BUDGETS:
            with network.adsc.budget(name):
                found[name] = float(network(**batch).loss)
    # Batches count alike in a Trainer's evaluation, whatever their number of labels: hence the tolerance.
    assert {name: entries[-1][f"eval_{name}_loss"] for name in BUDGETS} == pytest.approx(found, rel=0.02)
    assert len({round(loss, 4) for loss in found.values()}) == 3
    assert entries[-1]["eval_loss"] == pytest.approx(sum(entries[-1][f"eval_{name}_loss"] for name in BUDGETS) / 3)
    assert entries[-1]["eval_loss"] < entries[0]["eval_loss"]
    accuracy = entries[-1]["eval_1/3_accuracy"]
    assert 0 <= accuracy <= 1
    told = f"| retained 1/3 | {entries[-1]['eval_1/3_loss']:.4g} | {100 * accuracy:.4g} |"
    assert told in (undisturbed.folder / "README.md").read_text()


def test_the_best_checkpoint_is_the_result(folder, tmp_path):
    made = recipe_values(
        folder, tmp_path / "run", eval_steps=2, load_best_model_at_end=True, learning_rate=0.1, save_total_limit=3
    )
    outcome = train(check(made))
    by_step = {entry["step"]: entry["eval_loss"] for entry in outcome.history if "eval_loss" in entry}
    best = min(by_step, key=by_step.get)
    assert best < 8  # such steps lead nowhere
    assert same(weights(outcome.folder), weights(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}"))


# Stopping and going on


def test_a_stopped_run_goes_on_as_if_nothing_had_been(folder, tmp_path, undisturbed):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    recipe = check(recipe_values(folder, tmp_path / "run"))
    handler = signal.getsignal(signal.SIGINT)
    stopped = train(recipe, callbacks=[Interrupt()])
    assert stopped.stopped
    assert (stopped.step, stopped.steps) == (4, 8)
    assert stopped.checkpoint == tmp_path / "run" / "checkpoints" / "checkpoint-4"
    assert not (tmp_path / "run" / "adapter").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(adsc.InputError, match="holds a training already"):
        train(recipe)
    outcome = train(recipe, resume=True)
    assert not outcome.stopped
    assert_equal_runs(outcome.history, outcome.folder, undisturbed)


def assert_equal_runs(history, result, undisturbed):
    """Every loss and all else that was logged, the adapter, and the optimiser's state."""
    found, expected = (
        [entry for entry in told(each) if "train_loss" not in entry] for each in (history, undisturbed.history)
    )
    assert found == expected
    assert len(losses(undisturbed)) == 8
    assert same(weights(result), weights(undisturbed.folder))
    states = [
        torch.load(each.parent / "checkpoints" / "checkpoint-8" / "optimizer.pt")
        for each in (result, undisturbed.folder)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_checkpoint_that_was_being_written_is_left_out(folder, tmp_path, undisturbed):
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(undisturbed.folder.parent / "checkpoints", checkpoints)
    assert last_checkpoint(checkpoints).name == "checkpoint-8"
    (checkpoints / "checkpoint-8" / "trainer_state.json").unlink()
    assert last_checkpoint(checkpoints).name == "checkpoint-6"
    for file, step in {"adapter_model.safetensors": 6, "optimizer.pt": 4}.items():
        path = checkpoints / f"checkpoint-{step}" / file
        path.write_bytes(path.read_bytes()[:-100])
        assert last_checkpoint(checkpoints).name == f"checkpoint-{step - 2}"
    outcome = train(check(recipe_values(folder, tmp_path / "run")), resume=True)
    assert_equal_runs(outcome.history, outcome.folder, undisturbed)


def test_killed_behind_the_last_step(folder, tmp_path, undisturbed):
    shutil.copytree(undisturbed.folder.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    outcome = train(check(recipe_values(folder, tmp_path / "run")), resume=True)
    assert (outcome.step, outcome.steps) == (8, 8)
    assert same(weights(outcome.folder), weights(undisturbed.folder))


def test_another_recipe_does_not_go_on(folder, tmp_path):
    made = values(folder, tmp_path / "run", max_steps=2)
    train(check(made))
    made["lora"]["rank"], made["training"]["learning_rate"] = 8, 1e-3
    with pytest.raises(adsc.InputError, match=r"another recipe \(it differs in lora\.rank, training\.learning_rate\)"):
        train(check(made), resume=True)
    made = values(folder, tmp_path / "run", max_steps=2, logging_steps=5)  # what changes no weight may change
    assert train(check(made), resume=True).step == 2


def test_resume_without_a_checkpoint_begins(folder, tmp_path):
    outcome = train(check(values(folder, tmp_path / "run", max_steps=1)), resume=True)
    assert outcome.step == 1


@pytest.mark.slow
def test_killed_at_random_steps(folder, tmp_path, undisturbed):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(folder, tmp_path / "run")))
    draw = random.Random(0)
    for bounds in ((1, 3), (3, 5), (5, 7)):
        last = draw.randint(*bounds)
        with start(recipe, "resume") as process:
            for line in process.stdout:
                if line == f"step {last}\n":
                    process.kill()
        assert process.returncode == -signal.SIGKILL
    with start(recipe, "resume") as process:
        said = process.stdout.read()
    assert process.returncode == 0
    first = int(said.splitlines()[0].split()[1])
    assert first >= 2  # it went on
    assert "finished 8" in said
    history = json.loads(recipe.with_suffix(".history").read_text())
    assert_equal_runs(history, tmp_path / "run" / "adapter", undisturbed)


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    """The same rows a step, split over two processes; and both stop where one is asked to."""
    found = {}
    for name, processes in {"one": 1, "two": 2}.items():
        made = recipe_values(folder, tmp_path / name, per_device_train_batch_size=4 // processes)
        made["distillation"] = {"hidden": 0.5}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(made))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        script = str(Path(__file__).with_name("running.py"))
        for arguments, said in ([["stop=2"], "stopped 3"], [["resume"], "finished 8"])[2 - processes :]:
            done = subprocess.run(
                [*command, script, str(recipe), *arguments], env=ENVIRONMENT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert said in done.stdout
        found[name] = json.loads(recipe.with_suffix(".history").read_text())
    for key in ("loss", "distillation", "hidden", "retained", "eval_1/3_loss", "eval_loss", "num_tokens"):
        one, two = ([entry[key] for entry in found[name] if key in entry] for name in ("one", "two"))
        assert len(one) >= 2
        tolerance = 0.02 if key.startswith("eval") else 1e-4  # evaluation batches are of other sizes
        assert two == pytest.approx(one, rel=tolerance), key
    one, two = (weights(tmp_path / name / "adapter") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-4)


def start(recipe: Path, *arguments: str) -> subprocess.Popen:
    script = str(Path(__file__).with_name("running.py"))
    return subprocess.Popen(
        [sys.executable, script, str(recipe), *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


# The whole


def test_tensorboard(folder, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outcome = train(check(recipe_values(folder, tmp_path / "run", report_to="tensorboard", max_steps=4)))
    read = events.EventAccumulator(str(tmp_path / "run" / "logs"))
    read.Reload()
    logged = [event.value for event in read.Scalars("train/loss")]
    assert logged == pytest.approx(losses(outcome))
    assert len(logged) == 4
    assert {"train/retained", "train/distillation", "eval/1/3_loss", "eval/loss"} <= set(read.Tags()["scalars"])
    assert not (tmp_path / "run" / "checkpoints" / "runs").exists()


def test_bad_training_values(folder, tmp_path):
    for key, value, match in (
        ("lerning_rate", 1, "did you mean learning_rate"),
        ("learning_rate", "fast", "must be float"),
        ("save_strategy", "sometimes", "sometimes"),
    ):
        with pytest.raises(adsc.InputError, match=match):
            train(check(values(folder, tmp_path / "run", **{key: value})))
    assert not (tmp_path / "run").exists()


def test_the_model_in_the_box(tmp_path):
    """A few steps on a few questions: they are answered better with a ninth of the vision tokens."""
    rows, lines = open_rows({"pocket": "train"}), []
    for number in range(8):
        row = rows[number]
        row["images"][0].save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"messages": row["messages"], "images": [f"{number}.png"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    made = {
        "model": str(MODEL_FOLDER),
        "output": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "method": {"retained": "1/9"},
        "curriculum": {"kind": "constant"},
        "lora": {"rank": 8, "alpha": 16},
        "training": {
            "max_steps": 5, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1,
            "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "disable_tqdm": True,
        },
    }  # fmt: skip
    outcome = train(check(made))
    entries = [entry for entry in outcome.history if "loss" in entry]
    assert all(entry["retained"] == pytest.approx(1 / 9, abs=0.005) for entry in entries)
    assert all(entry["distillation"] > 0 for entry in entries)
    network, processor = adsc.load(outcome.folder)
    batch = Collator(processor, config=network.config)([rows[number] for number in range(8)])
    before, _ = adsc.load(MODEL_FOLDER, retained=1)
    with torch.no_grad(), before.adsc.using(network.adsc.method):
        assert network(**batch).loss < 0.8 * before(**batch).loss
    row = rows[0]
    text = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    inputs = processor(images=row["images"], text=text, return_tensors="pt")
    answer = network.generate(**inputs, max_new_tokens=8)
    said = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == row["messages"][1]["content"][0]["text"]
