"""Pictures of a solve: errors against seconds, and slices of the solution."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.pde.marching import EvolutionSolution
from jaxstack.pde.problem import Problem
from jaxstack.pde.solution import Solution
from jaxstack.pde.transport import OptimalTransport


def _figure(columns: int, width: float = 4.2, height: float = 3.8) -> tuple[Any, Any]:
    # No pyplot: it keeps figures in a global and chooses a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_errors(
    path: str | Path, histories: Mapping[str, Sequence[Mapping[str, Any]]], *, fields: Sequence[str] = ("c_l2",)
) -> None:
    """Errors against run seconds, log-log, a line for each history and field that has values. Histories whose names
    differ behind a comma and "seed" alone share a colour and a name.
    """
    figure, (axes,) = _figure(1, 7.0, 4.5)
    colours: dict[str, Any] = {}
    for history, rows in histories.items():
        for field in fields:
            points = [(r["seconds"], r[field]) for r in rows if r.get(field) and np.isfinite(r[field])]
            if not points:
                continue
            name = history.partition(", seed ")[0] + (f" {field}" if len(fields) > 1 else "")
            (line,) = axes.loglog(*zip(*points), color=colours.get(name), label=None if name in colours else name)
            colours[name] = line.get_color()
    axes.set_xlabel("run seconds")
    axes.set_ylabel(", ".join(fields))
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_solution(
    path: str | Path, solution: Solution, *, axes: tuple[int, int] = (0, 1), resolution: int = 81
) -> None:
    """A slice of the solution through two coordinates, the others in the middle of the domain; beside it, where it is
    known, the exact solution and the error. In one dimension, a curve. Of a map, images of points.
    """
    problem = solution.problem
    if isinstance(problem, OptimalTransport):
        _plot_map(path, solution, problem)
        return
    low, high = (np.asarray(corner) for corner in problem.domain.box)
    if problem.dim == 1:
        x = np.linspace(low[0], high[0], 401)[:, None]
        figure, (panel,) = _figure(1, 7.0, 4.0)
        panel.plot(x[:, 0], np.asarray(solution(jnp.asarray(x))), label="u")
        if problem.exact is not None:
            panel.plot(x[:, 0], _exact(problem, x), "--", label="exact")
        panel.legend()
        figure.savefig(path, dpi=110)
        return
    a, b = axes
    grid = [np.linspace(low[k], high[k], resolution) for k in (a, b)]
    points = np.tile((low + high) / 2, (resolution**2, 1))
    points[:, a], points[:, b] = (g.ravel() for g in np.meshgrid(*grid, indexing="ij"))
    inside = np.asarray(problem.domain.contains(jnp.asarray(points)))
    shown = [("u", np.asarray(solution(jnp.asarray(points))))]
    if problem.exact is not None:
        exact = _exact(problem, points)
        shown += [("exact", exact), ("|error|", np.abs(shown[0][1] - exact))]
    figure, panels = _figure(len(shown))
    for panel, (title, values) in zip(panels, shown):
        image = np.where(inside, values, np.nan).reshape(resolution, resolution).T
        drawn = panel.imshow(image, origin="lower", extent=(low[a], high[a], low[b], high[b]), aspect="auto")
        figure.colorbar(drawn, ax=panel)
        panel.set_title(title)
        panel.set_xlabel(f"x_{a}")
        panel.set_ylabel(f"x_{b}")
    figure.savefig(path, dpi=110)


def _exact(problem: Problem, x: np.ndarray) -> np.ndarray:
    exact = problem.exact
    assert exact is not None
    return np.asarray(jax.vmap(lambda p: jnp.asarray(exact(p)))(jnp.asarray(x)))


def _plot_map(path: str | Path, solution: Solution, problem: OptimalTransport) -> None:
    x = problem.sample_source(jax.random.key(1), 2000)
    y = np.asarray(problem.sample_target(jax.random.key(2), 2000))
    image = np.asarray(solution(x))
    if problem.dim == 1:
        figure, (panel,) = _figure(1, 7.0, 4.0)
        order = np.argsort(np.asarray(x)[:, 0])
        panel.plot(np.asarray(x)[order, 0], image[order, 0], label="T")
        if problem.exact_map is not None:
            exact = problem.exact_map(np.asarray(x, float)[order])
            panel.plot(np.asarray(x)[order, 0], exact[:, 0], "--", label="exact")
        panel.legend()
        figure.savefig(path, dpi=110)
        return
    # The two coordinates in which the distributions differ most.
    a, b = np.sort(np.argsort(np.abs(y.std(axis=0) - np.asarray(x).std(axis=0)))[-2:])
    figure, panels = _figure(3)
    for panel, (title, points) in zip(panels, (("source", np.asarray(x)), ("image", image), ("target", y))):
        panel.plot(points[:, a], points[:, b], ".", markersize=2)
        panel.set_title(title)
        panel.set_xlabel(f"x_{a}")
        panel.set_ylabel(f"x_{b}")
    figure.savefig(path, dpi=110)


def plot_evolution(path: str | Path, solution: EvolutionSolution, *, resolution: int = 81) -> None:
    """The solution at each time: curves in one dimension, slices through the first two coordinates in more."""
    low, high = (np.asarray(corner) for corner in solution.evolution.problem.domain.box)
    if solution.net.dim == 1:
        x = np.linspace(low[0], high[0], 401)[:, None]
        figure, (panel,) = _figure(1, 7.0, 4.0)
        for index, time in enumerate(solution.times):
            panel.plot(x[:, 0], np.asarray(solution(jnp.asarray(x), index)), label=f"t = {time:g}")
        panel.legend()
        figure.savefig(path, dpi=110)
        return
    grid = [np.linspace(low[k], high[k], resolution) for k in (0, 1)]
    points = np.tile((low + high) / 2, (resolution**2, 1))
    points[:, 0], points[:, 1] = (g.ravel() for g in np.meshgrid(*grid, indexing="ij"))
    figure, panels = _figure(len(solution.times), 3.4, 3.2)
    for index, (panel, time) in enumerate(zip(panels, solution.times)):
        image = np.asarray(solution(jnp.asarray(points), index)).reshape(resolution, resolution).T
        drawn = panel.imshow(image, origin="lower", extent=(low[0], high[0], low[1], high[1]), aspect="auto")
        figure.colorbar(drawn, ax=panel)
        panel.set_title(f"t = {time:g}")
    figure.savefig(path, dpi=110)
