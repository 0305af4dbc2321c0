"""Reptile: move the initialisation towards the weights that ordinary training on each task leads to.

Paper: Nichol, Achiam, Schulman 2018, On First-Order Meta-Learning Algorithms, arXiv:1803.02999, Algorithm 2.
Run: python algos/reptile.py                        sinusoids; --help explains every flag; --cuda uses the GPU
     python algos/reptile.py --env-id Glyphs-v0     5-way 1-shot characters; --env-id Omniglot-v0 --data DIR: real ones
Result: sinusoid, 10 shots: MSE 0.60 after 1 step, 0.14 after 10, 0.11 after 50 (MAML: 0.42, 0.14). Glyphs, 5-way
    1-shot, 81.5 % (MAML: 93.8 %; the paper, on Omniglot: 97.7 % and 98.7 %); docs/reptile.md, docs/maml.md
Algorithm:
    [1] repeat: draw N tasks, and k disjoint minibatches of each
    [2]     phi_i = U^k(theta): k steps of SGD, or of Adam with beta1 = 0, one on each minibatch
    [3]     theta <- theta + epsilon mean_i (phi_i - theta), epsilon falling linearly to 0
    [4]     now and then: score on held-out tasks after 0, 1, .. inner steps
Symbols: phi_i = params, k = inner_steps, epsilon = outer_lr; L: mean squared error or cross-entropy.
    With SGD, theta - phi_i is the sum of the gradients on the way; for k = 1 this is joint training, for k > 1 it also
    turns the gradients of a task's minibatches towards each other (section 5), as MAML does with Hessians.
Shapes: a suffix names a tensor's axes (x_NBX): N tasks, B examples, X inputs, Y outputs, K counts of inner steps from 0
    on. Entries of parameter dicts gain N by adaptation; inside vmap a function sees one task, without N.
Differs from the paper: a minibatch of images has equally many of each class; all steps of an evaluation use the whole
    support set (its code: for 5-way 5-shot 5 of 25 examples); curves have random points (its code: 50 fixed
    ones), MAML's phases (--env-id SinusoidAllPhases-v0: the paper's) and ReLU networks (its code: tanh).
"""

import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.nn import functional

Params = dict[str, Tensor]  # one net for all tasks: w0 [X, H], b0 [H], ..; one net per task: w0 [N, X, H], ..
Examples = tuple[Tensor, Tensor]  # x [N, B, X] and y [N, B, Y]; booleans y are classes, one-hot
CURVES = {"meta_batch_size": 25, "shots": 10, "inner_lr": 0.02, "inner_shots": 10, "inner_optimizer": "sgd"}
IMAGES = {"meta_batch_size": 5, "shots": 1, "inner_lr": 3e-3, "inner_shots": 2, "inner_optimizer": "adam"}


@dataclass
class Args:
    env_id: str = "Sinusoid-v0"
    """Sinusoid-v0, SinusoidAllPhases-v0, SinusoidOrLine-v0 (curves), Glyphs-v0, Omniglot-v0 (images)"""
    data: str = ""
    """folder of Omniglot-v0: it holds images_background/ and images_evaluation/"""
    seed: int = 1
    """seed of everything: parameters, tasks, examples"""
    iterations: int = 10000
    """meta-updates; in the paper 30000 for curves, 100000 for images (20-way: 200000)"""
    meta_batch_size: int | None = None
    """tasks per meta-update (N); default 25 for curves (paper: 1), 5 for images as in the paper"""
    ways: int = 5
    """classes of an image task; 5 and 20 in MAML's paper"""
    shots: int | None = None
    """support examples of an evaluation, of each class, and as many queries; default 10 for curves, 1 for images"""
    mlp: bool = False
    """fully connected layers for images, too, in place of 3x3 filters with stride 2"""
    hidden_sizes: tuple[int, ...] = ()
    """units or filters of the layers; default: 64 64 for curves, 64 64 64 64 for images, with --mlp 256 128 64 64"""
    inner_optimizer: Literal["sgd", "adam"] | None = None
    """adam: with beta1 = 0, its moments new for each task; default and paper: sgd for curves, adam for images"""
    inner_lr: float | None = None
    """step size of training on a task; default 0.02 for curves (paper: 0.02), 0.003 for images (paper: 0.001; docs)"""
    inner_steps: int = 5
    """minibatches of a task, disjoint, one step on each (k); 5 in the paper (20-way: 10)"""
    inner_shots: int | None = None
    """examples of a minibatch, for images of each class; default and paper: 10 for curves, 2 for images (20-way: 1)"""
    outer_lr: float = 1.0
    """step size of the meta-update at the start (epsilon); in the paper 1 for images, 0.1 for curves (one at a time)"""
    eval_every: int = 1000
    """iterations from one evaluation and checkpoint to the next"""
    eval_tasks: int = 200
    """held-out tasks of an evaluation"""
    eval_steps: int = 50
    """inner steps of an evaluation; in the paper 32 for curves, 50 for images"""
    transductive: bool = True
    """batch norm sees a task's queries together, as in the papers; if not, one query at a time beside the support"""
    cuda: bool = False
    """everything on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        images = self.env_id in ("Glyphs-v0", "Omniglot-v0")
        for name, value in (IMAGES if images else CURVES).items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        usual = ((256, 128, 64, 64) if self.mlp else (64, 64, 64, 64)) if images else (64, 64)
        self.hidden_sizes = tuple(self.hidden_sizes) or usual
        for name, value in vars(self).items():
            low, high = (0, 2**31) if name == "seed" else (1e-12, 1e6) if isinstance(value, float) else (1, 10**9)
            for x in value if isinstance(value, tuple) else (value,):
                if not isinstance(x, bool | str) and not low <= x <= high:
                    raise ValueError(f"--{name.replace('_', '-')} {x}: allowed is {low:g} to {high:g}")


def init_params(tasks, args: Args, generator: Generator) -> Params:
    """Weights and biases uniform in +-1 / sqrt(fan-in); scales of 1 for batch norm in the networks for images."""
    params, depth, conv = {}, len(args.hidden_sizes), tasks.is_classification and not args.mlp
    pixels = math.ceil(math.isqrt(tasks.num_inputs) / 2**depth) ** 2 if conv else 1  # behind the last convolution
    sizes = 1 if conv else tasks.num_inputs, *args.hidden_sizes, tasks.num_outputs
    for i, (n, m) in enumerate(pairwise(sizes)):
        shape = (m, n, 3, 3) if conv and i < depth else (n * pixels if i == depth else n, m)
        bound = 1 / math.sqrt(9 * n if len(shape) == 4 else shape[0])
        params[f"w{i}"] = bound * (2 * torch.rand(shape, generator=generator) - 1)
        params[f"b{i}"] = bound * (2 * torch.rand(m, generator=generator) - 1)
        params |= {f"scale{i}": torch.ones(m)} if tasks.is_classification and i < depth else {}
    return params


def batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise each channel (axis 1) over this very batch, in training and in evaluation: no running statistics."""
    axes, shape = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))
    centred = x - x.mean(axes, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(axes, keepdim=True) + 1e-5)
    return centred * (rstd * scale.view(shape)) + shift.view(shape)


def network(params: Params, x_BX: Tensor) -> Tensor:
    """Outputs [B, Y]: ReLU layers, fully connected or 3x3 convolutions with stride 2 by the shape of the weights."""
    hidden = x_BX.unflatten(1, (1, math.isqrt(x_BX.shape[1]), -1)) if params["w0"].ndim == 4 else x_BX
    last = sum(name.startswith("w") for name in params) - 1
    for i in range(last):
        w, b, scale = params[f"w{i}"], params[f"b{i}"], params.get(f"scale{i}")
        hidden = functional.conv2d(hidden, w, stride=2, padding=1) if w.ndim == 4 else hidden @ w
        hidden = torch.relu(hidden + b if scale is None else batch_norm(hidden, scale, b))
    return hidden.flatten(1) @ params[f"w{last}"] + params[f"b{last}"]


def loss(params: Params, x_BX: Tensor, y_BY: Tensor) -> Tensor:
    """L: cross-entropy where y is boolean, mean squared error elsewhere."""
    output_BY = network(params, x_BX)
    if y_BY.dtype == torch.bool:
        return functional.cross_entropy(output_BY, y_BY.to(output_BY))
    return (output_BY - y_BY).square().mean()


def fit(params: Params, batches: list[Examples], args: Args) -> list[Params]:
    """The weights before and after each step of training on one task."""
    path, second = [params], dict.fromkeys(params, 0)
    for step, (x_BX, y_BY) in enumerate(batches, 1):
        gradient = grad(loss)(path[-1], x_BX, y_BY)
        if args.inner_optimizer == "adam":
            second = {name: 0.999 * second[name] + 0.001 * g.square() for name, g in gradient.items()}
            gradient = {name: g / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8) for name, g in gradient.items()}
        path.append({name: value - args.inner_lr * gradient[name] for name, value in path[-1].items()})  # [2]
    return path


def reptile_gradient(theta: Params, batches: list[Examples], args: Args) -> tuple[Params, Tensor]:
    """theta - mean_i phi_i, and the mean loss of the last minibatches at phi_i."""
    params = vmap(lambda batches: fit(theta, batches, args)[-1])(batches)
    gradient = {name: value - params[name].mean(0) for name, value in theta.items()}
    return gradient, vmap(loss)(params, *batches[-1]).mean()


def score(params: Params, support: Examples, query: Examples, args: Args) -> Tensor:
    """Accuracy where y is boolean, mean squared error elsewhere, on the queries of one task."""
    (x_BX, y_BY), alone = query, lambda x_X: network(params, torch.cat([support[0], x_X[None]]))[-1]
    output_BY = network(params, x_BX) if args.transductive else vmap(alone)(x_BX)
    if y_BY.dtype == torch.bool:
        return y_BY.gather(1, output_BY.argmax(1, keepdim=True)).to(x_BX).mean()
    return (output_BY - y_BY).square().mean()


@torch.no_grad()
def evaluate(tasks, theta: Params, args: Args) -> dict:
    """Scores on held-out tasks, the same ones in every evaluation."""
    generator = Generator().manual_seed(args.seed + 1)
    support, query = tasks.sample(tasks.sample_tasks(args.eval_tasks, generator, "test"), (args.shots,) * 2, generator)

    def scores(support: Examples, query: Examples) -> Tensor:
        path = fit(theta, [support] * args.eval_steps, args)
        return torch.stack([score(params, support, query, args) for params in path])

    score_NK = vmap(scores, chunk_size=50)(support, query)  # [4]
    name, spread = "accuracy" if query[1].dtype == torch.bool else "loss", 1.96 / math.sqrt(args.eval_tasks)
    stats = {f"test/{name}_k{k}": float(x) for k, x in enumerate(score_NK.mean(0))}
    stats |= {"test/ci95": spread * float(score_NK[:, -1].std(correction=0))}
    return stats | {"test/gain_ci95": spread * float((score_NK[:, -1] - score_NK[:, 0]).std(correction=0))}


def train(tasks, args: Args, run: "Run", state: dict) -> None:
    """The paper's Algorithm 2, from `state` on."""
    theta = {name: value.to(tasks.device) for name, value in state["theta"].items()}
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        batch = tasks.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        batches = tasks.sample(batch, (args.inner_shots,) * args.inner_steps, generator)  # [1]
        gradient, train_loss = reptile_gradient(theta, batches, args)
        epsilon = args.outer_lr * (1 - (iteration - 1) / args.iterations)
        theta = {name: value - epsilon * gradient[name] for name, value in theta.items()}  # [3]
        state["env_steps"] += len(batches) * len(batch) * batches[0][0].shape[1]
        state |= {"theta": theta, "generator": generator.get_state()}
        save = iteration % args.eval_every == 0 or iteration == args.iterations or run.stopping
        stats = {"train/loss_post": float(train_loss)}
        run.log(state, stats | (evaluate(tasks, theta, args) if save else {}))
        if save:
            run.save(state)
            if run.stopping:
                break


class Run:
    """A run's folder (args.json, metrics.jsonl, checkpoint.pt), progress line, W&B, and an orderly end on signals."""

    def __init__(self, args, algorithm: str, iteration: int):
        from tqdm import tqdm

        name = f"{args.env_id.replace('/', '-')}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder, self.args, self.since = Path(args.resume or f"runs/{name}"), args, time.time()
        self.stopping, self.shown = False, {}
        if args.track:
            import wandb

            if args.wandb_mode == "online" and not wandb.api.api_key:  # W&B itself would prompt for it
                raise SystemExit("--track: no W&B login; run `wandb login`, or pass --wandb-mode offline")
            settings = wandb.Settings(init_timeout=30, mode=args.wandb_mode)  # an error, not a hang, without a network
            self.wandb = wandb.init(project="cleanmeta", name=name, config=vars(args), settings=settings)
        self.folder.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
        (self.folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        self.metrics = self.folder / "metrics.jsonl"  # one line an iteration; those behind the checkpoint are redone
        self.metrics.write_text("".join(self.metrics.read_text().splitlines(True)[:iteration]) if iteration else "")
        self.bar = tqdm(total=args.iterations, initial=iteration, unit="it", dynamic_ncols=True, desc=algorithm)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number, frame):
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)
        self.bar.write("stopping after this iteration; the same signal again aborts at once")

    def log(self, state: dict, stats: dict) -> None:
        state["seconds"], self.since = round(state["seconds"] + time.time() - self.since, 3), time.time()
        record = {name: state[name] for name in ("iteration", "env_steps", "seconds")} | stats
        if bad := {name: value for name, value in record.items() if not math.isfinite(value)}:
            raise FloatingPointError(f"not finite: {bad}")
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.args.track:
            self.wandb.log(record, step=record["iteration"])
        names = [name for name in stats if name.endswith(("_pre", "_post", "_trial")) or "_k" in name]
        self.shown |= {name: f"{stats[name]:.3g}" for name in names[:3] + names[-1:]}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def save(self, state: dict) -> None:
        with open(self.folder / "checkpoint.tmp", "wb") as file:
            torch.save(state, buffer := io.BytesIO())
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")  # at every moment there is a complete one


def load_checkpoint(folder: str, algorithm: str) -> dict:
    """The state saved in a run's folder, or one line that says what is wrong. Only testzip notices a flipped bit."""
    try:
        if damaged := zipfile.ZipFile(path := Path(folder) / "checkpoint.pt").testzip():
            raise ValueError(f"damaged in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["algorithm"] != algorithm:
            raise ValueError(f"written by {state['algorithm']}, not {algorithm}")
        return state | {"args": Args(**state["args"])}
    except Exception as error:
        raise SystemExit(f"--resume {folder}: no usable checkpoint.pt there: {error!r}") from None


def main(argv: list[str] | None = None) -> None:
    here, algorithm = Path(__file__).resolve().parent, Path(__file__).stem
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # envs/ lies beside this file or algos/
    import tyro

    args = tyro.cli(Args, args=argv, description=__doc__)
    saved = load_checkpoint(args.resume, algorithm) if args.resume else {}
    args = tyro.cli(Args, args=argv, default=saved["args"]) if saved else args
    from envs import learning_curve, make_supervised

    tasks = make_supervised(args.env_id, args.ways, 2 * args.shots, args.data, args.cuda)
    if tasks.is_classification and args.inner_steps * args.inner_shots > (drawings := tasks.images.shape[1]):
        raise SystemExit(
            f"--inner-steps {args.inner_steps}: allowed is 1 to {drawings // args.inner_shots} disjoint minibatches"
        )
    torch.set_num_threads(torch.get_num_threads() if tasks.is_classification else 1)  # small nets: threads only cost
    generator = Generator().manual_seed(args.seed)
    theta = init_params(tasks, args, generator)
    state = {"algorithm": algorithm, "iteration": 0, "env_steps": 0, "seconds": 0.0, "theta": theta}
    state |= {"generator": generator.get_state()} | saved | {"args": vars(args)}
    shapes, expected = ({name: tuple(x.shape) for name, x in params.items()} for params in (state["theta"], theta))
    if shapes != expected:
        raise SystemExit(f"--resume {args.resume}: it holds {shapes}, the flags ask for {expected}")
    try:
        run = Run(args, algorithm, state["iteration"])
        train(tasks, args, run, state)
        run.bar.write(learning_curve(run.folder))
    except (FloatingPointError, OSError) as error:
        raise SystemExit(f"\niteration {state['iteration']}: {error}; the last whole checkpoint is kept") from None


if __name__ == "__main__":
    main()
