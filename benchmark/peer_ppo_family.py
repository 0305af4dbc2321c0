"""ProMP, Reptile and PPO on all tasks as they are usually written: what benchmark/speed.py compares our files with.

The computation is the same (tests/test_peer_ppo_family.py compares the updates), its organisation is that of
benchmark/peer_maml_trpo.py: a Python loop over tasks that samples each task's episodes in a `SyncVectorEnv`, adapts and
sums losses, differentiated by autograd through inner steps made with `create_graph=True`. PPO on all tasks has no inner
step: its update is one net on minibatches, as ours is, and only its sampling differs.
Left out: early ends (none of these tasks has one), ProMP's `--target-kl`, falling step sizes, `--task-given`.
"""

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.optim import Adam

from benchmark.peer_maml_trpo import ENVS, Episodes, Params, collect, gaussian, make, policy

__all__ = ["ENVS", "ITERATIONS", "make"]


def ratio(params: Params, batch: Episodes) -> Tensor:
    """pi(a|s) [E, T] over that of the policy that drew a."""
    return (policy(params, batch.obs).log_prob(batch.action) - batch.log_prob).exp()


def clipped_gain(params: Params, batch: Episodes, clip: float) -> Tensor:
    ratios = ratio(params, batch)
    return torch.min(ratios * batch.advantage, ratios.clamp(1 - clip, 1 + clip) * batch.advantage).mean()


def ascend(params: Params, gain: Tensor, lr: float, create_graph: bool = False) -> Params:
    grads = torch.autograd.grad(gain, list(params.values()), create_graph=create_graph)
    return {name: value + lr * g for (name, value), g in zip(params.items(), grads, strict=True)}


def leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def adapt(params: Params, support: Episodes, args, create_graph: bool) -> Params:
    return ascend(params, (ratio(params, support) * support.advantage).mean(), args.inner_lr, create_graph)


def promp_update(theta: Params, optimizer, batches: list[list[Episodes]], old: list[list], args) -> None:
    """Epochs of Adam, in place; `old` are the policies that sampled each task's supports."""
    for _ in range(args.epochs):
        losses = []
        for (*supports, query), own in zip(batches, old, strict=True):
            params, kl = theta, 0.0
            for support, before in zip(supports, own, strict=True):
                kl = kl + kl_divergence(before, policy(params, support.obs)).mean() / len(supports)
                params = adapt(params, support, args, True)
            losses.append(args.kl_coef * kl - clipped_gain(params, query, args.clip))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()


def promp(envs, theta: Params, args):
    optimizer = Adam(theta.values(), args.outer_lr)

    def iterate(tasks) -> None:
        batches, old = [], []
        for task in tasks:
            params, supports, policies = leaves(theta), [], []
            for _ in range(args.inner_steps):
                supports.append(collect(envs, task, params, args))
                with torch.no_grad():
                    before = policy(params, supports[-1].obs)
                policies.append(gaussian(before.mean, before.stddev))
                params = leaves(adapt(params, supports[-1], args, False))
            batches.append([*supports, collect(envs, task, params, args)])
            old.append(policies)
        promp_update(theta, optimizer, batches, old, args)

    return iterate


def ppo_step(params: Params, batch: Episodes, args) -> Params:
    """SGD on a task's batch."""
    for _ in range(args.inner_epochs):
        params = leaves(ascend(params, clipped_gain(params, batch, args.clip), args.inner_lr))
    return params


def reptile_ppo(envs, theta: Params, args):
    def iterate(tasks) -> None:
        sums = {name: torch.zeros_like(value) for name, value in theta.items()}
        for task in tasks:
            params = leaves(theta)
            for _ in range(args.inner_steps):
                params = ppo_step(params, collect(envs, task, params, args), args)
            for name, value in params.items():
                sums[name] += value.detach() / len(tasks)
        with torch.no_grad():
            for name, value in theta.items():
                value += args.outer_lr * (sums[name] - value)

    return iterate


def multitask_update(theta: Params, optimizer, batch: Episodes, args, generator) -> None:
    for _ in range(args.epochs):
        order = torch.randperm(len(batch.obs), generator=generator)
        for rows in order.tensor_split(min(args.minibatches, len(order))):
            minibatch = Episodes(*(x[rows] for x in batch))
            entropy = policy(theta, minibatch.obs).entropy().mean()
            optimizer.zero_grad()
            (-clipped_gain(theta, minibatch, args.clip) - args.entropy_coef * entropy).backward()
            torch.nn.utils.clip_grad_norm_(theta.values(), args.max_grad_norm)
            optimizer.step()


def multitask_ppo(envs, theta: Params, args):
    optimizer, generator = Adam(theta.values(), args.lr), torch.Generator().manual_seed(args.seed)

    def iterate(tasks) -> None:
        batches = [collect(envs, task, theta, args) for task in tasks]
        batch = Episodes(*(torch.cat(x) for x in zip(*batches, strict=True)))
        multitask_update(theta, optimizer, batch, args, generator)

    return iterate


ITERATIONS = {"promp": promp, "reptile_ppo": reptile_ppo, "multitask_ppo": multitask_ppo}
