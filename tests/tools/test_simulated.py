"""What the simulated GPUs promise: exact counts, exact memory, CUDA's refusals, and the CPU's numbers."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from tools import simulated

CPU, SIM0, SIM1, SIM2 = "cpu", "sim:0", "sim:1", "sim:2"


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Collecting after each test (tests/conftest.py) takes 0.2 s with all of transformers to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def four_devices() -> Iterator[None]:
    simulated.start(4)
    yield
    for index in range(4):
        simulated.set_capacity(index, None)
    torch.sim.set_device(0)


def on(device: str, *values: float) -> Tensor:
    """A vector of float32, 4 bytes per value."""
    return torch.tensor(values or (1.0, 2.0, 3.0, 4.0), device=device)


# Traffic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"), [(SIM0, SIM1), (SIM1, SIM0), (CPU, SIM0), (SIM1, CPU)], ids=lambda name: name.replace(":", "")
)
@pytest.mark.parametrize(
    "move",
    [
        lambda x, target: x.to(target),
        lambda x, target: torch.empty(4, device=target).copy_(x),
        lambda x, target: torch.empty(4, device=target).__setitem__(slice(None), x),
        lambda x, target: torch.ops.aten._to_copy(x, device=torch.device(target)),
        lambda x, target: (
            torch.ops.aten._copy_from(x, torch.empty(4, device=target)) if "sim" in target else x.to(target)
        ),
        lambda x, target: x.to(target, non_blocking=True),
        lambda x, target: torch.zeros(1, device=target).to(x.dtype) if x.device == target else x.to(device=target),
        lambda x, target: x.requires_grad_().to(target),
        lambda x, target: nn.ParameterList([x]).to(target),
        lambda x, target: torch.as_tensor(x, device=target),
        lambda x, target: x.type_as(torch.empty(0, device=target)),
    ],
    ids=[
        "to",
        "copy_",
        "setitem",
        "_to_copy",
        "_copy_from",
        "non_blocking",
        "keyword",
        "grad",
        "module",
        "as_tensor",
        "type_as",
    ],
)
def test_a_move_is_one_copy_of_its_bytes(source: str, target: str, move: Callable[[Tensor, str], Any]) -> None:
    x = on(source)
    with simulated.record() as traffic:
        move(x, target)
    assert (traffic.bytes, traffic.copies) == ({(source, target): 16}, {(source, target): 1})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_move_is_one_copy_in_every_gradient_mode(mode: Callable[[], Any]) -> None:
    x = on(SIM0)
    with mode(), simulated.record() as traffic:
        x.to(SIM1)
    assert traffic.copies == {(SIM0, SIM1): 1}


def test_a_tensor_made_from_numbers_is_one_copy_from_the_host() -> None:
    with simulated.record() as traffic:
        torch.tensor([1.0, 2.0], device=SIM1)
    assert traffic.bytes == {(CPU, SIM1): 8}


def test_factories_move_nothing() -> None:
    with simulated.record() as traffic:
        for make in (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn):
            make(3, device=SIM1)
        torch.arange(3, device=SIM1), torch.full((3,), 2.0, device=SIM1), torch.empty_like(on("cpu"), device=SIM1)
        torch.linspace(0, 1, 3, device=SIM1), torch.randperm(3, device=SIM1), torch.eye(3, device=SIM1)
    assert traffic.copies == {}


def test_a_move_to_where_it_is_moves_nothing() -> None:
    x = on(SIM1)
    with simulated.record() as traffic:
        assert x.to(SIM1) is x
        x.clone(), x.to(torch.float16), x.contiguous(), x.to(SIM1, copy=True)
    assert traffic.copies == {}


def test_a_tensor_without_elements_crosses_without_a_copy() -> None:
    with simulated.record() as traffic:
        torch.empty(0, device=SIM0).to(SIM1)
    assert traffic.copies == {}


def test_an_expanded_tensor_crosses_at_its_full_size() -> None:
    x = on(SIM0, 1.0).expand(100)
    with simulated.record() as traffic:
        x.to(SIM1)
    assert traffic.bytes == {(SIM0, SIM1): 400}


def test_a_slice_crosses_without_the_rest_of_its_storage() -> None:
    x = on(SIM0)[:1]
    with simulated.record() as traffic:
        x.to(SIM1)
    assert traffic.bytes == {(SIM0, SIM1): 4}


def test_a_copy_counts_in_the_dtype_that_crosses() -> None:
    x, host = on(SIM0), on("cpu")
    with simulated.record() as traffic:
        host.to(SIM0, torch.float16)
        x.to(SIM1, torch.float16)
        x.to("cpu", torch.float16)
    assert traffic.bytes == {(CPU, SIM0): 8, (SIM0, SIM1): 16, (SIM0, CPU): 16}


def test_totals_are_between_gpus_and_host_totals_are_not() -> None:
    with simulated.record() as traffic:
        on(SIM0).to(SIM1).to(SIM2).cpu()
    assert (traffic.total_bytes, traffic.total_copies, traffic.host_bytes, traffic.host_copies) == (32, 2, 32, 2)


@pytest.mark.parametrize("read", [Tensor.item, bool, float, int, lambda x: torch.equal(x, x)])
def test_reading_a_value_is_a_read_and_no_copy(read: Callable[[Tensor], Any]) -> None:
    x = on(SIM1, 1.0).sum()
    with simulated.record() as traffic:
        read(x)
    assert (traffic.reads, traffic.copies) == (1, {})


def test_item_is_a_read_in_inference_mode_too() -> None:
    x = on(SIM1, 1.0)
    with torch.inference_mode(), simulated.record() as traffic:
        x.item()
    assert (traffic.reads, traffic.copies) == (1, {})


def test_tolist_is_one_copy_to_the_host() -> None:
    x = on(SIM1)
    with simulated.record() as traffic:
        assert x.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert traffic.bytes == {(SIM1, CPU): 16}


def test_showing_a_tensor_counts_nothing() -> None:
    x = on(SIM1, 1.0)
    with simulated.record() as traffic:
        assert repr(x) == "tensor([1.], device='sim:1')"
    assert (traffic.copies, traffic.reads) == ({}, 0)


def test_backward_through_a_move_counts_the_way_back() -> None:
    x = on(SIM0).requires_grad_()
    y = x.to(SIM1)
    with simulated.record() as traffic:
        y.sum().backward()
    assert traffic.bytes == {(SIM1, SIM0): 16}


def test_records_nest() -> None:
    with simulated.record() as outer:
        on(SIM0).to(SIM1)
        with simulated.record() as inner:
            on(SIM0).to(SIM1)
    assert (inner.total_copies, outer.total_copies) == (1, 2)


def test_a_record_can_be_read_while_it_runs_and_stays_as_it_ended() -> None:
    with simulated.record() as traffic:
        on(SIM0).to(SIM1)
        assert traffic.total_copies == 1
    on(SIM0).to(SIM1)
    assert traffic.total_copies == 1


def test_a_record_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="mine"), simulated.record() as traffic:
        raise ValueError("mine")
    on(SIM0).to(SIM1)
    assert traffic.total_copies == 0


def test_copies_of_all_threads_are_counted() -> None:
    x = on(SIM0)

    def move() -> None:
        for _ in range(250):
            x.to(SIM1)

    with simulated.record() as traffic:
        in_threads(4, move)
    assert (traffic.total_copies, traffic.total_bytes) == (1000, 16000)


def in_threads(count: int, work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# Operands on several devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operate", [torch.add, torch.dot, torch.outer, torch.maximum, lambda x, y: torch.cat([x, y]), F.mse_loss]
)
def test_operands_on_two_devices_are_refused(operate: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"same device, but found at least two devices, sim:0 and sim:1!"):
        operate(on(SIM0), on(SIM1))


def test_operands_on_two_devices_are_refused_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"at least two devices, sim:0 and sim:1!"):
        F.linear(on(SIM0), on(SIM1)[None])


def test_an_operand_on_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"at least two devices, sim:0 and cpu!"):
        on(SIM0) + on("cpu")


def test_an_embedding_refuses_ids_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"at least two devices, sim:0 and cpu!"):
        F.embedding(torch.tensor([1]), torch.ones(2, 2, device=SIM0))


def test_a_scalar_on_the_cpu_may_stand_beside_a_tensor() -> None:
    with simulated.record() as traffic:
        assert (on(SIM0, 1.0, 2.0) * torch.tensor(3.0)).tolist() == [3.0, 6.0]
    assert traffic.copies[CPU, SIM0] == 1  # the operand's own making, from numbers


@pytest.mark.parametrize(
    "write",
    [
        lambda host, x: host.add_(x),
        lambda host, x: torch.add(x, 1, out=host),
        lambda host, x: host.masked_fill_(torch.tensor(True), x),
        lambda host, x: host.clamp_(max=x),
    ],
)
def test_a_scalar_on_the_cpu_is_not_written_to(write: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"at least two devices"):
        write(torch.tensor(1.0), on(SIM0).sum())


def test_a_scalar_on_the_cpu_takes_a_value_by_copying_it() -> None:
    host, x = torch.tensor(1.0), on(SIM0).sum()
    with simulated.record() as traffic:
        host.copy_(x)
    assert (host.item(), type(host), traffic.copies) == (10.0, Tensor, {(SIM0, CPU): 1})


def test_a_scalar_on_another_gpu_may_not() -> None:
    with pytest.raises(RuntimeError, match=r"at least two devices, sim:0 and sim:1!"):
        on(SIM0) * torch.tensor(3.0, device=SIM1)


def test_a_scalar_on_the_cpu_is_refused_where_cuda_refuses_it() -> None:
    with pytest.raises(RuntimeError, match=r"at least two devices, sim:0 and cpu!"):
        torch.stack([on(SIM0).sum(), torch.tensor(1.0)])


def test_where_copies_a_scalar_from_the_cpu() -> None:
    x, other = on(SIM0), torch.tensor(0.0)
    with simulated.record() as traffic:
        y = torch.where(x > 2, x, other)
    assert (y.tolist(), traffic.copies) == ([0.0, 0.0, 3.0, 4.0], {(CPU, SIM0): 1})


@pytest.mark.parametrize(
    "index", [torch.tensor([0, 2]), torch.tensor([True, False, True, False])], ids=["places", "mask"]
)
def test_an_index_on_the_cpu_is_copied_to_the_tensor(index: Tensor) -> None:
    x = on(SIM1)
    with simulated.record() as traffic:
        y = x[index]
    assert traffic.bytes == {(CPU, SIM1): 16}  # two int64, also for the mask
    assert (y.device, y.tolist()) == (torch.device(SIM1), [1.0, 3.0])


def test_an_index_on_another_gpu_is_refused() -> None:
    expected = r"indices should be either on cpu or on the same device as the indexed tensor \(sim:1\)"
    with pytest.raises(RuntimeError, match=expected):
        on(SIM1)[torch.tensor([0], device=SIM0)]


def test_writing_through_an_index_on_another_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"indices should be either on cpu .* \(sim:1\)"):
        on(SIM1)[torch.tensor([0], device=SIM0)] = 1.0


def test_a_host_tensor_refuses_indices_on_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"indices should be either on cpu .* \(cpu\)"):
        on("cpu")[torch.tensor([0], device=SIM0)]


def test_lists_over_several_devices_are_not_there_for_foreach() -> None:
    with pytest.raises(NotImplementedError, match="_foreach_add"):
        torch._foreach_add([on(SIM0), on(SIM1)], 1.0)


# Memory ---------------------------------------------------------------------------------------------------------


def test_a_tensor_holds_its_bytes_until_it_dies() -> None:
    before = simulated.allocated(1)
    x = on(SIM1)
    assert simulated.allocated(1) - before == 16
    del x
    assert simulated.allocated(1) == before


def test_a_view_costs_no_memory() -> None:
    x = torch.ones(4, 4, device=SIM1)
    before = simulated.allocated(1)
    views = [x.view(16), x.t(), x[1], x.expand(3, 4, 4), x.detach(), x.data, x.as_strided((2,), (1,)), *x.split(2)]
    views += [x.reshape(2, 8), x.unsqueeze(0), x.transpose(0, 1).contiguous().new_empty(0)]
    assert simulated.allocated(1) == before


def test_a_view_keeps_the_whole_storage() -> None:
    before = simulated.allocated(1)
    view = on(SIM1)[:1]
    assert simulated.allocated(1) - before == 16
    del view
    assert simulated.allocated(1) == before


def test_what_autograd_saves_is_held_until_backward() -> None:
    x = on(SIM1).requires_grad_()
    before = simulated.allocated(1)
    loss = (x * 2).exp().sum()  # exp saves its result
    assert simulated.allocated(1) - before == 16 + 4
    loss.backward()
    assert simulated.allocated(1) - before == 4 + 16  # the loss and the gradient


def test_the_peak_is_the_most_that_was_held_at_once() -> None:
    before = simulated.allocated(1)
    simulated.reset_peak(1)
    x = on(SIM1)
    x = x + 1
    x = x + 1
    assert simulated.peak(1) - before == 32
    simulated.reset_peak(1)
    assert simulated.peak(1) - before == 16


def test_resetting_all_peaks_resets_every_device() -> None:
    for device in (SIM0, SIM1):
        on(device)
    simulated.reset_peak()
    assert [simulated.peak(i) for i in (0, 1)] == [simulated.allocated(i) for i in (0, 1)]


def test_the_peak_of_a_device_that_never_held_anything_may_be_reset() -> None:
    simulated.start(8)
    simulated.reset_peak(7)
    assert simulated.peak(7) == 0
    simulated.start(4)


def test_an_in_place_operator_allocates_nothing() -> None:
    x = on(SIM1)
    before = simulated.allocated(1)
    simulated.reset_peak(1)
    x.add_(1).mul_(2).clamp_(max=3)
    assert simulated.peak(1) == before


def test_past_its_capacity_a_device_is_out_of_memory() -> None:
    simulated.set_capacity(1, simulated.allocated(1) + 1024)
    with pytest.raises(torch.OutOfMemoryError, match=r"^sim:1 out of memory\. Tried to allocate 2\.00 KiB\."):
        torch.empty(512, device=SIM1)


def test_an_allocation_may_fill_a_device_to_the_last_byte() -> None:
    before = simulated.allocated(1)
    simulated.set_capacity(1, before + 1024)
    x = torch.empty(256, device=SIM1)
    assert simulated.allocated(1) == before + x.nbytes


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.zeros(100, device=SIM1),
        lambda x: torch.ones(100).to(SIM1),
        lambda x: torch.ones(100, device=SIM0).to(SIM1),
        lambda x: torch.tensor([1.0] * 100, device=SIM1),
        lambda x: x + 1,
        lambda x: torch.topk(x, 40),
        lambda x: torch._foreach_add([x, x], 1),
        lambda x: torch.empty(0, device=SIM1).resize_(100),
        lambda x: torch.add(x, 1, out=torch.empty(0, device=SIM1)),
        lambda x: copy.deepcopy(x),
    ],
)
def test_a_refused_allocation_leaves_the_account_as_it_was(allocate: Callable[[Tensor], Any]) -> None:
    x = torch.ones(50, device=SIM1)
    before = simulated.allocated(1)
    simulated.set_capacity(1, before + 100)
    with pytest.raises(torch.OutOfMemoryError):
        allocate(x)
    gc.collect()
    assert simulated.allocated(1) == before
    simulated.set_capacity(1, None)
    assert allocate(x) is not None


def test_a_copy_that_does_not_fit_is_not_counted() -> None:
    x = on(SIM0)
    simulated.set_capacity(1, simulated.allocated(1))
    with simulated.record() as traffic, pytest.raises(torch.OutOfMemoryError):
        x.to(SIM1)
    assert traffic.copies == {}


def test_a_tensor_whose_resize_does_not_fit_stays_as_it_was() -> None:
    x = on(SIM1)
    simulated.set_capacity(1, simulated.allocated(1))
    with pytest.raises(torch.OutOfMemoryError):
        x.resize_(100)
    assert (x.shape, x.tolist()) == ((4,), [1.0, 2.0, 3.0, 4.0])


def test_running_out_of_memory_in_backward_is_an_error_and_not_the_end() -> None:
    x = torch.ones(100, device=SIM1, requires_grad=True)
    loss = (x * x).sum()
    simulated.set_capacity(1, simulated.allocated(1) + 8)
    with pytest.raises(torch.OutOfMemoryError, match="sim:1 out of memory"):
        loss.backward()


def test_memory_is_right_after_many_threads() -> None:
    before = simulated.allocated(1)
    in_threads(4, lambda: [torch.ones(8, device=SIM1) + 1 for _ in range(200)] and None)
    assert simulated.allocated(1) == before


# Numbers, shapes, versions ---------------------------------------------------------------------------------------


def test_an_out_argument_takes_the_shape_of_the_result() -> None:
    out = torch.empty(0, device=SIM1)
    result = torch.add(on(SIM1), 1, out=out)
    assert result is out
    assert (out.shape, out.tolist()) == ((4,), [2.0, 3.0, 4.0, 5.0])


def test_operators_that_reshape_in_place_reshape_the_tensor() -> None:
    x = torch.ones(2, 3, device=SIM1)
    assert x.unsqueeze_(0).shape == x.shape == (1, 2, 3)
    assert x.squeeze_(0).t_().shape == x.shape == (3, 2)
    assert x.stride() == (1, 3)


def test_resize_counts_the_memory_it_takes() -> None:
    before = simulated.allocated(1)
    x = on(SIM1)
    x.resize_(8)
    assert (x.shape, simulated.allocated(1) - before) == ((8,), 32)


def test_a_change_through_a_view_changes_the_base() -> None:
    x = on(SIM1)
    x[:2].mul_(10)
    x.view(2, 2)[1, 1] = 0
    assert x.tolist() == [10.0, 20.0, 3.0, 0.0]


def test_versions_count_changes_in_place_as_on_any_tensor() -> None:
    x = on(SIM1)
    view = x[:2]
    x.add_(1)
    view.mul_(2)
    assert (x._version, view._version) == (2, 2)
    assert (x + 1)._version == 0


def test_autograd_notices_a_saved_tensor_that_was_changed() -> None:
    y = on(SIM1).requires_grad_().exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_operators_return_their_tensor() -> None:
    x = on(SIM1)
    assert x.add_(1) is x
    assert x.contiguous() is x
    assert x.to(torch.float32) is x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("rows", [slice(None), slice(-1, None)], ids=["contiguous", "with-gaps"])
def test_a_linear_layer_gives_the_same_bits_whether_it_runs_whole_or_in_parts(mode: Any, rows: slice) -> None:
    x, layer = torch.randn(3, 9, 64), torch.nn.Linear(64, 160, bias=False)
    in_parts = torch.mm(x[:, rows].reshape(-1, 64), layer.weight.t()).view(3, -1, 160).detach()
    layer.to("sim:0")
    with mode():
        assert torch.equal(layer(x.to("sim:0")[:, rows]).detach().cpu(), in_parts)


def test_inference_mode_makes_inference_tensors_and_views_of_others_are_none() -> None:
    x = on(SIM1)
    with torch.inference_mode():
        assert (x + 1).is_inference()
        assert not x[:2].is_inference()
        assert x[:2].tolist() == [1.0, 2.0]


def test_integers_have_a_histogram_as_on_a_gpu() -> None:
    x = torch.tensor([0, 1, 1, 3], device=SIM1)
    assert torch.histc(x, bins=4, min=0, max=3).tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes(dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, device=SIM1, dtype=dtype)
    assert (x @ x).sum().item() == 64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_cpus(mode: Callable[[], Any], causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    with mode():
        got = F.scaled_dot_product_attention(q.to(SIM1), k.to(SIM1), v.to(SIM1), is_causal=causal)
        torch.testing.assert_close(got.cpu(), F.scaled_dot_product_attention(q, k, v, is_causal=causal))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", ["causally", "by-numbers", "by-truths", "not"])
def test_attention_gives_the_same_bits_whether_it_runs_whole_or_in_parts(
    mode: Any, dtype: torch.dtype, masked: str
) -> None:
    q, k, v = torch.randn(3, 2, 4, 11, 16, dtype=dtype)
    counts = torch.arange(11) > 2
    numbers = torch.where(counts, 0.0, torch.finfo(dtype).min).to(dtype)
    given = {"by-numbers": numbers, "by-truths": counts}.get(masked)
    options = {"is_causal": masked == "causally", "scale": 0.3}
    in_parts, _ = torch.ops.aten._scaled_dot_product_attention_math(
        q, k, v, None if given is None else numbers, **options
    )
    mask = None if given is None else given.to(SIM1)
    with mode():
        got = F.scaled_dot_product_attention(q.to(SIM1), k.to(SIM1), v.to(SIM1), mask, **options)
    assert torch.equal(got.cpu(), in_parts)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("others", [{"k": torch.float32}, {"v": torch.float32}, {"mask": torch.float64}], ids=str)
def test_attention_of_several_types_is_refused(mode: Any, others: dict[str, torch.dtype]) -> None:
    dtypes = [others.get(name, torch.float16) for name in ("q", "k", "v", "mask")]
    q, k, v, mask = (torch.ones(1, 1, 4, 4, dtype=dtype, device=SIM1) for dtype in dtypes)
    with mode(), pytest.raises(RuntimeError, match="dtype"):
        F.scaled_dot_product_attention(q, k, v, mask)


# Autograd -------------------------------------------------------------------------------------------------------


def test_gradients_are_where_their_parameters_are() -> None:
    a, b = nn.Linear(4, 4).to(SIM0), nn.Linear(4, 4).to(SIM2)
    b(a(torch.ones(1, 4, device=SIM0)).to(SIM2)).sum().backward()
    assert (a.weight.grad.device, b.weight.grad.device) == (torch.device(SIM0), torch.device(SIM2))


def test_backward_runs_in_threads() -> None:
    def train() -> None:
        x = torch.ones(4, device=SIM1, requires_grad=True)
        (x.to(SIM2) * 3).sum().backward()
        assert x.grad.tolist() == [3.0] * 4

    in_threads(4, train)


def test_an_error_in_backward_is_the_operators_own() -> None:
    class TwoDevices(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient + on(SIM2)

    with pytest.raises(RuntimeError, match="at least two devices, sim:1 and sim:2!"):
        TwoDevices.apply(on(SIM1).requires_grad_()).sum().backward()


def test_checkpointing_recomputes_on_the_device() -> None:
    x = on(SIM1).requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda y: F.dropout(y.exp(), 0.5), x, use_reentrant=False).sum().backward()
    assert x.grad.device == torch.device(SIM1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_multiplies_in_lower_precision_as_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=dtype):
        expected = layer(x)
    with torch.autocast("sim", dtype=dtype):
        result = layer.to(SIM1)(x.to(SIM1))
        product = result @ result.T
    assert result.dtype is product.dtype is dtype
    assert str(result.device) == SIM1
    assert torch.equal(result.cpu(), expected)


def test_autocast_sums_up_in_full_precision() -> None:
    with torch.autocast("sim", dtype=torch.float16):
        half = torch.ones(4, device=SIM0, dtype=torch.float16)
        assert torch.softmax(half, -1).dtype is torch.float32
        assert half.sum().dtype is torch.float32
        assert torch.nn.functional.layer_norm(half, (4,)).dtype is torch.float32


def test_autocast_leaves_other_operators_and_devices_alone() -> None:
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("sim", dtype=torch.float16):
        assert (on(SIM1) * 2).dtype is torch.float32
        assert layer(torch.ones(4)).dtype is torch.float32
    with torch.autocast("sim", enabled=False):
        assert layer.to(SIM0)(torch.ones(4, device=SIM0)).dtype is torch.float32


def test_gradients_through_autocast_are_in_the_weights_precision() -> None:
    layer = torch.nn.Linear(4, 4).to(SIM1)
    with torch.autocast("sim", dtype=torch.bfloat16):
        layer(torch.ones(2, 4, device=SIM1)).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32
    assert str(layer.weight.grad.device) == SIM1


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor])
def test_a_list_of_scalars_on_devices_becomes_a_tensor_on_the_cpu(make: Callable[[Any], torch.Tensor]) -> None:
    with simulated.record() as traffic:
        made = make([torch.tensor(3, device=SIM0), [torch.tensor(4, device=SIM1)][0]])
    assert made.tolist() == [3, 4]
    assert made.device.type == "cpu"
    assert traffic.reads == 2


# Random numbers -------------------------------------------------------------------------------------------------


def test_one_seed_seeds_every_device() -> None:
    torch.manual_seed(7)
    first = [torch.rand(3, device=device).tolist() for device in (SIM0, SIM1)]
    torch.manual_seed(7)
    assert [torch.rand(3, device=device).tolist() for device in (SIM0, SIM1)] == first


DRAWS: dict[str, Callable[[str], Tensor]] = {
    "rand": lambda device: torch.rand(8, device=device),
    "randn": lambda device: torch.randn(8, device=device),
    "randint": lambda device: torch.randint(0, 99, (8,), device=device),
    "randperm": lambda device: torch.randperm(8, device=device),
    "normal_": lambda device: torch.empty(8, device=device).normal_(),
    "uniform_": lambda device: torch.empty(8, device=device).uniform_(),
    "bernoulli_": lambda device: torch.empty(8, device=device).bernoulli_(0.5),
    "multinomial": lambda device: torch.multinomial(torch.ones(8, device=device), 4),
    "dropout": lambda device: F.dropout(torch.ones(8, device=device)),
    "rand_like": lambda device: torch.rand_like(torch.ones(8, device=device)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_device_draws_the_numbers_the_cpu_draws(draw: Callable[[str], Tensor]) -> None:
    torch.manual_seed(3)
    expected = draw("cpu").tolist()
    torch.manual_seed(3)
    assert draw(SIM1).tolist() == expected


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_drawing_on_one_device_leaves_the_others_alone(draw: Callable[[str], Tensor]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    draw(SIM1)
    assert torch.rand(2).tolist() == torch.rand(2, device=SIM2).tolist() == expected


def test_a_generator_belongs_to_its_device_and_repeats_itself() -> None:
    generator = torch.Generator(device=SIM1)
    assert (generator.device, isinstance(generator, torch.Generator)) == (torch.device(SIM1), True)
    draws = [torch.randn(3, device=SIM1, generator=generator.manual_seed(5)).tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    assert torch.rand(1, device=SIM1, generator=generator.clone_state()) == torch.rand(
        1, device=SIM1, generator=generator
    )


def test_a_generator_of_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator but found 'cpu'"):
        torch.multinomial(on(SIM1), 1, generator=torch.Generator())


def test_generators_of_the_cpu_are_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    assert (generator.device, isinstance(generator, torch.Generator)) == (torch.device("cpu"), True)
    assert isinstance(torch.default_generator, torch.Generator)


def test_a_random_state_can_be_put_back() -> None:
    state = torch.sim.get_rng_state(1)
    first = torch.rand(3, device=SIM1).tolist()
    torch.sim.set_rng_state(state, 1)
    assert torch.rand(3, device=SIM1).tolist() == first


def test_forking_the_random_state_covers_the_devices() -> None:
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[1], device_type="sim"):
        inside = torch.rand(2, device=SIM1).tolist()
    assert torch.rand(2, device=SIM1).tolist() == inside


# The current device ----------------------------------------------------------------------------------------------


def test_the_module_answers_what_generic_code_asks() -> None:
    module = torch.get_device_module("sim")
    assert module is torch.sim
    assert (module.is_available(), module.device_count(), module.current_device()) == (True, 4, 0)
    assert module.get_device_name(2) == "Simulated GPU"
    module.synchronize(), module.empty_cache()


def test_the_module_answers_for_memory() -> None:
    x = on(SIM1)
    used = simulated.allocated(1)
    simulated.set_capacity(1, used + 1000)
    assert used >= x.nbytes
    assert torch.sim.memory_allocated(1) == torch.sim.memory_reserved(SIM1) == used
    assert torch.sim.mem_get_info(torch.device(SIM1)) == (1000, used + 1000)
    torch.sim.reset_peak_memory_stats(1)
    assert torch.sim.max_memory_allocated(1) == used


def test_the_number_of_devices_can_be_set_again() -> None:
    simulated.start(2)
    assert torch.sim.device_count() == torch.accelerator.device_count() == 2
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device=SIM2)


def test_at_least_one_device_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        simulated.start(0)


BARE: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(1, device="sim"),
    "tensor": lambda: torch.tensor([1.0], device="sim"),
    "to": lambda: torch.ones(1).to("sim"),
    "to device": lambda: torch.ones(1).to(torch.device("sim")),
    "sim()": lambda: torch.ones(1).sim(),
    "module": lambda: nn.Linear(1, 1).to("sim").weight,
    "randn": lambda: torch.randn(1, device="sim"),
    "empty_like": lambda: torch.empty_like(torch.ones(1), device="sim"),
    "generator": lambda: torch.Generator("sim"),
}


@pytest.mark.parametrize("make", BARE.values(), ids=BARE)
@pytest.mark.parametrize("index", [0, 2])
def test_sim_without_an_index_is_the_current_device(make: Callable[[], Any], index: int) -> None:
    with torch.sim.device(index):
        assert make().device == torch.device("sim", index)


def test_the_current_device_holds_inside_a_default_device() -> None:
    with torch.sim.device(2), torch.device("sim"):
        assert torch.tensor([1.0]).device == torch.device(SIM2)


def test_a_device_block_puts_the_one_before_back() -> None:
    with torch.sim.device(SIM1):
        assert torch.sim.current_device() == torch.accelerator.current_device_index() == 1
    assert torch.sim.current_device() == 0


def test_a_device_block_puts_the_one_before_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="mine"), torch.sim.device(SIM1):
        raise ValueError("mine")
    assert torch.sim.current_device() == 0


def test_torch_device_itself_stays_bare() -> None:
    with torch.sim.device(1):
        assert torch.device("sim").index is None
        assert torch.device("sim", 2).index == 2


def test_only_real_changes_of_the_current_device_count() -> None:
    with simulated.record() as traffic:
        torch.sim.set_device(0)
        with torch.sim.device(1), torch.sim.device(1), torch.sim.device(None):
            torch.sim.set_device(SIM1)
    assert traffic.switches == 2


def test_each_thread_has_its_own_current_device() -> None:
    torch.sim.set_device(2)
    seen: list[int] = []
    in_threads(1, lambda: seen.append(torch.sim.current_device()))
    assert (seen, torch.sim.current_device()) == ([0], 2)


def test_function_modes_entered_before_leave_in_their_order() -> None:
    with torch.device("meta"):
        torch.sim.set_device(1)
        assert torch.ones(1).device.type == "meta"
    assert torch.ones(1).device.type == "cpu"
    assert torch.ones(1, device="sim").device == torch.device(SIM1)
    torch.sim.set_device(0)
    assert torch.overrides._len_torch_function_stack() == 0


def test_an_integer_is_a_simulated_device() -> None:
    assert torch.ones(1).to(1).device == torch.device(1) == torch.device("sim", 1)
    assert torch.ones(1, device=2).device == torch.device(SIM2)


# Tensors as other code handles them -------------------------------------------------------------------------------


def test_a_tensor_knows_its_device() -> None:
    x = on(SIM1)
    assert x.device == torch.device("sim", 1)
    assert (x.is_sim, x.is_cpu, x.is_cuda, x.is_meta, x.get_device()) == (True, False, False, False, 1)


def test_addresses_tell_storages_apart() -> None:
    x, y = on(SIM1), on(SIM1)
    assert x.data_ptr() not in (0, y.data_ptr())
    assert x[1:].data_ptr() == x.data_ptr() + 4
    assert x[1:].untyped_storage().data_ptr() == x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
    assert x.untyped_storage().nbytes() == 16


def test_new_tensors_are_where_the_old_one_is() -> None:
    x = on(SIM1)
    made = [
        x.new_tensor([1]),
        x.new_zeros(1),
        x.new_empty(1),
        x.new_full((1,), 2),
        x.new(2),
        x.new([1.0]),
        torch.zeros_like(x),
    ]
    assert {str(tensor.device) for tensor in made} == {SIM1}
    assert x.new_zeros(1, device="cpu").device.type == "cpu"


def test_a_gpu_tensor_is_not_a_numpy_array() -> None:
    with pytest.raises(TypeError, match=r"can't convert sim:1 device type tensor to numpy\. Use Tensor\.cpu\(\)"):
        on(SIM1).numpy()


def test_a_parameter_is_a_parameter() -> None:
    weight = nn.Parameter(on(SIM1))
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad
    layer = nn.Linear(2, 2).to(SIM1)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_module_moves_and_its_memory_with_it() -> None:
    before = [simulated.allocated(i) for i in (0, 1)]
    layer = nn.Linear(4, 4, bias=False).to(SIM0)
    layer.to(SIM1)
    assert [simulated.allocated(i) - b for i, b in zip((0, 1), before, strict=True)] == [0, 64]
    layer.to("cpu")
    assert type(layer.weight) is nn.Parameter
    assert simulated.allocated(1) == before[1]


def test_data_can_be_swapped_for_a_tensor_elsewhere() -> None:
    weight = nn.Parameter(on(SIM0))
    weight.data = weight.data.to(SIM1)[:2]
    assert (weight.device, weight.shape) == (torch.device(SIM1), (2,))
    assert (weight * 2).tolist() == [2.0, 4.0]


def test_a_meta_module_materialises() -> None:
    layer = nn.Linear(2, 2, device="meta").to_empty(device=SIM1)
    assert layer.weight.device == torch.device(SIM1)
    assert on(SIM1).to("meta").is_meta


def test_a_deep_copy_keeps_ties_and_shares_nothing() -> None:
    layer = nn.Linear(2, 2).to(SIM1)
    layer.tied = layer.weight
    layer.register_buffer("view", layer.weight.detach()[0])
    twin = copy.deepcopy(layer)
    assert twin.tied is twin.weight
    assert isinstance(twin.weight, nn.Parameter)
    twin.weight.data.zero_()
    assert twin.view.tolist() == [0.0, 0.0]  # a view of one storage stays one
    assert layer.weight.abs().sum() > 0


def test_a_deep_copy_brings_its_gradient() -> None:
    weight = nn.Parameter(on(SIM1))
    (weight * 2).sum().backward()
    assert copy.deepcopy(weight).grad.tolist() == [2.0] * 4


def test_a_saved_state_comes_back_to_its_device_or_where_it_is_told_to() -> None:
    file = io.BytesIO()
    torch.save({"x": on(SIM1)}, file)

    def load(**options: Any) -> Tensor:
        file.seek(0)
        return torch.load(file, weights_only=True, **options)["x"]

    assert (load().device, load().tolist()) == (torch.device(SIM1), [1.0, 2.0, 3.0, 4.0])
    assert load(map_location="cpu").device == torch.device("cpu")
    assert load(map_location={SIM1: SIM2}).device == torch.device(SIM2)


def test_a_pickled_parameter_is_one_again() -> None:
    weight = pickle.loads(pickle.dumps(nn.Parameter(on(SIM1), requires_grad=False)))
    assert isinstance(weight, nn.Parameter)
    assert (weight.device, weight.requires_grad) == (torch.device(SIM1), False)


class Numbered(nn.Parameter):
    """A parameter of a class of its own, made as bitsandbytes makes its own."""

    number: int

    def __new__(cls, data: Tensor | None = None, number: int = 0) -> Numbered:
        made = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data)
        made.number = number
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Numbered:
        twin = type(self).__new__(type(self))
        twin.data, twin.number = self.data.clone(), self.number
        return twin


def test_a_parameter_of_another_class_keeps_it_and_its_device() -> None:
    weight = Numbered(on(SIM1), number=7)
    assert isinstance(weight, Numbered)
    assert isinstance(weight, nn.Parameter)
    assert (weight.device, weight.number, weight.tolist()) == (torch.device(SIM1), 7, [1.0, 2.0, 3.0, 4.0])
    assert (weight * 2).device == torch.device(SIM1)
    with pytest.raises(RuntimeError, match="same device"):
        weight + on(SIM0)


def test_a_deep_copy_of_a_parameter_of_another_class_is_one_on_its_device() -> None:
    twin = copy.deepcopy(Numbered(on(SIM1), number=7))
    assert isinstance(twin, Numbered)
    assert (twin.device, twin.number, twin.tolist()) == (torch.device(SIM1), 7, [1.0, 2.0, 3.0, 4.0])


def test_nothing_is_pinned() -> None:
    assert not on(SIM1).is_pinned()


@pytest.mark.parametrize(
    "operate",
    [
        lambda x: x.to_sparse(),
        lambda x: x.set_(on(SIM1)),
        lambda x: x.pin_memory(),
        lambda x: x.storage(),
        lambda x: x.share_memory_(),
        lambda x: x.to(torch.complex64).conj(),
        lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
        lambda x: x.__dlpack__(),
        lambda x: x.new(on(SIM1)),
    ],
)
def test_what_is_not_there_says_so(operate: Callable[[Tensor], Any]) -> None:
    with pytest.raises(NotImplementedError):
        operate(on(SIM1))


# Models ---------------------------------------------------------------------------------------------------------


@functools.cache
def llama() -> LlamaForCausalLM:
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return spread_out(LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=128, **sizes, **TOKENS)))


@functools.cache
def gptj() -> GPTJForCausalLM:
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 128}
    return spread_out(GPTJForCausalLM(GPTJConfig(vocab_size=128, **sizes, **TOKENS)))


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {"llama": llama, "gptj": gptj}


def spread_out(model: Any) -> Any:
    """Weights large enough for different tokens to follow one another."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.25 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise
    model.get_input_embeddings().weight.data.mul_(0.2)  # or the residuals hand a token on and it repeats
    return model.eval()


def halves(model: Any) -> dict[str, str]:
    """The first two of four layers and what comes before them on sim:0, the rest on sim:1."""
    layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    root, _, last = layers.rpartition(".")
    places = {f"{layers}.{i}": SIM0 if i < 2 else SIM1 for i in range(4)}
    for name, module in model.get_submodule(root).named_children():
        if name != last:
            places[f"{root}.{name}"] = (
                SIM0 if isinstance(module, nn.Embedding) or "rotary" in name or "drop" in name else SIM1
            )
    return {**places, "lm_head": SIM1}


def generate(model: Any, device: str, mode: Callable[[], Any] = torch.no_grad, **options: Any) -> list[list[int]]:
    """New tokens for three prompts of different lengths, padded on the left."""
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    ids[mask == 0] = 0
    torch.manual_seed(2)
    with mode():
        tokens = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=8,
            min_new_tokens=8,
            pad_token_id=0,
            **options,
        )
    return tokens[:, 9:].tolist()


WAYS = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True}, "beams": {"do_sample": False, "num_beams": 3}}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_on_two_devices_generates_what_it_does_on_the_cpu(
    build: Any, options: dict[str, Any], mode: Any
) -> None:
    model = build()
    spread = dispatch_model(copy.deepcopy(model), halves(model), main_device=SIM0)
    with simulated.record() as traffic:
        tokens = generate(spread, SIM0, mode, **options)
    assert tokens == generate(model, "cpu", mode, **options)
    assert len({token for row in tokens for token in row}) > 8
    assert traffic.copies[SIM0, SIM1] >= 8
    assert traffic.copies[SIM1, SIM0] >= 8


@pytest.mark.parametrize("places", [lambda place: place, lambda place: int(place[-1])], ids=["names", "integers"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_checkpoint_loads_onto_two_devices(build: Any, places: Callable[[str], Any], tmp_path: Any) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    device_map = {name: places(place) for name, place in halves(model).items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {str(parameter.device) for parameter in loaded.parameters()} == {SIM0, SIM1}
    assert generate(loaded, SIM0, do_sample=False) == generate(model, "cpu", do_sample=False)


def test_a_model_with_offloaded_layers_generates_what_it_does_on_the_cpu() -> None:
    model = llama()
    device_map = {**halves(model), "model.layers.1": "cpu", "model.layers.2": "cpu"}
    spread = dispatch_model(copy.deepcopy(model), device_map, main_device=SIM0)
    assert generate(spread, SIM0, do_sample=False) == generate(model, "cpu", do_sample=False)


def test_weights_take_the_memory_their_numbers_take() -> None:
    model = llama()
    before = simulated.allocated(0) + simulated.allocated(1)
    spread = dispatch_model(copy.deepcopy(model), halves(model), main_device=SIM0)
    weights = sum(tensor.nbytes for tensor in [*spread.parameters(), *spread.buffers()])
    assert simulated.allocated(0) + simulated.allocated(1) - before == weights
    del spread
    gc.collect()
    assert simulated.allocated(0) + simulated.allocated(1) == before


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_training_step_on_two_devices_has_the_cpus_gradients(build: Any) -> None:
    reference, spread = copy.deepcopy(build()), copy.deepcopy(build())
    spread = dispatch_model(spread, halves(spread), main_device=SIM0)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    for model, device in ((reference, "cpu"), (spread, SIM0)):
        logits = model(input_ids=ids.to(device)).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for (name, expected), (_, got) in zip(reference.named_parameters(), spread.named_parameters(), strict=True):
        assert got.grad.device == got.device, name
        torch.testing.assert_close(got.grad.cpu(), expected.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(got.detach().cpu(), expected.detach(), rtol=1e-3, atol=1e-5)
