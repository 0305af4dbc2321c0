"""Learning in context: a network reads a task's examples and predicts its queries; no weight changes.

Paper: Mishra et al. 2018, SNAIL, arXiv:1707.03141 (--encoder snail); Santoro et al. 2016, Memory-Augmented
    Neural Networks, arXiv:1605.06065 (--sequential). transformer: self-attention over a set of examples.
Run: python algos/in_context.py                     sinusoids; --help explains every flag; --cuda: on the GPU
     python algos/in_context.py --env-id Glyphs-v0  5-way 1-shot characters, drawn on the spot
     python algos/in_context.py --env-id Omniglot-v0 --data DIR     the real ones
     python algos/in_context.py --env-id Glyphs-v0 --sequential     one image after the other, ten of each
Result: sinusoids, ten points: MSE 0.050 after 2,000 meta-updates, 55 CPU seconds (maml.py: 0.417 and 0.144
    after 1 and 10 gradient steps). Omniglot, 5-way 1-shot: 90.6 % after 1,200 meta-updates, 48 CPU seconds
Algorithm:
    [1] repeat: draw N tasks; the classes of an image task come in random order, so that labels mean nothing
    [2]     per task: a support set D_i and a query set D'_i of `shots` examples (of each class), disjoint;
            --sequential: one set in random order, D'_i = D_i
    [3]     a token of each example, from (x, y), and of each query, from x; images by an embedding, centred
    [4]     the network reads them: a query sees itself and all of D_i, --sequential: the examples before it
    [5]     L(theta) = mean over tasks i and queries (x, y) in D'_i of the loss of the output for x
    [6]     theta <- Adam(theta, grad L(theta)), its step size falling linearly to 0
    [7]     now and then: result on the test tasks with 0, 1, .. examples (of each class, for images)
Symbols: loss: mean squared error or cross-entropy.
Shapes: a suffix names a tensor's axes (x_NBX): N tasks, B examples, Q queries, S = B + Q tokens, X inputs,
    Y outputs, F features of an input or of a layer, H units, U other units, G heads, D their width, C = B + 1
    states of a GRU, L = Y + 1: an example's y, and 1 where it is known, K counts of examples, from 0.
Differs from the papers: an image's embedding normalises each layer over that image alone, so that queries
    tell nothing of each other. --sequential: the network reads the pair (x_t, y_t) after its answer to x_t
    (Santoro et al.: x_t beside y_(t-1)); its memory is that of the encoder, not an external one.
"""

import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there: its idle threads soon sleep

import torch
from torch import Generator, Tensor
from torch.nn import functional

Params = dict[str, Tensor]
Examples = tuple[Tensor, Tensor]  # x [N, B, X] and y [N, B, Y]; booleans y are classes, one-hot
CURVES = {"iterations": 5000, "meta_batch_size": 64, "shots": 10}
IMAGES = {"iterations": 3000, "meta_batch_size": 16, "shots": 1}
HEAD_WIDTH = 16  # units of one of the transformer's attention heads
CHUNK = 50  # tasks that are evaluated at once


@dataclass
class Args:
    env_id: str = "Sinusoid-v0"
    """Sinusoid-v0, SinusoidAllPhases-v0, SinusoidOrLine-v0 (curves), Glyphs-v0, Omniglot-v0 (images)"""
    data: str = ""
    """folder of Omniglot-v0: it holds images_background/ and images_evaluation/"""
    seed: int = 1
    """seed of everything but the test set: parameters, tasks, examples"""
    iterations: int | None = None
    """meta-updates; default 5000 for curves, 3000 for images"""
    meta_batch_size: int | None = None
    """tasks per meta-update (N); default 64 for curves, 16 for images"""
    ways: int = 5
    """classes of an image task"""
    shots: int | None = None
    """examples, of each class, and as many queries; default 10 for curves and --sequential, 1 for images"""
    sequential: bool = False
    """one example after the other, each first as a query; results by how many of its class came before"""
    encoder: Literal["transformer", "gru", "snail"] = "transformer"
    """what reads: attention to the set of examples; a recurrent net; dilated convolutions and attention"""
    hidden_size: int = 64
    """units (H); a multiple of 16 for the transformer"""
    layers: int = 3
    """blocks of the transformer and of SNAIL, layers of the GRU"""
    mlp: bool = False
    """fully connected layers in the embedding of images in place of 3x3 filters with stride 2"""
    hidden_sizes: tuple[int, ...] = ()
    """filters or units of the embedding's layers; default 64 64 64 64, with --mlp 256 128 64 64"""
    lr: float = 1e-3
    """Adam's step size at first"""
    eval_every: int = 500
    """iterations from one evaluation and checkpoint to the next"""
    eval_tasks: int = 600
    """test tasks of an evaluation"""
    eval_split: Literal["test", "valid"] = "test"
    """classes of an evaluation; valid, of images only: others than the test's, to choose step sizes by"""
    cuda: bool = False
    """everything on the GPU"""
    resume: str = ""
    """folder of a run to continue; flags beside it replace the saved ones"""
    evaluate: str = ""
    """folder of a run to evaluate again, without training; flags beside it count"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs neither account nor network"""

    def __post_init__(self):
        images = self.env_id in ("Glyphs-v0", "Omniglot-v0")
        usual = (IMAGES if images else CURVES) | ({"shots": 10} if self.sequential else {})
        for name, value in usual.items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        self.hidden_sizes = tuple(self.hidden_sizes) or ((256, 128, 64, 64) if self.mlp else (64, 64, 64, 64))
        for name, value in vars(self).items():
            low, high = (1e-12, 1e6) if isinstance(value, float) else (1, 10**9)
            if name == "seed":
                low, high = 0, 2**31
            for x in value if isinstance(value, tuple) else (value,):
                if not isinstance(x, bool | str) and not low <= x <= high:
                    allowed = f"{'above 0,' if low == 1e-12 else low} up to {high:,.10g}"
                    raise ValueError(f"--{name.replace('_', '-')} {x}: allowed is {allowed}")
        if self.encoder == "transformer" and self.hidden_size % HEAD_WIDTH:
            raise ValueError(f"--hidden-size {self.hidden_size}: allowed is a multiple of {HEAD_WIDTH}")


def dense(rows: int, columns: int, generator: Generator, scale: float = 1.0) -> Tensor:
    """A weight [rows, columns] of normal numbers with standard deviation scale / sqrt(columns)."""
    return scale / math.sqrt(columns) * torch.randn(rows, columns, generator=generator)


def init_embedding(tasks, args: Args, generator: Generator) -> Params:
    """Weights uniform in +-1 / sqrt(fan-in), and scale and shift of a norm for each layer."""
    sizes = tasks.num_inputs if args.mlp else 1, *args.hidden_sizes
    params = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        bound = 1 / math.sqrt(n if args.mlp else 9 * n)
        shape = (n, m) if args.mlp else (m, n, 3, 3)
        params[f"w{i}"] = bound * (2 * torch.rand(shape, generator=generator) - 1)
        params[f"shift{i}"] = bound * (2 * torch.rand(m, generator=generator) - 1)
        params[f"scale{i}"] = torch.ones(m)
    return params


def embed_alone(theta: Params, x_NBX: Tensor, args: Args) -> Tensor:
    """Features [N, B, F] of images, each by itself: layers with layer norm, ReLU between; of curves x."""
    if "w0" not in theta:
        return x_NBX
    hidden = x_NBX.flatten(0, 1)
    if not args.mlp:
        hidden = hidden.unflatten(1, (1, math.isqrt(hidden.shape[1]), -1))
    for i in range(len(args.hidden_sizes)):
        w = theta[f"w{i}"]
        hidden = torch.relu(hidden) if i else hidden
        hidden = hidden @ w if args.mlp else functional.conv2d(hidden, w, stride=2, padding=1)
        hidden = functional.group_norm(hidden, 1, theta[f"scale{i}"], theta[f"shift{i}"])
    return hidden.flatten(1).unflatten(0, x_NBX.shape[:2])


def centred(feature_NSF: Tensor, seen_S: Tensor, B: int) -> Tensor:
    """Features less their mean over the examples a token sees, and itself: what all share tells nothing."""
    sum_NCF = functional.pad(feature_NSF[:, :B].cumsum(1), (0, 0, 1, 0))  # over the first 0, 1, .. examples
    return feature_NSF - (sum_NCF[:, seen_S] + feature_NSF) / (seen_S + 1)[:, None]


def layer_norm(theta: Params, name: str, x_NSH: Tensor) -> Tensor:
    """Layer normalisation with learned scale and shift."""
    return functional.layer_norm(x_NSH, x_NSH.shape[2:], theta[f"scale_{name}"], theta[f"shift_{name}"])


def masked_attention(qkv_NSF: Tensor, seen_S: Tensor, heads: int) -> Tensor:
    """What each token reads [N, S, H] of itself and the first `seen` tokens: softmax(q k / sqrt(D)) v."""
    column_S = torch.arange(len(seen_S), device=seen_S.device)
    mask_SS = (column_S < seen_S[:, None]) | (column_S == column_S[:, None])
    q_NGSD, k_NGSD, v_NGSD = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in qkv_NSF.chunk(3, 2))
    read_NGSD = functional.scaled_dot_product_attention(q_NGSD, k_NGSD, v_NGSD, attn_mask=mask_SS)
    return read_NGSD.transpose(1, 2).flatten(2)


def init_transformer_reader(args: Args, num_examples: int, generator: Generator) -> Params:
    """Weights of pre-norm blocks. Keys begin as queries, so that a token reads from those like it."""
    H = args.hidden_size
    theta = {}
    for i in range(args.layers):
        w_q, w_v = dense(H, H, generator), dense(H, H, generator)
        theta |= {f"w_qkv{i}": torch.cat([w_q, w_q, w_v]), f"w_read{i}": dense(H, H, generator)}
        theta |= {f"w_wide{i}": dense(4 * H, H, generator), f"w_narrow{i}": torch.zeros(H, 4 * H)}
        theta |= {f"scale_attention{i}": torch.ones(H), f"scale_mlp{i}": torch.ones(H)}
        theta |= {f"shift_attention{i}": torch.zeros(H), f"shift_mlp{i}": torch.zeros(H)}
    return theta | {"scale_out": torch.ones(H), "shift_out": torch.zeros(H)}


def transformer_reader(theta: Params, token_NSH: Tensor, seen_S: Tensor, B: int, args: Args) -> Tensor:
    """Features [N, S, H] by self-attention, without positions: the order of what is seen has no effect."""
    hidden_NSH = token_NSH
    for i in range(args.layers):
        qkv_NSF = layer_norm(theta, f"attention{i}", hidden_NSH) @ theta[f"w_qkv{i}"].mT
        read_NSH = masked_attention(qkv_NSF, seen_S, heads=args.hidden_size // HEAD_WIDTH)
        hidden_NSH = hidden_NSH + read_NSH @ theta[f"w_read{i}"].mT
        wide_NSU = functional.gelu(layer_norm(theta, f"mlp{i}", hidden_NSH) @ theta[f"w_wide{i}"].mT)
        hidden_NSH = hidden_NSH + wide_NSU @ theta[f"w_narrow{i}"].mT
    return layer_norm(theta, "out", hidden_NSH)


def init_gru_reader(args: Args, num_examples: int, generator: Generator) -> Params:
    """Weights of GRU layers."""
    H = args.hidden_size
    theta = {}
    for i in range(args.layers):
        theta |= {f"w_input{i}": dense(3 * H, H, generator), f"w_hidden{i}": dense(3 * H, H, generator)}
        theta |= {f"b_input{i}": torch.zeros(3 * H), f"b_hidden{i}": torch.zeros(3 * H)}
    return theta


def gru_reader(theta: Params, token_NSH: Tensor, seen_S: Tensor, B: int, args: Args) -> Tensor:
    """Features [N, S, H]: each query makes one step from the state after the examples that it sees."""
    N, S, H = token_NSH.shape
    example_NBH, query_NQH = token_NSH.split([B, S - B], 1)
    zeros_1NH = token_NSH.new_zeros(1, N, H)
    options = {
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": True,  # always: without it, cuDNN has no gradient
        "bidirectional": False,
        "batch_first": True,
    }
    for i in range(args.layers):
        weights = [theta[f"{name}{i}"] for name in ("w_input", "w_hidden", "b_input", "b_hidden")]
        if B:
            example_NBH, _ = torch.gru(example_NBH, zeros_1NH, weights, **options)
        state_NCH = torch.cat([zeros_1NH.transpose(0, 1), example_NBH], 1)  # after 0, 1, .. examples
        before_NQH = state_NCH[:, seen_S[B:]]
        query_NQH = torch.gru_cell(query_NQH.flatten(0, 1), before_NQH.flatten(0, 1), *weights).view(N, -1, H)
    return torch.cat([example_NBH, query_NQH], 1)


def init_snail_reader(args: Args, num_examples: int, generator: Generator) -> Params:
    """Weights of SNAIL: in each block convolutions (dilations 1, 2, .. span all), then attention."""
    H = args.hidden_size
    convolutions = max(1, math.ceil(math.log2(num_examples + 1)))
    theta = {}
    width = H
    for i in range(args.layers):
        for j in range(convolutions):
            theta |= {f"w_conv{i}_{j}": dense(4 * H, width, generator), f"b_conv{i}_{j}": torch.zeros(2 * H)}
            width += H  # each layer reads all that came before, and appends H features
        theta[f"w_qkv{i}"] = dense(3 * H, width, generator)
        width += H
    return theta | {"w_out": dense(H, width, generator), "b_out": torch.zeros(H)}


def snail_reader(theta: Params, token_NSH: Tensor, seen_S: Tensor, B: int, args: Args) -> Tensor:
    """Features [N, S, H]; a token that sees s examples is number s of the sequence, right after them."""
    hidden_NSF = token_NSH
    for i in range(args.layers):
        for j in range(sum(name.startswith("w_conv0_") for name in theta)):
            # (f_t, g_t) = W h_t + U h_(t-d) + b, with d = 2^j; tanh(f_t) sigmoid(g_t) is appended.
            Wh_NSU, Uh_NSU = (hidden_NSF @ theta[f"w_conv{i}_{j}"].mT).chunk(2, 2)
            place_S = seen_S - 2**j
            earlier_NSU = Uh_NSU[:, place_S.clamp_min(0)] * (place_S >= 0)[:, None]
            f_NSH, g_NSH = (Wh_NSU + earlier_NSU + theta[f"b_conv{i}_{j}"]).chunk(2, 2)
            hidden_NSF = torch.cat([hidden_NSF, torch.tanh(f_NSH) * torch.sigmoid(g_NSH)], 2)
        read_NSH = masked_attention(hidden_NSF @ theta[f"w_qkv{i}"].mT, seen_S, heads=1)
        hidden_NSF = torch.cat([hidden_NSF, read_NSH], 2)
    return hidden_NSF @ theta["w_out"].mT + theta["b_out"]


INITS = {"transformer": init_transformer_reader, "gru": init_gru_reader, "snail": init_snail_reader}
ENCODERS = {"transformer": transformer_reader, "gru": gru_reader, "snail": snail_reader}


def init_reader(tasks, args: Args, generator: Generator) -> Params:
    """theta: an embedding of images, tokens, what reads them, and a linear output."""
    ways = tasks.num_outputs if tasks.is_classification else 1
    F = tasks.num_inputs
    theta = {}
    if tasks.is_classification:
        theta = init_embedding(tasks, args, generator)
        side = 1 if args.mlp else math.ceil(math.isqrt(F) / 2 ** len(args.hidden_sizes))
        F = args.hidden_sizes[-1] * side**2
    theta["w_x"] = dense(args.hidden_size, F, generator)
    theta["w_y"] = dense(args.hidden_size, tasks.num_outputs + 1, generator)
    theta |= INITS[args.encoder](args, ways * args.shots, generator)
    theta["w_head"] = dense(tasks.num_outputs, args.hidden_size, generator)
    return theta | {"b_head": torch.zeros(tasks.num_outputs)}


def predict_queries(theta: Params, support: Examples, x_NQX: Tensor, args: Args) -> Tensor:
    """Outputs [N, Q, Y] for the queries; with --sequential they are the examples, in the same order."""
    x_NBX, y_NBY = support
    B, Q = x_NBX.shape[1], x_NQX.shape[1]
    example_NBF = embed_alone(theta, x_NBX, args)
    query_NQF = example_NBF if args.sequential else embed_alone(theta, x_NQX, args)
    known_NBL = torch.cat([y_NBY.to(x_NBX), torch.ones_like(y_NBY[..., :1], dtype=x_NBX.dtype)], 2)
    shown_NSL = functional.pad(known_NBL, (0, 0, 0, Q))  # a query's y is not known
    # How many examples a token sees, the first ones: all, or those before it where the order matters.
    before_B = torch.arange(B, device=x_NBX.device)
    all_B, all_Q = (torch.full((n,), B, device=x_NBX.device) for n in (B, Q))
    in_order = args.sequential or args.encoder != "transformer"
    seen_S = torch.cat([before_B if in_order else all_B, before_B if args.sequential else all_Q])
    feature_NSF = torch.cat([example_NBF, query_NQF], 1)
    if "w0" in theta:
        feature_NSF = centred(feature_NSF, seen_S, B)
    token_NSH = feature_NSF @ theta["w_x"].mT + shown_NSL @ theta["w_y"].mT  # [3]
    read_NSH = ENCODERS[args.encoder](theta, token_NSH, seen_S, B, args)  # [4]
    return read_NSH[:, B:] @ theta["w_head"].mT + theta["b_head"]


def score(output_NQY: Tensor, y_NQY: Tensor) -> Tensor:
    """Of each query [N, Q]: whether it is right where y is boolean, the mean squared error elsewhere."""
    if y_NQY.dtype == torch.bool:
        return y_NQY.take_along_dim(output_NQY.argmax(2, keepdim=True), 2).squeeze(2).to(output_NQY)
    return (output_NQY - y_NQY).square().mean(2)


def in_context_gradient(theta: Params, support: Examples, query: Examples, args: Args) -> tuple[Params, dict]:
    """The gradient of L, and the mean loss (and accuracy, of classes) of a batch of tasks."""
    theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
    x_NQX, y_NQY = query
    output_NQY = predict_queries(theta, support, x_NQX, args)
    if y_NQY.dtype == torch.bool:
        loss = -(output_NQY.log_softmax(2) * y_NQY).sum(2).mean()  # [5]
        stats = {"train/loss_post": loss.detach(), "train/accuracy_post": score(output_NQY, y_NQY).mean()}
    else:
        loss = (output_NQY - y_NQY).square().mean()
        stats = {"train/loss_post": loss.detach()}
    gradient = torch.autograd.grad(loss, list(theta.values()))
    return dict(zip(theta, gradient, strict=True)), stats


def draw_sets(tasks, batch: Tensor, args: Args, generator: Generator) -> tuple[Examples, Examples]:
    """Support and query sets of a batch of tasks; with --sequential twice the same set, in random order."""
    if not args.sequential:
        return tuple(tasks.sample(batch, (args.shots, args.shots), generator))
    ((x_NBX, y_NBY),) = tasks.sample(batch, (args.shots,), generator)
    order_NB = torch.rand(x_NBX.shape[:2], generator=generator).argsort(1).to(x_NBX.device)
    examples = tuple(x.take_along_dim(order_NB[..., None], 1) for x in (x_NBX, y_NBY))
    return examples, examples


def learn_tasks(theta: Params, support: Examples, query: Examples, args: Args) -> Tensor:
    """Accuracies or errors [N, K] with 0, 1, .. examples, of each class where there are classes."""
    x_NBX, y_NBY = support
    x_NQX, y_NQY = query
    ways = x_NBX.shape[1] // args.shots
    if not args.sequential:
        results = []
        for k in range(args.shots + 1):
            first = x_NBX[:, : k * ways], y_NBY[:, : k * ways]  # one of every class, then the next
            results.append(score(predict_queries(theta, first, x_NQX, args), y_NQY).mean(1))
        return torch.stack(results, 1)
    score_NB = score(predict_queries(theta, support, x_NQX, args), y_NQY)
    class_NBY = y_NBY if y_NBY.dtype == torch.bool else torch.ones_like(y_NBY[..., :1])
    before_NB = (class_NBY.cumsum(1) * class_NBY).sum(2)  # its number in its class, from 1
    order_NB = before_NB.argsort(dim=1, stable=True)
    return score_NB.take_along_dim(order_NB, 1).unflatten(1, (args.shots, ways)).mean(2)


@torch.no_grad()
def evaluate(tasks, theta: Params, args: Args) -> dict:
    """Accuracy or error on the test tasks with 0, 1, .. examples, the same tasks in every run."""
    test_tasks, generator = tasks.test_set(args.eval_tasks)
    support, query = draw_sets(tasks, test_tasks, args, generator)
    parts = zip(*(x.split(CHUNK) for x in (*support, *query)), strict=True)
    result_NK = torch.cat([learn_tasks(theta, (x, y), (u, v), args) for x, y, u, v in parts])  # [7]
    name = "accuracy" if tasks.is_classification else "loss"
    stats = {f"test/{name}_k{k}": result_N for k, result_N in enumerate(result_NK.unbind(1))}
    # A run logs means, and of names that end in ci95 half the width of a 95 % interval over different tasks.
    stats |= {f"{key}_ci95": (result_N, test_tasks) for key, result_N in stats.items()}
    stats["test/ci95"] = result_NK[:, -1], test_tasks
    stats["test/gain_ci95"] = result_NK[:, -1] - result_NK[:, 0], test_tasks
    return stats


def train(tasks, args: Args, run, state: dict) -> None:
    """The algorithm's loop, from `state` on."""
    theta = {name: value.to(tasks.device, copy=True) for name, value in state["theta"].items()}
    optimizer = torch.optim.Adam(theta.values(), args.lr, fused=True)
    optimizer.load_state_dict(state.get("optimizer") or optimizer.state_dict())
    generator = Generator()
    generator.set_state(state["generator"])
    for iteration in range(state["iteration"] + 1, args.iterations + 1):
        state["iteration"] = iteration
        batch = tasks.sample_tasks(args.meta_batch_size, generator, "train")  # [1]
        support, query = draw_sets(tasks, batch, args, generator)  # [2]
        gradient, stats = in_context_gradient(theta, support, query, args)
        for name, value in theta.items():
            value.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = args.lr * (1 - (iteration - 1) / args.iterations)
        optimizer.step()  # [6]
        x_NBX, _ = support
        state["env_steps"] += x_NBX.shape[0] * x_NBX.shape[1] * (1 if args.sequential else 2)  # examples seen
        state.update(theta=theta, optimizer=optimizer.state_dict(), generator=generator.get_state())
        run.end_iteration(state, stats, evaluate=lambda: evaluate(tasks, state["theta"], args))


def main(argv: list[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "envs").is_dir() else here.parent))  # where envs/ is
    from envs import make_supervised, records

    algorithm = Path(__file__).stem
    args, saved = records.parse(Args, argv, __doc__, algorithm, fixed=("sequential",))
    tasks = make_supervised(args.env_id, args.ways, 2 * args.shots, args.data, args.cuda, args.eval_split)
    generator = Generator().manual_seed(args.seed)
    theta = init_reader(tasks, args, generator)
    fresh = {"theta": theta, "generator": generator.get_state()}
    state = records.first_state(args, algorithm, fresh, saved, tasks.device)

    def examine() -> dict:
        return evaluate(tasks, state["theta"], args)

    unit = "examples of each class" if tasks.is_classification else "examples"
    with records.open_run(args, state, tasks, unit=unit, evaluate=examine) as run:
        if not args.evaluate:
            train(tasks, args, run, state)


if __name__ == "__main__":
    main()
