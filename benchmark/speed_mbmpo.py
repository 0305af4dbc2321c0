"""How fast MB-MPO imagines and learns; `python benchmark/speed.py mbmpo` comes here.

Runs the algorithm file's own `train()`: real episodes of the untrained policy, a fit of EPOCHS epochs, then one
meta-update after the other until `--iterations` of them are measured. MB-MPO written the usual way, a loop over models
(benchmark/peer_mbmpo.py), is always measured beside it, in the same process: a fit after each of our FITS, and after
each of our meta-updates one from the same policy, in models with the same weights, of as many episodes and steps.
Figures are medians; the first fits and meta-updates, which warm up, are not counted.

The peer is measured with torch's threads, and with one alone, which is often quicker for its small matrices (ours, too,
imagines with one). `peer_threads` is with how many a meta-update of it was quicker, `peer_fit_threads` the same of its
fit; figures named peer_ and speedups are of these. peer_N_threads_meta_update_s: its meta-updates with N threads. Its
Fisher products are on all episodes, as usual; `--fisher-fraction 1` shows how fast ours would be without their share.

imagined_steps_per_s: imagined steps of a meta-update, over its time. All are counted, also those after an early end,
which take as long; `running_share` is the share of the others. imagination_s: both batches of episodes, their
advantages, and the inner step between; imagination_only_steps_per_s is over this time. update_s: the step of TRPO.
model_rows_per_s: transitions times models times epochs of a fit, over its time; held-out transitions count, too. In no
figure: real episodes, evaluation. Names with `cpu`: processor time, of all threads together; on a busy machine that is
the measure to trust.
"""

import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor

from benchmark import peer_mbmpo
from envs import Imagined, ScaleActions, imagine, make
from envs.records import first_state

FITS, EPOCHS = 5, 5


def make_worlds(args) -> tuple[ScaleActions, Imagined]:
    """The real and the imagined worlds that the algorithm's main() makes."""
    envs = make(
        args.env_id,
        args.num_models * args.real_episodes,
        args.horizon,
        args.cuda,
        args.action_scale,
        physics=args.physics,
    )
    return envs, imagine(envs, args.num_models * args.episodes_per_task)


def threads() -> list[int]:
    """With how many threads of torch the peer is measured."""
    return sorted({1, torch.get_num_threads()})


@contextmanager
def with_threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Clock:
    """Wall and processor time since it was made, or since the last `lap`."""

    def __init__(self, watch):
        self.watch, self.since, self.cpu = watch, watch.now(), time.process_time()

    def lap(self) -> tuple[float, float]:
        since, cpu = self.since, self.cpu
        self.since, self.cpu = self.watch.now(), time.process_time()
        return self.since - since, self.cpu - cpu


class Peer:
    """The loop over models, timed with each number of threads."""

    def __init__(self, args, watch):
        self.args, self.watch, self.models, self.scales = args, watch, {}, {}
        self.worlds = make(
            args.env_id, args.episodes_per_task, args.horizon, args.cuda, args.action_scale, physics=args.physics
        )
        self.worlds.reset(seed=args.seed)

    def keep(self, number: int, **values) -> None:
        for name, value in values.items():
            self.watch.times[f"peer_{number}_{name}"].append(value)

    def fit(self, models: dict, data: dict) -> None:
        """A fit that begins with the same weights as ours."""
        for number in threads():
            with with_threads(number):
                members, clock = peer_mbmpo.models_like(models, {}), Clock(self.watch)
                epochs = peer_mbmpo.fit(members, data, self.args)
                fit, fit_cpu = clock.lap()
            self.keep(number, fit=fit, fit_cpu=fit_cpu, rows=len(data["obs"]) * sum(epochs))

    def meta_update(self, theta: dict, task: Tensor) -> None:
        """A meta-update from the same policy as ours, in the same models."""
        members = peer_mbmpo.models_like(self.models, self.scales)
        theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
        for number in threads():
            with with_threads(number):
                clock = Clock(self.watch)
                batches = peer_mbmpo.sample(self.worlds, task, members, theta, self.args)
                sample, sample_cpu = clock.lap()
                peer_mbmpo.trpo_step(theta, batches, self.args)
                update, update_cpu = clock.lap()
            self.keep(number, sample=sample, update=update, total=sample + update, cpu=sample_cpu + update_cpu)


def fits(fit_models, measure, peer: Peer, watch):
    """`fit_models`, several times beside the peer's, before the stopwatch starts for the first meta-update."""

    def fit(envs, models, data, args, generator):
        for _ in range(1 + FITS):
            clock = Clock(watch)
            peer.models, stats = fit_models(envs, models, data, args, generator)
            seconds, cpu = clock.lap()
            rows = args.num_models * len(data["obs"]) * stats["train/model_epochs"]
            for name, value in {"fit": seconds, "fit_cpu": cpu, "rows": rows}.items():
                watch.times[name].append(value)
            peer.fit(models, data)
        peer.scales = measure(data)
        watch.restart()
        return peer.models, stats

    return fit


def meta_updates(trpo_step, peer: Peer, task: Tensor, watch):
    """`trpo_step`, at whose end a meta-update is measured; one of the peer follows."""

    def step(theta, surrogate, supports, query, args):
        watch.sampled = watch.now() - watch.since
        result = trpo_step(theta, surrogate, supports, query, args)
        masks = torch.stack([query.mask, *(support.mask for support in supports)])
        watch.times["running"].append(float(masks.mean()))
        watch.extras = [partial(peer.meta_update, theta, task)]
        watch.log({"env_steps": watch.steps + masks.numel()}, {})  # after the last meta-update it ends train()
        return result

    return step


def measure(algorithm, args, envs: ScaleActions, imagined: Imagined, watch) -> None:
    """train() of the algorithm's file, from the state that its main() makes, until the stopwatch ends it."""
    args = replace(args, meta_steps=10**9, model_epochs=min(EPOCHS, args.model_epochs))
    generator, peer = Generator().manual_seed(args.seed), Peer(args, watch)
    fresh = {"theta": algorithm.init_policy(envs, args.hidden_size, generator)}
    fresh |= {"models": algorithm.init_models(envs, args, generator), "data": {}, "generator": generator.get_state()}
    state = first_state(args, "mbmpo", fresh, {}, envs.unwrapped.device)
    task = envs.unwrapped.sample_tasks(1, Generator().manual_seed(args.seed))
    algorithm.fit_models = fits(algorithm.fit_models, algorithm.measure, peer, watch)
    algorithm.trpo_step = meta_updates(algorithm.trpo_step, peer, task, watch)
    algorithm.train(envs, imagined, args, watch, state)


def quicker(watch, name: str) -> int:
    """The number of threads with which the peer takes less time for this."""
    return min(threads(), key=lambda number: watch.median(f"peer_{number}_{name}"))


def figures(watch, steps: float, own: str, own_fit: str) -> dict:
    """Rates and times of ours, or of the peer with some number of threads."""
    total, sample, update, cpu = (watch.median(own + name) for name in ("total", "sample", "update", "cpu"))
    rows, fit, fit_cpu = (watch.median(own_fit + name) for name in ("rows", "fit", "fit_cpu"))
    return {
        "imagined_steps_per_s": steps / total,
        "imagination_only_steps_per_s": steps / sample,
        "model_rows_per_s": rows / fit,
        "meta_update_s": total,
        "imagination_s": sample,
        "update_s": update,
        "meta_update_cpu_s": cpu,
        "fit_s": fit,
        "fit_cpu_s": fit_cpu,
    }


def report(watch) -> dict:
    """Rates and times; those of the peer beside them, and how many times ours the peer's times are."""
    steps, kinds = watch.median("steps"), {"end_to_end": "meta_update", "imagination": "imagination"}
    ours = figures(watch, steps, "", "")
    usual = figures(watch, steps, f"peer_{quicker(watch, 'total')}_", f"peer_{quicker(watch, 'fit')}_")
    kinds |= {"update": "update", "fit": "fit"}
    result = {f"speedup_{kind}": usual[f"{name}_s"] / ours[f"{name}_s"] for kind, name in kinds.items()}
    names = {"end_to_end": "meta_update_cpu_s", "fit": "fit_cpu_s"}
    result |= {f"cpu_speedup_{kind}": usual[name] / ours[name] for kind, name in names.items()}
    result |= ours | {f"peer_{name}": value for name, value in usual.items()}
    result |= {f"peer_{n}_threads_meta_update_s": watch.median(f"peer_{n}_total") for n in threads()}
    result |= {"running_share": watch.median("running")}
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def sizes(args, watch) -> dict:
    """What was measured."""
    return {
        "imagined_steps": int(watch.median("steps")),
        "fits": FITS,
        "epochs_per_fit": min(EPOCHS, args.model_epochs),
        "peer_threads": quicker(watch, "total"),
        "peer_fit_threads": quicker(watch, "fit"),
    }
