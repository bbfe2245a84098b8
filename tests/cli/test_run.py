"""``adsc run`` and ``adsc demo``: what they print is what the library computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import adsc
from adsc.pocket.splits import stored_image

from .conftest import BUDGETS, LAYERS, SCHEDULE, Ran

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("run", "demo"):
        monkeypatch.setattr(f"adsc.cli.{command}.SECONDS", 0.2)


PROMPT = "what color is the large circle?"


def reference(
    direct: tuple[Any, Any], paths: list[Path], content: list[str], schedule: str | None, tokens: int = 8
) -> str:
    """The answer by way of the library alone; ``content`` holds texts, and ``""`` where an image goes."""
    model, processor = direct
    images = iter([Image.open(path) for path in paths])
    parts = [{"type": "text", "text": part} if part else {"type": "image", "image": next(images)} for part in content]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    options = {"max_new_tokens": tokens, "do_sample": False}
    if schedule is None:
        output = model.generate(**inputs, **options)
    else:
        with adsc.compress(model, schedule):
            output = model.generate(**inputs, **options)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_run_reports_both_ways(
    adsc_run: Run, pocket: Path, image: Path, direct: tuple[Any, Any], tmp_path: Path
) -> None:
    picture = tmp_path / "run.png"
    ran = adsc_run(
        "run", "--model", pocket, "--image", image, "--prompt", PROMPT, "--schedule", SCHEDULE,
        "--max-new-tokens", 8, "--json", "--picture", picture,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    report = ran.json
    dense, reduced = (reference(direct, [image], ["", PROMPT], way) for way in (None, SCHEDULE))
    assert dense != reduced
    assert (report["dense"]["text"], report["reduced"]["text"]) == (dense, reduced)
    assert report["reduction"]["schedule"] == SCHEDULE
    assert report["vision_tokens_per_layer"] == [256, 256, 128, 128, 32, 32]
    # Measured on the caches, and by formula.
    assert report["kv_bytes"]["dense"] == report["cost"]["dense"]["kv_bytes"]
    assert report["kv_bytes"]["reduced"] == report["cost"]["reduced"]["kv_bytes"]
    seconds = report["seconds_to_first_token"]
    assert seconds["rounds"] >= 1
    assert seconds["dense"] > 0 < seconds["median_ratio"]
    assert Image.open(picture).width > 1000


def test_run_prints_for_people(adsc_run: Run, pocket: Path, image: Path) -> None:
    ran = adsc_run("run", "--model", pocket, "--image", image, "--schedule", SCHEDULE, "--max-new-tokens", 2)
    assert ran.status == 0, ran.err
    for text in ("dense", "reduced", "KV cache", "time to first token", "139 of 256 vision tokens", "(54.2 %)"):
        assert text in ran.out
    assert ran.err == ""


def test_placeholders_say_where_images_go(adsc_run: Run, pocket: Path, image: Path, direct: tuple[Any, Any]) -> None:
    ran = adsc_run(
        "run", "--model", pocket, "--image", image, "--image", image, "--prompt", "is <image> like <image>?",
        "--schedule", SCHEDULE, "--only", "reduced", "--max-new-tokens", 8,
    )  # fmt: skip
    assert ran.out.strip() == reference(direct, [image, image], ["is ", "", " like ", "", "?"], SCHEDULE)


def test_saved_reduction_is_used_unless_told_otherwise(
    adsc_run: Run, pocket: Path, image: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pocket, folder)
    adsc.ADSCConfig(adsc.Schedule.parse("1:1/3"), pattern="first", positions="compact").save_pretrained(folder)
    common = ("run", "--model", folder, "--image", image, "--only", "reduced", "--max-new-tokens", 1, "--json")
    saved = adsc_run(*common).json["reduction"]
    assert [saved[name] for name in ("schedule", "pattern", "positions")] == ["1:1/3", "first", "compact"]
    told = adsc_run(*common, "--retain", "1/2", "--pattern", "grid").json["reduction"]
    expected = str(adsc.Schedule.for_budget(LAYERS, "1/2"))
    assert [told[name] for name in ("schedule", "pattern", "positions")] == [expected, "grid", "compact"]


def test_tiles(adsc_run: Run, tiled: Path, image: Path, tmp_path: Path) -> None:
    wide, picture = tmp_path / "wide.png", tmp_path / "tiles.png"
    Image.open(image).resize((120, 60)).save(wide)
    ran = adsc_run(
        "run", "--model", tiled, "--image", wide, "--schedule", SCHEDULE, "--max-new-tokens", 2, "--json",
        "--picture", picture,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.json["vision_tokens_per_layer"][0] == 64 + 8 * 17
    assert ran.json["kv_bytes"]["reduced"] == ran.json["cost"]["reduced"]["kv_bytes"]
    assert Image.open(picture).width > 1000


def test_a_budget_that_was_trained_has_its_own_schedule(adsc_run: Run, adapter: Path, image: Path) -> None:
    common = ("run", "--model", adapter, "--image", image, "--only", "reduced", "--max-new-tokens", 1, "--json")
    for options, schedule in {
        (): BUDGETS["1/3"],
        ("--retain", "2/9"): BUDGETS["2/9"],
        ("--retain", "1/2"): str(adsc.Schedule.for_budget(LAYERS, "1/2")),
        ("--schedule", SCHEDULE): SCHEDULE,
    }.items():
        ran = adsc_run(*common, *options)
        assert ran.status == 0, ran.err
        assert ran.json["reduction"]["schedule"] == schedule


@pytest.fixture
def box(pocket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model in the box is ``pocket``, with no adapter yet at the path that is given."""
    monkeypatch.setattr("adsc.pocket.MODEL_FOLDER", pocket)
    monkeypatch.setattr("adsc.pocket.ADAPTER_FOLDER", tmp_path / "adapter")
    monkeypatch.setattr("adsc.cli.demo.MAX_NEW_TOKENS", 3)
    return tmp_path / "adapter"


def test_the_model_in_the_box_comes_with_its_adapter(
    adsc_run: Run, box: Path, pocket: Path, adapter: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("run", "--image", image, "--only", "reduced", "--max-new-tokens", 1, "--json")
    assert adsc_run(*common).json["model"] == str(pocket)
    shutil.copytree(adapter, box)
    report = adsc_run(*common, "--retain", "1/9").json
    assert report["model"] == str(box)
    assert report["reduction"]["schedule"] == BUDGETS["1/9"]
    assert adsc_run(*common, "--model", pocket).json["model"] == str(pocket)
    monkeypatch.setattr("adsc.cli.answering.is_peft_available", lambda: False)
    assert adsc_run(*common).json["model"] == str(pocket)


def test_demo_at_one_reduction(adsc_run: Run, box: Path, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    arguments = ("demo", "--schedule", SCHEDULE, "--image-index", 7, "--out", picture)
    report = json.loads(adsc_run(*arguments, "--json").out)
    assert len({each["task"] for each in report["questions"]}) == len(report["questions"]) >= 5
    for way in ("dense", "reduced"):
        assert report["right"][way] == sum(each[way] == each["answer"] for each in report["questions"])
    assert Image.open(picture).width > 1000
    shown = adsc_run(*arguments)
    assert shown.status == 0, shown.err
    for each in report["questions"]:
        assert each["task"] in shown.out
    assert str(picture) in shown.out.replace("\n", "")


def test_demo_without_an_adapter(adsc_run: Run, box: Path, tmp_path: Path) -> None:
    report = adsc_run("demo", "--image-index", 1999, "--out", tmp_path / "demo.png", "--json").json
    assert report["reduction"]["schedule"] == str(adsc.Schedule.for_budget(LAYERS, "1/3", 256))
    assert report["right"].keys() == {"dense", "reduced"}


def test_demo_at_the_budgets_of_an_adapter(
    adsc_run: Run, box: Path, pocket: Path, adapter: Path, direct: tuple[Any, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(adapter, box)
    monkeypatch.setattr("adsc.cli.demo.SCENES", 3)
    monkeypatch.setattr("adsc.cli.demo.SHOWN", 2)
    picture = tmp_path / "demo.png"
    report = json.loads(adsc_run("demo", "--image-index", 1999, "--out", picture, "--json").out)
    assert report["images"] == [1999, 0, 1]
    asked = report["questions"]
    assert report["asked"] == len(asked) >= 12
    assert Image.open(picture).width > 1000
    # Each answer is the library's, asked alone.
    adapted, processor = adsc.load(adapter)
    adapted.adsc.remove()
    stored_image(1999).save(tmp_path / "1999.png")
    for each in asked[:2]:
        for way, model in (("trained", adapted), ("untrained", direct[0])):
            for budget, schedule in BUDGETS.items():
                said = reference((model, processor), [tmp_path / "1999.png"], ["", each["question"]], schedule, 3)
                assert each[way][budget] == said
        assert each["dense"] == reference(direct, [tmp_path / "1999.png"], ["", each["question"]], None, 3)
    ways = [
        [each["dense"]] + [each[way][budget] for way in ("trained", "untrained") for budget in BUDGETS]
        for each in asked
    ]
    assert len({tuple(column) for column in zip(*ways, strict=True)}) == 7  # no two of the seven ways are the same
    for way in ("trained", "untrained"):
        for budget in BUDGETS:
            assert report["right"][way][budget] == sum(each[way][budget] == each["answer"] for each in asked)
    assert report["right"]["dense"] == sum(each["dense"] == each["answer"] for each in asked)
    for budget, schedule in BUDGETS.items():
        stated = report["budgets"][budget]
        assert stated["reduction"]["schedule"] == schedule
        plan = adsc.plan([(0, 256)], 256, adsc.Schedule.parse(schedule), LAYERS)
        assert stated["vision_tokens_per_layer"] == plan.vision_tokens_per_layer()
        assert 0 < stated["ratios"]["kv_bytes"] < 0.6


def test_demo_at_three_budgets_for_people(
    adsc_run: Run, box: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, box)
    monkeypatch.setattr("adsc.cli.demo.SCENES", 2)
    monkeypatch.setattr("adsc.cli.demo.SHOWN", 1)
    ran = adsc_run("demo", "--out", tmp_path / "demo.png")
    assert ran.status == 0, ran.err
    for text in ("test image 1", "untrained", "KV cache", *BUDGETS, "(1/9)", "what number is"):
        assert text in ran.out
    assert "test image 2" not in ran.out
    assert ran.err == ""
    one = adsc_run("demo", "--retain", "2/9", "--out", tmp_path / "demo.png", "--json").json
    assert one["reduction"]["schedule"] == BUDGETS["2/9"]
