"""What the README shows works as it stands there, and its figures are those that the code gives."""

from __future__ import annotations

import json
import re
import shlex
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, LlamaConfig, LlavaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import adsc
from adsc.cli import main
from adsc.pocket.building import build_model, build_processor
from adsc.pocket.scenes import WORDS
from adsc.pocket.splits import stored_image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HUB_ID = "llava-hf/llava-1.5-7b-hf"
PROMISE, USE, AROUND, PLAN, POCKET = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
# Commands of ``adsc``, in blocks and in running text.
COMMANDS = re.findall(r"^(adsc .*)$", SHELL, re.MULTILINE) + re.findall(
    r"`(adsc (?:run|cost|demo|env) -[^`]*)`", README
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the model on the hub: as deep as LLaVA-1.5-7B, and thin."""
    path = tmp_path_factory.mktemp("llava")
    processor = build_processor()
    build_model(len(processor.tokenizer), num_hidden_layers=32, hidden_size=32, intermediate_size=32).save_pretrained(
        path
    )
    processor.save_pretrained(path)
    return path


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A folder to work in, where the hub id is a folder."""
    (tmp_path / HUB_ID).parent.mkdir()
    (tmp_path / HUB_ID).symlink_to(folder)
    stored_image(0).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inputs_with_an_image(processor: Any) -> Any:
    chat = [{"role": "user", "content": [{"type": "image", "image": stored_image(0)}, {"type": "text", "text": "hi"}]}]
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")


def test_the_promise_in_two_lines(folder: Path) -> None:
    model, processor = adsc.load(folder)
    inputs = inputs_with_an_image(processor)
    plans = []
    generate = model.generate

    def watched(**given: Any) -> torch.Tensor:
        output: torch.Tensor = generate(**given)
        plans.extend(model.adsc.last_plans)
        return output

    model.generate = watched
    exec(PROMISE, {"adsc": adsc, "model": model, "inputs": inputs})
    (plan,) = plans
    assert plan.vision_tokens_per_layer()[-1] == 256 / 16
    assert not hasattr(model, "adsc")
    told, average = map(int, re.search(r"(\d+) vision tokens → (\d+) on average", PROMISE).groups())  # type: ignore[union-attr]
    row = adsc.plan([(35, 35 + told)], told + 100, plan.schedule, 32)
    assert float(row.retained) * told == pytest.approx(average, abs=0.5)


def test_the_model_in_the_box() -> None:
    names: dict[str, Any] = {}
    exec(POCKET, names)
    text = "what word is printed?"
    chat = [{"role": "user", "content": [{"type": "image", "image": stored_image(0)}, {"type": "text", "text": text}]}]
    (answer,) = names["pipe"](text=chat, return_full_text=False)
    assert answer["generated_text"].upper() in WORDS


def test_use(there: Path) -> None:
    names: dict[str, Any] = {}
    exec(USE, names)
    schedule, model = names["schedule"], names["model"]
    assert schedule == adsc.Schedule.for_budget(32, Fraction(1, 3))
    assert {path.name for path in (there / "my-model").iterdir()} >= {"model.safetensors", "adsc_config.json"}
    assert model.adsc is not names["handle"]
    assert model.adsc.method.schedule == schedule
    assert names["processor"].image_token == "<image>"
    written = re.search(r'adsc\.Schedule\.parse\("(.*?)"\)', USE)
    assert written is not None
    assert abs(float(adsc.plan([(0, 576)], 600, adsc.Schedule.parse(written[1]), 32).retained) - 1 / 3) < 1 / 576


# PEFT asks for it by its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_compiled_adapted_and_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, schedule = build_processor(), adsc.Schedule.parse("2:1/2,4:1/2")
    model = build_model(len(processor.tokenizer), num_hidden_layers=6, hidden_size=32, intermediate_size=32)
    inputs = inputs_with_an_image(processor)
    with torch.no_grad():
        dense = model(**inputs).logits
        with adsc.compress(model, schedule):
            reduced = model(**inputs).logits
    embedded = {"inputs_embeds": torch.randn(1, 676, 32), "attention_mask": torch.ones(1, 676, dtype=torch.long)}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the default takes minutes
    names: dict[str, Any] = {"adsc": adsc, "schedule": schedule, "model": model, "inputs": inputs, "embedded": embedded}
    counters.clear()
    # transformers asks whether placeholders and features match, a number in the graph.
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        exec(AROUND, names)
    assert not counters["graph_break"]
    assert torch.allclose(names["logits"][:, -1], reduced[:, -1], atol=1e-5)
    assert not torch.allclose(dense[:, -1], reduced[:, -1], atol=1e-3)
    adapters = [weight for name, weight in names["model"].named_parameters() if "lora_B" in name]
    assert any(weight.grad.any() for weight in adapters)
    (plan,) = names["handle"].last_plans
    assert [span.tolist() for span in plan.layout.spans] == [list(range(35, 611))]


def test_the_plan() -> None:
    code, comment = PLAN.strip().rsplit("#", 1)
    *before, last = code.strip().splitlines()
    names: dict[str, Any] = {"adsc": adsc}
    exec("\n".join(before), names)
    start, end = (list(map(int, re.findall(r"\d+", part))) for part in comment.split("…"))
    counts = eval(last, names)
    assert len(start) > 3
    assert counts[: len(start)] == start
    assert counts[-len(end) :] == end


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    there: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adsc.cli.run.SECONDS", 0.1)
    program, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert program == "adsc"
    assert not ended.value.code, err
    assert len(out.splitlines()) > 5


def test_commands_are_found() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {"run", "cost", "env"}


def llava_7b() -> Any:
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=32064))
    text, vision = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (32, 4096, 11008)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.image_size, vision.patch_size) == (24, 1024, 336, 14)
    return config


def saved(schedule: str, text_tokens: int) -> tuple[float, float, float]:
    """FLOPs of the LLM, all FLOPs and KV bytes that are saved, in percent."""
    ratios = adsc.cost(llava_7b(), 576, text_tokens, adsc.Schedule.parse(schedule)).ratios
    llm, everything, kv = (ratios[name] for name in ("llm_prefill_flops", "prefill_flops", "kv_bytes"))
    return 100 * (1 - llm), 100 * (1 - everything), 100 * (1 - kv)


def test_the_table_of_costs() -> None:
    rows = re.findall(r"^\| (\d+) \| −([\d.]+) % \| −([\d.]+) % \| −([\d.]+) % \|$", README, re.MULTILINE)
    schedule = re.search(r"The schedule is `([^`]*)`", README)
    assert len(rows) == 3
    assert schedule is not None
    assert f"--schedule {schedule[1]}" in SHELL
    for text_tokens, *figures in rows:
        assert [f"{figure:.1f}" for figure in saved(schedule[1], int(text_tokens))] == figures


def test_how_the_cost_relates_to_the_paper() -> None:
    """Over schedules of every kind: where 56.7 % of the KV cache are saved, more FLOPs are saved than 53.7 %."""
    schedules = ["8:1/2,10:1/2,11:1/2,13:1/2", "3:1/2,11:1/2,21:1/2,29:1/2", "4:1/3,20:1/3", "8:1/4,16:1/4,24:1/4"]
    schedules += [str(adsc.Schedule.for_budget(32, "1/3", keep=keep)) for keep in ("1/2", "1/3", "1/4")]
    found = [saved(schedule, text_tokens) for schedule in schedules for text_tokens in range(95, 108)]
    alike = [(llm, everything) for llm, everything, kv in found if abs(kv - 56.7) <= 0.05]
    assert len(alike) > len(schedules)
    for llm, everything in alike:
        assert 0.7 < everything - 53.7 < 1.3
        assert llm - 53.7 > 3


def supported(row: str) -> str:
    """A row of the table of what is supported."""
    found = re.search(rf"^\| {row} \| (.*) \|$", README, re.MULTILINE)
    assert found is not None, row
    return found[1]


def test_what_is_said_to_be_supported() -> None:
    table = (ROOT / "docs" / "support.md").read_text()
    served = re.search(r"^(\d+) model types are served", table, re.MULTILINE)
    assert served is not None
    assert supported("models").startswith(f"{served[1]} model types of transformers")
    types = re.findall(r"^\| `([^`]*)` \|.*✓", table, re.MULTILINE)
    assert len([name for name in types if name in CONFIG_MAPPING]) == int(served[1])
    named = README.partition("Among them are ")[2].partition("\n\n")[0]
    assert 18 <= len(re.findall(r"`(\w+)`", named)) == len(set(re.findall(r"`(\w+)`", named)) & set(types))
    oldest, newest, torch_version, torch_oldest = re.findall(r"\d\.\d+", supported("transformers"))
    for file, version in (("constraints-oldest.txt", oldest), ("constraints.txt", newest)):
        pins = (ROOT / file).read_text()
        assert f"transformers=={version}." in pins
        assert f"torch=={torch_version}." in pins
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"transformers>={oldest},' in project
    assert f'"torch>={torch_oldest}"' in project


def test_what_an_idle_engine_costs() -> None:
    stored = json.loads((ROOT / "results" / "overhead.json").read_text())["overhead of retained=1"]
    low, high = (100 * (ratio - 1) for ratio in stored["interval"])
    assert f"{100 * (stored['ratio'] - 1):.1f} % of a prefill" in README
    assert f"{low:.1f} to {high:.1f} %" in README


def test_what_is_named_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in ("README.md", "CONTRIBUTING.md", "docs/support.md", "docs/refused.md"):
        text = (ROOT / page).read_text()
        assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), link


def test_the_stand_in_is_read_as_a_hub_id(there: Path) -> None:
    """The other tests here would prove little if the id went elsewhere."""
    assert AutoConfig.from_pretrained(HUB_ID).text_config.hidden_size == 32
