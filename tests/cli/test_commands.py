"""The commands that need no model, and what all commands share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

import adsc
from adsc.cli import COMMANDS

from .conftest import LAYERS, SCHEDULE, Ran

Run = Callable[..., Ran]


def test_help_is_light_and_has_examples() -> None:
    program = """
import sys
from adsc.cli import COMMANDS, main
for arguments in [[], *([name] for name in COMMANDS)]:
    try:
        main([*arguments, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
heavy = {"torch", "transformers", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Example: adsc") == 1 + len(COMMANDS)


def test_version(adsc_run: Run) -> None:
    assert adsc_run("--version") == (0, f"adsc {adsc.__version__}\n", "")


def test_env(adsc_run: Run) -> None:
    ran = adsc_run("env", "--json")
    assert ran.json["adsc"] == adsc.__version__
    assert {"python", "torch", "transformers", "platform", "gpus"} <= ran.json.keys()
    assert "sdpa" in ran.json["attention"]
    shown = adsc_run("env").out
    assert all(name in shown for name in ran.json)


def test_cost_is_the_library_s(adsc_run: Run, pocket: Path) -> None:
    ran = adsc_run(
        "cost", "--model", pocket / "config.json", "--schedule", SCHEDULE, "--text-tokens", 40, "--images", 2,
        "--decode-tokens", 9, "--batch", 3, "--dtype", "float16", "--json",
    )  # fmt: skip
    expected = adsc.cost(
        AutoConfig.from_pretrained(pocket),
        vision_tokens=512,
        text_tokens=40,
        schedule=adsc.Schedule.parse(SCHEDULE),
        images=2,
        decode_tokens=9,
        batch=3,
        dtype="float16",
    )
    report = ran.json
    assert json.loads(json.dumps(expected.to_dict())).items() <= report.items()
    assert "multiply-accumulates" in report["convention"]


def test_cost_prints_a_table(adsc_run: Run, pocket: Path) -> None:
    ran = adsc_run("cost", "--model", pocket, "--retain", "1/2")
    assert ran.status == 0, ran.err
    schedule = adsc.Schedule.for_budget(LAYERS, "1/2")
    expected = adsc.cost(AutoConfig.from_pretrained(pocket), vision_tokens=256, text_tokens=100, schedule=schedule)
    assert str(schedule) in ran.out
    assert f"−{100 * (1 - expected.ratios['kv_bytes']):.1f} %" in ran.out
    assert "multiply-accumulates" in ran.out


@pytest.mark.parametrize(("error", "status", "line"), [
    (RuntimeError("it\nbroke"), 1, "error: RuntimeError: it broke (unexpected; --debug shows the traceback)"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_what_nobody_expected(
    adsc_run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("adsc.cli.env.collect", fail)
    assert adsc_run("env", "--json") == (status, "", f"{line}\n")


def test_standard_output_holds_json_alone(adsc_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> dict[str, object]:
        print("a library says hello")
        return {}

    monkeypatch.setattr("adsc.cli.env.collect", chatty)
    ran = adsc_run("env", "--json")
    assert ran.json == {}
    assert "hello" in ran.err
