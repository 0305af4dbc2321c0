"""What a share of the data in TRPO's Fisher products does to the step: MAML-TRPO at the policy of a saved run.

    python algos/maml_trpo.py --env-id HalfCheetahDir-v0 --meta-batch-size 20 --episodes-per-task 10 --iterations 60
    OMP_NUM_THREADS=1 python benchmark/fisher.py runs/HalfCheetahDir-v0__maml_trpo__..

For each choice of data, the cosine of the step's direction with that of all data; and by how much J rises on the batch
itself and on another one of the same tasks, with the step so long that the KL on all data is max_kl. Means over
batches, and the lowest cosine. One line of JSON; docs/maml_trpo.md has the table.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import tyro
from torch.distributions import kl_divergence
from torch.func import grad_and_value
from torch.nn.utils import parameters_to_vector

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs as task_envs  # noqa: E402
from algos import maml_trpo  # noqa: E402

EIGHT = "everything, 8 iterations of conjugate gradient for 10"


@dataclass
class Options:
    run: tyro.conf.Positional[Path]
    """folder of a run of maml_trpo.py"""
    batches: int = 3
    """batches, each of fresh tasks"""
    seed: int = 100
    """seed of the first batch"""


def saved(folder: Path):
    """The flags and the policy of a run."""
    flags = json.loads((folder / "args.json").read_text())[-1]["flags"]
    known = {name: value for name, value in flags.items() if name in vars(maml_trpo.Args())}
    return maml_trpo.Args(**known), torch.load(folder / "checkpoint.pt", weights_only=True)["theta"]


def cut(batch, tasks: int, episodes: int):
    """The first episodes of the first tasks."""
    return maml_trpo.Episodes(*(x[:tasks, :episodes] for x in batch))


def choices(support, query, args) -> dict:
    """name: support and query of the Fisher products, and whether these leave out the inner step's derivative."""
    N, E = query.mask.shape[:2]

    def part(fraction: float, whole: int) -> int:
        return max(1, round(fraction * whole))

    return {
        "everything": (support, query, False),
        "a quarter of the query": (support, cut(query, N, part(0.25, E)), False),
        "a tenth of the query": (support, cut(query, N, part(0.1, E)), False),
        "a quarter of support and query": (cut(support, N, part(0.25, E)), cut(query, N, part(0.25, E)), False),
        "a quarter of the tasks": (cut(support, part(0.25, N), E), cut(query, part(0.25, N), E), False),
        "half of the tasks": (cut(support, part(0.5, N), E), cut(query, part(0.5, N), E), False),
        "everything, first order": (support, query, True),
        EIGHT: (support, query, False),
    }


def measure(envs, theta: dict, args, generator: torch.Generator) -> dict:
    """choice: cosine, and the rise of J on the batch and on another one."""
    tasks_NP = envs.unwrapped.sample_tasks(args.meta_batch_size, generator, "train")
    batches = []
    for _ in range(2):
        support = maml_trpo.collect(envs, tasks_NP, theta, args, generator)
        adapted = maml_trpo.adapt(theta, support, args)
        batches.append((support, maml_trpo.collect(envs, tasks_NP, adapted, args, generator)))
    (support, query), other = batches
    vector_W = parameters_to_vector(theta.values())
    everything = replace(args, fisher_fraction=1.0)

    def objective(w_W, support=support, query=query):
        J_N, policies = maml_trpo.surrogate(maml_trpo.unflatten(w_W, theta), [support], query, args)
        return J_N.mean(), policies

    gradient_W, (J, old) = grad_and_value(objective, has_aux=True)(vector_W)
    with torch.no_grad():
        J_other, _ = objective(vector_W, *other)

    def kl(step_W) -> float:
        with torch.no_grad():
            _, new = objective(vector_W + step_W)
        kl_NB = kl_divergence(maml_trpo.normal(*old), maml_trpo.normal(*new)).sum(-1) * query.mask.flatten(1)
        return float((kl_NB.sum(1) / query.mask.sum((1, 2))).mean())

    results = {}
    exact_W = None
    for name, (own_support, own_query, first_order) in choices(support, query, args).items():
        iterations = 8 if name == EIGHT else 10
        product = maml_trpo.fisher_product(
            theta, maml_trpo.surrogate, [own_support], own_query, replace(everything, first_order=first_order)
        )
        direction_W, F_direction_W = maml_trpo.conjugate_gradient(product, gradient_W, iterations)
        exact_W = direction_W if exact_W is None else exact_W
        step_W = direction_W * (2 * args.max_kl / (direction_W @ F_direction_W)).sqrt()
        short, long = 0.0, 4.0
        for _ in range(14):  # bisection: the step that ends on the border of the trust region
            middle = (short + long) / 2
            short, long = (middle, long) if kl(middle * step_W) <= args.max_kl else (short, middle)
        with torch.no_grad():
            own, _ = objective(vector_W + short * step_W)
            held, _ = objective(vector_W + short * step_W, *other)
        cosine = float(torch.cosine_similarity(direction_W, exact_W, 0))
        results[name] = {"cosine": cosine, "rise": float(own - J), "rise_on_another": float(held - J_other)}
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    args, theta = saved(options.run)
    worlds = args.meta_batch_size * args.episodes_per_task
    envs = task_envs.make(args.env_id, worlds, args.horizon, False, args.action_scale)
    found = defaultdict(lambda: defaultdict(list))
    for k in range(options.batches):
        generator = torch.Generator().manual_seed(options.seed + k)
        for name, numbers in measure(envs, theta, args, generator).items():
            for key, value in numbers.items():
                found[name][key].append(value)
    table = {
        name: {key: float(f"{mean(x):.4g}") for key, x in numbers.items()}
        | {"lowest_cosine": float(f"{min(numbers['cosine']):.4g}")}
        for name, numbers in found.items()
    }
    about = {"env_id": args.env_id, "tasks": args.meta_batch_size, "episodes": args.episodes_per_task}
    print(json.dumps(about | {"batches": options.batches, "choices": table}))


if __name__ == "__main__":
    main()
