"""Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", figure 7.

The paper: with the usual initialisation, W ~ U[-1/√n, 1/√n], the gradient that is propagated back shrinks from layer to
layer, by n·Var[W] = 1/3 in variance (its equation 14), that is 0.58 in norm; with the normalised one,
W ~ U[-√6/√(n + n'), √6/√(n + n')], it stays about the same. Sigmoid loses it in either.

Here: five hidden layers as in the paper, 512 units wide, on the digits; one gradient before training, median of five
seeds, read from the backward kernels by a GradientMonitor.

    python examples/glorot_bengio_2010.py      # prints a table, writes glorot_bengio_2010.png; needs vgkern[demo]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgkern.demo import data
from vgkern.gradients import GradientMonitor
from vgkern.nn import AddAct

LAYERS = 5


def usual(weight: Tensor) -> None:
    nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))


INITIALISATIONS: dict[str, Callable[[Tensor], object]] = {"usual": usual, "normalised": nn.init.xavier_uniform_}


def gradient_norms(activation: str, initialisation: str, width: int = 512, seeds: int = 5) -> list[float]:
    """Norm of the gradient at each hidden layer's pre-activations, input first, median over the seeds."""
    digits = data.load(torch.device("cpu"))
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n_in in (64, *[width] * (LAYERS - 1)):
            layers += [nn.Linear(n_in, width), AddAct(activation=activation)]
        net = nn.Sequential(*layers, nn.Linear(width, 10))
        for module in net:
            if isinstance(module, nn.Linear):
                INITIALISATIONS[initialisation](module.weight)
                nn.init.zeros_(module.bias)
        with GradientMonitor(net) as monitor:
            F.cross_entropy(net(digits.train_images[:256].flatten(1)), digits.train_labels[:256]).backward()
            monitor.step()
        runs.append([record.grad_preact_norm for record in monitor.records() if record.source == "kernel"])
    return [statistics.median(norms) for norms in zip(*runs, strict=True)]


def main(out: Path = Path("glorot_bengio_2010.png"), **options: int) -> dict[tuple[str, str], list[float]]:
    results = {
        (activation, initialisation): gradient_norms(activation, initialisation, **options)
        for activation in ("sigmoid", "tanh")
        for initialisation in INITIALISATIONS
    }
    print("activation  initialisation  layer 1 ... 5: gradient norm                 a layer   paper")
    for (activation, initialisation), norms in results.items():
        factor = (norms[0] / norms[-1]) ** (1 / (LAYERS - 1))
        claim = {"tanh": {"usual": "0.58", "normalised": "about 1"}}.get(activation, {}).get(initialisation, "below 1")
        print(f"{activation:11} {initialisation:15} {'  '.join(f'{n:.1e}' for n in norms)}   {factor:6.2f}    {claim}")
    draw(results, out)
    return results


def draw(results: dict[tuple[str, str], list[float]], out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from vgkern.figures import BLUE, LIGHT, ORANGE, panel_title, style

    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        ax = figure.subplots()
        panel_title(ax, "Gradient before training, by layer", "norm at the pre-activations, log scale")
        for (activation, initialisation), norms in results.items():
            ax.plot(
                range(1, LAYERS + 1), norms, marker="o", label=f"{activation}, {initialisation}",
                color=BLUE if activation == "tanh" else ORANGE, linestyle="-" if initialisation == "normalised" else ":"
            )  # fmt: skip
        ax.set_yscale("log")
        ax.set_xticks(range(1, LAYERS + 1))
        ax.set_xlabel("hidden layer, from the input")
        ax.legend(frameon=False)
        figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
