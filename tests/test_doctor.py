"""The doctor names what is planted in sick nets, finds nothing in healthy ones, and says it all on the command line."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import Tensor, nn

import vgkern
from vgkern import cli
from vgkern.demo import NETS, DeepNet
from vgkern.doctor import Patient, examine
from vgkern.gradients import GradientMonitor, Thresholds


def _chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def _mlp(depth: int, activation=nn.ReLU, init=None, width: int = 32, outputs: int = 10) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), activation())]
    net = _chain(*layers, nn.Linear(width, outputs))
    if init is not None:
        for module in net:
            if isinstance(module, nn.Linear):
                init(module.weight)
                nn.init.zeros_(module.bias)
    return net


def _kaiming(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


class _Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _with(net: nn.Sequential, place: int, module: nn.Module) -> nn.Sequential:
    return _chain(*net[:place], module, *net[place + 1 :])


def _vector(*size: int) -> Tensor:
    return torch.randn(*(size or (32, 32)))


# Sick nets: what makes the patient, what must be found, where, and a word of the advice. ------------------------------


def _sigmoid():
    return Patient(_mlp(12, nn.Sigmoid, nn.init.xavier_normal_), _vector())


def _small_weights():
    return Patient(_mlp(8, nn.ReLU, lambda w: nn.init.normal_(w, std=0.01)), _vector())


def _torch_default():
    return Patient(_mlp(20), _vector())


def _large_weights():
    return Patient(_mlp(8, nn.ReLU, lambda w: nn.init.normal_(w, std=1.0)), _vector())


def _dead_relu():
    net = _mlp(4, init=_kaiming)
    nn.init.constant_(net[4].bias, -30.0)
    return Patient(net, _vector())


def _nan_weight():
    net = _mlp(6, init=_kaiming)
    with torch.no_grad():
        net[6].weight[0, 0] = math.nan
    return Patient(net, _vector())


def _root_of_zero():
    """Finite on the way forward; on the way back 0 times the root's infinite derivative."""
    return Patient(_with(_mlp(6, init=_kaiming), 5, _Function(lambda x: x + (0 * x).sqrt())), _vector())


def _overflow():
    return Patient(_with(_mlp(6, init=_kaiming), 5, _Function(lambda x: (100 * x).exp())), _vector())


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = _mlp(2, init=_kaiming, outputs=32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(x).detach())


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary = _mlp(2, init=_kaiming), nn.Linear(32, 10)

    def forward(self, x):
        return self.body(x)


def _frozen(norm: nn.Module):
    net = _chain(nn.Linear(32, 32), norm, nn.Linear(32, 10))
    net[1].eval()
    return Patient(net, _vector())


def _saturated(activation):
    return Patient(_mlp(3, activation, lambda w: nn.init.normal_(w, std=40.0)), _vector())


def _deep_batch_norm():
    """Without residuals, batch norm makes gradients explode with depth: Yang et al. 2019, arXiv 1902.08129."""
    layers = [m for _ in range(60) for m in (nn.Linear(32, 32, bias=False), vgkern.nn.BatchNormAct1d(32))]
    return Patient(_chain(*layers, nn.Linear(32, 10)), _vector())


def _fused_sigmoid():
    return Patient(DeepNet(NETS[0], 20, width=4), _vector(8, 1, 8, 8))


def _fused_dead():
    net = _chain(nn.Linear(32, 32), vgkern.nn.BatchNormAct1d(32), nn.Linear(32, 32), vgkern.nn.BatchNormAct1d(32))
    nn.init.constant_(net[3].bias, -20.0)
    return Patient(_chain(*net, nn.Linear(32, 10)), _vector())


def _outlier():
    return Patient(_mlp(3, init=_kaiming), [_vector() * (1e5 if step == 6 else 1.0) for step in range(9)])


def _constant_loss():
    return Patient(_mlp(3, init=_kaiming), _vector(), lambda y: (0 * y).sum())


SICK = {
    "sigmoid": (_sigmoid, "vanishing", "0", "relu or silu"),
    "small weights": (_small_weights, "vanishing", "0", "Initialisation"),
    "torch's default weights": (_torch_default, "vanishing", "0", "kaiming_normal_"),
    "large weights": (_large_weights, "exploding", None, "Initialisation"),
    "dead ReLUs": (_dead_relu, "dead", "5", "leaky_relu"),
    "a NaN weight": (_nan_weight, "nonfinite", "6", "not finite"),
    "root of zero": (_root_of_zero, "nonfinite", "4", "root"),
    "overflow": (_overflow, "nonfinite", "5", "overflow"),
    "detached": (lambda: Patient(_Detached(), _vector()), "no_gradient", "encoder.4", "detach()"),
    "unused": (lambda: Patient(_Unused(), _vector()), "no_gradient", "auxiliary", "requires_grad_"),
    "frozen batch norm": (lambda: _frozen(nn.BatchNorm1d(32)), "frozen_norm", "1", "train()"),
    "frozen fused batch norm": (lambda: _frozen(vgkern.nn.BatchNormAct1d(32)), "frozen_norm", "1", "train()"),
    "saturated tanh": (lambda: _saturated(nn.Tanh), "dead", None, "smaller initialisation"),
    "saturated hardsigmoid": (lambda: _saturated(nn.Hardsigmoid), "dead", None, "smaller initialisation"),
    "deep batch norm": (_deep_batch_norm, "exploding", None, "residual"),
    "fused sigmoid": (_fused_sigmoid, "vanishing", "acts.0", "relu or silu"),
    "fused dead ReLUs": (_fused_dead, "dead", "3", "leaky_relu"),
    "an outlier among the batches": (_outlier, "exploding", None, "max_norm"),
    "a loss without gradient": (_constant_loss, "no_gradient", None, "multiplied by 0"),
}


@pytest.mark.parametrize("name", SICK)
def test_the_planted_illness_is_named(name):
    make, kind, layer, word = SICK[name]
    report = examine(make(), steps=9 if make is _outlier else 5).report
    found = [finding for finding in report.findings if finding.kind == kind]
    assert [finding.kind for finding in report.findings] == [kind], str(report)
    assert layer in (None, found[0].layer)
    assert any(word in advice for advice in found[0].advice), found[0].advice
    assert not report.ok
    for text in (kind, found[0].layer, found[0].summary, *found[0].advice):
        assert text in str(report)


# Healthy nets ---------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """He et al. 2016, arXiv 1512.03385, of ``torch.nn`` layers, one ReLU in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = _chain(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


def _resnet18(zero_init: bool = False) -> nn.Module:
    """With a quarter of the channels."""
    channels = (16, 16, 32, 64, 128)
    blocks = [
        _Block(channels[stage] if first else channels[stage + 1], channels[stage + 1], 2 if first and stage else 1)
        for stage in range(4)
        for first in (True, False)
    ]
    if zero_init:
        for block in blocks:
            nn.init.zeros_(block.bn2.weight)
    stem = (nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return _chain(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = (
            nn.Embedding(20, 16),
            nn.LSTM(16, 16, batch_first=True),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def _fused_vgg() -> nn.Module:
    layers = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), vgkern.nn.BatchNormAct2d(outputs)]
    return _chain(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _ulysses(depth: int) -> nn.Module:
    """A plain net of ``depth`` weight layers in the initialisation of He et al. 2015."""
    return _mlp(depth - 1, init=_kaiming, width=64)


HEALTHY = {
    "ResNet-18": lambda: Patient(_resnet18(), _vector(8, 3, 64, 64)),
    "ResNet-18 whose branches begin at zero": lambda: Patient(_resnet18(zero_init=True), _vector(8, 3, 64, 64)),
    "plain Kaiming net of 20 layers": lambda: Patient(_ulysses(20), _vector(64, 64)),
    "fused residual net": lambda: Patient(DeepNet(NETS[3], 20, width=4), _vector(16, 1, 8, 8)),
    "fused VGG": lambda: Patient(_fused_vgg(), _vector(8, 3, 8, 8)),
    "tanh, Xavier": lambda: Patient(_mlp(8, nn.Tanh, nn.init.xavier_normal_), _vector()),
    "transformer": lambda: Patient(_Transformer(), _vector(8, 6, 16)),
    "LSTM": lambda: Patient(_Recurrent(), torch.randint(20, (8, 7))),
    "regression": lambda: Patient(_mlp(2, init=_kaiming, outputs=1), _vector()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_net(name):
    report = examine(HEALTHY[name]()).report
    assert report.ok, str(report)
    assert report.to_dict()["findings"] == []


# Findings that a doctor's few steps do not meet -----------------------------------------------------------------------


def _scaled(scale: float, factor: float = 1.0, steps: int = 4):
    torch.manual_seed(0)
    net = _chain(nn.Linear(8, 8), vgkern.nn.BatchNormAct1d(8), nn.Linear(8, 8), vgkern.nn.BatchNormAct1d(8))
    monitor = GradientMonitor(net)
    for _ in range(steps):
        net.zero_grad()
        (scale * factor * net(torch.randn(16, 8)).square().mean()).backward()
        monitor.step()
    return monitor.report(unscale=scale)


def test_a_loss_scale_that_is_too_low_or_too_high():
    assert _scaled(1024.0).ok
    (low,) = _scaled(8.0, factor=1e-9).findings
    assert low.kind == "loss_scale"
    assert low.evidence["rms"] < 2.0**-24
    assert "GradScaler" in low.advice[0]
    (high,) = _scaled(2.0**30, factor=math.inf).findings
    assert (high.kind, high.evidence["steps"]) == ("loss_scale", 4)
    assert "too high" in high.summary


def test_the_thresholds_decide():
    patient = _sigmoid()
    monitor = GradientMonitor(patient.model)
    patient.model(patient.data).square().mean().backward()
    monitor.step()
    assert [finding.kind for finding in monitor.report().findings] == ["vanishing"]
    assert monitor.report(Thresholds(vanishing=1e-30)).ok
    with pytest.raises(ValueError, match="dead"):
        Thresholds(dead=0.0)


def test_a_report_as_json_and_frame():
    report = examine(_sigmoid()).report
    raw = json.loads(report.to_json())
    assert raw["ok"] is False
    assert raw["findings"][0]["evidence"]["product_of_gains"] == report.findings[0].evidence["product_of_gains"]
    assert raw["layers"][1]["gain"] == pytest.approx(report.layers[1].gain)
    assert raw["layers"][0]["gain"] is None  # NaN is no JSON
    pytest.importorskip("pandas")
    frame = report.to_frame()
    assert list(frame["layer"]) == [layer.layer for layer in report.layers]
    assert frame["gain"].tolist()[1] == report.layers[1].gain


def test_long_tables_show_a_part_and_say_so():
    report = examine(Patient(_mlp(40, nn.ReLU, _kaiming, width=16), _vector(8, 16)), steps=1).report
    text = str(report)
    assert "more layers in to_dict()" in text
    assert len(text.splitlines()) < 70
    assert len(report.to_dict()["layers"]) == 81


def test_rich_shows_the_same(capsys):
    rich = pytest.importorskip("rich")
    report = examine(_sigmoid()).report
    rich.print(report)
    out = " ".join(capsys.readouterr().out.split())
    assert report.findings[0].kind in out
    assert "relu or silu" in out


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def sick():\n"
        "    return nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(8, 8), nn.Sigmoid())])\n"
        "def well():\n"
        "    x = torch.randn(16, 8)\n"
        "    return nn.Linear(8, 2), (x, (x[:, 0] > 0).long()), nn.functional.cross_entropy\n"
        "def broken():\n"
        "    raise KeyError('made up')\n"
        "def batches():\n"
        "    return nn.Linear(8, 1), [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(2)]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_nets", None)


def test_findings_exit_1_with_report_and_figure(nets, capsys):
    assert cli.main(["doctor", "my_nets:sick", "--input", "4,8", "--steps", "2", "--out", "new"]) == 1
    captured = capsys.readouterr()
    assert "vanishing" in captured.out
    assert (nets / "new" / "vgkern-doctor.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("factory", ["my_nets:well", "my_nets:batches"])
def test_health_exits_0(nets, capsys, factory):
    assert cli.main(["doctor", factory, "--json", "--dark", "--out", "a.png"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is True
    assert "No findings" in captured.err
    assert (nets / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_nets:well", "--input", "2,8"], "both --input and data"),
        (["my_nets:sick"], "--input"),
        (["my_nets:nothing", "--input", "2,8"], "no 'nothing'"),
        (["my_nets:number", "--input", "2,8"], "expected a torch.nn.Module"),
        (["my_nets:broken", "--input", "2,8"], "KeyError: 'made up'"),
        (["my_nets", "--input", "2,8"], "MODULE:FACTORY"),
        (["no_such_nets:make", "--input", "2,8"], "No module named 'no_such_nets'"),
        (["my_nets:sick", "--input", "2,9"], "a training step raised RuntimeError"),
        (["my_nets:sick", "--input", "2,8", "--steps", "0"], "--steps"),
        (["my_nets:sick", "--input", "2,8", "--out", "a.pdf"], "--out"),
        ([], "MODULE:FACTORY is missing"),
        (["my_nets:sick", "--demo"], "--demo"),
    ],
)
def test_what_cannot_be_done_exits_2(nets, capsys, arguments, message):
    assert cli.main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not list(nets.glob("*.png"))


def test_a_wrong_shape_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "nets:make", "--input", "32,three"])
    assert stop.value.code == 2
    assert "32,3,224,224" in capsys.readouterr().err


def test_the_demo_shows_the_sick_net_beside_its_cure(nets, capsys):
    assert cli.main(["doctor", "--demo", "--steps", "2", "--json", "n.json"]) == 0
    out = capsys.readouterr().out
    assert any("1 finding (" in line and "No findings (" in line for line in out.splitlines())
    sick, cured = json.loads((nets / "n.json").read_text()).values()
    assert [finding["kind"] for finding in sick["findings"]] == ["vanishing"]
    assert cured["ok"]
    assert (nets / "vgkern-doctor.png").stat().st_size > 50_000


def test_without_rich_and_matplotlib_there_is_plain_text(nets, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("rich", "matplotlib") else find(name)
    )
    assert cli.main(["doctor", "my_nets:sick", "--input", "4,8"]) == 1
    out = capsys.readouterr().out
    assert "1. vanishing: 0" in out
    assert "vgkern[monitor]" in out
