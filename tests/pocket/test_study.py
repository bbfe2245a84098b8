"""Answers through the engine, packed and alone; what is stored of them; and tables with numbers known beforehand."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

import adsc
from adsc import InputError
from adsc.evaluation.record import store
from adsc.evaluation.statistics import clustered_mean
from adsc.hf.checkpoint import read_config
from adsc.layout import Layout
from adsc.pocket import MODEL_FOLDER, study
from adsc.pocket.ablations import Ablations
from adsc.pocket.evaluation import answers, answers_alone
from adsc.pocket.predictions import Asked, Predictions, fingerprint, predict, read, read_all
from adsc.pocket.splits import load
from adsc.pocket.study import Questions, figures, markdown, spreadsheet
from adsc.training.recipe import check_training

ROWS = [(image, asked[:4]) for image, asked in load("test", 4)]
SCHEDULES = ("", "6:1/2,9:1/4,11:1/8", "1:1/2,2:1/2,6:1/16,11:1/4", "1:1/64")


@pytest.fixture(scope="module")
def opened():
    model, processor = adsc.load(MODEL_FOLDER, retained=1)
    return model.eval(), processor


def said(model, processor, image, question) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    return processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_packed_answers_are_those_of_questions_asked_one_by_one(opened, schedule):
    model, processor = opened
    with model.adsc.using(schedule):
        packed = answers(model, processor, ROWS, progress=False)
        assert packed == answers_alone(model, processor, ROWS, batch=9)
        generated = [[said(model, processor, image, q) == q.answer for q in asked] for image, asked in ROWS[:1]]
    assert packed[:1] == generated
    assert sum(map(sum, packed)) > 0
    if schedule == SCHEDULES[-1]:  # so hard that the engine must have been at work
        assert sum(map(sum, packed)) < sum(map(sum, answers(model, processor, ROWS, progress=False)))


def test_alone_serves_renumbered_positions(opened):
    model, processor = opened
    method = adsc.ADSCConfig("1:1/2,2:1/2,6:1/16,11:1/4", positions="compact")
    with model.adsc.using(method):
        alone = answers_alone(model, processor, ROWS[:2])
        assert alone == [[said(model, processor, image, q) == q.answer for q in asked] for image, asked in ROWS[:2]]


def test_predictions_are_stored_once_and_read_back(tmp_path, monkeypatch):
    asked = Asked("untrained", retained=("1", "1/9"), images=2, folder=tmp_path)
    first, second = predict(asked)
    assert first == tmp_path / "test-first-2" / "untrained-1.json"
    found = read(second)
    model, processor = adsc.load(MODEL_FOLDER, retained=1)
    with model.adsc.using(found.about["schedule"]):
        expected = answers(model, processor, list(load("test", 2)), progress=False)
    assert found.right.tolist() == [hit for hits in expected for hit in hits]
    assert found.about["share"] == pytest.approx(1 / 9, abs=1 / 256)
    assert found.about["cost"]["kv_bytes"] < 0.2
    assert {"command", "versions", "hardware", "weights", "precision"} <= found.about.keys()
    second.unlink()
    before = first.stat().st_mtime_ns
    predict(asked)  # goes on where it was
    assert first.stat().st_mtime_ns == before
    assert read(second).right.tolist() == found.right.tolist()
    with pytest.raises(InputError, match="differs in precision"):
        predict(replace(asked, precision="bfloat16"))


def test_two_processes_answer_as_one(tmp_path):
    asked = Asked("untrained", retained=("1/9",), condition="downsampled 1/9", images=3, folder=tmp_path)
    (alone,) = predict(replace(asked, folder=tmp_path / "alone"))
    (both,) = predict(asked, processes=2)
    assert both.name == "untrained-1_9-downsampled-1_9.json"
    assert read(both).right.tolist() == read(alone).right.tolist()


def test_schedules_of_another_folder_and_ones_own(tmp_path):
    saved = adsc.ADSCConfig("4:1/2", pattern="first", budgets={"1/9": "1:1/64", "2/3": "4:1/2"})
    saved.save_pretrained(tmp_path)
    asked = Asked("untrained", retained=("1/9", "own"), images=2, folder=tmp_path / "out", schedules_of=str(tmp_path))
    abouts = [read(path).about for path in predict(asked)]
    assert [about["schedule"] for about in abouts] == ["1:1/64", "4:1/2"]
    assert {about["pattern"] for about in abouts} == {"first"}


def test_wrong_names_are_told_in_one_line(tmp_path, capsys):
    for bad in ({"condition": "upside down"}, {"precision": "int8"}, {"retained": ("2",)}, {"retained": ("own",)}):
        with pytest.raises(InputError) as error:
            predict(Asked("untrained", images=2, folder=tmp_path, **bad))
        assert "\n" not in str(error.value)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="holds no predictions"):
        read_all(tmp_path)


# Tables of made-up answers.

TASKS = np.array(sorted(study.TASKS))
IMAGES = 300
QUESTIONS = Questions(np.tile(TASKS, IMAGES), np.repeat(np.arange(IMAGES), len(TASKS)))
ABOUT = {"schedule": "4:1/2", "pattern": "last", "positions": "original", "precision": "float32",
         "cost": {"prefill_flops": 0.6, "llm_prefill_flops": 0.5, "kv_bytes": 0.4}, "share": 0.5}  # fmt: skip


def made(name, retained, seed, right, condition="dense"):
    schedule = "" if retained == "1" else f"{len(retained)}:{retained}"
    about = {**ABOUT, "name": name, "retained": retained, "seed": seed, "condition": condition, "schedule": schedule}
    about |= {"share": eval(retained), "questions": {"count": len(right), "digest": ""}}
    return Predictions(np.array(right, dtype=bool), about)


def study_of(seeds=(0, 1, 2), budgets=study.BUDGETS):
    """Dense answers 90 % right. Untrained loses a share of these that grows with the reduction, ADSC a tenth of it."""
    count = len(QUESTIONS.tasks)
    rng = np.random.default_rng(0)
    dense = np.arange(count) % 10 != 0
    found = [made("untrained", "1", None, dense), made("untrained", "1", None, dense & (rng.random(count) < 0.7),
             "downsampled 1/9")]  # fmt: skip
    found += [made("dense", "1", seed, dense) for seed in seeds]
    for retained, lost in zip(budgets, (0.05, 0.1, 0.3, 0.6), strict=False):
        found.append(made("untrained", retained, None, dense & (rng.random(count) >= lost)))
        found += [made("adsc", retained, s, dense & (rng.random(count) >= lost / 10)) for s in seeds]
    return found


def test_the_tables_numbers():
    found = study_of()
    result = figures(found, QUESTIONS)
    rows = {(row["name"], row["retained"]): row for row in result["rows"]}
    assert list(rows)[:2] == [("untrained", "1"), ("dense", "1")]
    assert rows["dense", "1"]["quality"]["overall"]["mean"] == 0.9
    assert rows["dense", "1"]["of dense"]["overall"] == {
        "mean": 1.0,
        "margin_95": 0.0,
        "questions": len(QUESTIONS.tasks),
    }
    adsc_rows = [each.right for each in found if (each.about["name"], each.about["retained"]) == ("adsc", "1/9")]
    row, mean = rows["adsc", "1/9"], np.mean(adsc_rows, axis=0)
    assert row["quality"]["overall"] == clustered_mean(mean, QUESTIONS.images).to_dict()
    assert row["of dense"]["overall"]["mean"] == pytest.approx(mean.mean() / 0.9, abs=1e-5)
    assert row["of dense"]["overall"]["mean"] == pytest.approx(0.97, abs=0.01)
    assert row["deviation over seeds"] == pytest.approx(np.std([r.mean() for r in adsc_rows], ddof=1), abs=1e-5)
    reading = QUESTIONS.tasks == "reading"
    assert row["quality"]["reading"]["mean"] == pytest.approx(mean[reading].mean(), abs=1e-5)
    five = ~np.isin(QUESTIONS.tasks, ["reading", "grounding"])
    assert row["quality"]["the other five"]["questions"] == five.sum() == 5 * IMAGES
    hard = ~found[1].right
    assert row["quality"]["difficult"]["mean"] == pytest.approx(mean[hard].mean(), abs=1e-5)
    assert row["quality"]["difficult"]["questions"] == hard.sum()
    assert row["mean over tasks"]["mean"] == pytest.approx(row["quality"]["overall"]["mean"], abs=1e-5)  # equal sizes
    assert row["goal"] == {"of dense": 0.983, "reached": False}
    assert rows["adsc", "1/3"]["floor"] == {"of dense": 0.982, "reached": True}
    assert "goal" not in rows["adsc", "1/18"]
    assert "goal" not in rows["untrained", "1/3"]
    assert result["control"]["holds"]
    assert result["missing"] == []
    assert result["card"]["ADSC trained at 1/9"]["right, %"].startswith(f"{100 * mean.mean():.1f} ± ")
    lines = spreadsheet(result).splitlines()
    assert len(lines) == 1 + len(rows) * (len(row["quality"]) + 1)


def test_a_control_that_lost_too_much_is_told():
    found = study_of()
    for each in found:
        if each.about["name"] == "dense":
            each.right[:: len(TASKS)] = False
    result = figures(found, QUESTIONS)
    assert not result["control"]["holds"]
    assert "is NOT within 0.5 points" in markdown({**result, "split": "test", "images": IMAGES, "questions": 1})


def test_missing_parts_are_told_in_one_line():
    found = [
        each for each in study_of(seeds=(0, 2), budgets=("1/3", "2/9", "1/9")) if each.about["condition"] == "dense"
    ]
    result = figures(found, QUESTIONS)
    assert result["missing"] == [
        "untrained at 1/18", "untrained at 1, downsampled 1/9", "dense at 1 (seed 1)", "adsc at 1/3 (seed 1)",
        "adsc at 2/9 (seed 1)", "adsc at 1/9 (seed 1)", "adsc at 1/18 (seed 0, 1, 2)",
    ]  # fmt: skip
    text = markdown({**result, "split": "test", "images": IMAGES, "questions": 1})
    (line,) = [line for line in text.splitlines() if line.startswith("Missing: ")]
    assert "adsc at 1/18 (seed 0, 1, 2)" in line
    assert "difficult" not in result["rows"][0]["quality"]


# Ablations


@pytest.fixture
def root(request):
    return request.config.rootpath


def test_every_ablation_is_a_recipe_of_its_budget(root, monkeypatch):
    monkeypatch.chdir(root)
    ablations = Ablations.read(root / "recipes" / "ablations.yaml")
    config = read_config(str(MODEL_FOLDER))
    base = ablations.recipe_of(next(run for run in ablations.runs if not run.changes))
    assert len({run.group for run in ablations.runs}) >= 8
    for run in ablations.unique():
        recipe = ablations.recipe_of(run)
        check_training(recipe)
        method = recipe.reduction(config)
        plan = method.plan(Layout(270, [(2, 258)], [(16, 16)]), 24)
        slack = 0.02 if run.value == "grid" else 1 / 256  # rows times columns do not meet every number
        assert float(plan.retained) == pytest.approx(1 / 9, abs=slack), run.name
        assert recipe.output == f"runs/ablation/{run.name}"
        assert run.name == "base" or recipe != base, run.name


def test_the_table_of_ablations(tmp_path, capsys):
    recipe = tmp_path / "ablations.yaml"
    recipe.write_text(
        "base: recipes/pocket-elastic.yaml\noutput: runs/x\nruns:\n"
        "- {group: pattern, value: last}\n- {group: pattern, value: first, set: {method.pattern: first}}\n"
        "- {group: place, value: off, set: {method.retained: 1/3}}\n"
    )
    asked = Asked("", split="test", images=40, folder=tmp_path / "predictions")
    with pytest.raises(InputError, match="no predictions"):
        Ablations.read(recipe).table(asked, tmp_path)
    rows = [some for _, some in load("test", 40)]
    images = np.repeat(np.arange(40), list(map(len, rows)))
    base = np.arange(len(images)) % 4 != 0
    worse = base & (np.arange(len(images)) % 3 != 0)
    for name, right in (("base", base), ("pattern-first", worse)):
        about = {**ABOUT, "questions": fingerprint(rows), "right": base64.b64encode(np.packbits(right)).decode()}
        store(replace(asked, name=name, seed=0).path("own"), about, seed=0)
    text = Ablations.read(recipe).table(asked, tmp_path)
    assert (tmp_path / "ablations.md").read_text() == text
    result = json.loads((tmp_path / "ablations.json").read_text())
    first, second = result["rows"]
    assert (first["value"], second["value"], result["missing"]) == ("last", "first", ["place-off"])
    assert "difference" not in first
    assert first["right"]["mean"] == pytest.approx(base.mean(), abs=1e-5)
    paired = clustered_mean(worse.astype(float) - base, images)
    assert second["difference"] == {**paired.to_dict(), "from": "last"}
    assert "Missing: place-off." in text
    assert "−" in text


def test_where_the_model_reads(tmp_path, capsys):
    study.main(["layers", "--folder", str(tmp_path), "--images", "3"])
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert [row["layers with vision tokens"] for row in rows] == list(range(1, 25))
    overall = [row["quality"]["overall"]["mean"] for row in rows]
    assert overall[0] < 0.8 < overall[-1]
    assert (tmp_path / "layers.md").read_text().count("\n| ") == 26  # head, rule and layers
    stored = read(tmp_path / "predictions" / "validation-first-3" / "layers-6-1_256.json").about
    assert (stored["schedule"], stored["share"]) == ("6:1/256", pytest.approx((6 * 256 + 18) / 24 / 256, abs=1e-5))


def test_wrong_ablations_are_told_in_one_line(tmp_path):
    recipe = tmp_path / "ablations.yaml"
    for text, said in (
        ("base: x", "needs base, output and runs"),
        ("base: x\noutput: y\nruns: [{group: a, value: b}, {group: a, value: b}]", "names a b twice"),
    ):
        recipe.write_text(text)
        with pytest.raises(InputError, match=said):
            Ablations.read(recipe)
    recipe.write_text("base: x\noutput: y\nruns: [{group: a, value: b}]")
    with pytest.raises(SystemExit, match="no run 'c'; the runs are base"):
        study.main(["ablate", str(recipe), "--only", "c"])


def test_the_commands(tmp_path, capsys):
    options = ["--folder", str(tmp_path), "--images", "2"]
    with pytest.raises(SystemExit, match="there are no predictions"):
        study.main(["table", *options])
    study.main(["predict", "--name", "untrained", "--retained", "1", "1/9", *options])
    study.main(["predict", "--name", "dense", "--seed", "0", *options])
    study.main(["table", *options])
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert told.err.startswith("missing: untrained at 1/3; ")
    result = json.loads((tmp_path / "main.json").read_text())
    assert [(row["name"], row["retained"]) for row in result["rows"]] == [
        ("untrained", "1"), ("dense", "1"), ("untrained", "1/9"),
    ]  # fmt: skip
    assert result["rows"][1]["of dense"]["overall"]["mean"] == 1
    assert (tmp_path / "main.md").read_text() in told.out
    (stored,) = (tmp_path / "predictions" / "test-first-2").glob("untrained-1.json")
    values = json.loads(stored.read_text())
    store(stored, {**values, "questions": {"count": values["questions"]["count"], "digest": "other"}})
    with pytest.raises(SystemExit, match="other questions"):
        study.main(["table", *options])
