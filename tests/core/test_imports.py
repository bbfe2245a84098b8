"""The core needs neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import adsc

PROGRAM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "huggingface_hub"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import adsc

schedule = adsc.Schedule.for_budget(32, "1/3")
made = adsc.plan([(35, 611)], 676, schedule, 32)
decoder = dict(model_type="llama", num_hidden_layers=32, hidden_size=4096, intermediate_size=11008,
               num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)
print(sum(made.tokens_per_layer()), adsc.cost(decoder, plan=made).reduced.kv_bytes)
adsc.ADSCConfig.from_dict(adsc.ADSCConfig(schedule).to_dict())
adsc.methods.METHODS["adsc"], adsc.Layout, adsc.Plan, adsc.InputError, adsc.UnsupportedModelError
try:
    adsc.attach
except ImportError:
    print("blocked")
"""


def test_the_core_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, kv_bytes, blocked = done.stdout.split()
    assert int(kv_bytes) == int(tokens) * 2 * 4096 * 2
    assert blocked == "blocked"


def test_every_public_name_is_there() -> None:
    for name in adsc.__all__:
        assert getattr(adsc, name).__name__.removeprefix("adsc.") == name
    assert set(adsc.__all__) <= set(dir(adsc))
