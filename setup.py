"""Builds the compiled modules; everything else about the package is in pyproject.toml.

Every ``.pyx`` under ``ksmcore`` becomes one extension module. The C that Cython writes goes to
``build`` and never into the source tree or the sdist. What only tests use (``ksmcore._testing``) is
built in a checkout, and left out of wheels.

Environment:
    KSMCORE_TESTING=1    have ksmcore._testing in a wheel too, for tests of what is installed
    KSMCORE_SANITIZE=1   build with the address and undefined-behaviour sanitizers, for
                         `make sanitize`
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = Path("ksmcore")
TESTING = f"{PACKAGE}._testing"


def is_set(variable):
    return os.environ.get(variable, "0") not in ("", "0")


# All modules share these. Code that needs a check writes it, at the one gate where input comes in.
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    # No hidden names that the stubs would have to know: no class here can be pickled anyway.
    "auto_pickle": False,
    "autotestdict": False,
    # Plain built-in functions, with signatures: a tenth less to compile and to load.
    "binding": False,
    "embedsignature": True,
    "embedsignature.format": "clinic",
}

# No -march: a build runs on every machine of its architecture; fast paths are chosen at run time.
# Pages are read as words of several widths, which strict aliasing would not allow.
COMPILE_ARGS = ["-fno-strict-aliasing"]
LINK_ARGS = []
# Where builds leave what they make on the way. Sanitized ones keep apart, so that neither kind is
# ever taken for the other, or makes it compile anew.
BUILD = Path("build")
SANITIZED = is_set("KSMCORE_SANITIZE")
WITH_TESTING = SANITIZED or is_set("KSMCORE_TESTING")
if SANITIZED:
    SANITIZE = ["-fsanitize=address,undefined"]
    LINK_ARGS += SANITIZE
    # The first report ends the process. Python's own flags are taken back where they would hide
    # something: with -fwrapv no signed overflow is reported, and the sanitizer does not see
    # fortified calls.
    COMPILE_ARGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-wrapv", "-U_FORTIFY_SOURCE"]
    COMPILE_ARGS += ["-fno-omit-frame-pointer", "-g", "-O1"]
    BUILD = Path("build", "sanitize")
else:
    COMPILE_ARGS += ["-O3", "-g0"]

# What is entered by the call, never by the page or the array, compiles in half the time.
LIGHT = ["-O1"]
OF_ROOM = {"_core": LIGHT, "_gate": LIGHT, "_hooks": LIGHT, "_testing": LIGHT}
# A thread that is cancelled in a hook's call unwinds through it.
OF_ONE = {f"{PACKAGE}._hooks.calls": ["-fexceptions"]}

# Names what the last build was made with. A change of it makes everything anew.
SETTINGS_FILE = BUILD / "settings.txt"


def extensions():
    """One extension per .pyx; a change of any header rebuilds all of them."""
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.h"))
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("*.pyx"))
    return [
        Extension(
            ".".join(path.with_suffix("").parts),
            [str(path)],
            depends=headers,
            include_dirs=[str(PACKAGE)],
            extra_compile_args=[
                *COMPILE_ARGS,
                *OF_ROOM.get(path.parent.name, []),
                *OF_ONE.get(".".join(path.with_suffix("").parts), []),
            ],
            extra_link_args=LINK_ARGS,
        )
        for path in sources
    ]


def written(extension):
    """The file of C that Cython writes for an extension."""
    return (BUILD / "cython" / extension.sources[0]).with_suffix(".c")


def is_translated(extension):
    """Is its C as new as everything in the project that it was made from?

    Cython would also look at its own files, and at NumPy's: those are new in each of the
    environments that pip builds in, and a second `pip install -e .` would compile everything anew.
    Their versions are in the settings.
    """
    made = written(extension)
    told = made.with_suffix(".c.dep")
    if not made.exists() or not told.exists():
        return False
    names = told.read_text().replace("\\\n", " ").partition(":")[2].split()
    paths = [ROOT / name for name in [*extension.sources, *names]]
    ours = [path for path in paths if path.resolve().is_relative_to(ROOT.resolve() / PACKAGE)]
    return all(path.exists() and path.stat().st_mtime <= made.stat().st_mtime for path in ours)


class BuildPy(build_py):
    """Leaves out what only tests use, unless it is asked for."""

    def finalize_options(self):
        super().finalize_options()
        if not WITH_TESTING:
            self.packages = [name for name in self.packages if name != TESTING]

    def run(self):
        if not WITH_TESTING:
            # What an earlier build may have left there.
            shutil.rmtree(Path(self.build_lib, *TESTING.split(".")), ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Checks the platform and runs Cython, but only when it really builds (not for an sdist)."""

    def finalize_options(self):
        super().finalize_options()
        if SANITIZED and (self.inplace or self.editable_mode):
            # They load into no plain Python, and everything else would use them unawares.
            raise SystemExit("sanitized modules are not built in place: see `make sanitize`")
        in_checkout = self.inplace or self.editable_mode
        if not in_checkout and not WITH_TESTING:
            self.extensions = [e for e in self.extensions if not e.name.startswith(f"{TESTING}.")]
        if in_checkout:
            # An editable install would build in a new temporary directory, and so all modules
            # every time; a lasting one compiles only those that changed.
            # abiflags: a free-threaded or debug build has the tag of the plain one.
            tag = f"{sys.implementation.cache_tag}{sys.abiflags}"
            self.build_lib = f"build/lib-{tag}"
            self.build_temp = f"build/temp-{tag}"
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def run(self):
        try:
            runpy.run_path(str(ROOT / PACKAGE / "_platform.py"))["require_linux"]()
        except ImportError as error:
            raise SystemExit(str(error)) from None

        import Cython
        from Cython.Build import cythonize

        settings = f"{Cython.__version__} {DIRECTIVES} {COMPILE_ARGS} {LINK_ARGS}\n"
        changed = not SETTINGS_FILE.exists() or SETTINGS_FILE.read_text() != settings
        forced = changed or self.force
        old = [one for one in self.extensions if forced or not is_translated(one)]
        translated = cythonize(
            old,
            build_dir=str(BUILD / "cython"),
            compiler_directives=DIRECTIVES,
            depfile=True,
            force=forced,
        )
        if changed:
            SETTINGS_FILE.parent.mkdir(parents=True, exist_ok=True)
            SETTINGS_FILE.write_text(settings)

        import numpy

        by_name = {made.name: made for made in translated}
        for extension in self.extensions:
            if extension.name in by_name:
                vars(extension).update(vars(by_name[extension.name]))
            else:
                extension.sources = [str(written(extension))]
            extension.depends = [*extension.depends, str(SETTINGS_FILE)]
            if extension.name == f"{PACKAGE}._arrays.allocator":
                extension.include_dirs = [*extension.include_dirs, numpy.get_include()]
                # The first that has replaceable allocators: it runs with all later ones too.
                extension.define_macros = [
                    ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
                    ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),
                ]
        super().run()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
