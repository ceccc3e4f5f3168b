"""The extension ``vgkern._C``; all else is in ``pyproject.toml``.

It needs a C++17 compiler and pybind11, no torch. Without them the package is built all the same: it then runs on its
reference backend and says so (``vgkern.backends.available()``).
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# Without contraction: where the kernels want a·b + c in one rounding they say fma, and nowhere else is it one.
# Functions begin at a cache line: else where one lies in it, which any change of another may move, makes up to 8 % of
# its speed (Zen 5).
FLAGS = ["-O2", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-falign-functions=64"]
FLAGS += ["-Wall", "-Wextra"]

# What each file of csrc/isa is compiled with beyond FLAGS; csrc/dispatch.cpp asks the machine for the same, but for
# prefetchw, which does nothing on a processor with AVX2 that lacks it. x86 without AVX2 is from before 2015: with -O1
# its kernels take 1.0 to 1.4 times as long, and two thirds of the time to compile, which everybody waits for.
X86_FLAGS = {
    "baseline.cpp": ["-O1"],
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mprfchw"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mbmi2", "-mprfchw"],
}
ISA_FLAGS = X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline.cpp": []}


def sources() -> list[str]:
    return sorted(map(str, [*Path("csrc").glob("*.cpp"), *(Path("csrc/isa", name) for name in ISA_FLAGS)]))


class BuildExtension(build_ext):
    """Compiles with flags of each file's own, two files at a time, with OpenMP where the compiler has it."""

    def run(self) -> None:
        super().run()
        for ext in self.extensions:
            if not Path(self.get_ext_fullpath(ext.name)).exists():
                _say(f"{ext.name} was not built (see above); CPU tensors will run on the reference backend")

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise CompileError(f"pybind11 is needed to build {ext.name}") from error

        openmp = ["-fopenmp"] if self._has_openmp() else []
        if not openmp:
            _say("the compiler has no OpenMP; the CPU kernels will run on one thread")

        def compile_one(source: str) -> str:
            (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            if self.force or newer_group([source, *ext.depends], target):
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=[pybind11.get_include()],
                    extra_postargs=[*FLAGS, *openmp, *ISA_FLAGS.get(Path(source).name, [])],
                )
            return target

        # Those of csrc/isa take longest and come first, so that the last two end together.
        order = sorted(ext.sources, key=lambda source: "isa" not in source)
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(compile_one, order))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=openmp, target_lang="c++"
        )

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            command = [*self.compiler.compiler_so_cxx, "-fopenmp", str(source), "-o", str(Path(folder, "openmp"))]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:  # no such compiler: compiling will say so
                return False


def _say(message: str) -> None:
    print(f"vgkern: {message}", file=sys.stderr)


setup(
    ext_modules=[
        Extension(
            "vgkern._C",
            sources(),
            depends=["setup.py", *(str(path) for path in Path("csrc").glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
