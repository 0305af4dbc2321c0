"""What classic_bandits.py and classic_mdps.py share: tuning on other problems, and the command line."""

import json
import time
from collections.abc import Callable
from functools import partial

from torch import Tensor


def summary(total_B: Tensor) -> list[float]:
    """Mean and half of its 95 % interval."""
    return [round(total_B.mean().item(), 3), round(1.96 * total_B.std().item() / len(total_B) ** 0.5, 3)]


def compare(algorithms: dict[str, Callable], grids: dict[str, tuple], tuning: Callable, playing: Callable) -> dict:
    """Every algorithm's reward: `tuning` and `playing` run one, on other problems and on those that count, and return
    totals [B]. What has a grid is tuned first: its `strength` is the one with the highest mean."""
    result = {"reward": {}, "tuned": {}, "seconds": {}}
    for name, algorithm in algorithms.items():
        start = time.perf_counter()
        if name in grids:
            options = {strength: partial(algorithm, strength=strength) for strength in grids[name]}
            scores = {strength: tuning(option).mean().item() for strength, option in options.items()}
            result["tuned"][name] = max(scores, key=scores.get)
            algorithm = options[result["tuned"][name]]
        result["reward"][name] = summary(playing(algorithm))
        result["seconds"][name] = round(time.perf_counter() - start, 1)
    return result


def print_settings(settings: list[dict], evaluate: Callable, columns: tuple, paper: Callable, **common) -> None:
    """One JSON line per setting: evaluate(**setting, **common), with the paper's numbers if it has any."""
    for setting in settings:
        line = setting | {name: common[name] for name in ("problems", "seed")} | evaluate(**setting, **common)
        if numbers := paper(setting):
            line["paper"] = dict(zip(columns, numbers, strict=True))
        print(json.dumps(line), flush=True)
