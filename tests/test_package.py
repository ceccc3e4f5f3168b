"""The package as users get it: what importing it costs, what works without a compiler, metadata, examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tomllib

import vgkern

ROOT = Path(__file__).parents[1]


def _python(code: str, **environment: str) -> str:
    """The standard output of a fresh interpreter in which no backend is forced, and warnings are shown."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VGKERN_CPU_ISA")} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_neither_triton_nor_what_the_extras_bring():
    """They take seconds together, and none of them is there in a plain installation."""
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import vgkern
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    imported = set(_python(code).split())
    assert "vgkern" in imported
    assert not imported & {"triton", "matplotlib", "rich", "sklearn", "click", "scipy", "pytest", "pandas"}


def test_a_step_on_the_cpu_imports_no_triton():
    code = """
        import sys
        import torch, vgkern
        vgkern.nn.BatchNormAct2d(3)(torch.randn(2, 3, 4, 4)).sum().backward()
        print("triton.language" in sys.modules)
    """
    assert _python(code).strip() == "False"


_WITHOUT_THE_EXTENSION = """
    import sys, warnings

    class NoExtension:
        def find_spec(self, name, path=None, target=None):
            if name == "vgkern._C":
                raise ImportError("no compiler was there")

    sys.meta_path.insert(0, NoExtension())
    import torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import vgkern
        at_import = len(caught)
        layer = vgkern.nn.BatchNormAct2d(3)
        for _ in range(2):
            x = torch.randn(4, 3, 5, 5, requires_grad=True)
            y = layer(x, x)
            y.sum().backward()
        states = vgkern.backends.available()
    messages = [str(w.message) for w in caught if "vgkern" in str(w.message)]
    assert at_import == len(messages) == 1, (at_import, messages)
    assert "_C" in messages[0] and "no compiler was there" in messages[0], messages
    assert states["reference"] == "usable", states
    assert "_C" in states["cpu"], states
    assert vgkern.backends.name_of("cpu") == "reference"
    plain = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert torch.allclose(y, (plain + x).relu(), atol=1e-5)
    assert layer.grad_stats().backwards == 2
    try:
        with vgkern.backends.use("cpu"):
            pass
    except RuntimeError as error:
        assert "not usable" in str(error) and "_C" in str(error), error
    else:
        raise AssertionError("a backend that is not there was accepted")
"""


def test_without_the_extension_it_warns_once_and_computes_on_the_reference():
    _python(_WITHOUT_THE_EXTENSION)


def test_with_the_extension_it_does_not_warn():
    code = """
        import warnings
        import torch
        warnings.simplefilter("error")
        import vgkern
        vgkern.nn.BatchNormAct2d(3)(torch.randn(4, 3, 5, 5)).sum().backward()
        print(vgkern.backends.name_of("cpu"))
    """
    assert _python(code).strip() == "cpu"


def test_the_kernels_are_installed_as_a_part_of_the_package():
    from vgkern.kernels import activations, batch_norm, tuning

    for module in (activations, batch_norm, tuning):
        assert module.__name__.startswith("vgkern.kernels.")
        assert module.__doc__
    top_level = importlib.metadata.packages_distributions()
    assert "vgkern" not in top_level.get("kernels", []), "a package named `kernels` exists elsewhere"


def _imports(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it; relative imports as dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level if node.level else node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_the_kernels_know_nothing_of_the_package(path):
    assert not _imports(path) & {"vgkern", "..", "..."}
    assert _imports(path) <= {"triton", "torch", ".", *sys.stdlib_module_names}


def test_only_what_is_required_is_imported_at_module_level():
    extras = {"rich", "matplotlib", "sklearn", "click", "pytest"}
    for path in (ROOT / "vgkern").rglob("*.py"):
        if "demo" in path.parts:
            continue  # the extra of that name brings them
        tree = ast.parse(path.read_text())
        names = {
            alias.name.partition(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        } | {(node.module or "").partition(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not names & extras, path


def test_metadata():
    assert importlib.metadata.version("vgkern") == vgkern.__version__
    metadata = importlib.metadata.metadata("vgkern")
    assert metadata["License-Expression"] == "BSD-3-Clause"
    plain = [r for r in importlib.metadata.requires("vgkern") if "extra ==" not in r]
    assert sorted(r.partition(">=")[0] for r in plain) == ["numpy", "torch", "triton"]
    assert next(r for r in plain if r.startswith("torch")) == "torch>=2.9"
    assert "Linux" in next(r for r in plain if r.startswith("triton"))
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert scripts["vgkern"].load() is importlib.import_module("vgkern.cli").main


def test_every_package_is_listed_for_installation():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vgkern").rglob("__init__.py")}
    assert listed == found | {"vgkern.kernels"}


# Examples -------------------------------------------------------------------------------------------------------------

_NOT_PUBLIC = ("vgkern.__main__", "vgkern._C", "vgkern._version")
_MODULES = [
    "vgkern",
    *(
        module.name
        for module in pkgutil.walk_packages(vgkern.__path__, "vgkern.")
        if module.name not in _NOT_PUBLIC and not module.name.startswith("vgkern.kernels")
    ),
]


# What a module stands on that an extra brings.
_STANDS_ON = {"vgkern.gradients.lightning": "pytorch_lightning", "vgkern.gradients.transformers": "transformers"}


def _imported(name: str):
    if name in _STANDS_ON:
        pytest.importorskip(_STANDS_ON[name])
    return importlib.import_module(name)


@pytest.mark.parametrize("name", _MODULES)
def test_examples_run(name):
    module = _imported(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize(
    "public",
    [
        "activations.names", "backends.available", "backends.use", "functional.add_act", "functional.batch_norm_act",
        "gradients.GradientMonitor", "gradients.GradientMonitor.report",
        "nn.AddAct", "nn.BatchNormAct1d", "nn.BatchNormAct2d", "nn.BatchNormAct3d", "nn.BatchNormAct2d.grad_stats",
        "init.gain", "init.init_weights_", "models.cifar_resnet", "models.resnet18", "models.resnet34",
        "models.resnet50", "models.resnet101", "models.resnet152", "nn.BasicBlock", "nn.Bottleneck", "nn.DropPath",
        "nn.PreActBasicBlock", "nn.PreActBottleneck",
        "memory.empty_cache", "memory.set_limit", "memory.stats", "testing.assert_matches_autograd", "verify",
    ],
)  # fmt: skip
def test_what_the_contract_names_has_an_example(public):
    thing = vgkern
    for part in public.split("."):
        thing = getattr(thing, part)
    assert ">>>" in thing.__doc__


@pytest.mark.parametrize("name", _MODULES)
def test_what_a_module_exports_is_there_and_documented(name):
    module = _imported(name)
    assert module.__doc__
    for exported in getattr(module, "__all__", ()):
        thing = getattr(module, exported)
        if callable(thing):
            assert thing.__doc__, exported
