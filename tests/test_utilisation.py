"""Operations of a model by formula and counted one by one; what processors can do; where the start's time goes."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from hpcllm import startup, utilisation
from hpcllm.data import batches
from hpcllm.mpi import process
from hpcllm.plan import machines
from hpcllm.plan.count import count

CONFIGS = {
    "bert": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "llama": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 320,
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("targets", [19, 128])
def test_the_formula_gives_what_counting_every_product_gives(kind, targets):
    config = AutoConfig.for_model(kind, vocab_size=1000, **CONFIGS[kind])
    made = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    counted = 3 * count(lambda: made.from_config(config), 128, targets).flops
    with torch.device("meta"):
        found = utilisation.count(made.from_config(config)).step(128, targets, 128 * 128)
    # Counting passes all tokens through BERT's dense layer before the output layer, which training does not.
    dense = 6 * 128 * 128 * (128 - targets) if kind == "bert" else 0
    assert found + dense == pytest.approx(counted, rel=1e-6)


def test_a_frozen_weight_has_no_gradient_to_be_computed():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=1000, **CONFIGS["gpt2"]))
    trained = utilisation.count(model)
    frozen = utilisation.count(model.requires_grad_(False))
    assert (6 * frozen.token, 6 * frozen.target, frozen.pair) == (4 * trained.token, 4 * trained.target, trained.pair)


def test_experts_count_as_often_as_they_are_used():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": 100, "num_experts_per_tok": 2}
    with torch.device("meta"):
        few, many = (
            utilisation.count(
                AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_local_experts=n, **sizes))
            )
            for n in (4, 16)
        )
    router = 6 * 2 * 64 * (16 - 4)
    assert many.token - few.token == router
    assert few.token == 6 * 2 * (4 * 64 * 64 + 2 * 3 * 64 * 96 + 4 * 64)


def test_latent_attention_counts_its_own_widths_and_what_has_no_heads_none():
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "v_head_dim": 8}
    config = AutoConfig.for_model("deepseek_v3", qk_nope_head_dim=12, qk_rope_head_dim=4, **sizes)
    assert utilisation._widths(config) == 3 * 4 * (16 + 8)
    assert utilisation._widths(AutoConfig.for_model("mamba")) == 0


def test_pairs_are_those_of_documents_where_attention_is():
    ids = torch.zeros(1, 6, dtype=torch.int64)
    assert batches.MicroBatch(ids, ids, 0, 1).pairs == 36
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    assert batches.MicroBatch(ids, ids, 0, 1, positions).pairs == 16 + 4


def test_gpus_are_known_by_the_names_that_torch_gives_them():
    names = {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA GH200 480GB": "gh200",
        "Tesla V100-SXM2-32GB": "v100",
        "AMD Instinct MI250X": "mi250x",
        "AMD Instinct MI300X": "mi300x",
    }
    assert {name: machines.called(name).name for name in names} == names
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L4"):
        assert machines.called(other) is None


@pytest.mark.mpi()
def test_the_peak_is_that_of_all_ranks(world, monkeypatch):
    monkeypatch.setattr(utilisation, "products", lambda *_: 1e9 * (world.rank + 1))
    total, how = utilisation.peak(world, "fp32")
    assert total == 1e9 * sum(range(1, world.size + 1)) and how == "measured"
    gpu = SimpleNamespace(device=torch.device("cuda", 0), host="a", rank=world.rank, comm=world.comm)
    for identity, gpus in (("one", 1), (f"of rank {world.rank}", world.size)):  # all share it, or see but their own
        torchs = SimpleNamespace(
            get_device_name=lambda _: "NVIDIA H200",
            get_device_properties=lambda _, uuid=identity: SimpleNamespace(uuid=uuid),
        )
        monkeypatch.setattr(torch, "get_device_module", lambda _, torchs=torchs: torchs)
        total, how = utilisation.peak(gpu, "bf16")
        assert total == gpus * 989e12 and how == "data sheet of the h200"


def test_the_start_is_told_from_the_launcher_on(tmp_path):
    launcher = tmp_path / "mpirun"
    launcher.symlink_to(sys.executable)
    child = "import json; from hpcllm import startup; p = startup.Parts(); p.end('rest'); print(json.dumps(p.seconds))"
    code = f"import subprocess, sys, time; time.sleep(0.5); subprocess.run([{sys.executable!r}, '-c', {child!r}])"
    told = subprocess.run([launcher, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds = json.loads(told)
    assert list(seconds) == ["launch", "python", "rest"]
    assert 0.5 <= seconds["launch"] < 5 and 0 < seconds["python"] < 5 and 0 <= seconds["rest"] < 1


def test_parts_add_up(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    own, above = (process.Process(1, name, "R", 1, born) for name, born in (("python", 1000), ("x", 300)))
    monkeypatch.setattr(process, "look", lambda number: own if number == os.getpid() else above)
    now = iter([12.0, 13.5, 14.0, 14.25])
    monkeypatch.setattr(time, "clock_gettime", lambda _: next(now))
    parts = startup.Parts()
    for name in ("mpi", "data", "mpi"):
        parts.end(name)
    assert parts.seconds == {"python": 2.0, "mpi": 1.75, "data": 0.5}
    assert parts.describe() == "4.25 s: python 2.00, mpi 1.75, data 0.50"
