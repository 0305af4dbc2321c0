"""What was tried to make rollouts and updates faster, each beside the present code; one line of JSON a part.

    OMP_NUM_THREADS=1 python benchmark/tried.py maml_trpo --meta-batch-size 20 --episodes-per-task 10
    OMP_NUM_THREADS=1 python benchmark/tried.py pearl_sac --hidden-size 64 --batch-size 32 --context-size 128

Every flag of the algorithm's file is accepted, too. The first variant of a part is the present code. All variants of a
part compute the same from the same data (but for products in lower precision), which is checked, and take turns in
one process. `ms` is the median time of a call, `cpu_ms` that of the processor time of all threads, the measure to trust
where other programs run; `first_s` is the first call's, compiling included, if nothing lies in torch's cache; `error`
is the largest difference from the present code, relative to the largest entry of each result; `operations` counts
torch's, views left out: on a GPU each is at least one launch of a kernel. The table made of it is in docs/speed.md.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.distributions import Normal
from torch.func import grad, grad_and_value, jvp, vjp
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs as task_envs  # noqa: E402
from algos import maml_trpo, pearl_sac, promp  # noqa: E402
from envs import processor  # noqa: E402

PARTS = ("theta", "target", "replay", "recent")  # of PEARL's state


@dataclass
class Options:
    algorithm: tyro.conf.Positional[Literal["maml_trpo", "pearl_sac"]]
    """file of algos/"""
    repeats: int = 20
    """timed calls of each variant"""
    parts: tuple[str, ...] = ()
    """only these of what is printed as `part`"""


def tensors(result) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts; numbers are not compared."""
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, dict):
        result = [result[name] for name in sorted(result)]
    items = result if isinstance(result, list | tuple) else ()
    return [x for item in items for x in tensors(item)]


def difference(result, expected) -> float:
    """The largest, relative to the largest entry of each tensor."""
    pairs = list(zip(tensors(result), tensors(expected), strict=True))
    relative = (((x - y).abs().max() / y.abs().max().clamp_min(1e-12)).item() for x, y in pairs)
    return max(relative, default=0.0)


class Operations(TorchDispatchMode):
    """Counts what torch's operators are called for, views left out."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def race(part: str, variants: dict, repeats: int, about: dict) -> None:
    """Print what each variant, a function without arguments, takes; they take turns."""
    rows, expected = {}, None
    for name, function in variants.items():
        since = time.perf_counter()
        result = function()
        expected = [x.clone() for x in tensors(result)] if expected is None else expected
        rows[name] = {"first_s": time.perf_counter() - since, "error": difference(result, expected)}
        if "compile" not in name:
            with Operations() as mode:
                function()
            rows[name]["operations"] = mode.count
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            since, cpu = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.perf_counter() - since, time.process_time() - cpu))
    for name, row in rows.items():
        row |= {
            key: 1e3 * median(column)
            for key, column in zip(("ms", "cpu_ms"), zip(*times[name], strict=True), strict=True)
        }
        row = {key: float(f"{value:.3g}") for key, value in row.items()}
        print(json.dumps({"part": part, "variant": name} | row | about), flush=True)


# ---------------------------------------------------------------- MAML-TRPO


class Still:
    """Stands in for worlds whose physics takes no time: what is left of a rollout is the algorithm's own part."""

    def __init__(self, envs, steps: maml_trpo.Episodes):
        self.unwrapped, self.single_action_space = envs.unwrapped, envs.single_action_space
        self.obs, self.rewards = steps.obs.flatten(0, 1).unbind(1), steps.reward.flatten(0, 1).unbind(1)
        self.over = torch.zeros(len(self.obs[0]), dtype=torch.bool)

    def reset(self, **_):
        self.t = 0
        return self.obs[0], {}

    def step(self, action: Tensor):
        self.t += 1
        return self.obs[self.t % len(self.obs)], self.rewards[self.t - 1], self.over, self.over, {}


def rollout_with(policy, late: bool = True, buffers: bool = False):
    """maml_trpo's `rollout` with another policy, with log-probabilities in the loop, with buffers for the stack."""

    @torch.no_grad()
    def rollout(envs, tasks_NP, params, args, generator):
        N, E, seed = len(tasks_NP), args.episodes_per_task, int(torch.randint(2**31, (1,), generator=generator))
        names = "obs", "action", "log_prob", "mask", "reward"
        noise_TNEA = torch.randn(args.horizon, N, E, envs.single_action_space.shape[0], generator=generator)
        obs, _ = envs.reset(seed=seed, options={"tasks": tasks_NP.repeat_interleave(E, 0)})
        mask_NE, steps, kept = torch.ones(N, E), [], None
        for t, noise_NEA in enumerate(noise_TNEA):
            mean_NEA, std = policy(params, obs_NEO := obs.view(N, E, -1))
            action_NEA = mean_NEA + std * noise_NEA
            obs, reward, terminated, _, _ = envs.step(action_NEA.flatten(0, 1))
            third = mean_NEA if late else Normal(mean_NEA, std, False).log_prob(action_NEA).sum(-1)
            step = obs_NEO, action_NEA, third, mask_NE, reward.view_as(mask_NE)
            if buffers:
                kept = kept or [x.new_empty(*x.shape[:2], args.horizon, *x.shape[2:]) for x in step]
                for buffer, x in zip(kept, step, strict=True):
                    buffer[:, :, t] = x
            else:
                steps.append(step)
            mask_NE = 1 - terminated.view_as(mask_NE).to(tasks_NP)
        result = kept or [torch.stack(x, 2) for x in zip(*steps, strict=True)]
        if late:
            result[2] = Normal(result[2], std.unsqueeze(-2), False).log_prob(result[1]).sum(-1)
        return dict(zip(names, result, strict=True))

    return rollout


def fused_policy(params: dict, obs: Tensor) -> tuple[Tensor, Tensor]:
    """maml_trpo's `policy` with the bias added inside the matrix product."""
    x = obs if params["b0"].ndim == 2 else obs.flatten(0, -2)
    for i in range(3):
        w, b = params[f"w{i}"], params[f"b{i}"]
        x = torch.baddbmm(b.unsqueeze(-2), x, w) if w.ndim == 3 else torch.addmm(b, x, w)
        x = x.tanh() if i < 2 else x
    return x.view(*obs.shape[:-1], -1), params["log_std"].clamp_min(-13.815511).exp().unsqueeze(-2)


def objective(w_W: Tensor, theta: dict, supports: list, query, args):
    """What trpo_step calls so, with all its data as arguments."""
    J_N, outputs = maml_trpo.surrogate(maml_trpo.unflatten(w_W, theta), supports, query, args)
    return J_N.mean(), outputs


def objective_and_gradient(*data):
    return grad_and_value(objective, has_aux=True)(*data)


@torch.no_grad()
def objective_alone(*data):
    return objective(*data)


def in_chunks(function, size: int, supports: list, query, combine):
    """A function that calls `function(supports, query)` on chunks of this many tasks, one after the other."""
    parts = [
        (
            [type(batch)(*(x[k : k + size] for x in batch)) for batch in supports],
            type(query)(*(x[k : k + size] for x in query)),
        )
        for k in range(0, len(query.mask), size)
    ]
    return lambda: combine([function(*part) for part in parts])


def mean_of(results: list):
    """The means over chunks of equal sizes, of nested tuples and dicts of tensors; outputs by task are put together."""
    first = results[0]
    if isinstance(first, dict):
        return {name: mean_of([x[name] for x in results]) for name in first}
    if isinstance(first, tuple):
        return tuple(mean_of(list(x)) for x in zip(*results, strict=True))
    return torch.cat(results) if first.ndim == 3 else torch.stack(results).mean(0)


def by_mkl(function):
    """The same function, with MKL's matrix products in place of oneDNN's."""

    def called():
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        try:
            return function()
        finally:
            processor.multiply_by_onednn()

    return called


def promp_gradient(theta: dict, args):
    """A function of supports and query: the gradient of ProMP's objective at theta, whose policies are the old ones."""
    own = promp.Args(inner_lr=args.inner_lr)

    def gradient(supports: list, query) -> dict:
        old = [maml_trpo.normal(*maml_trpo.policy(theta, batch.obs.flatten(1, 2))) for batch in supports]
        return grad(promp.promp_objective, has_aux=True)(theta, old, supports, query, own, 1.0)[0]

    return gradient


def product_anew(v_W: Tensor, w_W: Tensor, theta: dict, supports: list, query, args) -> Tensor:
    """fisher_product's product without damping for unit masks, linearised in every call, so that it can be compiled."""

    def outputs(w_W: Tensor):
        return maml_trpo.surrogate(maml_trpo.unflatten(w_W, theta), supports, query, args)[1]

    (_, std), (d_mean, d_std) = jvp(outputs, (w_W,), (v_W,))
    _, transposed = vjp(outputs, w_W)
    samples = query.mask.numel()
    return transposed((d_mean / std**2 / samples, 2 * d_std / std**2 / len(query.mask)))[0]


def maml_trpo_parts(args) -> dict:
    """part: {variant: function}; the first part is a whole iteration without what evaluates and logs."""
    worlds = args.meta_batch_size * args.episodes_per_task
    envs = task_envs.make(args.env_id, worlds, args.horizon, False, args.action_scale)
    theta = maml_trpo.init_policy(envs, args.hidden_size, generator := torch.Generator().manual_seed(args.seed))
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")
    support = maml_trpo.collect(envs, tasks_NP, theta, args, generator)
    params = maml_trpo.adapt(theta, support, args)
    query = maml_trpo.collect(envs, tasks_NP, params, args, generator)
    still, vector_W = Still(envs, query), torch.cat([x.flatten() for x in theta.values()])
    candidate_W = vector_W + 0.01 * torch.randn(vector_W.shape, generator=generator)  # where J is not 0
    data = candidate_W, theta, [support], query, args
    few = max(1, round(args.fisher_fraction * args.episodes_per_task))  # of the query, as in fisher_product
    shortened = maml_trpo.Episodes(*(x[:, :few] for x in query))
    undamped = replace(args, cg_damping=0.0)
    product = maml_trpo.fisher_product(theta, maml_trpo.surrogate, [support], query, undamped)
    anew = vector_W, vector_W, theta, [support], shortened, args

    def rolls(rollout):
        return lambda: rollout(still, tasks_NP, params, args, torch.Generator().manual_seed(0))

    def iteration():
        batches = [maml_trpo.collect(envs, tasks_NP, theta, args, generator)]
        adapted = maml_trpo.adapt(theta, batches[0], args)
        batches.append(maml_trpo.collect(envs, tasks_NP, adapted, args, generator))
        maml_trpo.trpo_step(theta, maml_trpo.surrogate, batches[:1], batches[1], args)

    def physics():
        for _ in range(2):
            envs.reset(seed=0, options={"tasks": tasks_NP.repeat_interleave(args.episodes_per_task, 0)})
            for action_NEA in query.action.unbind(2):
                envs.step(action_NEA.flatten(0, 1))

    def gradient_of(supports: list, query):
        return objective_and_gradient(candidate_W, theta, supports, query, args)

    def candidate_of(supports: list, query):
        return objective_alone(candidate_W, theta, supports, query, args)

    def product_of(size: int):
        """The mean of products that are linearised for chunks of so many tasks, once."""
        made = in_chunks(
            lambda supports, query: maml_trpo.fisher_product(theta, maml_trpo.surrogate, supports, query, undamped),
            size, [support], query, lambda products: products,
        )()  # fmt: skip
        return lambda: torch.stack([part(vector_W) for part in made]).mean(0)

    promp_of = promp_gradient(theta, args)
    sizes = {f"chunks of {size} tasks": size for size in (10, 4, 1) if args.meta_batch_size % size == 0}
    inference = torch.inference_mode()(rollout_with(maml_trpo.policy).__wrapped__)
    return {
        "iteration": {"present": iteration, "its worlds alone": physics},
        "rollout": {
            "present": rolls(maml_trpo.rollout),
            "log-probabilities in every step": rolls(rollout_with(maml_trpo.policy, late=False)),
            "buffers": rolls(rollout_with(maml_trpo.policy, buffers=True)),
            "fused bias": rolls(rollout_with(fused_policy)),
            "inference_mode": rolls(inference),
            "compiled policy": rolls(rollout_with(torch.compile(maml_trpo.policy))),
        },
        "adapt": {
            "present": partial(maml_trpo.adapt, theta, support, args),
            "compiled": partial(torch.compile(maml_trpo.adapt), theta, support, args),
        },
        "gradient": {
            "present": partial(objective_and_gradient, *data),
            "fused bias": with_policy(fused_policy, partial(objective_and_gradient, *data)),
            "compiled": partial(torch.compile(objective_and_gradient), *data),
            "by MKL": by_mkl(partial(objective_and_gradient, *data)),
            **{name: in_chunks(gradient_of, size, [support], query, mean_of) for name, size in sizes.items()},
        },
        "candidate": {
            "present": partial(objective_alone, *data),
            "fused bias": with_policy(fused_policy, partial(objective_alone, *data)),
            "compiled": partial(torch.compile(objective_alone), *data),
            "by MKL": by_mkl(partial(objective_alone, *data)),
            **{name: in_chunks(candidate_of, size, [support], query, mean_of) for name, size in sizes.items()},
        },
        "product": {
            "present": partial(product, vector_W),
            "linearised anew": partial(product_anew, *anew),
            "linearised anew, compiled": partial(torch.compile(product_anew), *anew),
            "by MKL": by_mkl(partial(product, vector_W)),
            **{name: product_of(size) for name, size in sizes.items()},
        },
        "ProMP's gradient": {
            "present": partial(promp_of, [support], query),
            "by MKL": by_mkl(partial(promp_of, [support], query)),
            **{name: in_chunks(promp_of, size, [support], query, mean_of) for name, size in sizes.items()},
        },
    }


# ---------------------------------------------------------------- PEARL


def eager(loss_function=pearl_sac.pearl_loss):
    """The gradient as `learn` takes it without --compile, and parts of the loss."""

    def gradient(theta: dict, *data) -> tuple[dict, dict]:
        weights = {name: value.detach().requires_grad_() for name, value in theta.items()}
        loss, stats = loss_function(weights, *data)
        return torch.autograd.grad(loss, weights), stats

    return gradient


def step_with(theta: dict, gradient: dict, target: dict, foreach: bool, compiled: bool = False, **kwargs):
    """A function that takes a step of Adam and moves the targets, of copies of theta and target."""
    theta, target = ({name: x.clone() for name, x in params.items()} for params in (theta, target))
    optimizer = torch.optim.Adam(theta.values(), 1e-3, **kwargs)
    for name, value in theta.items():
        value.grad = gradient[name]

    def step() -> None:
        optimizer.step()
        if foreach:
            torch._foreach_lerp_(list(target.values()), [theta[name] for name in target], 0.005)
        else:
            for name, value in target.items():
                value.lerp_(theta[name], 0.005)

    step = torch.compile(step) if compiled else step

    def measured() -> dict:
        step()
        return theta | target

    return measured


def updates_with(envs, state: dict, args):
    """A function that makes 10 of learn's updates, of a copy of the state."""
    tasks, state = state["tasks"], {part: {k: x.clone() for k, x in state[part].items()} for part in PARTS}
    state |= {"tasks": tasks, "updates": 0}
    optimizer = torch.optim.Adam(state["theta"].values(), args.lr, fused=True)

    def updates() -> dict:
        generator = torch.Generator(tasks.device).manual_seed(0)
        pearl_sac.learn(envs, state, optimizer, args, generator, pause=lambda done: None)
        return state["theta"]

    return updates


def pearl_sac_parts(args) -> dict:
    """part: {variant: function}."""
    envs = task_envs.make(args.env_id, args.tasks_per_iteration, args.horizon, False)
    state = pearl_sac.init_state(envs, args, generator := torch.Generator().manual_seed(args.seed))
    theta, target, N, B = state["theta"], state["target"], args.meta_batch_size, args.batch_size
    for name in ("replay", "recent"):
        for field in ("obs", "action", "reward", "next_obs", "training_reward"):
            state[name][field].normal_(generator=generator)
        state[name]["mask"].fill_(1)
        state[name]["count"] += state[name]["mask"].shape[1]
    batch, context = (
        pearl_sac.draw(state[name], torch.arange(N), torch.rand(N, size, generator=generator))
        for name, size in (("replay", B), ("recent", args.context_size))
    )
    action = torch.randn(N, B, *envs.single_action_space.shape, generator=generator)
    noise = {
        "z": torch.randn(N, args.latent_size, generator=generator),
        "next_action": action,
        "action": action.flip(0),
    }
    data = theta, target, batch, context, noise, args
    gradient = eager()(*data)[0]
    return {
        "10 updates": {
            "present": updates_with(envs, state, replace(args, updates=10)),
            "--compile": updates_with(envs, state, replace(args, updates=10, compile=True)),
        },
        "10 updates, precision": {
            "present": updates_with(envs, state, replace(args, updates=10)),
            "--low-precision": updates_with(envs, state, replace(args, updates=10, low_precision=True)),
        },
        "gradient": {
            "present": partial(eager(), *data),
            "torch.func.grad": partial(grad(pearl_sac.pearl_loss, has_aux=True), *data),
            "loss compiled": partial(eager(torch.compile(pearl_sac.pearl_loss)), *data),
            "--compile": partial(
                torch.compile(grad(pearl_sac.pearl_loss, has_aux=True), mode="reduce-overhead"), *data
            ),
        },
        "step": {
            "present": step_with(theta, gradient, target, foreach=True, fused=True),
            "targets one by one": step_with(theta, gradient, target, foreach=False, fused=True),
            "Adam not fused": step_with(theta, gradient, target, foreach=True),
            "compiled": step_with(theta, gradient, target, foreach=True, compiled=True, fused=True),
        },
    }


def with_policy(policy, function):
    """`function` while maml_trpo's `policy` is another one."""

    def patched():
        present, maml_trpo.policy = maml_trpo.policy, policy
        try:
            return function()
        finally:
            maml_trpo.policy = present

    return patched


def main() -> None:
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    algorithm, parts = {"maml_trpo": (maml_trpo, maml_trpo_parts), "pearl_sac": (pearl_sac, pearl_sac_parts)}[
        options.algorithm
    ]
    args = tyro.cli(algorithm.Args, args=rest)
    processor.keep_memory()  # these two as a run does
    processor.multiply_by_onednn()
    harness = ("resume", "evaluate", "capture_video", "track", "wandb_mode", "iterations", "eval_every", "cuda")
    about = {
        "algorithm": options.algorithm,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "args": {name: value for name, value in vars(args).items() if name not in harness},
    }
    for part, variants in parts(args).items():
        if part in options.parts or not options.parts:
            race(part, variants, options.repeats, about)


if __name__ == "__main__":
    main()
