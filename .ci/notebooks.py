"""Execute the notebooks: each `notebooks/0x_name.py` becomes `0x_name.ipynb`, with its outputs.

    python .ci/notebooks.py                 write them
    python .ci/notebooks.py --check         only say whether each .ipynb still holds its .py

Nothing of the machine goes into the files: no time stamps, no paths, no kernel's version.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
LIMIT = 300
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(notebook: Any) -> list[tuple[str, str]]:
    """Kind and text of every cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def is_noise(output: Any) -> bool:
    """Whether an output is the remark about widgets that a library makes at its import; other warnings are an error."""
    if output.get("name") != "stderr":
        return False
    if "IProgress not found" in output.text:
        return True
    raise RuntimeError(f"a cell wrote to stderr: {output.text}")


def execute(source: Path) -> float:
    """Run one notebook and write it beside its source; returns the seconds it took."""
    notebook = jupytext.read(source)
    began = time.perf_counter()
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    seconds = time.perf_counter() - began
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_noise(output)]
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return seconds


def main() -> int:
    """Exit code 1 if a pair has come apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", help="beginnings of names; all without any")
    options = parser.parse_args()
    apart = 0
    for source in sorted(FOLDER.glob("0*.py")):
        if options.names and not source.name.startswith(tuple(options.names)):
            continue
        if options.check:
            written = source.with_suffix(".ipynb")
            same = written.exists() and cells(nbformat.read(written, 4)) == cells(jupytext.read(source))
            print(f"{source.name}: {'ok' if same else 'differs from its .ipynb; run python .ci/notebooks.py'}")
            apart += not same
        else:
            print(f"{source.name}: {execute(source):.0f} s", flush=True)
    return int(apart > 0)


if __name__ == "__main__":
    sys.exit(main())
