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
from _common import Data, arguments, panels, print_table
from torch import Tensor, nn

from vgkern.gradients import GradientMonitor
from vgkern.nn import AddAct

LAYERS = 5


def usual(weight: Tensor) -> None:
    nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))


INITIALISATIONS: dict[str, Callable[[Tensor], object]] = {"usual": usual, "normalised": nn.init.xavier_uniform_}
CLAIMS = {  # the factor of a layer
    ("sigmoid", "usual"): "below 1", ("sigmoid", "normalised"): "below 1",
    ("tanh", "usual"): "0.58", ("tanh", "normalised"): "about 1",
}  # fmt: skip


def gradient_norms(data: Data, activation: str, initialisation: str, width: int = 512, seeds: int = 5) -> list[float]:
    """Norm of the gradient at each hidden layer's pre-activations, input first, median over the seeds."""
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n_in in (data.train_images[0].numel(), *[width] * (LAYERS - 1)):
            layers += [nn.Linear(n_in, width), AddAct(activation=activation)]
        net = nn.Sequential(*layers, nn.Linear(width, 10))
        for module in net:
            if isinstance(module, nn.Linear):
                INITIALISATIONS[initialisation](module.weight)
                nn.init.zeros_(module.bias)
        with GradientMonitor(net) as monitor:
            F.cross_entropy(net(data.train_images[:256].flatten(1)), data.train_labels[:256]).backward()
            monitor.step()
        runs.append([record.grad_preact_norm for record in monitor.records() if record.source == "kernel"])
    return [statistics.median(norms) for norms in zip(*runs, strict=True)]


def main(out: Path, data: Data, **options: int) -> dict[tuple[str, str], list[float]]:
    results = {}

    def rows():
        for (activation, initialisation), claim in CLAIMS.items():
            norms = results[activation, initialisation] = gradient_norms(data, activation, initialisation, **options)
            factor = (norms[0] / norms[-1]) ** (1 / (LAYERS - 1))
            yield f"{activation}, {initialisation}", *(f"{norm:.1e}" for norm in norms), f"{factor:.2f}", claim

    layers = [f"layer {number}" for number in range(1, LAYERS + 1)]
    print_table(("gradient norm", *layers, "a layer", "the paper"), rows())
    draw(results, out)
    return results


def draw(results: dict[tuple[str, str], list[float]], out: Path) -> None:
    from vgkern.figures import BLUE, ORANGE

    title = ("Gradient before training, by layer", "norm at the pre-activations, log scale")
    with panels(out, title, size=(7, 4.4)) as (ax,):
        for (activation, initialisation), norms in results.items():
            ax.plot(
                range(1, LAYERS + 1), norms, marker="o", label=f"{activation}, {initialisation}",
                color=BLUE if activation == "tanh" else ORANGE, linestyle="-" if initialisation == "normalised" else ":"
            )  # fmt: skip
        ax.set_yscale("log")
        ax.set_xticks(range(1, LAYERS + 1))
        ax.set_xlabel("hidden layer, from the input")
        ax.legend(frameon=False)


if __name__ == "__main__":
    main(**arguments(__doc__ or "", __file__))
