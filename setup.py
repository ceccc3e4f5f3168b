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

# Without contraction: where the kernels want a·b + c in one rounding they say fma, and nowhere else is it one.
FLAGS = ["-O2", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]

# What each file of csrc/isa is compiled with beyond FLAGS; csrc/dispatch.cpp asks the machine for the same.
X86_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


def sources() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    paths = [*Path("csrc").glob("*.cpp"), Path("csrc/isa/baseline.cpp")]
    paths += [Path("csrc/isa", name) for name in X86_FLAGS if x86]
    return sorted(str(path) for path in paths)


class BuildExtension(build_ext):
    """Compiles with flags of each file's own, two files at a time, with OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        openmp = ["-fopenmp"] if self._has_openmp() else []
        if not openmp:
            print("vgkern: the compiler has no OpenMP; the CPU kernels will run on one thread", file=sys.stderr)

        def compile_one(source: str) -> list[str]:
            flags = [*FLAGS, *openmp, *X86_FLAGS.get(Path(source).name, [])]
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[pybind11.get_include()],
                depends=ext.depends,
                extra_postargs=flags,
            )

        # The longest first, so that the last two end together.
        longest_first = sorted(ext.sources, key=lambda source: "isa" not in source)
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = [path for paths in pool.map(compile_one, longest_first) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=openmp,
            target_lang="c++",
            build_temp=self.build_temp,
        )

    def run(self) -> None:
        super().run()
        for ext in self.extensions:
            if not Path(self.get_ext_fullpath(ext.name)).exists():
                print(
                    f"vgkern: {ext.name} was not built; the package will use its reference backend on CPU",
                    file=sys.stderr,
                )

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            command = [*self.compiler.compiler_so_cxx, "-fopenmp", str(source), "-o", str(Path(folder, "openmp"))]
            return subprocess.run(command, capture_output=True).returncode == 0


setup(
    ext_modules=[
        Extension("vgkern._C", sources(), depends=[str(path) for path in Path("csrc").glob("*.h")], optional=True)
    ],
    cmdclass={"build_ext": BuildExtension},
)
