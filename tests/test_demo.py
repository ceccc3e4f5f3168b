"""The demo: nets, training, numbers, figure and words, on nets of eight layers."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.text import Text
from rich.console import Console
from torch import nn

from vgkern.demo import NETS, Config, DeepNet, Observer, conclude, data, draw_figure, run, training
from vgkern.demo.conclusion import headline
from vgkern.demo.display import LogProgress, notes, progress_for, tables
from vgkern.demo.figure import _spread
from vgkern.demo.results import DemoResult, EpochResult, NetResult, StepSeconds
from vgkern.models.resnet import check_depth
from vgkern.text import figures

SMALL = Config(depth=8, epochs=2, width=4)


@pytest.fixture
def few_timed_steps(monkeypatch):
    monkeypatch.setattr(training, "_WARMUP_STEPS", 1)
    monkeypatch.setattr(training, "_TIMED_STEPS", 2)


@pytest.fixture(scope="module")
def result() -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_WARMUP_STEPS", 1)
        patch.setattr(training, "_TIMED_STEPS", 2)
        return run(SMALL)


def made_up(ratios=(1e-30, 1e-3, 0.1, 0.5), accuracies=(0.1, 0.12, 0.5, 0.98), depth=8, epochs=2, **options):
    """A result with these ratios of first to last layer and these final accuracies."""

    def epoch(ratio: float, accuracy: float) -> EpochResult:
        norms = [ratio ** (1 - layer / (depth - 1)) if ratio else float(layer == depth - 1) for layer in range(depth)]
        ones = [1.0] * (depth - 1)
        return EpochResult(3, 1.0, 1.0, accuracy, norms, norms, norms, ones, ones)

    nets = [
        NetResult(spec.key, spec.label, spec.residual, 1, StepSeconds(0.01, 0.02), [epoch(ratio, accuracy)] * epochs)
        for spec, ratio, accuracy in zip(NETS, ratios, accuracies, strict=False)
    ]
    environment = {"backend": "reference", "device": "cpu", "threads": 1, "torch": "2"}
    return DemoResult(Config(depth=depth, epochs=epochs), environment, 1347, 450, nets, 1.0, **options)


# Nets


@pytest.mark.parametrize("spec", NETS, ids=lambda spec: spec.key)
@pytest.mark.parametrize("depth", [8, 14, 20, 50])
def test_depth_is_the_number_of_weight_layers(spec, depth):
    net = DeepNet(spec, depth, width=2)
    weighted = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == len(net.weight_layers()) == depth
    assert len(net.acts) == depth - 1
    assert net(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("depth", "near"), [(50, None), (8, None), (51, "50 or 56"), (7, "8"), (-4, "8"), (13, "8 or 14")]
)
def test_a_wrong_depth_is_refused_with_the_nearest_right_ones(depth, near):
    if near is None:
        assert check_depth(depth) == depth
    else:
        with pytest.raises(ValueError, match=f"nearest to {depth}: {near}$"):
            Config(depth=depth)


def test_shortcuts_carry_no_weights():
    counts = {spec.key: sum(p.numel() for p in DeepNet(spec, 14).parameters()) for spec in NETS}
    assert counts["sigmoid"] == counts["relu"]
    assert counts["batch_norm"] == counts["residual"]
    # γ and β in place of the convolution's bias: one more for each channel of each of the 13 convolutions.
    assert counts["batch_norm"] - counts["relu"] == 5 * 16 + 4 * 32 + 4 * 64


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("spec", NETS, ids=lambda spec: spec.key)
def test_the_plain_torch_twin_computes_the_same(spec, training_mode):
    net, twin = DeepNet(spec, 14, width=4).double(), DeepNet(spec, 14, width=4, plain_torch=True).double()
    assert not any(hasattr(module, "grad_stats") for module in twin.modules())
    twin.load_state_dict(net.state_dict(), strict=True)
    net.train(training_mode)
    twin.train(training_mode)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(x), twin(x))
    net(x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(net.weight_layers(), twin.weight_layers(), strict=True):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-7, atol=1e-12)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def test_every_row_of_the_table_uses_the_residual_it_says():
    x = torch.randn(2, 1, 8, 8)
    nets = {}
    for spec in NETS[2:]:
        torch.manual_seed(0)
        nets[spec.key] = DeepNet(spec, 8, width=4)
    assert not torch.allclose(nets["batch_norm"](x), nets["residual"](x))


# Data and training


def test_the_split_is_fixed_stratified_and_normalised():
    first, second = data.load(torch.device("cpu")), data.load(torch.device("cpu"))
    assert len(first.train_images) + len(first.test_images) == 1797
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    shares = torch.bincount(first.test_labels, minlength=10) / torch.bincount(first.train_labels, minlength=10)
    assert ((shares - 450 / 1347).abs() < 0.02).all()
    torch.testing.assert_close(first.train_images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_a_result_holds_every_net_epoch_and_layer(result):
    assert [net.key for net in result.nets] == [spec.key for spec in NETS]
    assert result.complete
    for net in result.nets:
        assert len(net.epochs) == SMALL.epochs
        assert net.step_seconds.fused > 0
        assert net.step_seconds.torch > 0
        for epoch in net.epochs:
            assert epoch.steps == 1347 // SMALL.batch_size
            assert len(epoch.grad_norm) == len(epoch.grad_norm_low) == len(epoch.grad_norm_high) == 8
            assert len(epoch.gain) == len(epoch.dead) == 7
            quantiles = zip(epoch.grad_norm_low, epoch.grad_norm, epoch.grad_norm_high, strict=True)
            assert all(0 < low <= median <= high for low, median, high in quantiles)
            assert 0 <= epoch.test_accuracy <= 1
    sigmoid, relu, *_ = result.nets
    assert max(sigmoid.epochs[0].gain) <= 0.25  # the largest slope of the sigmoid
    assert sigmoid.dead_fraction == 0
    assert 0 < relu.dead_fraction < 1


@pytest.mark.usefixtures("few_timed_steps")
def test_the_recorded_norms_are_those_of_the_gradients():
    # One step an epoch: the median over it is the one gradient that there is.
    config = replace(SMALL, epochs=1, batch_size=1347)
    epoch = run(config).nets[3].epochs[0]
    digits = data.load(torch.device("cpu"))
    torch.manual_seed(config.seed)
    net = DeepNet(NETS[3], config.depth, config.width, plain_torch=True).double()
    loss = nn.functional.cross_entropy(net(digits.train_images.double()), digits.train_labels)
    loss.backward()
    expected = [layer.weight.grad.norm().item() for layer in net.weight_layers()]
    assert epoch.grad_norm == pytest.approx(expected, rel=1e-3)
    assert epoch.train_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.usefixtures("few_timed_steps")
def test_a_run_repeats_and_leaves_the_random_state_alone(result):
    state = torch.get_rng_state()
    again = run(SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(result.nets, again.nets, strict=True):
        assert [e.train_loss for e in a.epochs] == pytest.approx([e.train_loss for e in b.epochs], rel=1e-3)


def test_norms_far_below_float32_squares_are_seen():
    layer = nn.Linear(3, 1)
    layer.weight.grad = torch.full_like(layer.weight, 1e-30)
    assert training._grad_norms([layer]).item() == pytest.approx(math.sqrt(3) * 1e-30, rel=1e-6, abs=0)


class Interrupt(Observer):
    """Ctrl-C at the given step of the given net."""

    def __init__(self, key: str, step: int) -> None:
        self.key, self.left = key, step

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def step_done(self, spec, share):
        self.left -= spec.key == self.key
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("few_timed_steps")
@pytest.mark.parametrize(
    ("key", "step", "nets", "steps"), [("sigmoid", 1, 1, [1]), ("relu", 13, 2, [10, 3]), ("relu", 20, 2, [10, 10])]
)
def test_an_interrupted_run_keeps_what_was_trained(key, step, nets, steps):
    result = run(SMALL, Interrupt(key, step))
    assert result.interrupted
    assert not result.complete
    assert len(result.nets) == nets
    assert [epoch.steps for epoch in result.nets[-1].epochs] == steps
    assert draw_figure(result).axes
    assert "interrupted" in conclude(result)


def test_an_interrupt_before_the_first_step_leaves_nothing(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_time_steps", stop)
    result = run(SMALL)
    assert result.interrupted
    assert result.nets == []
    assert "nothing to show" in conclude(result)
    json.dumps(result.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="no net"):
        draw_figure(result)


@pytest.mark.usefixtures("few_timed_steps")
def test_a_net_that_diverges_ends_early_and_says_so():
    result = run(replace(SMALL, learning_rate=1e30, epochs=3))
    assert len(result.nets) == 4
    diverged = [net for net in result.nets if net.diverged]
    assert diverged
    assert all(len(net.epochs) < 3 for net in diverged)
    assert "diverged in epoch" in conclude(result)
    assert draw_figure(result).axes
    json.dumps(result.to_dict(), allow_nan=False)


# Numbers


def test_a_result_is_json(result):
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["config"]["depth"] == 8
    assert plain["environment"]["torch"] == torch.__version__
    for net, raw in zip(result.nets, plain["nets"], strict=True):
        assert raw["epochs"][0]["grad_norm"] == net.epochs[0].grad_norm
        assert raw["summary"]["test_accuracy"] == net.accuracy
        assert raw["summary"]["first_to_last_ratio"] == pytest.approx(net.first_norm / net.last_norm)
        assert raw["step_seconds"]["fused"] == net.step_seconds.fused


def test_json_has_null_where_there_is_no_number():
    net = made_up().nets[0]
    net.epochs = [replace(net.epochs[0], gain=[math.nan, math.inf], train_loss=math.nan)]
    raw = replace(made_up(), nets=[net]).to_dict()["nets"][0]
    assert raw["epochs"][0]["gain"] == [None, None]
    assert raw["epochs"][0]["train_loss"] is None
    assert raw["summary"]["diverged"] is True


def test_zero_gradients_have_a_ratio_of_zero_or_none():
    epoch = made_up().nets[0].epochs[0]
    assert replace(epoch, grad_norm=[0.0, 1.0]).ratio == 0
    assert math.isnan(replace(epoch, grad_norm=[0.0, 0.0]).ratio)


def test_the_gradient_is_judged_over_the_first_five_epochs():
    net = made_up().nets[0]
    epochs = [replace(net.epochs[0], grad_norm=[float(n), 2.0], gain=[float(n), math.nan]) for n in range(1, 9)]
    net.epochs = epochs
    assert net.early("grad_norm") == [3.0, 2.0]
    assert (net.first_norm, net.last_norm, net.ratio) == (3.0, 2.0, 1.5)
    assert net.early("gain")[0] == 3.0
    assert math.isnan(net.early("gain")[1])
    net.epochs = epochs[:2]
    assert net.first_norm == 1.5


# Figure


def series(ax) -> set[str]:
    return {line.get_label() for line in ax.lines if not line.get_label().startswith("_")}


def test_the_figure_has_four_panels_with_four_series(result):
    figure = draw_figure(result)
    gradient, gain, loss, accuracy = figure.axes
    labels = {spec.label for spec in NETS}
    assert series(gradient) == series(gain) == series(loss) == series(accuracy) == labels
    assert gradient.get_yscale() == gain.get_yscale() == loss.get_yscale() == "log"
    drawn = {line.get_label(): list(line.get_ydata()) for line in gradient.lines}
    for net in result.nets:
        assert drawn[net.label] == net.early("grad_norm")
        assert len(drawn[net.label]) == 8
    for ax in figure.axes:
        assert ax.get_title(loc="left")
        assert ax.get_xlabel()


@pytest.mark.parametrize("ratios", [(0.0, 1e-3, 0.1, 0.5), (1e-30, 1e-3, 0.1, 0.5), (0.0, 0.0, 0.0, 0.0)])
def test_no_label_covers_another_or_leaves_the_figure(ratios):
    figure = draw_figure(made_up(ratios, depth=50))
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for ax in figure.axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the leader lines
        for i, box in enumerate(boxes):
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width
            assert box.y1 <= height
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), [t.get_text() for t in ax.texts]


def test_zero_is_drawn_below_everything_else_and_named():
    ax = draw_figure(made_up((0.0, 1e-3, 0.1, 0.5))).axes[0]
    zeros = next(list(line.get_ydata()) for line in ax.lines if line.get_marker() == "o" and len(line.get_ydata()))
    assert len(zeros) == 7
    assert max(zeros) < 1e-3
    assert any("exactly 0" in text.get_text() for text in ax.texts)
    assert not any("exactly 0" in text.get_text() for text in draw_figure(made_up()).axes[0].texts)


def test_labels_are_spread_in_order():
    placed = _spread([5.0, 5.0, 5.5, 90.0], 10.0, 0.0, 100.0)
    assert sorted(placed) == [placed[i] for i in sorted(range(4), key=placed.__getitem__)]
    assert placed[2] > max(placed[:2])
    assert all(b - a >= 10 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert max(_spread([99.0, 99.0, 99.0], 10.0, 0.0, 100.0)) <= 100


# Words


def test_the_conclusion_says_when_the_order_is_the_predicted_one():
    text = conclude(made_up())
    assert "in the order that the theory predicts" in text
    assert "not the order" not in text
    assert "shrinks 1.0·10³⁰-fold (plain sigmoid), 1000-fold (plain ReLU)" in text
    assert "98.0\N{NO-BREAK SPACE}%" in text
    assert "guessing" in text


@pytest.mark.parametrize(
    ("changed", "evidence"),
    [
        ({"accuracies": (0.1, 0.12, 0.9, 0.5)}, "batch norm + residual gets 50.0"),
        ({"accuracies": (0.9, 0.12, 0.5, 0.98)}, "plain ReLU gets 12.0"),
        ({"ratios": (0.5, 1e-3, 0.1, 0.5)}, "more even in plain sigmoid than in plain ReLU"),
        ({"ratios": (1e-30, 1e-3, 0.1, 1e5)}, "more even in batch norm than in batch norm + residual"),
        ({"ratios": (1e-30, math.nan, 0.1, 0.5)}, "plain ReLU"),
    ],
)
def test_the_conclusion_says_when_it_is_not(changed, evidence):
    text = conclude(made_up(**changed))
    assert "This is not the order that the theory predicts" in text
    assert evidence in text


def test_differences_within_the_noise_are_none():
    assert "not the order" not in conclude(made_up((1e-30, 0.02, 1.0, 0.05)))
    assert "not the order" not in conclude(made_up((1e-30, 0.5, 0.4, 0.5), (0.102, 0.1, 0.98, 0.97)))


def test_nets_that_all_guess_confirm_nothing():
    text = conclude(made_up(accuracies=(0.1, 0.1, 0.11, 0.1)))
    assert "does not tell them apart" in text
    assert "theory" not in text


def test_the_conclusion_follows_the_gradient_up_and_to_zero():
    text = conclude(made_up((0.0, 1e-3, 50.0, 0.5)))
    assert "shrinks to zero (plain sigmoid), 1000-fold (plain ReLU), grows 50-fold (batch norm)" in text


def test_the_headline_states_only_what_was_found():
    assert "sigmoid loses the gradient" in headline(made_up())
    assert "learns best" in headline(made_up())
    assert "learns best" not in headline(made_up(accuracies=(0.1, 0.1, 0.99, 0.9)))
    for other in (made_up((0.5, 0.5, 0.5, 0.5)), made_up((1e-30, 1e-3, 0.1, 1e-5)), made_up((1e-30, 1e-3))):
        assert headline(other) == "Gradient and training of nets with 8 weight layers"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0216, "0.022"), (9.96, "10"), (9949.0, "9900"), (12345.0, "1.2·10⁴"), (math.nan, "–")],
)
def test_figures(value, text):
    assert figures(value) == text


# Terminal


def console(width: int, **options):
    return Console(file=io.StringIO(), width=width, **options)


def test_progress_without_a_terminal_is_lines(result):
    out = console(80)
    progress = progress_for(out, SMALL)
    assert isinstance(progress, LogProgress)
    with progress:
        for spec, net in zip(NETS, result.nets, strict=True):
            progress.net_started(spec)
            progress.training_started(spec)
            for done in range(1, len(net.epochs) + 1):
                progress.step_done(spec, 1.0)
                progress.epoch_done(spec, replace(net, epochs=net.epochs[:done]))
            progress.net_done(spec, net)
    lines = out.file.getvalue().splitlines()
    assert "\x1b" not in out.file.getvalue()
    assert len(lines) == 4 * 3
    assert lines[1].startswith("plain sigmoid: epoch 1/2, loss ")
    assert "first/last gradient" in lines[1]
    assert "accuracy" in lines[1]
    assert lines[-1].endswith("0:00 left")


@pytest.mark.usefixtures("few_timed_steps")
def test_progress_on_a_terminal_is_live():
    out = console(120, force_terminal=True)
    with progress_for(out, SMALL) as progress:
        run(SMALL, progress)
    text = out.file.getvalue()
    assert all(spec.label in text for spec in NETS)
    assert "2/2 loss" in text


@pytest.mark.parametrize(("width", "count"), [(140, 1), (120, 1), (100, 2), (78, 2)])
def test_tables_fit_the_terminal(result, width, count):
    out = console(width)
    parts = tables(result, out)
    assert len(parts) == count
    for part in parts:
        out.print(part)
    text = out.file.getvalue()
    assert "…" not in text
    for header in ("accuracy", "loss", "layer 1", "layer 8", "dead", "vgkern", "torch.nn"):
        assert header in text
    assert "backend cpu" in notes(result).lower() or "backend reference" in notes(result).lower()
