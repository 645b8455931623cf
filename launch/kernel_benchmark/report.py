"""Rows for people: a table and a plot."""

from collections.abc import Sequence
from pathlib import Path

from launch.kernel_benchmark.measure import Row


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; nothing where nothing was measured."""
    columns = list(rows[0]) if rows else []
    cells = [columns, *(["" if row[c] is None else str(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = {"op", "case", "implementation"}
    lines = (
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in zip(columns, line, widths)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def plot(rows: Sequence[Row], title: str, file: Path) -> None:
    """Bars: the share of the memory limit of every timed case and implementation, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["share_of_limit"] is not None]
    names = list(dict.fromkeys(row["implementation"] for row in timed))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.22 * len(timed)), layout="constrained")
    places, last = [], None
    place = 0.0
    for row in timed:
        place += 1.0 if (row["op"], row["case"]) == last else 1.6
        last = row["op"], row["case"]
        places.append(place)
    for name in names:
        of_name = [i for i, row in enumerate(timed) if row["implementation"] == name]
        bars = axes.barh(
            [places[i] for i in of_name], [timed[i]["share_of_limit"] for i in of_name], color=colours[name], label=name
        )
        axes.bar_label(bars, [f"{timed[i]['ms']:.3g} ms" for i in of_name], padding=3, fontsize=7)
    axes.set_yticks(places, [f"{row['op']}: {row['case']}" for row in timed], fontsize=7)
    axes.margins(x=0.1, y=0.01)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="bytes it must move, over time and copy bandwidth")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
