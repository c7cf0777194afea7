"""Drives CMake; everything else stands in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds the libraries and puts them beside the package's modules."""

    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).parent.resolve()
        packages = [Path(self.get_ext_fullpath(ext.name)).resolve().parent]
        if self.editable_mode:  # of itself setuptools copies _C alone to the sources
            packages.append(source / "python" / "ternary_ssm")
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            *("cmake", "-S", source, "-B", build, "-G", "Ninja"),
            # Build tools live in pip's build environment, which is another directory each time.
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTERNARY_CUDA={os.environ.get('TERNARY_CUDA', 'AUTO')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        for package in packages:
            subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)


setup(ext_modules=[Extension("ternary_ssm._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
