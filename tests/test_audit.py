"""The audit of the GPU kernels: its reading of machine code, its arithmetic, and one small run of all of it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from vgkern.kernels import batch_norm, double_batch_norm, tuning
from vgkern.kernels.launching import Launch

from benchmarks.audit import findings, layers, machine_code, predict, traffic
from benchmarks.audit.targets import DEVICES, TARGETS, seconds
from benchmarks.interpreter import count_bytes

ROOT = Path(__file__).parents[1]
SOURCE = """
def _channel_values(ptr, channel):
    return tl.load(ptr + channel)


def _store_bits(mask_ptr, bits):
    tl.store(mask_ptr + offset, bits)


def kernel(x_ptr, y_ptr, weight_ptr, sums_ptr):
    weight = _channel_values(weight_ptr, channel)
    x = tl.load(x_ptr + offset)
    tl.store(y_ptr + offset, x)
    tl.store(sums_ptr + split, total)
    _store_bits(mask_ptr, x > 0)
"""
CHANNEL, LOAD, STORE, SUMS, MASK = 11, 12, 13, 14, 15


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    return path


# -- machine code ------------------------------------------------------------------------------------------------------


def test_the_kind_of_an_access_is_that_of_the_pointer_its_line_names(source):
    def kind(*lines: int) -> str:
        return machine_code.kind_of([(str(source), line) for line in lines])

    assert kind(LOAD) == kind(STORE) == "tensor"
    assert kind(SUMS) == "other"
    assert kind(3, CHANNEL) == "other"  # innermost first
    assert kind(7, MASK) == "mask"
    assert machine_code.kind_of([("/no/such/file.py", 3)]) == "other"


def _sass(path: Path, lines: list[tuple[int, str]]) -> str:
    text = [".text.kernel:"]
    for i, (line, instruction) in enumerate(lines):
        if line:
            text.append(f'\t//## File "{path}", line {line}')
        text.append(instruction if instruction.startswith(".L") else f"        /*{16 * i:04x}*/    {instruction} ;")
    return "\n".join(text)


def test_sass(source):
    code = machine_code.sass(_sass(source, [
        (CHANNEL, "@P0 LDG.E R40, desc[UR6][R22.64]"),
        (0, ".L_x_1:"),
        (LOAD, "@P0 LDG.E.128 R8, desc[UR6][R12.64]"),
        (LOAD, "LDG.E.128.CONSTANT R16, desc[UR6][R34.64]"),
        (0, "FADD R8, R8, R40"),
        (LOAD, "LDG.E.U16 R30, desc[UR6][R34.64]"),
        (STORE, "@P0 STG.E.64 desc[UR6][R6.64], R8"),
        (MASK, "STG.E.U8 desc[UR6][R6.64], R8"),
        (0, "STL [R1], R5"),
        (0, "@P1 BRA `(.L_x_1)"),
        (SUMS, "STG.E.64 desc[UR6][R2.64], R10"),
    ]))  # fmt: skip
    assert code.widths(store=False) == [2, 16]
    assert code.widths(store=True) == [8]
    assert code.widths(store=True, kind="mask") == [1]
    assert code.spills == 1
    assert (code.in_flight, code.bytes_in_flight) == (2, 32)  # R8 is used before R30 is asked for


def test_arms_of_a_branch_do_not_add_up(source):
    code = machine_code.sass(_sass(source, [
        (0, "@P0 BRA `(.L_x_2)"),
        (LOAD, "LDG.E.128 R8, desc[UR6][R12.64]"),
        (0, "BRA `(.L_x_3)"),
        (0, ".L_x_2:"),
        (LOAD, "LDG.E R8, desc[UR6][R12.64]"),
        (0, ".L_x_3:"),
        (0, "FADD R8, R8, R40"),
    ]))  # fmt: skip
    assert (code.in_flight, code.bytes_in_flight) == (1, 16)


def test_copies_to_shared_memory_are_in_flight_over_turns_of_a_loop(source):
    code = machine_code.sass(_sass(source, [
        (0, ".L_x_1:"),
        (0, "DEPBAR.LE SB0, 0x2"),
        (LOAD, "@P0 LDGSTS.E.BYPASS.128 [R3], desc[UR6][R4.64]"),
        (0, "LDGDEPBAR"),
        (0, "@P1 BRA `(.L_x_1)"),
    ]))  # fmt: skip
    assert code.widths(store=False) == [16]
    assert (code.in_flight, code.bytes_in_flight) == (3, 48)


def test_amdgcn(source):
    def loc(line: int) -> str:
        return f"\t.loc\t1 {line} 16 ; {source.name}:{line}:16"

    text = "\n".join([
        "kernel:", loc(CHANNEL), "\tbuffer_load_dword v2, v1, s[8:11], 0 offen", ".LBB0_1:", loc(LOAD),
        "\tglobal_load_dwordx4 v[4:7], v[2:3], off", "\tglobal_load_dwordx2 v[8:9], v[2:3], off",
        "\ts_waitcnt vmcnt(0)", "\tv_add_f32_e32 v4, v4, v2", loc(STORE),
        "\tbuffer_store_short v4, v1, s[8:11], 0 offen",
        "\tscratch_store_dword off, v9, s32", "\ts_cbranch_scc1 .LBB0_1",
    ])  # fmt: skip
    code = machine_code.amdgcn(text, source.parent)
    assert code.widths(store=False) == [8, 16]
    assert code.widths(store=True) == [2]
    assert code.spills == 1
    assert (code.in_flight, code.bytes_in_flight) == (2, 24)


def test_every_function_that_is_told_apart_exists():
    """A kernel's helper by another name would turn its accesses into another kind."""
    from vgkern.kernels import gradient_norm

    names = {*vars(batch_norm), *vars(gradient_norm)}
    assert names >= machine_code.COLD | machine_code.MASK


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "occupancy", "limit"),
    [
        ("sm_80", 64, 0, 4, 0.5, "registers"),
        ("sm_90", 40, 64, 8, 0.75, "registers"),
        ("sm_90", 255, 0, 8, 0.125, "registers"),
        ("sm_80", 32, 81 * 1024, 8, 0.25, "shared memory"),
        ("sm_90", 32, 0, 1, 0.5, "blocks"),
        ("sm_90", 32, 0, 8, 1.0, "warps"),
        ("gfx942", 128, 0, 8, 0.5, "registers"),
        ("gfx942", 64, 0, 4, 1.0, "registers"),
    ],
)
def test_occupancy(target, registers, shared, warps, occupancy, limit):
    """By hand from the tables of CUDA's programming guide and of CDNA 3."""
    got, by = TARGETS[target].occupancy(registers, shared, warps)
    assert got == occupancy
    assert by == limit or got == 1.0


def test_layers_and_gradients_are_those_of_the_nets():
    resnet, cifar = layers.resnet50(2), layers.cifar_resnet(2)
    assert sum(layer.count for layer in resnet) == 49
    assert sum(layer.count * (1 + layer.projection) for layer in resnet) == 53
    assert sum(layer.count for layer in resnet if layer.residual) == 16
    projections = [layer.shape for layer in resnet if layer.projection]
    assert projections == [(2, 256, 56, 56), (2, 512, 28, 28), (2, 1024, 14, 14), (2, 2048, 7, 7)]
    assert all(layer.residual and layer.count == 1 for layer in resnet if layer.projection)
    assert len({layer.label for layer in resnet}) == len(resnet)
    assert sum(layer.count for layer in cifar) == 55
    gradients = layers.gradients(layers.DTYPES["float32"])
    assert len(gradients) == 161
    assert sum(tensor.numel() for tensor in gradients) == 25_557_032


def test_the_model_of_time():
    device = DEVICES[0]
    assert seconds(device, 3, 0) == pytest.approx(6e-6)
    assert seconds(device, 0, device.bandwidth) == pytest.approx(1 / 0.9)
    layer = layers.Layer("net", (2, 3, 4, 5), "relu", True, 7)
    forward = layers.Case(layer, "float32", "contiguous", "forward")
    backward = layers.Case(layer, "float32", "contiguous", "backward")
    assert predict.eager(forward) == (4, 8)
    assert predict.eager(backward) == (3, 8)
    projection = replace(layer, projection=True)
    assert predict.eager(replace(forward, layer=projection)) == (6, 11)
    assert predict.eager(replace(backward, layer=projection)) == (5, 13)
    selection = layers.Selection([layer], ("float16",))
    inductor = [
        {"layer": layer.label, "dtype": "bfloat16", "layout": "contiguous", "direction": "forward", "launches": 3,
         "bytes": 5 * 240},
    ]  # fmt: skip
    rows = predict.times(selection, inductor)
    first = next(row for row in rows if row["layout"] == "contiguous" and row["direction"] == "forward")
    assert first["inductor_units"] == 5
    assert first["eager_us"] == pytest.approx(1e6 * seconds(device, 4, 8 * 240))
    totals = predict.totals(rows)
    assert [total["inductor_ms"] for total in totals] == [None] * len(totals)  # the backward is not known
    a100 = [row for row in rows if row["device"] == "A100" and row["layout"] == "contiguous"]
    assert totals[0]["eager_ms"] == pytest.approx(sum(row["eager_us"] for row in a100) * 7 / 1e3)


# -- findings ----------------------------------------------------------------------------------------------------------

GOOD = {
    "target": "sm_90", "kernel": "forward_apply", "dtype": "float32", "layout": "contiguous", "block": "1x2048",
    "users": ["a layer"], "spills": 0, "load_bytes": [16], "store_bytes": [16], "aligned_bytes": 16, "occupancy": 0.5,
    "bytes_in_flight": 1024, "limited_by": "registers",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, ""),
        ({"spills": 2}, "spills"),
        ({"load_bytes": [4, 16]}, "alignment"),
        ({"store_bytes": [8]}, "alignment"),
        ({"load_bytes": [4], "store_bytes": [4], "aligned_bytes": 4}, ""),
        ({"kernel": "norm_partial", "load_bytes": [4, 16], "store_bytes": []}, ""),
        ({"occupancy": 0.25}, "occupancy"),
        ({"occupancy": 0.25, "bytes_in_flight": 2**20}, ""),
        ({"occupancy": 0.25, "kernel": "forward_channel"}, ""),
        ({"occupancy": 0.25, "kernel": "backward_reduce", "aligned_bytes": 2}, ""),
        ({"occupancy": 0.125, "kernel": "backward_reduce", "aligned_bytes": 2}, "occupancy"),
        ({"occupancy": 0.25, "kernel": "double_forward_channel"}, ""),
        ({"occupancy": 0.25, "kernel": "double_forward_apply"}, "occupancy"),
        ({"occupancy": 0.25, "kernel": "double_backward_reduce", "aligned_bytes": 2}, ""),
        ({"occupancy": 0.25, "kernel": "double_backward_apply", "aligned_bytes": 2}, ""),
        ({"occupancy": 0.25, "kernel": "double_backward_apply"}, "occupancy"),
        ({"occupancy": 0.25, "kernel": "backward_apply", "aligned_bytes": 2}, "occupancy"),
        ({"occupancy": 0.25, "kernel": "input_gradient"}, "occupancy"),
        ({"occupancy": 0.25, "aligned_bytes": 2}, "occupancy"),
    ],
)
def test_what_is_held_against_a_kernel(change, word):
    found = findings.of_code([{**GOOD, **change}])
    assert len(found) == bool(word)
    assert all(word in line for line in found)


def test_what_is_held_against_traffic_and_launches():
    row = {"kernel": "k", "dtype": "d", "layout": "l", "layer": "x", "stated_bytes": 1000}
    assert findings.of_traffic([{**row, "counted_bytes": 1019}]) == []
    assert len(findings.of_traffic([{**row, "counted_bytes": 1021}, {**row, "counted_bytes": 979}])) == 2
    launched = {"layer": "x", "direction": "forward"}
    assert findings.of_launches([{**launched, "vgkern_launches": 2}]) == []
    assert len(findings.of_launches([{**launched, "vgkern_launches": 3}])) == 1


def test_the_floor_is_every_tensor_once():
    def floor(direction: str, activation: str = "relu", residual: bool = True, projection: bool = False) -> float:
        layer = layers.Layer("", (1, 8, 8, 8), activation, residual, 1, projection)
        return traffic.floor_units(layers.Case(layer, "float32", "contiguous", direction))

    assert floor("forward") == 3 + 1 / 32
    assert floor("backward") == 4 + 1 / 32
    assert floor("eval") == 3
    assert floor("forward", residual=False) == 2
    assert floor("backward", "identity", residual=False) == 3
    assert floor("forward", projection=True) == 3 + 1 / 32
    assert floor("backward", projection=True) == 5 + 1 / 32
    assert floor("eval", projection=True) == 3


# -- all of it ---------------------------------------------------------------------------------------------------------


def test_gradient_kernels_move_what_they_state():
    with count_bytes():  # nests: the audit's own counters come inside
        rows = traffic._gradient_rows("bfloat16")
    assert [row["kernel"] for row in rows] == ["norm_partial", "norm_merge", "gradient_scale"]
    assert [row["counted_bytes"] for row in rows] == [row["stated_bytes"] for row in rows]


@pytest.mark.parametrize(
    ("shape", "units"),
    [
        ((256, 256, 16, 16), {"forward": [2, 3 + 1 / 32], "backward": [3 + 1 / 32, 5 + 1 / 32], "eval": [3]}),
        ((16, 2048, 8, 8), {"forward": [3 + 1 / 32], "backward": [5 + 1 / 32, 0], "eval": [3]}),
    ],
)
def test_a_projection_moves_what_its_kernels_state(monkeypatch, shape, units):
    """By the kernels' docstrings; channels that are walked, and channels that fit one program."""
    monkeypatch.setattr(tuning, "TABLE", dict(tuning.TABLE))
    monkeypatch.setattr(layers, "FORMATS", {"contiguous": layers.FORMATS["contiguous"]})
    layer = layers.Layer("", shape, "relu", True, 1, projection=True)
    monkeypatch.setattr(traffic, "_gradient_rows", lambda dtype: [])
    rows = traffic.count(layers.Selection([layer], ("float32",), layers.DIRECTIONS))
    assert findings.of_traffic(rows) == []
    for direction, stated in units.items():
        chosen = [row for row in rows if row["direction"] == direction]
        assert all(row["kernel"].startswith("double_") for row in chosen)
        assert [row["units"] for row in chosen] == pytest.approx(stated)
        assert {row["floor_units"] for row in chosen} == {max(stated)}
    assert {row["direction"] for row in rows} == units.keys()  # no "synchronised": of one batch norm alone


def test_halves_are_counted_once_for_both_types(monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", dict(tuning.TABLE))  # the audit has a process of its own and changes it
    layer = layers.Layer("", (2, 8, 5, 5), "relu", True, 1)
    rows = traffic.count(layers.Selection([layer], ("float16", "bfloat16", "float32"), ("eval",)))
    rows = [row for row in rows if row["direction"] == "eval"]
    assert [(row["dtype"], row["layout"]) for row in rows] == [
        (dtype, layout) for dtype in ("float16", "bfloat16", "float32") for layout in layers.FORMATS
    ]
    assert [row["counted_bytes"] for row in rows] == [3 * traffic.ELEMENTS * size for size in (2, 2, 2, 2, 4, 4)]


def _walked(monkeypatch, lanes: int, capability: int, layout: str, projection: bool) -> list[Launch]:
    """The launches of a forward and a backward that walk tiles, as for that GPU."""
    monkeypatch.setattr(batch_norm, "INTERPRETED", False)
    monkeypatch.setattr(batch_norm, "LANES", lanes)
    monkeypatch.setattr(batch_norm, "_capability", lambda: capability)
    layer = layers.Layer("", (32, 64, 56, 56), "relu", True, 1, projection)
    cases = [layers.Case(layer, "bfloat16", layout, direction) for direction in ("forward", "backward")]
    return [launch for case in cases for launch in layers.launches_of(case, layers.tensors_of(case))]


@pytest.mark.parametrize(
    ("lanes", "capability", "layout", "projection", "limits"),
    [
        (32, 90, "contiguous", False, [None, 128, 144, None]),
        (32, 100, "channels_last", False, [None, 128, None, 128]),
        (32, 80, "contiguous", False, [None, 128, 144, 64]),
        (32, 89, "channels_last", False, [None, 128, None, 128]),
        (32, 90, "contiguous", True, [None, None, 144, 128]),
        (32, 80, "channels_last", True, [None, None, None, 192]),
        (64, 0, "contiguous", False, [None] * 4),
        (64, 0, "contiguous", True, [None] * 4),
    ],
)
def test_the_compiler_is_told_what_keeps_it_from_spilling(
    monkeypatch, lanes, capability, layout, projection, limits
):  # fmt: skip
    """On NVIDIA's GPUs: else ptxas spills loops, and not the same for all. AMD's compiler knows no such option."""
    launches = _walked(monkeypatch, lanes, capability, layout, projection)
    assert [launch.options.get("maxnreg") for launch in launches] == limits


@pytest.mark.parametrize(("lanes", "stages"), [(32, [6, 1, 6, 3]), (64, [3, 1, 3, 1])])
def test_loops_of_many_registers_have_tiles_in_flight(monkeypatch, lanes, stages):
    """Those that write in planes as well, where asynchronous copies cost no registers."""
    launches = _walked(monkeypatch, lanes, 90, "contiguous", projection=True)
    assert [launch.args["STAGES"] for launch in launches] == stages
    case = layers.Case(layers.Layer("", (32, 64, 56, 56), "relu", True, 1), "bfloat16", "contiguous", "synchronised")
    (launch,) = layers.launches_of(case, layers.tensors_of(case))
    assert launch.args["STAGES"] == stages[-1]


def test_the_capability_is_that_of_the_current_gpu(monkeypatch):
    for available, capability in ((True, 86), (False, 0)):
        batch_norm._capability.cache_clear()
        monkeypatch.setattr(batch_norm.torch.cuda, "is_available", lambda there=available: there)
        monkeypatch.setattr(batch_norm.torch.cuda, "get_device_capability", lambda: (8, 6))
        assert batch_norm._capability() == capability
    batch_norm._capability.cache_clear()


@pytest.mark.parametrize("targets", [["sm_90"], pytest.param(["sm_80", "gfx942"], marks=pytest.mark.slow)], ids=str)
def test_a_small_audit(targets, tmp_path):
    """Compiles, counts, lowers, and writes all it writes; nothing is held against any kernel."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "audit", "--small", "--target", *targets, "--output", tmp_path / "out"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "0 findings" in result.stdout
    rows = {}
    for name in ("kernels", "traffic", "times"):
        with (tmp_path / "out" / f"audit-{name}.csv").open() as file:
            rows[name] = list(csv.DictReader(file))
    kernels = {row["kernel"] for row in rows["kernels"]}
    assert kernels == {name.removesuffix("_kernel") for name in (*batch_norm.TENSORS, *double_batch_norm.TENSORS)} | {
        "norm_partial", "norm_merge", "gradient_scale",
    }  # fmt: skip
    for row in rows["kernels"]:
        assert int(row["registers"]) > 0
        reads = row["kernel"] not in ("backward_finish", "double_backward_finish", "norm_merge")
        assert bool(row["load_bytes"]) == reads, json.dumps(row)
    inductor, ours = (sum(float(row[f"{name}_us"]) for row in rows["times"]) for name in ("inductor", "vgkern"))
    assert inductor > ours > 0
    page = (tmp_path / "out" / "audit.html").read_text()
    assert page.count("<svg") == 3
    assert "lowered without one" in page
