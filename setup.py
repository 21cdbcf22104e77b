"""What pyproject.toml cannot say: the optional compiled modules, and the schema inside the wheel."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def extensions() -> list[Extension]:
    """Return the compiled modules, marked optional: where one cannot be compiled the install goes on."""
    if importlib.util.find_spec("cffi") is None:
        return []
    return [made for source in sorted((ROOT / "qmpd").glob("*/_*_build.py")) if (made := extension(source)) is not None]


def extension(source: Path) -> Extension | None:
    """Return what the cffi source makes."""
    spec = importlib.util.spec_from_file_location(source.stem, source)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A relative folder keeps the object files below build/, as setuptools demands.
    made = module.ffibuilder.distutils_extension(str(Path("build") / "cffi" / source.stem))
    made.optional = True
    return made


class BuildWithSchema(build_py):
    """Copies qapi/*.json into the wheel as qmpd/_qapi; a checkout reads them where they are."""

    def run(self) -> None:
        """Build as usual, then add the schema."""
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / "qmpd" / "_qapi"
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted((ROOT / "qapi").glob("*.json")):
            shutil.copyfile(source, target / source.name)


setup(ext_modules=extensions(), cmdclass={"build_py": BuildWithSchema})
