"""What one drift score costs.

Question  Can a worker score 1 000 features once a second within 5 % of one core?
Method    Best of 7 runs of 1 000 calls; 10-bin counts drawn once with seed 7.
Budget    50 us a score.
Run       make bench NAME=psi
"""

import time

import numpy as np

from monitors.distance import psi

BUDGET_US = 50.0
N_CALLS = 1000
N_RUNS = 7


def main() -> None:
    """Print one line: what was measured, the budget, and whether it is kept."""
    random = np.random.default_rng(7)
    reference, current = random.multinomial([20_000, 1000], np.full(10, 0.1))
    best_s = min(_run(reference, current) for _ in range(N_RUNS))
    cost_us = best_s / N_CALLS * 1e6
    verdict = "kept" if cost_us <= BUDGET_US else "MISSED"
    print(f"psi: {cost_us:.1f} us a score of 10 bins, budget {BUDGET_US:.0f} us: {verdict}")


def _run(reference: np.ndarray, current: np.ndarray) -> float:
    start = time.perf_counter()
    for _ in range(N_CALLS):
        psi(reference, current)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
