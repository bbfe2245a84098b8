"""What is done to a model: checkpointing, quantized and offloaded weights, several devices, processes and threads."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

import adsc

from .oracle import decoder_of, difference, kept_positions, masked_dense
from .test_cache import GREEDY, STEPS, recomputed
from .test_training import gradients, trainable
from .tiny import CORE, SCHEDULE, case, model

FAMILIES = [*CORE, "gemma3", "qwen3_vl"]
EXACT, APART = 1e-5, 1e-3
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHARDED = ["llava", "qwen3_vl"]
WAYS = ["FSDP, attached before", "FSDP, attached after", "FSDP, checkpointed", "DDP, attached before"]
WAYS += ["DDP, attached after"]
pytestmark = [
    # The name of 5.16, which newer versions still know.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    # Offloading: a device for each parameter is as good as one for its module.
    pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning"),
]


def logits(network, made) -> torch.Tensor:
    with torch.no_grad():
        return network(**made.inputs).logits


def check(network, made) -> tuple[torch.Tensor, torch.Tensor]:
    """The reduced model equals the masked dense one, and not the dense one. Gives the logits of both."""
    kept = kept_positions(made)
    with adsc.compress(network, SCHEDULE):
        reduced = logits(network, made)
    dense = logits(network, made)
    assert difference(reduced, masked_dense(network, made.inputs, kept), kept[-1]) <= EXACT
    assert difference(reduced, dense, kept[-1]) >= APART
    return reduced, dense


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["single", "text_beside_image"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_checkpointing_changes_no_gradient(family, name, use_reentrant):
    """Where windows and blocks make masks, and where the decoder adds to hidden states between layers."""
    network, made = trainable(family), case(family, name)
    with adsc.compress(network, SCHEDULE) as handle:
        expected = gradients(network, made)
        network.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        network.enable_input_require_grads()
        network.zero_grad()
        loss = network(**made.inputs, labels=made.inputs["input_ids"], use_cache=False).loss
        with handle.budget("1/2"), torch.no_grad():  # belongs to another call
            network(**made.inputs)
        loss.backward()
        found = {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}
        with handle.budget(1):
            dense = gradients(network, made)
    decoder = [name for name in expected if "language_model" in name or "lm_head" in name]
    assert len(decoder) > 50
    for name in decoder:
        assert torch.equal(found[name], expected[name]), name
    assert not any(torch.equal(dense[name], expected[name]) for name in decoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights(family):
    quantization = pytest.importorskip("torchao.quantization")
    network, made = copy.deepcopy(model(family)), case(family, "left_padding")
    plain = logits(network, made)
    handle = adsc.attach(network, SCHEDULE)
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    weight = decoder_of(network).layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter
    before = logits(network, made)
    tokens = network.generate(**made.inputs, **GREEDY)[:, -STEPS:]
    handle.remove()
    reduced, dense = check(network, made)
    assert torch.equal(before, reduced)
    assert torch.equal(tokens, recomputed(network, made)[0])
    assert (dense - plain).abs().max() >= APART


def test_quantized_when_loaded(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model("llava").save_pretrained(tmp_path)
    network = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    assert type(network.get_decoder().layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    check(network, case("llava", "left_padding"))


@pytest.mark.gpu
@NEEDS_CUDA
def test_quantized_by_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # Of its kinds this one treats tokens apart; the other picks outliers among all of a call.
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model("llava").save_pretrained(tmp_path)
    network = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=four_bits, dtype=torch.float32, device_map="cuda"
    )
    made = case("llava", "left_padding")
    made.inputs = {name: value.cuda() for name, value in made.inputs.items()}
    kept = kept_positions(made)
    with adsc.compress(network, SCHEDULE):
        reduced = logits(network, made)
    assert difference(reduced, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-3
    assert difference(reduced, logits(network, made), kept[-1]) >= 0.1


def device_map(network, first, last) -> dict[str, object]:
    """Devices for a model, and for the last half of its decoder layers."""
    name = next(name for name, module in network.named_modules() if module is network.get_decoder())
    layers = tuple(f"{name}.layers.{index}" for index in range(3, 6))
    return dict.fromkeys((key for key in network.state_dict() if not key.startswith(layers)), first) | dict.fromkeys(
        layers, last
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk(family, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    network, made = copy.deepcopy(model(family)), case(family, "left_padding")
    dense = logits(network, made)
    ids = made.inputs["input_ids"]
    handle = adsc.attach(network, SCHEDULE)
    reduced, tokens = logits(network, made), network.generate(**made.inputs, **GREEDY)
    loss = network(**made.inputs, labels=ids).loss
    places = device_map(network, "cpu", "disk")
    network.save_pretrained(tmp_path)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "a")
    loaded.generation_config = network.generation_config
    adsc.attach(loaded, SCHEDULE)
    accelerate.dispatch_model(network, places, main_device="cpu", offload_dir=tmp_path / "b", force_hooks=True)
    for each in (loaded, network):
        layers = each.get_decoder().layers
        assert [next(layer.parameters()).device.type for layer in layers] == ["cpu"] * 3 + ["meta"] * 3
        assert torch.equal(logits(each, made), reduced)
        assert torch.equal(each.generate(**made.inputs, **GREEDY), tokens)
        assert torch.equal(each(**made.inputs, labels=ids).loss, loss)
    loaded.adsc.remove()
    handle.remove()
    assert torch.equal(logits(loaded, made), dense)
    assert torch.equal(logits(network, made), dense)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("last", ["cpu", 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_another_device(family, last, tmp_path):
    pytest.importorskip("accelerate")
    if last == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    made = case(family, "left_padding")
    with adsc.compress(model(family), SCHEDULE):
        reduced, tokens = logits(model(family), made), model(family).generate(**made.inputs, **GREEDY)
    model(family).save_pretrained(tmp_path)
    network = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map=device_map(model(family), 0, last), dtype=torch.float32
    )
    network.generation_config = model(family).generation_config
    assert {str(place) for place in network.hf_device_map.values()} == {"0", str(last)}
    with adsc.compress(network, SCHEDULE):
        assert (logits(network, made).cpu() - reduced).abs().max() <= 1e-3
        inputs = {name: value.cuda() for name, value in made.inputs.items()}
        assert torch.equal(network.generate(**inputs, **GREEDY).cpu(), tokens)


def test_two_models_in_two_threads():
    schedules = {"llava": "1:1/2", "qwen2_5_vl": "3:1/3"}
    made = {family: case(family, "left_padding") for family in schedules}
    alone, found, start = {}, {}, threading.Barrier(len(schedules))
    for family, schedule in schedules.items():
        with adsc.compress(model(family), schedule) as handle:
            alone[family] = logits(model(family), made[family]), handle.last_plans

    def work(family, handle):
        start.wait()
        found[family] = [(logits(model(family), made[family]), handle.last_plans) for _ in range(8)]

    with adsc.compress(model("llava"), "1:1/2") as one, adsc.compress(model("qwen2_5_vl"), "3:1/3") as other:
        threads = [threading.Thread(target=work, args=item) for item in zip(schedules, (one, other), strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.last_plans == other.last_plans == []  # those of this thread, which called nothing
    for family, (expected, plans) in alone.items():
        assert len(found[family]) == 8
        for result, own in found[family]:
            assert torch.equal(result, expected)
            assert [p.tokens_per_layer() for p in own] == [p.tokens_per_layer() for p in plans]


def shapes(family) -> list:
    """What two processes are given: batches of different shape."""
    return [case(family, name) for name in ("single", "left_padding")]


def work(rank, folder) -> None:
    """One of two processes: loss and gradients of every family, wrapped in every way."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found = {}
    for family, way in itertools.product(SHARDED, WAYS):
        network, made = trainable(family), shapes(family)[rank]
        around = network
        if way.endswith("before"):
            adsc.attach(network, SCHEDULE)
        if way.startswith("FSDP"):
            for layer in network.get_decoder().layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)
        else:
            around = torch.nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        if not way.endswith("before"):
            adsc.attach(network, SCHEDULE)
        if way.endswith("checkpointed"):
            network.gradient_checkpointing_enable({"use_reentrant": False})
        loss = around(**made.inputs, labels=made.inputs["input_ids"], use_cache=False).loss
        loss.backward()
        grads = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
        network.adsc.remove()
        with torch.no_grad():
            dense = network(**made.inputs, use_cache=False).logits
        found[family, way] = loss.detach(), whole, dense
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", SHARDED)
def test_two_processes(family, way, processes):
    """Every process has its own loss; all have the mean of what each one's gradients would be alone."""
    network, alone = trainable(family), []
    for rank, made in enumerate(shapes(family)):
        with adsc.compress(network, SCHEDULE):
            alone.append(gradients(network, made))
            loss = network(**made.inputs, labels=made.inputs["input_ids"], use_cache=False).loss
        loss_found, _, dense = processes[rank][family, way]
        assert torch.allclose(loss_found, loss, rtol=1e-6)
        assert (logits(network, made) - dense).abs().max() <= EXACT  # and the handle is gone
    for rank in range(2):
        found = processes[rank][family, way][1]
        assert found.keys() == alone[0].keys() | alone[1].keys()
        for name, grad in found.items():
            mean = (alone[0][name] + alone[1][name]) / 2
            assert (grad - mean).abs().max() <= 1e-6 * max(1, mean.abs().max()), name
