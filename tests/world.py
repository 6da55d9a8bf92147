"""A seeded world to watch: 30 numbers of ten shapes that depend on each other, 5 names, holes."""

import numpy as np

N_NUMBERS = 30
HOLES = [j for j in range(N_NUMBERS) if j % 6 == 5]
SYMMETRIC = [j for j in range(N_NUMBERS) if j % 10 in (0, 2, 6)]
"""Numbers whose distribution does not change when their sign does."""
_SHAPES = (
    lambda v: v,
    lambda v: np.exp(0.7 * v),
    lambda v: v**3 / 3 + v,
    lambda v: np.round(3 * v),
    np.abs,
    lambda v: np.maximum(v, 0),
    np.tanh,
    lambda v: np.where(v > 1, 5 + v, v),
    lambda v: np.exp(v / 2) + v,
    lambda v: np.floor(np.exp(v)),
)


class World:
    """One world; `rows` draws from it."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        loadings = 0.5 * draw.normal(size=(N_NUMBERS, 6))
        covariance = loadings @ loadings.T + np.diag(draw.uniform(0.4, 1.0, N_NUMBERS))
        scale = np.sqrt(np.diag(covariance))
        self.correlations = covariance / np.outer(scale, scale)
        self._root = np.linalg.cholesky(self.correlations)
        self._shares = [np.cumsum(draw.dirichlet(2 * np.ones(k))) for k in (3, 5, 10, 20, 40)]
        self.sd = self.shaped(self.normal(draw, 20_000)).std(axis=0)

    def normal(self, draw: np.random.Generator, n: int) -> np.ndarray:
        """(n, 30) what is behind the numbers."""
        return draw.normal(size=(n, N_NUMBERS)) @ self._root.T

    def shaped(self, normal: np.ndarray) -> np.ndarray:
        """(n, 30) the numbers."""
        return np.stack([_SHAPES[j % 10](normal[:, j]) for j in range(N_NUMBERS)], axis=1)

    def rows(self, draw: np.random.Generator, n: int, *, normal=None, shift=None) -> dict:
        """Columns of n rows; `shift`: (number, standard deviations) to move one by."""
        numbers = self.shaped(self.normal(draw, n) if normal is None else normal)
        if shift is not None:
            numbers[:, shift[0]] += shift[1] * self.sd[shift[0]]
        columns = {}
        for j in range(N_NUMBERS):
            column = numbers[:, j].astype(np.float32)
            if j in HOLES:
                column[draw.random(n) < 0.05] = np.nan
            columns[f"n{j}"] = column
        for k, shares in enumerate(self._shares):
            names = np.array([f"level {i}" for i in range(shares.size)], object)
            columns[f"c{k}"] = names[shares[:-1].searchsorted(draw.random(n))]
        return columns


def cut(columns: dict, start: int, stop: int) -> dict:
    """Some of the rows."""
    return {name: column[start:stop] for name, column in columns.items()}


def in_blocks(monitor, columns: dict, *, rows: int = 50, at: float = 0.0, step: float = 1.0) -> int:
    """Update block by block until a page is raised; rows until then, 0 if none was."""
    n = len(next(iter(columns.values())))
    for k, start in enumerate(range(0, n, rows)):
        raised = monitor.update(cut(columns, start, start + rows), at=at + k * step)
        if any(alarm.level == "page" for alarm in raised):
            return start + rows
    return 0
