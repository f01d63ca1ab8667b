"""PyTorch's own parallelism over this backend gives the gradients of one process: DDP, FSDP2, tensor, pipeline.

Gradients are compared, or weights after SGD: AdamW hides a wrong factor.
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hpcllm.mpi import hooks, peers, shared

pytestmark = [
    pytest.mark.mpi(),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
WIDTH, SAMPLES = 24, 12  # divisible by 1, 2, 3 and 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def build(blocks=4):
    torch.manual_seed(5)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def data():
    torch.manual_seed(6)
    return torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)


def part(tensor, rank, size):
    return tensor.chunk(size)[rank]


def gradients_of_one_process(**kwargs):
    model = build(**kwargs)
    x, y = data()
    nn.functional.mse_loss(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_gradients(model, expected, tolerance=1e-6):
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=tolerance, atol=tolerance)


def train_part(model, world):
    x, y = (part(tensor, world.rank, world.size) for tensor in data())
    nn.functional.mse_loss(model(x), y).backward()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02},
        {"static_graph": True, "bucket_cap_mb": 0.02},
        {"find_unused_parameters": True},
    ],
    ids=str,
)
def test_ddp(world, options):
    model = DistributedDataParallel(build(), process_group=world.group, **options)
    for _ in range(2):  # DDP orders its buckets anew after the first step
        model.zero_grad()
        train_part(model, world)
        assert_gradients(model.module, gradients_of_one_process())


def test_ddp_starts_all_ranks_from_the_weights_of_root(world):
    net = build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(world.rank)
    DistributedDataParallel(net)
    for ours, expected in zip(net.parameters(), build().parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_ddp_accumulates_without_communication(world):
    model = DistributedDataParallel(build(), gradient_as_bucket_view=True, bucket_cap_mb=0.02)
    x, y = (part(tensor, world.rank, world.size) for tensor in data())
    first, second = slice(0, len(x) // 2), slice(len(x) // 2, None)
    shares = [len(x[rows]) / len(x) for rows in (first, second)]
    with model.no_sync():
        (nn.functional.mse_loss(model(x[first]), y[first]) * shares[0]).backward()
    (nn.functional.mse_loss(model(x[second]), y[second]) * shares[1]).backward()
    assert_gradients(model.module, gradients_of_one_process())


def test_ddp_with_a_hook_that_sums(world):
    def sum_gradients(group, bucket):
        return dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future().then(lambda f: f.value()[0])

    model = DistributedDataParallel(build(), bucket_cap_mb=0.02)
    model.register_comm_hook(world.group, sum_gradients)
    train_part(model, world)
    assert_gradients(model.module, {name: g * world.size for name, g in gradients_of_one_process().items()}, 1e-5)


def test_ddp_with_a_hook_that_sends_bf16(world):
    def compress(group, bucket):
        short = bucket.buffer().bfloat16()
        future = dist.all_reduce(short, dist.ReduceOp.AVG, group=group, async_op=True).get_future()
        return future.then(lambda f: bucket.buffer().copy_(f.value()[0]))

    model = DistributedDataParallel(build(), bucket_cap_mb=0.02)
    model.register_comm_hook(world.group, compress)
    train_part(model, world)
    assert_gradients(model.module, gradients_of_one_process(), 1e-2)


@pytest.fixture
def in_place(monkeypatch):
    """Everything that can be is summed where it lies, however small; a list of what was."""
    for name in ("WHOLE_BYTES", "SLICES_BYTES", "LOOK_BYTES", "LOOK_GATHER_BYTES"):
        monkeypatch.setattr(shared, name, 0)
    monkeypatch.setattr(hooks, "SMALLEST_BYTES", 0)
    done = []
    for name in ("_reduce_in_place", "_reduce_scatter_in_place"):
        method = getattr(shared.Shared, name)
        monkeypatch.setattr(shared.Shared, name, lambda self, *a, method=method: done.append(1) or method(self, *a))
    return done


@pytest.mark.parametrize("views", [True, False], ids=["views", "copies"])
def test_ddp_with_our_hooks(world, views, in_place):
    expected = gradients_of_one_process()
    short = hooks.sum_gradients_as(torch.bfloat16)
    for hook, factor in ((hooks.average_gradients, 1), (hooks.sum_gradients, world.size), (short, world.size)):
        model = DistributedDataParallel(build(), gradient_as_bucket_view=views, bucket_cap_mb=0.02)
        model.register_comm_hook(None, hook)
        for accumulated in (1, 2, 1):  # DDP makes other buckets after the first step
            model.zero_grad()
            for last in range(1, accumulated + 1):
                with contextlib.nullcontext() if last == accumulated else model.no_sync():
                    train_part(model, world)
            wanted = {name: g * factor * accumulated for name, g in expected.items()}
            assert_gradients(model.module, wanted, 1e-2 if hook is short else 1e-5)
        if hook is short:
            assert all(torch.equal(p.grad, p.grad.bfloat16().float()) for p in model.parameters())
            continue
        assert world.size == 1 or in_place
        if views and world.size > 1:
            places = {peers.pool.find(parameter.grad)[0] for parameter in model.parameters()}
            assert len(places) > 1 and min(places) >= 0


def test_memory_that_ddp_has_given_up_is_not_taken_for_shared(world):
    pool = peers.Pool()
    tensor = torch.arange(5000.0)
    part = tensor[10:20]
    assert pool.adopt(tensor, world.size) and pool.adopt(part)
    assert pool.find(part)[1] == 40 and part.tolist() == list(range(10, 20))
    del tensor
    assert pool.find(part)[0] >= 0
    address = part.data_ptr()
    del part
    assert pool.find(SimpleNamespace(data_ptr=lambda: address, nbytes=4)) == (-1, 0)
    assert not pool.adopt(torch.zeros(4), 1 << 50)  # so many would not fit


def test_fsdp2_with_buffers_from_the_group(world, in_place):
    model = build()
    mesh = init_device_mesh("cpu", (world.size,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (*model, model):
        module.set_allocate_memory_from_process_group_for_comm(True)
    for _ in range(2):
        model.zero_grad()
        train_part(model, world)
        assert_gradients(model, gradients_of_one_process())
    assert world.size == 1 or in_place
    given = world.group.allocate_tensor(1000, dtype=torch.bfloat16)
    assert given.shape == (1000,) and given.dtype == torch.bfloat16 and peers.pool.find(given)[0] >= 0


def test_ddp_sends_buffers_and_joins_ranks_with_fewer_batches(world):
    model = DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)))
    with torch.no_grad():
        model.module[1].running_mean.fill_(world.rank)
    with model.join():
        for _ in range(1 + world.rank % 2):
            model(torch.randn(4, WIDTH)).sum().backward()
    for buffer in model.module.buffers():
        copies = [torch.zeros_like(buffer) for _ in range(world.size)]
        dist.all_gather(copies, buffer)
        assert all(torch.equal(one, copies[0]) for one in copies)


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_fsdp2(world, reshard):
    model = build()
    mesh = init_device_mesh("cpu", (world.size,))
    for block in model:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = build()
    sgd_reference = torch.optim.SGD(reference.parameters(), lr=0.1)
    x, y = data()
    for _ in range(2):
        train_part(model, world)
        nn.functional.mse_loss(reference(x), y).backward()
        assert_gradients(model, {name: p.grad for name, p in reference.named_parameters()})
        for optimizer in (sgd, sgd_reference):
            optimizer.step()
            optimizer.zero_grad()
    for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), expected)


def test_fsdp2_in_bf16_reduces_in_fp32_or_bf16(world):
    for reduce_dtype, tolerance in ((torch.float32, 1e-2), (torch.bfloat16, 2e-2)):
        model = build()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype, output_dtype=torch.float32)
        fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)), mp_policy=policy)
        train_part(model, world)
        assert_gradients(model, gradients_of_one_process(), tolerance)


def parallelize(block, mesh):
    return parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def test_tensor_parallel(world):
    mesh = init_device_mesh("cpu", (world.size,))
    model = build()
    for block in model:
        parallelize(block, mesh)
    x, y = data()
    nn.functional.mse_loss(model(x), y).backward()
    assert_gradients(model, gradients_of_one_process())


@pytest.mark.mpi(min_size=2)
def test_fsdp2_over_tensor_parallel(world):
    for shards in (n for n in range(1, world.size + 1) if world.size % n == 0):
        mesh = init_device_mesh("cpu", (shards, world.size // shards), mesh_dim_names=("data", "tensor"))
        model = build()
        for block in model:
            parallelize(block, mesh["tensor"])
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        rank = mesh.get_local_rank("data")
        x, y = (part(tensor, rank, shards) for tensor in data())
        nn.functional.mse_loss(model(x), y).backward()
        assert_gradients(model, gradients_of_one_process())


@pytest.mark.mpi(min_size=4, max_size=4)
def test_hybrid_sharding(world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = build()
    fully_shard(model, mesh=mesh)
    train_part(model, world)
    assert_gradients(model, gradients_of_one_process())


def test_dtensors_are_dealt_out_and_redistributed(world):
    mesh = init_device_mesh("cpu", (world.size,))
    rows = torch.arange(7 * 3, dtype=torch.float32).view(7, 3)  # not divisible by 2, 3, 4
    sharded = distribute_tensor(rows, mesh, [Shard(0)])
    assert torch.equal(sharded.full_tensor(), rows)
    assert torch.equal(sharded.redistribute(mesh, [Shard(1)]).full_tensor(), rows)
    assert torch.equal(sharded.redistribute(mesh, [Replicate()]).to_local(), rows)
    assert torch.equal((sharded @ distribute_tensor(rows.t(), mesh, [Replicate()])).full_tensor(), rows @ rows.t())
    assert sharded.sum().full_tensor().item() == rows.sum().item()


def assert_stage_gradients(modules, blocks):
    """modules: slices of the model of that many blocks; a slice keeps the names that its blocks have in the whole."""
    expected = gradients_of_one_process(blocks=blocks)
    for module in modules:
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def mean_loss(output, target):
    return nn.functional.mse_loss(output, target)


@pytest.mark.mpi(min_size=2)
def test_pipeline_1f1b(world):
    model = build(blocks=2 * world.size)
    mine = model[2 * world.rank : 2 * world.rank + 2]
    stage = PipelineStage(mine, world.rank, world.size, torch.device("cpu"), group=world.group)
    schedule = Schedule1F1B(stage, n_microbatches=6, loss_fn=mean_loss)
    x, y = data()
    losses = []
    schedule.step(*([x] if world.rank == 0 else []), target=y if world.rank == world.size - 1 else None, losses=losses)
    assert_stage_gradients([mine], 2 * world.size)
    if world.rank == world.size - 1:
        torch.testing.assert_close(torch.stack(losses).mean(), nn.functional.mse_loss(build(2 * world.size)(x), y))


@pytest.mark.mpi(min_size=2)
def test_pipeline_interleaved(world):
    count = 2 * world.size
    model = build(blocks=count)
    mine = {index: copy.deepcopy(model[index : index + 1]) for index in (world.rank, world.rank + world.size)}
    stages = [
        PipelineStage(module, index, count, torch.device("cpu"), group=world.group) for index, module in mine.items()
    ]
    schedule = ScheduleInterleaved1F1B(stages, n_microbatches=12, loss_fn=mean_loss)
    x, y = data()
    schedule.step(*([x] if world.rank == 0 else []), target=y if world.rank == world.size - 1 else None, losses=[])
    assert_stage_gradients(mine.values(), count)


def test_distributed_checkpoint(world, tmp_path):
    import torch.distributed.checkpoint as dcp

    folder = world.comm.bcast(str(tmp_path))
    mesh = init_device_mesh("cpu", (world.size,))
    model = build(blocks=2)
    fully_shard(model, mesh=mesh)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    other = build(blocks=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    fully_shard(other, mesh=mesh)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    for name, tensor in build(blocks=2).state_dict().items():
        assert torch.equal(state["model"][name].full_tensor(), tensor)
