"""The pool behind the CPU backend's outputs and gradients: reuse, what keeps memory from it, giving it back, fork."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import pickle
import queue
import resource
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from common import bits
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import vgkern
from vgkern import cli, memory
from vgkern.backends import cpu

_C = pytest.importorskip("vgkern._C", reason="not run: the package was built without a C++ compiler")

MIB = 1 << 20
HUGE_PAGE = 2 * MIB
FORMATS = {
    "contiguous": ((4, 64, 40, 40), torch.contiguous_format),
    "channels_last": ((4, 64, 40, 40), torch.channels_last),
    "channels_last_3d": ((4, 64, 10, 8, 20), torch.channels_last_3d),
    "one channel": ((1024, 1, 20, 20), torch.channels_last),
    "one pixel": ((1024, 400, 1, 1), torch.channels_last),
    "rank 1": ((409_600,), torch.contiguous_format),
}


@pytest.fixture(autouse=True)
def _own_pool():
    before = memory.limit()
    memory.empty_cache()
    memory.set_limit(1 << 30)
    global _used_by_others
    _used_by_others = memory.stats().in_use_bytes  # the traceback of a failed test keeps its tensors
    yield
    memory.empty_cache()
    memory.set_limit(before)


_used_by_others = 0


def _in_use() -> int:
    return memory.stats().in_use_bytes - _used_by_others


def _in_use_and_idle() -> tuple[int, int]:
    return _in_use(), memory.stats().idle_bytes


def _tensor(mib: float = 4, value: float | None = None) -> torch.Tensor:
    """A tensor of the pool."""
    hits_and_misses = _handed_out()
    y = _C.new_output(torch.empty(int(mib * MIB / 4)))
    assert _handed_out() == hits_and_misses + 1
    return y if value is None else y.fill_(value)


def _handed_out() -> int:
    stats = memory.stats()
    return stats.hits + stats.misses


PRELUDE = "import os, sys, torch, vgkern\nfrom vgkern import _C, memory\n"


def _run(code: str, prelude: str = PRELUDE, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "VGKERN_MEMORY_LIMIT"} | environment
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def _is_pooled(tensor):
    """At the beginning of a huge page, but for an offset."""
    return 512 <= tensor.data_ptr() % HUGE_PAGE < 4096


# ---- What is handed out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_what_empty_like_gives_on_huge_pages(kind, dtype):
    shape, memory_format = FORMATS[kind]
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
    if x.nbytes < MIB:
        x = torch.cat([x, x])
    before = _handed_out()
    y, expected = _C.new_output(x), torch.empty_like(x)
    assert _handed_out() == before + 1
    assert (type(y), y.dtype, y.device, y.shape, y.stride(), y.requires_grad, y.storage_offset()) == (
        torch.Tensor, dtype, x.device, x.shape, expected.stride(), False, 0,
    )  # fmt: skip
    assert y.untyped_storage().nbytes() == x.nbytes
    assert _is_pooled(y)
    assert torch.equal(y.copy_(x), x)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(MIB // 4 - 1),
        torch.empty(0),
        torch.empty(1).expand(MIB),
        torch.empty(1024, 1024)[:, ::2],
        torch.empty(MIB, dtype=torch.int32).view(1024, 1024).t(),
        torch.empty(MIB, dtype=torch.int32),
        torch.empty(64, 32, 40, 40).contiguous(memory_format=torch.channels_last)[::2],
    ],
    ids=["small", "empty", "expanded", "step 2", "transposed", "integers", "a batch with gaps"],
)
def test_other_tensors_come_from_torch(x):
    before = memory.stats()
    y, expected = _C.new_output(x), torch.empty_like(x)
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert memory.stats() == before


def test_tensors_that_are_worked_on_together_begin_at_different_lines_of_a_page():
    """Where rows are whole pages, stores would else hold up the loads of another tensor."""
    memory.empty_cache()
    tensors = [_tensor(2) for _ in range(7)]
    offsets = {y.data_ptr() % 4096 for y in tensors}
    assert offsets == set(range(512, 4096, 512))
    assert all(1024 <= (a.data_ptr() - b.data_ptr()) % 4096 <= 3072 for a, b in itertools.pairwise(tensors))
    for y in tensors:
        y.fill_(1.0)
    assert all((y == 1.0).all() for y in tensors)


def test_where_nobody_wrote_is_nan():
    _tensor(value=1.0)
    assert _tensor().isnan().all()
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        _tensor(value=2.0)
        assert (_tensor() == 2).all()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)
    assert (_tensor() == 2).all()


def test_in_inference_mode_it_is_an_inference_tensor():
    with torch.inference_mode():
        assert _tensor().is_inference()
    assert not _tensor().is_inference()


def _step(layer, x, residual, dy):
    y = layer(x, residual)
    return (y, *torch.autograd.grad(y, (x, residual), dy))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_backend_takes_output_and_gradients_from_it(memory_format):
    x, residual, dy = (torch.randn(8, 32, 64, 64).contiguous(memory_format=memory_format) for _ in range(3))
    layer = vgkern.nn.BatchNormAct2d(32)
    with vgkern.backends.use("cpu"):
        ours = _step(layer, x.requires_grad_(), residual.requires_grad_(), dy)
        assert all(map(_is_pooled, ours))
        assert _in_use() == 3 * x.nbytes
        memory.set_limit(0)
        plain = _step(layer, x, residual, dy)
    assert _in_use() == 3 * x.nbytes
    assert bits(*ours) == bits(*plain)
    assert [t.stride() for t in ours] == [t.stride() for t in plain]


@pytest.mark.parametrize(
    ("activation", "dtype", "more"),
    [("gelu", torch.bfloat16, 1), ("hardswish", torch.bfloat16, 0), ("gelu", torch.float32, 0)],
    ids=str,
)
def test_dz_waits_in_it_between_the_passes(activation, dtype, more):
    """Of a smooth activation in half precision, where all threads share each pass."""
    x, dy = (torch.randn(16, 64, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    layer = vgkern.nn.BatchNormAct2d(64, activation=activation, dtype=dtype)
    cache_bytes = _C.set_cache_bytes(32 * MIB)
    try:
        y = layer(x.requires_grad_())
        before, in_use = _handed_out(), _in_use()
        dx = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
        assert _handed_out() == before + 1 + more  # dx and, in float32, dz
        assert _in_use() == in_use + x.nbytes
        memory.set_limit(0)
        assert bits(torch.autograd.grad(y, x, dy)[0]) == bits(dx)
    finally:
        _C.set_cache_bytes(cache_bytes)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="not run: no /proc here")
@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="not run: no huge pages here")
def test_huge_pages_are_asked_for():
    address = _tensor(8).data_ptr()
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            name, *values = line.split()
            if "-" in name and not name.endswith(":"):
                begin, end = (int(bound, 16) for bound in name.split("-"))
            elif name == "VmFlags:" and begin <= address < end:
                assert "hg" in values
                return
    pytest.fail("the tensor's memory is not mapped")


# ---- Reuse -----------------------------------------------------------------------------------------------------------


def test_a_reused_buffer_is_not_paged_in_again():
    torch.use_deterministic_algorithms(False)
    x = torch.empty(32 * MIB // 4)
    address = _C.new_output(x).fill_(1.0).data_ptr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = _C.new_output(x).fill_(2.0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert y.data_ptr() == address
    assert faults < 32 * MIB // resource.getpagesize() / 10


def test_a_second_training_step_maps_nothing():
    x = torch.randn(8, 32, 64, 64, requires_grad=True)
    net = torch.nn.Sequential(*(vgkern.nn.BatchNormAct2d(32) for _ in range(3)))
    for _ in range(2):
        misses = memory.stats().misses
        net(x).sum().backward()
        x.grad = None
    assert memory.stats().misses == misses
    assert _in_use() == 0


def test_it_takes_the_smallest_that_fits_and_wastes_a_quarter_at_most():
    blocks = {mib: _tensor(mib) for mib in (6, 5, 8)}
    addresses = {mib: block.data_ptr() for mib, block in blocks.items()}
    del blocks
    fits_two = _tensor(4.9)
    assert fits_two.data_ptr() == addresses[5]
    fits_one = _tensor(5.5)
    assert fits_one.data_ptr() == addresses[6]
    misses = memory.stats().misses
    too_small_for_it = _tensor(6.3)
    assert memory.stats().misses == misses + 1
    just_right = _tensor(6.4)
    assert just_right.data_ptr() == addresses[8]
    del too_small_for_it


def test_statistics_add_up():
    a, b = _tensor(4), _tensor(8)
    before = memory.stats()
    assert (_in_use(), before.idle_bytes, before.limit_bytes) == (12 * MIB, 0, 1 << 30)
    assert before.peak_bytes >= 12 * MIB
    del a
    c = _tensor(4)
    after = memory.stats()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    del b, c
    assert _in_use_and_idle() == (0, 12 * MIB)


# ---- What keeps memory from being handed out again -------------------------------------------------------------------

KEEPERS = {
    "view": lambda y: y[1000:2000],
    "detach": lambda y: y.detach(),
    "numpy": lambda y: y.numpy(),
    "view of numpy": lambda y: memoryview(y.numpy()),
    "storage": lambda y: y.untyped_storage(),
    "other dtype": lambda y: y.view(torch.int16),
    "set_": lambda y: torch.empty(0).set_(y),
    "data": lambda y: y.data,
    "dlpack": lambda y: torch.from_dlpack(y),
    "capsule": lambda y: torch.utils.dlpack.to_dlpack(y),
    "parameter": lambda y: torch.nn.Parameter(y),
    "saved for backward": lambda y: torch.ones(y.shape, requires_grad=True) * y,
    "a cycle": lambda y: (lambda cycle: cycle.append((cycle, y)) or cycle)([]),
}


def _contents(kept) -> torch.Tensor:
    if isinstance(kept, torch.UntypedStorage):
        return torch.empty(0).set_(kept)
    if isinstance(kept, list):
        return kept[0][1]
    if not isinstance(kept, torch.Tensor):
        return torch.from_dlpack(kept) if type(kept).__name__ == "PyCapsule" else torch.as_tensor(kept)
    if kept.grad_fn is not None:
        return kept.grad_fn._saved_other
    return kept.view(torch.float32) if kept.dtype == torch.int16 else kept


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_still_uses_memory_keeps_it(keeper):
    y = _tensor(4, value=7.0)
    address = y.data_ptr()
    kept = KEEPERS[keeper](y)
    del y
    memory.empty_cache()
    others = [_tensor(4, value=float(i)) for i in range(3)]
    assert address not in [other.data_ptr() for other in others]
    assert (_contents(kept) == 7).all()
    if keeper == "a cycle":
        kept.clear()  # what the garbage collector would do
    del kept
    assert _tensor(4).data_ptr() == address


def test_it_outlives_the_pool_being_emptied_and_turned_off():
    y = _tensor(4, value=3.0)
    memory.empty_cache()
    memory.set_limit(0)
    assert (y == 3).all()
    assert _in_use() == 4 * MIB
    del y
    assert _in_use_and_idle() == (0, 0)


@pytest.fixture
def unfilled():
    """Where torch fills what is empty, it makes what is small."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch's table of functions", "none, as in torch 2.9"])
def table(request):
    if request.param.startswith("none"):
        _C.use_tensor_types(type("Tensor", (), {"grad": None}), torch.nn.Parameter)
    yield request.param
    _C.use_tensor_types(torch.Tensor, torch.nn.Parameter)


def test_small_outputs_are_like_their_input(table, unfilled):
    like = [torch.empty(shape).contiguous(memory_format=layout)[:2] for shape, layout in FORMATS.values()]
    like += [torch.empty(3, 5, 7).permute(2, 0, 1), torch.empty(1, 2, 3, 1, 2, 2), torch.tensor(1.0), torch.empty(0, 3)]
    for x in like:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            y, expected = _C.new_output(x.to(dtype)), torch.empty_like(x.to(dtype))
            assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype)
            assert type(y) is torch.Tensor
            assert y.data_ptr() % 64 == 0
            assert (y.fill_(2.0) == 2).all()
    x = torch.empty(2, 24, 3, 3)
    assert (_C.new_statistics(x).shape, _C.new_statistics(x).dtype) == ((3, 24), torch.float64)
    for layout, shape in ((torch.contiguous_format, (48, 2)), (torch.channels_last, (18, 3))):
        mask = _C.new_mask(x.contiguous(memory_format=layout))
        assert (mask.shape, mask.dtype) == (shape, torch.uint8)


def test_what_a_kernel_leaves_out_shows_where_torch_fills_what_is_empty(monkeypatch):
    class Idle:
        batch_norm_act_forward = batch_norm_act_backward = staticmethod(lambda *_: None)
        new_output, new_statistics, new_mask = _C.new_output, _C.new_statistics, _C.new_mask

    monkeypatch.setattr(cpu, "_C", Idle)
    torch.use_deterministic_algorithms(True)
    x, weight = torch.randn(4, 16, 5, 5), torch.ones(16)
    rest = True, 1e-5, "relu", ()
    y, statistics, mask = cpu.batch_norm_act_forward(x, x, weight, weight, None, None, None, *rest, True)
    gradients = cpu.batch_norm_act_backward(
        x, x, None, mask, statistics, weight, weight, None, *rest, 0.0, 1.0, [True] * 4 + [False, True]
    )
    assert all(t.isnan().all() for t in (y, statistics, *gradients) if t is not None)
    assert (mask == 255).all()


def test_the_mask_of_a_large_tensor_is_the_pools(unfilled):
    x = torch.empty(8, 1024, 32, 33, dtype=torch.bfloat16)
    mask = _C.new_mask(x)
    assert (mask.shape, mask.dtype) == ((8 * 1024, 132), torch.uint8)
    assert _in_use() >= mask.nbytes
    memory.set_limit(0)
    other = _C.new_mask(x)
    assert _in_use() < 2 * mask.nbytes
    assert torch.equal(other.fill_(3), mask.fill_(3))
    del mask
    assert _in_use() == 0


def test_small_outputs_live_as_long_as_something_needs_them(unfilled):
    x = torch.empty(4, 1000)
    y = _C.new_output(x).fill_(7.0)
    view, array = y[1:, ::2], y.numpy()
    del y
    others = [_C.new_output(x).fill_(float(i)) for i in range(100)]
    assert (view == 7).all()
    assert (array == 7).all()
    assert all((other == i).all() for i, other in enumerate(others))


def test_small_outputs_leave_no_memory_behind(unfilled):
    x = torch.empty(200_000)
    peak = 0
    for turn in range(2000):  # 1.6 GB
        _C.new_output(x).fill_(1.0)
        if turn == 100:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB


def test_without_the_pool_small_outputs_can_be_resized():
    def storage():
        x = torch.randn(4, 8, 5, 5)
        return vgkern.functional.batch_norm_act(x, None, None, training=True).untyped_storage()

    torch.use_deterministic_algorithms(False)
    memory.set_limit(0)
    assert storage().resizable()
    memory.set_limit(1 << 30)
    assert not storage().resizable()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_whoever_makes_small_outputs_they_are_the_same(layout, activation):
    layer = vgkern.nn.BatchNormAct2d(24, activation=activation)
    x, residual, dy = (torch.randn(4, 24, 5, 7).contiguous(memory_format=layout) for _ in range(3))

    def step():
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_(), *layer.parameters()
        y = layer(*leaves[:2])
        return bits(y, *torch.autograd.grad(y, leaves, dy), layer.running_mean)

    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = step()
    layer.load_state_dict(before)
    torch.use_deterministic_algorithms(False)  # under which torch makes them
    assert step() == expected


def test_a_capsule_that_nobody_takes_gives_its_buffer_back():
    """Without torch's table of functions a tensor goes by a capsule."""
    code = """
        def refuse(capsule):
            raise RuntimeError("refused")

        torch.utils.dlpack.from_dlpack = refuse  # before the extension is loaded
        from vgkern import _C, memory
        _C.use_tensor_types(type("Tensor", (), {"grad": None}), torch.nn.Parameter)
        try:
            _C.new_output(torch.empty(1 << 20))
        except RuntimeError as error:
            assert str(error) == "refused"
        stats = memory.stats()
        assert (stats.in_use_bytes, stats.idle_bytes) == (0, 4 << 20), stats
    """
    done = _run(code, prelude="import torch\nimport torch.utils.dlpack\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda y: pickle.loads(pickle.dumps(y)),
        lambda y: (buffer := io.BytesIO(), torch.save(y, buffer), buffer.seek(0), torch.load(buffer))[-1],
        torch.clone,
    ],
    ids=["deepcopy", "pickle", "save", "clone"],
)
def test_copies_are_copies(copied):
    y = _tensor(4, value=7.0)
    twin = copied(y)
    del y
    _tensor(4, value=1.0)
    assert (twin == 7).all()


def test_shared_memory_moves_out_of_the_pool():
    y = _tensor(4, value=7.0)
    y.share_memory_()
    assert y.is_shared()
    assert _in_use_and_idle() == (0, 4 * MIB)
    _tensor(4, value=1.0)
    assert (y == 7).all()


def test_its_storage_cannot_be_resized():
    """As that of torch.from_numpy: torch refuses, and what was there stays."""
    y = _tensor(4, value=7.0)
    for resize in (
        lambda: y.detach().resize_(2 * MIB),  # not y itself: torch leaves the shape that it refused behind
        lambda: y.untyped_storage().resize_(0),
        lambda: y.untyped_storage().resize_(8 * MIB),
    ):
        with pytest.raises(RuntimeError, match="not resizable"):
            resize()
    assert (y == 7).all()
    assert y.resize_(16).shape == (16,)
    assert _in_use() == 4 * MIB
    y.data = torch.empty(1)  # lets go of the memory
    assert _in_use() == 0


# ---- Through autograd, compile and threads ---------------------------------------------------------------------------


def _gradients_with_and_without(step) -> tuple[list, list]:
    memory.set_limit(1 << 30)
    misses = _handed_out()
    ours = bits(*step())
    assert _handed_out() > misses
    assert _in_use() == 0
    memory.set_limit(0)
    return ours, bits(*step())


def test_two_forwards_before_one_backward():
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    layer = vgkern.nn.BatchNormAct2d(16, activation="silu")

    def step():
        first = layer(x)
        for _ in range(3):
            layer(x.detach() + 1)
        second = layer(first * 2, first)
        return torch.autograd.grad(second.square().sum() + first.sum(), [x, layer.weight])

    ours, plain = _gradients_with_and_without(step)
    assert ours == plain


def test_checkpointing():
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    net = torch.nn.Sequential(*(vgkern.nn.BatchNormAct2d(16) for _ in range(3)))

    def step():
        return torch.autograd.grad(checkpoint(net, x, use_reentrant=False).square().sum(), [x])

    ours, plain = _gradients_with_and_without(step)
    assert ours == plain


def test_save_on_cpu():
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    net = torch.nn.Sequential(*(vgkern.nn.BatchNormAct2d(16) for _ in range(3)))

    def step():
        with save_on_cpu():
            y = net(x).square().sum()
        return torch.autograd.grad(y, [x])

    ours, plain = _gradients_with_and_without(step)
    assert ours == plain


def test_compile():
    x = torch.randn(4, 16, 64, 64, requires_grad=True)
    net = torch.nn.Sequential(*(vgkern.nn.BatchNormAct2d(16) for _ in range(2)))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")

    def step():
        return torch.autograd.grad((compiled(x) * 2).square().sum(), [x])

    ours, plain = _gradients_with_and_without(step)
    assert ours == plain


def test_many_threads_each_see_their_own_numbers():
    """Tensors of several sizes are made in one thread, checked and freed in another."""
    torch.use_deterministic_algorithms(False)
    memory.set_limit(24 * MIB)  # so that some are reused and some given back
    handed_on: queue.Queue = queue.Queue(maxsize=12)
    wrong = []

    def make(thread: int) -> None:
        for i in range(60):
            value = thread * 1000 + i
            handed_on.put((_tensor_unchecked(1 + i % 4, value), value))

    def check() -> None:
        while (item := handed_on.get()) is not None:
            tensor, value = item
            if not (tensor == value).all():
                wrong.append(value)
            del item, tensor

    makers = [threading.Thread(target=make, args=(i,)) for i in range(4)]
    checkers = [threading.Thread(target=check) for _ in range(4)]
    for thread in makers + checkers:
        thread.start()
    for thread in makers:
        thread.join()
    for _ in checkers:
        handed_on.put(None)
    for thread in checkers:
        thread.join()
    assert not wrong
    stats = memory.stats()
    assert _in_use() == 0
    assert stats.idle_bytes <= 24 * MIB
    assert stats.hits > 0


def _tensor_unchecked(mib: int, value: float) -> torch.Tensor:
    return _C.new_output(torch.empty(mib * MIB // 4)).fill_(value)


# ---- Giving back -----------------------------------------------------------------------------------------------------


def test_the_limit_is_kept_and_the_oldest_goes_first():
    a, b, c = _tensor(4), _tensor(8), _tensor(16)
    memory.set_limit(24 * MIB)
    del a, b
    assert memory.stats().idle_bytes == 12 * MIB
    del c
    assert memory.stats().idle_bytes == 24 * MIB
    misses = memory.stats().misses
    kept = [_tensor(8), _tensor(16)]
    assert memory.stats().misses == misses
    _tensor(4)
    assert memory.stats().misses == misses + 1
    del kept
    memory.set_limit(20 * MIB)  # at once
    assert memory.stats().idle_bytes <= 20 * MIB


def test_a_buffer_above_the_limit_drives_no_other_out():
    small, large = _tensor(4), _tensor(16)
    memory.set_limit(8 * MIB)
    del small, large
    assert memory.stats().idle_bytes == 4 * MIB


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="not run: no /proc here")
@pytest.mark.parametrize("give_back", [memory.empty_cache, lambda: memory.set_limit(0)], ids=["empty", "limit"])
def test_memory_really_goes_back_to_the_system(give_back):
    def resident() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

    _tensor(128, value=1.0)
    before = resident()
    give_back()
    assert before - resident() > 100 * MIB


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="not run: no /proc here")
def test_idle_memory_is_given_back_before_an_allocation_fails():
    code = """
        import resource
        memory.set_limit(1 << 40)
        large, less_large = torch.empty(100 << 18), torch.empty(75 << 18)
        _C.new_output(large)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (50 << 20), -1))
        y = _C.new_output(less_large)
        stats = memory.stats()
        assert (stats.in_use_bytes, stats.idle_bytes, stats.misses) == (75 << 20, 0, 2), stats
        try:
            _C.new_output(large)
        except RuntimeError as error:
            assert "allocate memory" in str(error), error
        else:
            raise AssertionError("memory out of nothing")
    """
    done = _run(code)
    assert done.returncode == 0, done.stderr


def test_without_the_extension_there_is_no_pool(monkeypatch):
    monkeypatch.setattr(memory, "_C", None)
    memory.set_limit(5)
    memory.empty_cache()
    assert memory.stats() == memory.MemoryStats(0, 0, 0, 0, 0, 0)


# ---- The process -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not run: no fork here")
def test_after_fork_neither_sees_what_the_other_writes():
    code = """
        def tensor(value):
            return _C.new_output(torch.empty(1 << 20)).fill_(value)

        live, idle = tensor(1.0), tensor(2.0)
        idle_address = idle.data_ptr()
        del idle
        to_child, from_parent = os.pipe()
        to_parent, from_child = os.pipe()

        def check(name):
            assert memory.stats().in_use_bytes == 4 << 20, name
            mine = tensor(10.0 if name == "child" else 20.0)
            live.fill_(mine[0])
            os.write(from_child if name == "child" else from_parent, b"x")  # the other has written as well
            os.read(to_child if name == "child" else to_parent, 1)
            assert (mine == mine[0]).all() and (live == mine[0]).all(), name
            return mine

        child = os.fork()
        if child == 0:
            try:
                assert memory.stats().idle_bytes == 0
                mine = check("child")
                del mine
                assert memory.stats().idle_bytes == 4 << 20
                live = None
                memory.empty_cache()
            except BaseException as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        assert memory.stats().idle_bytes == 4 << 20
        mine = check("parent")
        assert mine.data_ptr() == idle_address
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = os.fork()  # what was idle at the first fork is inherited like any memory now
        if child == 0:
            os._exit(0 if (mine == 20).all() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    done = _run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not run: what is shared is Linux's to tell")
def test_a_fork_does_not_cost_the_parent_its_idle_pages():
    """Shared with a child, they would be copied page by page at the next write."""
    code = """
        import resource
        like = torch.empty(8 << 20)
        _C.new_output(like).fill_(1.0)
        until_closed, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(until_closed, 1)
            os._exit(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _C.new_output(like).fill_(2.0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        os.close(end)
        os.waitpid(child, 0)
    """
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8192 / 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not run: no fork here")
def test_forks_while_other_threads_use_the_pool():
    code = """
        import threading
        stop = threading.Event()
        like = torch.empty(1 << 18)

        def work():
            while not stop.is_set():
                _C.new_output(like)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            child = os.fork()
            if child == 0:
                y = _C.new_output(like).fill_(3.0)
                os._exit(0 if (y == 3).all() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
    """
    done = _run(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_tensors_may_live_until_the_interpreter_ends():
    code = """
        import atexit, builtins, threading
        like = torch.empty(1 << 20)
        builtins.kept = _C.new_output(like)
        torch.kept_as_well = _C.new_output(like).numpy()
        idle = _C.new_output(like)
        del idle
        atexit.register(lambda y=_C.new_output(like): y.fill_(1.0))
        filled = threading.Event()

        def hold(y):  # and wait: in the midst of an operation of torch the end of the interpreter aborts the process
            y.fill_(2.0)
            filled.set()
            threading.Event().wait()

        threading.Thread(target=hold, args=(_C.new_output(like),), daemon=True).start()
        filled.wait()
        layer = vgkern.nn.BatchNormAct2d(16)
        graph = layer(torch.randn(8, 16, 64, 64, requires_grad=True))
    """
    done = _run(code)
    assert (done.returncode, done.stderr) == (0, "")


# ---- The limit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("67108864", 64 * MIB), ("64M", 64 * MIB), ("3k", 3 << 10), (" 2G ", 2 << 30), ("0", 0), ("", None), (None, None)],
)
def test_the_environment_sets_the_limit(text, wanted, monkeypatch):
    monkeypatch.delenv("VGKERN_MEMORY_LIMIT", raising=False)
    if text is not None:
        monkeypatch.setenv("VGKERN_MEMORY_LIMIT", text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory._set_limit_from_environment()
    assert memory.limit() == (memory._default_limit() if wanted is None else wanted)


@pytest.mark.parametrize("text", ["lots", "-1", "1.5G", "4GB"])
def test_a_bad_limit_warns_and_the_default_holds(text, monkeypatch):
    monkeypatch.setenv("VGKERN_MEMORY_LIMIT", text)
    with pytest.warns(
        RuntimeWarning, match=f"VGKERN_MEMORY_LIMIT: expected .* got '{text}'; the default, [0-9]+ bytes"
    ):
        memory._set_limit_from_environment()
    assert memory.limit() == memory._default_limit() > 0


def test_zero_turns_the_pool_off():
    code = """
        layer = vgkern.nn.BatchNormAct2d(16)
        layer(torch.randn(8, 16, 64, 64, requires_grad=True)).sum().backward()
        print(memory.stats() == memory.MemoryStats(0, 0, 0, 0, 0, 0))
    """
    done = _run(code, VGKERN_MEMORY_LIMIT="0")
    assert done.stdout.strip() == "True", done.stderr


def test_set_limit_takes_numbers_of_bytes():
    memory.set_limit(5)
    assert memory.limit() == 5
    memory.set_limit(1 << 100)
    assert memory.limit() == sys.maxsize
    with pytest.raises(ValueError, match="got -1"):
        memory.set_limit(-1)
    with pytest.raises(TypeError):
        memory.set_limit("1G")
    assert memory.limit() == sys.maxsize


def test_the_default_is_a_share_of_what_the_process_may_use(tmp_path, monkeypatch):
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "_control_group_limits", list)
    assert memory._default_limit() == installed // 8
    monkeypatch.setattr(memory, "_control_group_limits", lambda: [1 << 62, 1 << 28])
    assert memory._default_limit() == 1 << 25


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "300\n", "a/memory.max": "200\n", "memory.max": "max\n"}, [300, 200]),
        ("0::/\n", {"memory.max": "100\n"}, [100]),
        ("0::/../c\n", {"memory.max": "max\n"}, []),
        ("3:cpu,memory:/a\n1:cpu:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "70\n"}, [70]),
        ("4:memory:/outside\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, [9223372036854771712]),
        (None, {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path, groups, files, wanted):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    if groups is not None:
        proc.write_text(groups)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert memory._control_group_limits(proc, root) == wanted


def test_info_shows_its_use(capsys):
    y, idle = _tensor(4), _tensor(8)
    del idle
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "1024 MiB" in out
    assert f"{memory.stats().in_use_bytes // MIB} MiB in use" in out
    assert "8 MiB idle" in out
    assert cli.main(["info", "--json"]) == 0
    pool = json.loads(capsys.readouterr().out)["memory"]
    assert (pool["in_use_bytes"], pool["idle_bytes"]) == (_used_by_others + y.nbytes, 8 * MIB)
    assert pool["limit_bytes"] == 1 << 30
    memory.set_limit(0)
    assert cli.main(["info"]) == 0
    assert "the pool is off" in capsys.readouterr().out
