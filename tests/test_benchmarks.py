"""The benchmarks' own code: it must not fail, or flatter, on the day it is needed."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import os
import types

import pytest
import torch

import vgkern
from benchmarks import (
    clip,
    competitors,
    environment,
    figure,
    floor,
    libraries,
    micro,
    monitor,
    peak_memory,
    report,
    resnet50,
    tcmalloc,
    timing,
)  # fmt: skip
from benchmarks.__main__ import main
from benchmarks.competitors import VARIANTS, Contest, measure
from benchmarks.floor import Roof, floor_bytes
from benchmarks.model import NETS, convolutions_only
from benchmarks.report import Result
from benchmarks.shapes import SETS, Configuration, Site, configurations, resnet50_sites
from benchmarks.timing import Timing, geometric_mean, interleave

TINY = (2, 3, 4, 5)


@pytest.fixture
def benchmarks(monkeypatch):
    """``python -m benchmarks ...`` in this process, with a roof that takes no time to measure."""
    monkeypatch.setattr(floor, "ROOF_SIZES", (2**16, 2**17))

    def command(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, arguments)])
        return main()

    return command


def rows_of(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def result(configuration: Configuration, **milliseconds: tuple[float, float]) -> Result:
    """{variant: (forward, backward)}, each the same in three rounds."""
    timings = {
        direction: {name: Timing((pair[place] / 1e3,) * 3) for name, pair in milliseconds.items()}
        for place, direction in enumerate(report.DIRECTIONS)
    }
    return Result(configuration, timings)


# ---- timing --------------------------------------------------------------------------------------------------------


def test_variants_run_in_turn_and_warmup_is_not_counted():
    calls = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert len(timings["a"].seconds) == 3


def test_what_a_variant_returns_is_freed_outside_the_clock(monkeypatch):
    now = 0.0

    class Output:
        def __del__(self):
            nonlocal now
            now += 100.0

    def run():
        nonlocal now
        now += 1.0
        return Output()

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert interleave({"a": run}, rounds=3, warmup=1)["a"].seconds == (1.0, 1.0, 1.0)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU's clock without one: events that read a counter, which calls and flushes move. Yields what happened."""
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = now[0]
            now[0] += 1.0  # a millisecond, which is measured with the call

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    class Rest:
        def zero_(self):
            log.append("flush")
            now[0] += 1000.0

    def call(name, milliseconds):
        log.append(name)
        now[0] += milliseconds
        return name

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "device", contextlib.nullcontext)
    empty = torch.empty
    monkeypatch.setattr(timing.torch, "empty", lambda *a, **k: Rest() if a == (2**29,) else empty(*a, **k))
    return log, call


def test_on_a_gpu_its_own_time_is_taken_and_the_cache_flushed_before(fake_gpu):
    log, call = fake_gpu
    variants = {name: functools.partial(call, name, time) for name, time in (("a", 2.0), ("b", 3.0))}
    timings = interleave(variants, rounds=2, warmup=1, device="cuda")
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": (3e-3,) * 2, "b": (4e-3,) * 2}
    turn = [step for name in "ab" for step in ("flush", "record", name, "record", "synchronize")]
    assert log == turn * 3


def test_a_gpu_s_roof_is_what_a_copy_reaches(fake_gpu, monkeypatch):
    _, call = fake_gpu
    monkeypatch.setattr(timing, "clock_of", timing.gpu_clock)
    monkeypatch.setattr(floor, "ROOF_SIZES", (2**10, 2**20))
    copy = torch.Tensor.copy_

    def timed(self, source):
        call("copy", 4.0)
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", timed)
    assert floor.measure_copies("cpu").points == tuple((size, size / 5e-3) for size in floor.ROOF_SIZES)


def test_micro_runs_by_a_gpu_s_clock(fake_gpu, benchmarks, tmp_path, monkeypatch):
    log, _ = fake_gpu
    monkeypatch.setattr(timing, "clock_of", timing.gpu_clock)
    monkeypatch.setattr(floor, "measure_roof", floor.measure_copies)
    command = ("micro", "custom", "2,3,4,5", "--competitors", "eager", "--rounds", 2, "--out", tmp_path)
    assert benchmarks(*command) == 0
    # Two passes of vgkern, eager and the two triads, in 5 rounds; and the roof, twice.
    assert log.count("flush") == log.count("synchronize") == 2 * 4 * 5 + 2 * 2 * 10
    (forward, backward) = rows_of(tmp_path / "micro.csv")
    assert float(forward["vgkern_ms"]) == float(backward["eager_ms"]) == 1.0


def test_speedup_is_taken_round_by_round():
    fast, slow = Timing((1.0, 10.0, 2.0)), Timing((2.0, 20.0, 4.0))
    assert fast.speedup_over(slow) == 2.0
    assert fast.median == 2.0
    assert (fast + slow).seconds == (3.0, 30.0, 6.0)
    with pytest.raises(ValueError, match="zip"):
        fast.speedup_over(Timing((1.0,)))


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


# ---- shapes --------------------------------------------------------------------------------------------------------


def test_the_resnet50_set_is_every_batch_norm_of_the_model():
    """Against what a model, run at a small size, hands to its batch norms."""
    seen: collections.Counter = collections.Counter()
    net = NETS["vgkern"]()
    for module in net.modules():
        if isinstance(module, vgkern.nn.BatchNormAct2d):

            def see(layer, arguments):
                x, *residual = arguments
                seen[tuple(x.shape), bool(residual), layer.activation.name != "identity"] += 1

            module.register_forward_pre_hook(see)
    with torch.no_grad():
        net(torch.randn(2, 3, 64, 64))
    sites = {(site.shape, site.residual, site.activated): site.count for site in resnet50_sites(2, 64)}
    assert sites == seen
    assert sum(sites.values()) == 53


def test_the_resnet50_set_at_its_full_size():
    sites = {(site.shape, site.residual, site.activated): site.count for site in SETS["resnet50"]}
    assert sum(sites.values()) == 53
    assert sites[(32, 64, 112, 112), False, True] == 1
    assert sites[(32, 64, 56, 56), False, True] == 6
    assert sites[(32, 256, 56, 56), True, True] == 3
    assert sites[(32, 128, 56, 56), False, True] == 1
    assert sites[(32, 256, 14, 14), False, True] == 11
    assert sites[(32, 2048, 7, 7), False, False] == 1
    assert sum(count for (_, residual, _), count in sites.items() if residual) == 16


def test_configurations_are_all_combinations():
    sites = [Site((2, 3, 4, 5)), Site((2, 6, 4, 5), residual=False, activated=False, count=7)]
    made = list(configurations(sites, ["float32", "bfloat16"], ["contiguous"], ["gelu"]))
    assert made == [
        Configuration((2, 3, 4, 5), "float32", "contiguous", "gelu", True, True, 1, "gelu"),
        Configuration((2, 6, 4, 5), "float32", "contiguous", "identity", False, True, 7, "gelu"),
        Configuration((2, 3, 4, 5), "bfloat16", "contiguous", "gelu", True, True, 1, "gelu"),
        Configuration((2, 6, 4, 5), "bfloat16", "contiguous", "identity", False, True, 7, "gelu"),
    ]
    alone = configurations(sites, ["float32"], ["contiguous"], ["relu"], residual=False, training=False)
    assert [(each.residual, each.training) for each in alone] == [(False, False)] * 2


# ---- floor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "residual", "dtype", "layout", "forward", "backward"),
    [
        # u is 2·3·4·5 = 120 elements. A mask has a byte for 8 of the 20 of a plane, or of the 3 channels of a row.
        ("relu", True, "float32", "contiguous", 3 * 480 + 6 * 3, 4 * 480 + 6 * 3),
        ("relu", True, "bfloat16", "contiguous", 3 * 240 + 6 * 3, 4 * 240 + 6 * 3),
        ("relu", True, "float32", "channels_last", 3 * 480 + 40 * 1, 4 * 480 + 40 * 1),
        ("relu", False, "float32", "contiguous", 2 * 480, 3 * 480),
        ("gelu", True, "float32", "contiguous", 3 * 480, 5 * 480),
        ("gelu", False, "float64", "channels_last", 2 * 960, 3 * 960),
        ("identity", True, "float32", "contiguous", 3 * 480, 4 * 480),
        ("identity", False, "float16", "contiguous", 2 * 240, 3 * 240),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_floor_counts_what_must_move(activation, residual, dtype, layout, forward, backward, training):
    configuration = Configuration(TINY, dtype, layout, activation, residual, training)
    assert floor_bytes("forward", configuration) == forward
    assert floor_bytes("backward", configuration) == backward


def test_the_floor_counts_the_mask_that_the_operator_writes():
    configuration = Configuration(TINY)
    contest = Contest(configuration)
    _, _, mask = vgkern.ops.batch_norm_act_forward(
        contest.x, contest.residual, None, None, None, None, None, True, 1e-5, "relu", [], True
    )
    assert floor_bytes("forward", configuration) == 3 * contest.x.nbytes + mask.nbytes


def test_the_roof_lies_on_its_points_and_between_them():
    roof = Roof(((100, 8.0), (400, 2.0), (800, 1.0)))
    assert [roof.at(size) for size in (1, 100, 400, 800, 10**6)] == pytest.approx([8, 8, 2, 1, 1])
    assert roof.at(200) == pytest.approx(4.0)
    assert roof.seconds(200) == pytest.approx(50.0)
    assert roof.best_of(Roof(((100, 1.0), (400, 3.0), (800, 1.0)))) == Roof(((100, 8.0), (400, 3.0), (800, 1.0)))


def test_the_bandwidth_of_this_machine_is_measured():
    _C = pytest.importorskip("vgkern._C")
    for streaming in (False, True):
        # From a floppy disk's to that of no machine there is: a wrong unit does not pass.
        assert 1e6 < _C.Triad(2**22, 2).bandwidth(streaming) < 1e14
    assert _C.Triad(192, 1).bandwidth(False) > 0
    for bad in ((191, 1), (2**20, 0)):
        with pytest.raises(ValueError, match="expected at least"):
            _C.Triad(*bad)
    with pytest.raises(MemoryError):
        _C.Triad(2**60, 1)


def test_the_floor_is_timed_beside_the_layer():
    contest = Contest(Configuration((8, 64, 28, 28)))
    timings = measure(contest, [], 3)
    for direction in report.DIRECTIONS:
        assert {"vgkern", *floor.FLOOR_VARIANTS} <= set(timings[direction])
    # The triad moves as many bytes as the layer and computes next to nothing.
    fastest = min(timings["forward"][name].median for name in floor.FLOOR_VARIANTS)
    assert 0 < fastest < 3 * timings["forward"]["vgkern"].median


def test_a_hot_call_follows_calls_of_its_own(monkeypatch):
    calls, now = [], [0.0]

    def call(name: str) -> None:
        calls.append(name)
        now[0] += 4e-3

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])
    variants = {name: functools.partial(call, name) for name in ("a", "b")}
    timings = interleave(variants, rounds=2, warmup=0, hot=True)
    assert calls == ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["b"] * 4  # three in ten milliseconds, then the timed one
    assert timings["a"].seconds == pytest.approx((4e-3, 4e-3))


def test_no_roof_where_there_is_no_probe():
    assert floor.measure_roof("meta") is None


# ---- competitors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["leaky_relu", "prelu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_all_variants_compute_the_same_function(activation, training, monkeypatch):
    configuration = Configuration((4, 3, 4, 5), "float64", "channels_last", activation, True, training)
    monkeypatch.setattr(competitors, "COMPILER", "aot_eager")  # the C++ compiler would take the time of all other tests
    contest = Contest(configuration)
    variants = contest.variants(["eager", "compile"])
    assert list(variants) == ["vgkern", "eager", "compile"]
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = {name: variant.forward() for name, variant in variants.items()}
        gradients = {name: variant.backward(contest.dy)() for name, variant in variants.items()}
    torch._dynamo.reset()
    parameters = 5 if activation == "prelu" else 4
    for name in ("eager", "compile"):
        torch.testing.assert_close(outputs[name], outputs["vgkern"])
        assert len(gradients[name]) == parameters
        torch.testing.assert_close(gradients[name], gradients["vgkern"][:parameters])
    # The gradient of the record comes with vgkern's: recording is part of what is timed.
    (record,) = gradients["vgkern"][parameters:]
    assert record[vgkern.ops.RECORD_FIELDS.index("backwards")] == 1


def test_measuring_times_every_variant_in_both_directions(monkeypatch):
    monkeypatch.setattr(competitors, "COMPILER", "aot_eager")
    contest = Contest(Configuration(TINY))
    timings = measure(contest, ["eager", "compile"], 2, compare_record=True)
    for direction in report.DIRECTIONS:
        expected = {"vgkern", "eager", "compile", "recorded", "unrecorded", *floor.FLOOR_VARIANTS}
        assert set(timings[direction]) == expected
        assert all(len(timing.seconds) == 2 for timing in timings[direction].values())
    assert len(contest.recording()["recorded"].leaves) == len(contest.recording()["unrecorded"].leaves) + 1


class _Stub(torch.nn.BatchNorm2d):
    """The three libraries' layers, as far as ``benchmarks.libraries`` calls them."""

    def __init__(self, channels, fuse_relu=None, activation=None, activation_param=None, act_func=None, device=None):
        super().__init__(channels)
        self.activation, self.rows = activation or act_func or "relu", fuse_relu is not None

    def forward(self, x, residual=None):
        if self.rows:
            x, residual = (None if t is None else t.permute(0, 3, 1, 2) for t in (x, residual))
        y = super().forward(x)
        y = getattr(torch.nn.functional, self.activation)(y if residual is None else y + residual)
        return y.permute(0, 2, 3, 1) if self.rows else y


LIBRARY_CASES = [
    ("apex", "apex.contrib.groupbn", "BatchNorm2d_NHWC", Configuration(TINY, "float16", "channels_last", "relu")),
    ("inplace_abn", "inplace_abn", "InPlaceABN", Configuration(TINY, "float32", "contiguous", "leaky_relu", False)),
    ("attorch", "attorch", "BatchNorm2d", Configuration(TINY, "float32", "contiguous", "relu")),
]


@pytest.mark.parametrize(("name", "module", "kind", "configuration"), LIBRARY_CASES, ids=lambda value: str(value)[:12])
def test_a_library_that_is_installed_is_timed_where_it_fits(name, module, kind, configuration, monkeypatch):
    contest = Contest(configuration)
    assert list(contest.variants([name])) == ["vgkern"]  # on the CPU
    contest.device = "cuda"
    with monkeypatch.context() as absent:
        absent.setattr(libraries.importlib.util, "find_spec", lambda top: None)
        assert list(contest.variants([name])) == ["vgkern"]
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda top: top)
    monkeypatch.setattr(libraries.importlib, "import_module", {module: types.SimpleNamespace(**{kind: _Stub})}.get)
    variants = contest.variants([name])
    assert list(variants) == ["vgkern", name]
    outputs = [variants[which].forward() for which in ("vgkern", name)]
    torch.testing.assert_close(*outputs, check_dtype=False, rtol=1e-2, atol=1e-2)
    gradients = [variants[which].backward(contest.dy)() for which in ("vgkern", name)]
    for ours, theirs in zip(*gradients, strict=False):
        torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=2e-2, atol=2e-2)
    contest.configuration = dataclasses.replace(configuration, activation="mish")
    assert list(contest.variants([name])) == ["vgkern"]


def test_recording_can_be_off():
    contest = Contest(Configuration(TINY), record=False)
    assert len(contest.variants([])["vgkern"].leaves) == 4


def test_the_compiler_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    with competitors.compiler_cache():
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


# ---- tcmalloc ------------------------------------------------------------------------------------------------------


def test_a_library_that_cannot_be_loaded_is_an_error_and_not_a_measurement():
    with pytest.raises(tcmalloc.WorkerError, match=r"did not take libnosuch\.so"):
        tcmalloc.Worker("libnosuch.so", threads=1, rounds=2, device="cpu", record=True, hot=False)


def test_the_child_runs_under_tcmalloc_and_answers():
    library = tcmalloc.find_library()
    if library is None:
        pytest.skip(f"not run: {tcmalloc.MISSING}")
    with tcmalloc.Worker(library, threads=1, rounds=2, device="cpu", record=True, hot=False) as worker:
        for shape in (TINY, (3, 4, 5, 6)):
            timings = worker.measure(Configuration(shape))
            assert set(timings) == set(report.DIRECTIONS)
            for variants in timings.values():
                assert set(variants) == {"vgkern_tcmalloc", "eager_tcmalloc"}
                assert all(len(timing.seconds) == 2 for timing in variants.values())
        with pytest.raises(tcmalloc.WorkerError, match="ended with status 1"):
            worker.measure(Configuration((1, 1, 1, 1)))  # which batch norm refuses


def test_without_tcmalloc_it_says_how_to_install_it(benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tcmalloc, "find_library", lambda: None)
    assert benchmarks("micro", "custom", "2,3,4,5", "--rounds", 2, "--competitors", "tcmalloc", "--out", tmp_path) == 0
    assert "apt-get install libtcmalloc-minimal4" in capsys.readouterr().err
    assert [row["eager_tcmalloc_ms"] for row in rows_of(tmp_path / "micro.csv")] == ["", ""]


def test_a_child_that_fails_is_reported(benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tcmalloc, "find_library", lambda: "libnosuch.so")
    assert benchmarks("micro", "custom", "2,3,4,5", "--rounds", 2, "--competitors", "tcmalloc", "--out", tmp_path) == 0
    assert "eager is not measured under tcmalloc: the loader did not take libnosuch.so" in capsys.readouterr().err


def test_a_child_that_dies_ends_its_column_and_not_the_run(benchmarks, tmp_path, monkeypatch, capsys):
    class Dying(tcmalloc.Worker):
        def __init__(self, *_, **__): ...

        def close(self): ...

        def measure(self, configuration):
            raise tcmalloc.WorkerError("it ended")

    monkeypatch.setattr(tcmalloc, "find_library", lambda: "libanything.so")
    monkeypatch.setattr(tcmalloc, "Worker", Dying)
    arguments = ["--rounds", 2, "--competitors", "eager", "tcmalloc", "--out", tmp_path]
    assert benchmarks("micro", "custom", "2,3,4,5", "3,3,4,5", *arguments) == 0
    assert capsys.readouterr().err.count("eager is not measured under tcmalloc: it ended") == 1
    rows = rows_of(tmp_path / "micro.csv")
    assert [row["eager_tcmalloc_ms"] for row in rows] == [""] * 4
    assert all(row["eager_ms"] for row in rows)


def test_the_child_serves_a_line_at_a_time(tmp_path):
    """What the child does, here: settings, then configurations as JSON."""
    questions, answers = tmp_path / "questions", tmp_path / "answers"
    threads = torch.get_num_threads()
    settings = {"threads": threads, "rounds": 2, "device": "cpu", "record": True, "hot": False}
    asked = {"shape": TINY, "dtype": "float64", "activation": "silu"}
    questions.write_text("\n".join(map(json.dumps, (settings, asked))) + "\n")
    with questions.open() as source, answers.open("w") as target:
        tcmalloc.serve(source, target)
    hello, answer = map(json.loads, answers.read_text().splitlines())
    assert hello == {"preloaded": False}
    assert {name: len(seconds) for name, seconds in answer["backward"].items()} == {"vgkern": 2, "eager": 2}


# ---- report --------------------------------------------------------------------------------------------------------

ROOF = Roof(((1, 1e9), (2, 1e9)))  # 1 GB/s whatever the size: 1 byte is 1 ns
RELU = Configuration(TINY, count=3)
SHORTCUT = Configuration(TINY, activation="identity", residual=False, count=1)
RESULTS = [
    result(RELU, vgkern=(2.0, 4.0), eager=(8.0, 4.0), vgkern_tcmalloc=(1.0, 2.0), eager_tcmalloc=(3.0, 8.0),
           recorded=(1.0, 1.1), unrecorded=(1.0, 1.0)),
    result(SHORTCUT, vgkern=(1.0, 1.0), eager=(1.0, 0.5), vgkern_tcmalloc=(1.0, 1.0), eager_tcmalloc=(1.0, 1.0),
           recorded=(1.0, 0.9), unrecorded=(1.0, 1.0)),
]  # fmt: skip


def test_a_row_has_all_columns_whatever_was_measured():
    described = {"device": "cpu", "date": "today"}
    full = report.rows(RESULTS, ROOF, record="compare", environment=described)
    bare = report.rows([result(RELU, vgkern=(2.0, 4.0))], None, record="on", environment=described)
    assert {tuple(row) for row in full + bare} == {(*report.COLUMNS, "device", "date")}
    assert {f"{variant}_ms" for variant in VARIANTS} < set(report.COLUMNS)
    forward, backward, *_ = full
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    assert forward["shape"] == "2x3x4x5"
    assert forward["count"] == 3
    assert forward["speedup_eager"] == pytest.approx(4.0)
    assert forward["speedup_tcmalloc"] == pytest.approx(3.0)
    assert forward["speedup_compile"] == forward["compile_ms"] == ""
    assert backward["recording_cost"] == pytest.approx(0.1)
    assert forward["floor_bytes"] == 3 * 480 + 18
    assert forward["floor_ms"] == pytest.approx(1458e-6)
    assert forward["floor_share"] == pytest.approx(1458e-6 / 2.0)
    assert bare[0]["floor_ms"] == bare[0]["speedup_eager"] == ""


def test_the_total_of_a_step_counts_each_layer_as_often_as_it_occurs():
    assert report.step_totals(RESULTS, "forward")["vgkern"] == pytest.approx(3 * 2e-3 + 1e-3)
    assert report.step_totals(RESULTS, "backward")["eager"] == pytest.approx(3 * 4e-3 + 0.5e-3)
    assert report.step_totals(RESULTS, "forward + backward")["eager"] == pytest.approx(3 * 12e-3 + 1.5e-3)


def printed(results, roof) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for table in report.tables(results, roof):
        console.print(table)
    return console.export_text()


def test_the_table_shows_times_ratios_shares_and_totals():
    lines = [" ".join(line.split()) for line in printed(RESULTS, ROOF).splitlines()]
    assert "2x3x4x5 3 relu + r forward 2.00 0% 8.00 4.00x 3.00 3.00x +0.0%" in lines
    assert "2x3x4x5 3 relu + r backward 4.00 0% 4.00 1.00x 8.00 4.00x +10.0%" in lines
    assert "2x3x4x5 1 identity backward 1.00 0% 0.500 0.50x 1.00 1.00x -10.0%" in lines
    assert "a step 4 forward 7.00 25.00 3.57x 10.00 2.50x" in lines
    assert "a step 4 forward + backward 20.00 37.50 1.88x 35.00 3.18x" in lines


def test_a_set_without_counts_has_no_total_and_a_group_its_own_table():
    once = Configuration(TINY)
    other = Configuration(TINY, dtype="bfloat16", layout="channels_last", net_activation="gelu")
    text = printed([result(once, vgkern=(1.0, 1.0)), result(other, vgkern=(1.0, 1.0))], None)
    assert "a step" not in text
    assert "floor" not in text
    assert "float32, contiguous, relu" in text
    assert "bfloat16, channels_last, gelu" in text


def test_conclusions_are_geometric_means_and_the_worst():
    lines = report.conclusions(RESULTS, ROOF)
    where = "2x3x4x5 float32 contiguous, identity"
    assert f"eager, forward: geometric mean 2.00x, lowest 1.00x ({where}), 2 configurations" in lines
    assert f"eager, backward: geometric mean {math.sqrt(0.5):.2f}x, lowest 0.50x ({where}), 2 configurations" in lines
    both = math.sqrt(2.0 * 0.75)
    assert f"eager, forward + backward: geometric mean {both:.2f}x, lowest 0.75x ({where}), 2 configurations" in lines
    assert sum(line.startswith("eager, tcmalloc, ") for line in lines) == 3
    assert not any(line.startswith("torch.compile") for line in lines)
    assert f"gradient record, backward: {math.sqrt(1.1 * 0.9) - 1:+.1%} in the geometric mean, at most +10.0%" in lines
    assert any(line.startswith("floor, backward: 0% of it in the geometric mean") for line in lines)


@pytest.mark.parametrize("roof", [ROOF, None])
def test_the_figure_is_drawn(roof, tmp_path):
    rows = [Configuration(TINY), Configuration((8, 8, 8, 8), layout="channels_last")]
    results = [result(each, vgkern=(1.0, 2.0), eager=(3.0, 4.0), compile=(5.0, 6.0)) for each in rows]
    drawn = figure.draw(results, roof, "on this machine")
    assert [ax.get_title("left") for ax in drawn.axes] == ["forward", "backward"]
    for ax in drawn.axes:
        assert len(ax.collections) == 3 * 2  # three variants, filled and hollow
        assert len(ax.lines) == (roof is not None)
    size = floor_bytes("forward", rows[0])
    assert drawn.axes[0].collections[0].get_offsets()[0].tolist() == pytest.approx([size, size / 1e-3 / 1e9])
    figure.save(results, roof, "on this machine", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_says_what_was_measured_on():
    described = environment.describe("cpu")
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["device_name"]
    assert described["backend"] == vgkern.backends.name_of("cpu")
    assert described["torch"] in environment.summary(described)


# ---- commands ------------------------------------------------------------------------------------------------------


def test_micro_writes_rows_and_a_figure_and_concludes(benchmarks, tmp_path, capsys):
    arguments = ["--rounds", 3, "--activation", "relu", "gelu", "--competitors", "eager", "--record", "compare"]
    assert benchmarks("micro", "custom", "2,3,4,5", *arguments, "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "micro.csv")
    assert [(row["activation"], row["pass"]) for row in rows] == [
        ("relu", "forward"),
        ("relu", "backward"),
        ("gelu", "forward"),
        ("gelu", "backward"),
    ]
    for row in rows:
        assert row["shape"] == "2x3x4x5"
        assert row["torch"] == torch.__version__
        assert row["rounds"] == "3"
        assert float(row["vgkern_q1_ms"]) <= float(row["vgkern_ms"]) <= float(row["vgkern_q3_ms"])
        assert float(row["speedup_eager"]) > 0
        assert float(row["floor_share"]) > 0
        assert row["recording_cost"]
    assert (tmp_path / "micro.png").stat().st_size > 10_000
    captured = capsys.readouterr()
    assert "geometric mean" in captured.out
    assert "2x3x4x5 float32 contiguous, gelu + residual: timing" in captured.err


def test_what_is_wrong_is_not_timed(benchmarks, tmp_path, monkeypatch, capsys):
    plain = vgkern.backends.reference.batch_norm_act_forward

    def wrong(*args):
        y, statistics, mask = plain(*args)
        return y + 1e-3, statistics, mask

    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_forward", wrong)
    monkeypatch.setattr(micro, "measure", lambda *args, **kwargs: pytest.fail("it was timed"))
    with vgkern.backends.use("reference"):
        assert benchmarks("micro", "custom", "2,3,4,5", "--competitors", "eager", "--out", tmp_path) == 1
    captured = capsys.readouterr()
    assert "2x3x4x5 float32 contiguous, relu + residual is wrong and is not timed" in captured.err
    assert "forward" not in captured.out
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_is_done(benchmarks, tmp_path, monkeypatch):
    def interrupted(contest, *args, **kwargs):
        if contest.configuration.shape != TINY:
            raise KeyboardInterrupt
        return measure(contest, *args, **kwargs)

    monkeypatch.setattr(micro, "measure", interrupted)
    arguments = ["--rounds", 2, "--competitors", "eager", "--out", tmp_path]
    assert benchmarks("micro", "custom", "2,3,4,5", "3,3,4,5", *arguments) == 130
    assert [row["shape"] for row in rows_of(tmp_path / "micro.csv")] == ["2x3x4x5"] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("micro", "custom"),
        ("micro", "custom", "2,3,4"),
        ("micro", "custom", "2,3,4,0"),
        ("micro", "small", "2,3,4,5"),
        ("micro", "--rounds", "1"),
        ("monitor", "--depth", "9"),
        ("resnet50", "--size", "100"),
        ("resnet50", "--rounds", "1"),
        ("nothing",),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, benchmarks, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks(*arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), ("micro",), ("resnet50",), ("clip",), ("monitor",)])
def test_help(command, benchmarks, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks(*command, "--help")
    assert stopped.value.code == 0
    assert "usage: python -m benchmarks" in capsys.readouterr().out


def test_what_is_missing_is_named(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.NEEDS", ("rich", "nosuchmodule"))
    assert benchmarks("micro") == 2
    assert "they need nosuchmodule" in capsys.readouterr().err


# ---- resnet50 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets():
    return resnet50.make_nets(torch.float32, "channels_last", "cpu")


def test_the_model_is_a_resnet50(nets):
    parameters = sum(parameter.numel() for parameter in nets["torch.nn"].parameters())
    assert parameters == 25_557_032  # torchvision's
    names = list(nets["torch.nn"].state_dict())
    assert names == list(nets["vgkern"].state_dict())
    assert {"layer1.0.downsample.1.running_mean", "layer4.2.bn3.weight", "fc.bias"} < set(names)


def test_the_nets_are_one_function_and_a_wrong_one_is_found(nets, monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(1000, (4,))
    before = {name: value.clone() for name, value in nets["vgkern"].state_dict().items()}
    found = resnet50.errors(nets, images, labels)
    assert set(found) == {"vgkern", "torch.nn", "vgkern, float64"}
    assert resnet50.is_right(found)
    assert all(torch.equal(value, before[name]) for name, value in nets["vgkern"].state_dict().items())
    assert not resnet50.is_right(found | {"vgkern": {"logits": math.nan, "gradients": 0.0}})
    assert not resnet50.is_right(found | {"vgkern, float64": {"logits": 0.0, "gradients": 1e-3}})


def test_what_remains_without_norms_is_every_convolution(nets):
    plain = convolutions_only(nets["torch.nn"])
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))
    resnet50.make_step(plain, images, labels)()
    weights = [module.weight for module in plain.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(weights) == 53
    assert all(weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any() for weight in weights)
    original = [module.weight for module in nets["torch.nn"].modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(torch.equal(a, b) for a, b in zip(weights, original, strict=True))


def test_a_step_starts_without_gradients():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    step = resnet50.make_step(net, torch.randn(2, 3, 2, 2), torch.tensor([0, 3]))
    step()
    once = net[1].weight.grad.clone()
    step()
    assert torch.equal(net[1].weight.grad, once)


def test_the_share_that_is_not_convolution():
    timings = {
        "vgkern": Timing((1.2, 2.2, 1.2)), "torch.nn": Timing((2.0, 3.0, 2.0)),
        "convolution only": Timing((1.0, 2.0, 1.0)),
    }  # fmt: skip
    profiles = {"vgkern": resnet50.Profile(0.9, 0.1), "torch.nn": resnet50.Profile(0.9, 0.9)}
    memory = {"vgkern": resnet50.Memory(10**6, None), "torch.nn": resnet50.Memory(3 * 10**6, None)}
    outcome = resnet50.Outcome(timings, profiles, memory)
    assert outcome.other_seconds("torch.nn") == pytest.approx(1.0)  # round by round: the slow one does not count
    assert outcome.other_share("vgkern") == pytest.approx(0.2 / 1.2)
    assert outcome.cut == pytest.approx(5.0)
    assert outcome.profiled_cut == pytest.approx(9.0)
    first, second, third = resnet50.conclusions(outcome)
    assert "not convolution: 50.0% before, 16.7% after, its time cut by 5.00x" in first
    assert "50.0% before, 10.0% after, its time cut by 9.00x" in second
    assert third == "kept for the backward pass: vgkern 1 MB, torch.nn 3 MB"


def test_what_a_backward_pass_keeps_is_counted_once_and_without_the_parameters():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(32, 8)
    # The input; the ReLU's output, which the second layer keeps as well.
    assert peak_memory.saved_bytes(net, lambda: net(x).sum()) == 4 * 32 * (8 + 16)


def _allocate(megabytes: int) -> None:
    torch.ones(megabytes << 20, dtype=torch.uint8)


def test_the_peak_of_a_process_of_its_own():
    small, large = (peak_memory.peak_resident_bytes(_allocate, megabytes) for megabytes in (1, 301))
    assert 250e6 < large - small < 400e6


def test_the_profiler_tells_convolutions_from_the_rest():
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(8, 8, 3, 3, requires_grad=True)
    convolution = resnet50.profile(lambda: torch.conv2d(x, weight).sum().backward(), 1)
    nothing = resnet50.profile(lambda: x.to(torch.float64).add(1.0).sum(), 1)
    assert convolution.convolution > 0
    assert nothing.convolution == 0
    assert nothing.other > 0
    assert nothing.share == 1


def test_resnet50_times_what_is_right(benchmarks, tmp_path, capsys, monkeypatch):
    arguments = ["--batch", 2, "--size", 32, "--rounds", 2, "--sgd", "--dtype", "autocast", "--out", tmp_path]
    monkeypatch.setattr(resnet50, "is_right", lambda found: True)  # at this size its gradients are a matter of luck
    assert benchmarks("resnet50", *arguments) == 0
    rows = {row["net"]: row for row in rows_of(tmp_path / "resnet50.csv")}
    assert list(rows) == ["vgkern", "torch.nn", "convolution only"]
    assert all(float(row["step_ms"]) > 0 and row["optimizer"] == "sgd" for row in rows.values())
    assert float(rows["vgkern"]["profiled_other_ms"]) > 0
    assert all(float(rows[net]["saved_bytes"]) > 1e6 for net in NETS)
    assert all(float(rows[net]["peak_resident_bytes"]) > 1e8 for net in NETS)
    assert rows["convolution only"]["not_convolution_ms"] == ""
    assert "its time cut by" in capsys.readouterr().out


def test_resnet50_does_not_time_what_is_wrong(benchmarks, tmp_path, capsys, monkeypatch):
    bad = {"logits": 1.0, "gradients": 1.0}
    good = {"logits": 0.0, "gradients": 0.0}
    monkeypatch.setattr(resnet50, "errors", lambda *_: {"vgkern": bad, "torch.nn": good, "vgkern, float64": good})
    monkeypatch.setattr(resnet50, "measure", lambda *_: pytest.fail("it was timed"))
    assert benchmarks("resnet50", "--batch", 2, "--size", 32, "--out", tmp_path) == 1
    assert "the fused net is wrong and is not timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- clip ------------------------------------------------------------------------------------------------------------


def test_clip_writes_a_row_for_each_variant(benchmarks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clip, "resnet50", lambda fused: torch.nn.Conv2d(3, 4, 2))
    assert benchmarks("clip", "--rounds", 2, "--no-step", "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "clip.csv")
    assert len(rows) == 12
    assert [row["variant"] for row in rows] == ["vgkern", "torch"] * 4 + ["vgkern", "Python"] * 2
    assert all(float(row["ms"]) > 0 and row["rounds"] == "2" for row in rows)
    assert "2,000 tensors of 64, clipped" in capsys.readouterr().out


def test_a_wrong_clipping_is_not_timed(benchmarks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clip, "resnet50", lambda fused: torch.nn.Conv2d(3, 4, 2))
    monkeypatch.setattr(clip, "adaptive_clip_grad_", lambda parameters, factor: None)
    assert benchmarks("clip", "--rounds", 2, "--no-step", "--out", tmp_path) == 1
    assert "adaptive_clip_grad_, ResNet-50, clipped is wrong" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "clip.csv")) == 10


def test_the_step_of_clip_clips(monkeypatch):
    nets = []
    monkeypatch.setattr(clip, "resnet50", lambda fused: nets.append(vgkern.models.resnet18(fused=fused)) or nets[-1])
    args = clip.argparse.Namespace(batch=2, size=32, layout="contiguous", max_norm=0.1, device="cpu")
    contest = clip.step(args)
    (net,) = nets
    norms = {}
    for name in ("GradientClipper", "no clipping", "torch", "no clipping"):
        contest.variants[name].before()
        contest.variants[name].run()
        norms.setdefault(name, []).append(vgkern.gradients.get_grad_norms(net.parameters()).norm().item())
    assert list(contest.variants) == list(norms)
    assert norms["GradientClipper"] + norms["torch"] == pytest.approx([0.1, 0.1], rel=1e-4)
    assert min(norms["no clipping"]) > 0.2


# ---- monitor -------------------------------------------------------------------------------------------------------


def test_the_hooks_take_the_norms_that_the_monitor_records():
    torch.manual_seed(0)
    net = monitor.DeepNet(monitor.NETS[3], 8, 2)
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    monitored, hooked = (monitor.Contender(name, net, images, labels) for name in ("monitor", "hooks"))
    monitored()
    hooked()
    records = monitored.watcher.records()
    expected = [r.grad_output_norm for r in records if r.source == "kernel"]
    expected += [r.grad_input_norm for r in records if r.source == "kernel"]
    expected += [norm for r in records for norm in (r.grad_weight_norm, r.grad_bias_norm) if not math.isnan(norm)]
    assert sorted(hooked.watcher.last.tolist()) == pytest.approx(sorted(expected), rel=1e-4)


def test_the_monitor_benchmark_prints_a_ratio_for_each_variant(benchmarks, capsys):
    assert benchmarks("monitor", "--depth", 8, "--width", 2, "--batch", 4, "--rounds", 2) == 0
    out = capsys.readouterr().out
    for variant in monitor.VARIANTS:
        assert any(line.startswith(variant) and " x" in line for line in out.splitlines())
    assert "step() alone" in out
