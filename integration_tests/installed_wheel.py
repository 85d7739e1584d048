"""Installs the wheel in an empty venv and trains there, outside of the checkout: `make wheel`.

It runs the README's Python, and a weighted training step in each toolkit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "undimix_plugins", *sorted((ROOT / "adapters").glob("undimix_*"))]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
STEPS = Path(__file__).with_name("weighted_steps.py")
WHERE = """
import undimix_plugins
assert undimix_plugins.__version__ == {version!r}, undimix_plugins.__version__
assert undimix_plugins.__file__.startswith({folder!r}), undimix_plugins.__file__
print("undimix_plugins", undimix_plugins.__version__)
"""


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one {pattern}, got {[path.name for path in found]}")
    return found[0]


def check_files(wheel: Path) -> None:
    """Every module of the checkout is in the wheel, and each package says that it is typed."""
    expected = {
        path.relative_to(source.parent).as_posix()
        for source in SOURCES
        for path in (*source.rglob("*.py"), source / "py.typed")
    }
    with ZipFile(wheel) as archive:
        missing = expected - set(archive.namelist())
    if missing:
        raise SystemExit(f"{wheel.name}: lacks {sorted(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("folder", type=Path, help="the folder with the wheel and the sdist")
    parser.add_argument("--release", help="the tag that has to be the version's, such as v0.1.0")
    parser.add_argument("--constraint", type=Path, help="the file with the releases to install it beside")
    options = parser.parse_args()
    wheel = only(options.folder, "*.whl").resolve()
    version = wheel.name.split("-")[1]
    only(options.folder, f"*-{version}.tar.gz")
    if options.release and options.release != f"v{version}":
        raise SystemExit(f"--release: expected v{version}, the version in pyproject.toml, got {options.release}")
    check_files(wheel)

    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        # stable-pretraining asks for newer releases than the oldest of the others.
        extras = "all" if options.constraint else "all,stable-pretraining"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[{extras}]"]
        if options.constraint:
            install += ["--constraint", options.constraint.resolve()]
        print(f"installing {wheel.name}[{extras}]", flush=True)
        subprocess.run(install, cwd=folder, check=True)
        for block in (WHERE.format(version=version, folder=str(folder)), *BLOCKS):
            # -I: neither the current folder nor PYTHONPATH is searched.
            subprocess.run([python, "-I", "-c", block], cwd=folder, check=True)
        subprocess.run([python, "-I", STEPS], cwd=folder, check=True)
    print(f"the README's {len(BLOCKS)} blocks and a step in each toolkit ran with {wheel.name}")


if __name__ == "__main__":
    main()
