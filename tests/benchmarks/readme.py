"""The README's table of costs, from what `python -m tests.benchmarks` has measured."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- benchmarks: python -m tests.benchmarks --readme -->", "<!-- end of benchmarks -->"

COLUMNS = {
    "mlp": "MLP, P = 235k, batch 512",
    "cnn70k": "CNN, P = 69k, batch 64",
    "gpt": "GPT, P = 0.83M, 8 x 64 tokens",
}
ROWS = {
    "GGN": "GGN product",
    "MC Fisher": "MC Fisher product",
    "EF": "empirical Fisher product",
    "Hessian": "Hessian product",
    "GGN, 16 columns": "GGN, 16 columns at once, per column",
    "GGN, no cache": "GGN product, `cache=False`",
    "GGN, build and first product": "GGN, built and multiplied once",
}

STRUCTURED = {
    "diagonal, exact": ("exact diagonal of the GGN", "diagonal"),
    "KFAC, exact": ("KFAC, exact Fisher", "KFAC exact"),
    "KFAC, mc": ("KFAC, one sample", "KFAC mc"),
}
"""Row of curvops → its title, and what the peers' rows are called."""
PEERS = ("BackPACK", "ASDL", "curvlinops")


def text(measured: dict[str, Any]) -> str:
    """Sentence and tables."""
    products, machine = measured["products"]["results"], measured["products"]["machine"]
    rounds, torch = measured["products"]["rounds"], machine["torch"].split("+")[0]
    how = (
        f"In gradients of the summed loss on the same batch (medians of CPU time over {rounds} rounds, in one process "
        f"and in turns; float32, {_threads(machine)}, {machine['processor']}, torch {torch}); in brackets the "
        "same by curvlinops. Products are warm, if nothing else is said: the graph of the batch is kept, and two dozen "
        "were made on it before."
    )
    lines = [
        textwrap.fill(how, 120, break_long_words=False, break_on_hyphens=False),
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for key, title in ROWS.items():
        entries = [_entry(products[name]["rows"], key) for name in COLUMNS]
        lines.append(f"| {title} | " + " | ".join(entries) + " |")
    seconds = (f"{1e3 * products[name]['rows']['gradient']['cpu_seconds']:.1f} ms" for name in COLUMNS)
    lines.append("| one gradient | " + " | ".join(seconds) + " |")
    if "structured" in measured:
        lines += ["", *_structured(measured["structured"]["results"], _elsewhere(measured["structured"], machine))]
    if "dense" in measured:
        dense = _dense(measured["dense"]["results"], _elsewhere(measured["dense"], machine))
        lines += ["", textwrap.fill(dense, 120, break_on_hyphens=False)]
    return "\n".join(lines)


def write(measured: dict[str, Any]) -> None:
    """Put the text between the README's markers."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} has no '{BEGIN}' … '{END}'.")
    README.write_text(f"{before}{BEGIN}\n\n{text(measured)}\n\n{END}{after}")


def _entry(rows: dict[str, Any], key: str) -> str:
    peer = rows.get(f"curvlinops: {key}")
    return f"{rows[key]['cpu']:.2f}" + ("" if peer is None else f" ({peer['cpu']:.2f})")


def _elsewhere(part: dict[str, Any], machine: dict[str, Any]) -> str:
    """Where a part was measured, if not on the machine that was named first."""
    return "" if part["machine"] == machine else f" ({_threads(part['machine'])}, {part['machine']['processor']})"


def _threads(machine: dict[str, Any]) -> str:
    return "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def _structured(results: dict[str, Any], where: str) -> list[str]:
    """Structured curvatures of the first two networks, built and computed once; a peer's "-" is what it has not."""
    names = [name for name in COLUMNS if name in results]
    lines = [
        textwrap.fill(
            f"Structured curvatures from building to the last number{where}, in gradients and in megabytes above the "
            "model and the batch:",
            120,
        ),
        "",
        "| | curvops | " + " | ".join(PEERS) + " |",
        "|---|---:|" + "---:|" * len(PEERS),
    ]
    for name in names:
        rows, network = results[name]["rows"], COLUMNS[name].split(",")[0]
        for key, (title, theirs) in STRUCTURED.items():
            cells = [rows.get(key), *(rows.get(f"{peer}: {theirs}") for peer in PEERS)]
            entries = ["-" if row is None else f"{row['cpu']:.2f} ({row['megabytes']:.0f} MB)" for row in cells]
            lines.append(f"| {network}: {title} | " + " | ".join(entries) + " |")
    return [*lines, "", textwrap.fill(_multiplied_out(results["mlp"]["rows"]), 120, break_on_hyphens=False)]


def _multiplied_out(rows: dict[str, Any]) -> str:
    cost = {key: f"{row['cpu']:.2f}" for key, row in rows.items()}
    return (
        "The first factor of the MLP's KFAC is a sum over 512 vectors of 784 entries, and kept as these, which answer "
        "all verbs. With every factor multiplied out, as the peers have them, KFAC takes "
        f"{cost['KFAC, exact, multiplied out']} (exact) and {cost['KFAC, mc, multiplied out']} (one sample) gradients; "
        f"one sample and the log-determinant of the damped curvature take {cost['KFAC, mc, log-determinant']}, "
        f"and multiplied out {cost['KFAC, mc, log-determinant, multiplied out']}."
    )


def _dense(result: dict[str, Any], where: str) -> str:
    others = ", ".join(
        f"{row['cpu_seconds']:.1f} s and {row['megabytes']:.0f} MB by {name}"
        for name, row in result.items()
        if name != "curvops"
    )
    ours = result["curvops"]
    return (
        f"The dense GGN of P = 4,990 parameters over 256 data, 10 classes{where}: {ours['cpu_seconds']:.2f} s and "
        f"{ours['megabytes']:.0f} MB at the peak, the matrix of 100 MB included; {others}."
    )
