"""He et al. 2015, "Deep Residual Learning" (arXiv 1512.03385), figure 6 and table 6: deeper plain nets are worse.

The paper: on CIFAR-10 a plain net has the larger training error the deeper it is, from 20 to 56 layers (degradation),
although batch norm keeps its gradients healthy; at 110 layers its error stays above 60 %. With shortcuts, which add no
parameter, the deeper net is the better one: 8.75 % test error at 20 layers, 6.97 % at 56, 6.43 % at 110.

Here: the same nets at half the width, on the digits, 12 epochs by SGD with momentum 0.9 in batches of 128, weight decay
1e-4, one seed; a constant learning rate of 0.02, where the paper starts its 110 layers at 0.01 and goes on at 0.1.

    python examples/he_2015_resnet.py          # prints a table, writes he_2015_resnet.png; needs vgkern[demo]

Measured (torch 2.13, one CPU thread), error on the training set by depth: plain 0.6, 55 and 90 %, with shortcuts 0 % at
all three; on unseen images 7, 55, 90 and 3.1, 3.8, 4.9 %. Other than in the paper, the deeper residual net is not the
better one: 20 layers are enough for these images. And the plain nets' gap is larger than there, where they train for
64,000 steps and not 120.

The learning rate was chosen: at a constant 0.1 the residual net of 110 layers still had a training error of 63 % after
these 12 epochs (plain 90 %), those of 20 and 56 layers below 1 %.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from _common import Data, accuracy, arguments, panels, print_table, smooth, train

from vgkern.models import cifar_resnet

DEPTHS = (20, 56, 110)
CLAIMS = {  # test error on CIFAR-10
    (False, 20): "lowest of the plain", (False, 56): "higher", (False, 110): "above 60 %",
    (True, 20): "8.75 %", (True, 56): "6.97 %", (True, 110): "6.43 %",
}  # fmt: skip


def main(out: Path, data: Data, width: int = 8, epochs: int = 12) -> dict[tuple[bool, int], dict]:
    """{(with shortcuts, depth): training loss by step, training and test accuracy}"""
    results = {}

    def rows():
        for shortcut, depth in itertools.product((False, True), DEPTHS):
            torch.manual_seed(0)
            channels = data.train_images.shape[1]
            net = cifar_resnet(depth, in_channels=channels, width=width, shortcut=shortcut)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
            losses = train(net, optimizer, data, epochs=epochs)
            # by the statistics of the batch: the running ones lag behind so few steps
            seen, unseen = (accuracy(net, *part) for part in (data[:2], data[2:4]))
            results[shortcut, depth] = {"losses": losses, "seen": seen, "unseen": unseen}
            kind = "residual" if shortcut else "plain"
            yield (
                f"{kind}, {depth} layers",
                f"{100 * (1 - seen):.1f} %",
                f"{100 * (1 - unseen):.1f} %",
                CLAIMS[shortcut, depth],
            )

    print_table(("", "training error", "test error", "the paper, CIFAR-10"), rows())
    draw(results, out)
    return results


def draw(results: dict[tuple[bool, int], dict], out: Path) -> None:
    from vgkern.figures import BLUE, GREEN, ORANGE

    titles = [(name, "training loss, mean of 10 steps") for name in ("Plain", "With shortcuts")]
    with panels(out, *titles, sharey=True) as axes:
        for ax, shortcut in zip(axes, (False, True), strict=True):
            for depth, colour in zip(DEPTHS, (GREEN, BLUE, ORANGE), strict=False):
                losses = smooth(results[shortcut, depth]["losses"], 10)
                steps = [10 * (i + 1) for i in range(len(losses))]
                ax.plot(steps, losses, color=colour, label=f"{depth} layers")
            ax.set_xlabel("step")
        axes[0].set_ylim(bottom=0)
        axes[1].legend(frameon=False, labelcolor="linecolor")


if __name__ == "__main__":
    main(**arguments(__doc__ or "", __file__))
