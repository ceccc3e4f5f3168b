"""The demo: four nets of equal depth on real digits, and what their gradients do on the way down.

``run`` trains and measures, ``save_figure`` draws, ``conclude`` puts the numbers into words. Needs the extra
``vgkern[demo]``: scikit-learn for the data, matplotlib for the figure, rich for the command line.
"""

from .conclusion import conclude
from .figure import draw as draw_figure
from .figure import save as save_figure
from .nets import NETS, DeepNet, NetSpec
from .results import Config, DemoResult, EpochResult, NetResult, StepSeconds
from .training import Observer, run

__all__ = [
    "NETS",
    "Config",
    "DeepNet",
    "DemoResult",
    "EpochResult",
    "NetResult",
    "NetSpec",
    "Observer",
    "StepSeconds",
    "conclude",
    "draw_figure",
    "run",
    "save_figure",
]
