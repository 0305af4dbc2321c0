"""Statistics of a few seeds: interquartile means, bootstrap intervals, paired differences, sustained crossings.

After Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", arXiv:2108.13264. Returns are numbers
[S, M] of S seeds and M distinct test tasks. All seeds are tested on the same tasks, so a resample draws seeds, and
tasks for all seeds together; one or two tasks are all there are (both directions), and stay as they are.
"""

import math
from typing import NamedTuple

import numpy as np

RESAMPLES = 2_000
SEED = 2_108
# Student's t, 0.975 quantile, for n seeds (n - 1 degrees of freedom): NIST/SEMATECH e-Handbook, 1.3.6.7.2
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Estimate(NamedTuple):
    """A number and its 95 % interval; of a single seed there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.low is None else f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def distinct(values, tasks) -> np.ndarray:
    """Means [.., M] of values [.., N] over the copies of each of the M distinct tasks among tasks [N, P]."""
    values = np.asarray(values, float)
    different, place = np.unique(np.asarray(tasks, float), axis=0, return_inverse=True)
    return np.stack([values[..., place.reshape(-1) == i].mean(-1) for i in range(len(different))], -1)


def iqm(values) -> np.ndarray:
    """The interquartile mean [..] over seeds and tasks of values [.., S, M]: the mean without a quarter at each end.

    Agarwal et al. 2021, section 4: the 25 % trimmed mean over all runs of all tasks. Of n numbers n // 4 are left out
    at each end, so that up to three all count. NaN if one of them is: a run that diverged is no good one.
    """
    values = np.asarray(values, float)
    flat = np.sort(values.reshape(*values.shape[:-2], -1), -1)
    cut = flat.shape[-1] // 4
    middle = flat[..., cut : flat.shape[-1] - cut].mean(-1)
    return np.where(np.isnan(flat).any(-1), np.nan, middle)


def resampled(values: np.ndarray, tasks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Values [S, M] with seeds drawn anew, and of the tasks drawn [R, M] the same ones for all seeds: [R, S, M]."""
    seeds = generator.integers(len(values), size=(len(tasks), len(values)))
    return values[seeds[:, :, None], tasks[:, None, :]]


def drawn_tasks(number: int, generator: np.random.Generator) -> np.ndarray:
    """Tasks [R, M] of each resample; one or two distinct tasks stay as they are."""
    if number <= 2:
        return np.tile(np.arange(number), (RESAMPLES, 1))
    return generator.integers(number, size=(RESAMPLES, number))


def middle_95(estimates: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resamples: the percentile bootstrap of Agarwal et al. 2021, section 4."""
    low, high = np.percentile(estimates, [2.5, 97.5])
    return float(low), float(high)


def estimate(values) -> Estimate:
    """The interquartile mean of values [S, M] and its bootstrap interval (Agarwal et al. 2021, section 4).

    Of few seeds the interval is too narrow: three rarely spread as much as all that one could have taken.
    """
    values = np.asarray(values, float)
    if len(values) == 1:
        return Estimate(float(iqm(values)))
    generator = np.random.default_rng(SEED)
    tasks = drawn_tasks(values.shape[1], generator)
    return Estimate(float(iqm(values)), *middle_95(iqm(resampled(values, tasks, generator))))


def difference(first, second) -> Estimate:
    """The interquartile mean of `first` [S, M] minus that of `second` [U, M], paired by test task.

    A resample draws the same tasks for both, so that what makes a task hard or easy for both cancels (a paired
    bootstrap); the seeds of each are drawn on their own. Otherwise as `estimate` (Agarwal et al. 2021).
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} test tasks cannot be paired")
    value = float(iqm(first) - iqm(second))
    if len(first) == 1 or len(second) == 1:
        return Estimate(value)
    generator = np.random.default_rng(SEED)
    tasks = drawn_tasks(first.shape[1], generator)
    estimates = iqm(resampled(first, tasks, generator)) - iqm(resampled(second, tasks, generator))
    return Estimate(value, *middle_95(estimates))


def sustained(points: list[tuple[float, float]], level: float) -> float:
    """The first x from which on a curve of points (x, y) stays at or above a level to its end; infinite if it ends
    below. The first crossing of a noisy curve would come earlier, by luck."""
    since = math.inf
    for x, y in reversed(points):
        if not y >= level:
            break
        since = x
    return since


def interval(values) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean over the first axis, the seeds, and half of its 95 % interval by Student's t; None for a single seed."""
    values = np.asarray(values, float)
    n = len(values)
    return values.mean(0), T975[n] * values.std(0, ddof=1) / n**0.5 if n > 1 else None


def common(runs: list[list[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of points (x, y) on one grid [G], all x between the last start and the first end: y [seeds, G]."""
    points = [np.array(run, float) for run in runs]
    low, high = max(run[0, 0] for run in points), min(run[-1, 0] for run in points)
    grid = np.unique(np.concatenate([run[:, 0] for run in points]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.stack([np.interp(grid, *run.T) for run in points])
