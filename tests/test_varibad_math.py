"""The mathematics of algos/varibad_ppo.py against independent oracles, in float64: a GRU cell step by step, plain loops
over trials, beliefs and steps with torch.distributions, worlds whose reward is a pure function, and tasks of two
possibilities, whose posterior and best ELBO are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from algos import varibad_ppo as ours
from envs import ScaleActions, Trials, summarise
from envs.hidden_goals import GridNavi
from envs.mouse_cheese import MouseCheese
from envs.navigation import SparseNavigation2D
from tests.double_precision import ALONE, Recorder, flat, float64, seeded  # noqa: F401 (float64 is used by being here)

FAMILIES = {  # class, horizon, episodes, worlds
    "grid": (GridNavi, 6, 3, 5),
    "mouse": (MouseCheese, 7, 3, 9),  # some wait, for others that never find the cheese
    "mice": (MouseCheese, 60, 2, 2),  # both find it: the next episode begins before the horizon
    "navigation": (SparseNavigation2D, 4, 3, 9),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


class SmallGrid(GridNavi):
    """Nine cells; the goal is in one of five corners and sides that are not beside the start."""

    side = 3


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noisy(params, seed):
    """Away from the special values, 0 and 1, and from the near uniform policy."""
    generator, theta = seeded(seed), {}
    for name, value in params.items():
        size = 1 / math.sqrt(value.shape[1]) if value.ndim == 2 else 0.3
        theta[name] = value + size * torch.randn(value.shape, generator=generator)
    return theta


def setup(name, **kwargs):
    """Flags, worlds, tasks and weights; the mouse's cheese is near, so that it is found now and then."""
    family, horizon, episodes, num = FAMILIES[name]
    sizes = {"meta_batch_size": num, "episodes_per_trial": episodes, "horizon": horizon, "hidden_size": 7}
    sizes |= {"latent_size": 3, "decoder_size": 6, "policy_size": 8, "buffer_size": 20, "minibatches": 1}
    sizes |= {"vae_updates": 1, "vae_batch_size": 3}
    sizes |= {} if name == "grid" else {"reward_decoder": "gaussian", "decode_obs": True}
    args = ours.Args(**sizes | kwargs)
    envs = family(num, horizon, dtype=torch.float64)
    envs = Trials(envs if envs.is_discrete else ScaleActions(envs, 1.0), episodes)
    tasks = envs.unwrapped.sample_tasks(num, seeded(0))
    if family is MouseCheese:
        tasks[:, 4:] = torch.tensor([[1.0, 2], [2, 1], [2, 2]]).repeat(num, 1)[:num]
    state = ours.init_learner(envs, args, seeded(1))
    state |= {"phi": noisy(state["phi"], 2), "theta": noisy(state["theta"], 3)}
    if name == "mice":
        state["theta"]["w_policy"] *= 0.3  # so that none keeps running into a wall
    lab = SimpleNamespace(args=args, envs=envs, tasks=tasks, state=state, phi=state["phi"], theta=state["theta"])
    lab.seen, lab.choices, lab.returns = play(lab)
    return lab


def play(lab, seed=4):
    return ours.play_with_beliefs(lab.envs, lab.tasks, lab.phi, lab.theta, lab.args, seeded(seed))


@pytest.fixture
def lab(name):
    return setup(name)


def inputs(seen):
    """What the encoder reads in a trial: the first observation, with zeros, and each step."""
    first = torch.zeros_like(seen.x[:, :1])
    first[:, 0, : seen.obs.shape[-1]] = seen.obs[:, 0]
    return torch.cat([first, seen.x], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Beliefs
# ---------------------------------------------------------------------------------------------------------------------


def beliefs_by_hand(phi, x):
    """Distributions q_0, q_1, .. for the inputs x [K, I] of one trial, by a cell of torch."""
    size = phi["w_h"].shape[1]
    cell, h = nn.GRUCell(x.shape[1], size), torch.zeros(1, size)
    names = {"weight_ih": "w_x", "weight_hh": "w_h", "bias_ih": "b_x", "bias_hh": "b_h"}
    found = []
    for now in x:
        h = torch.func.functional_call(cell, {key: phi[name] for key, name in names.items()}, (now[None], h))
        mean, log_variance = (phi["w_belief"] @ h[0] + phi["b_belief"]).chunk(2)
        found.append(Independent(Normal(mean, log_variance.exp().sqrt()), 1))
    return found


@each_family
def test_beliefs_while_acting_are_those_of_the_replay_at_every_position(lab):
    mean, log_variance, _ = ours.beliefs(lab.phi, inputs(lab.seen))
    lengths = lab.seen.mask.sum(1).int().tolist()
    told = torch.cat([lab.seen.obs, mean[:, :-1], log_variance[:, :-1]], -1)
    for trial, length in enumerate(lengths):
        close(lab.choices.told[trial, :length], told[trial, :length])
        by_hand = beliefs_by_hand(lab.phi, inputs(lab.seen)[trial, : length + 1])
        close(torch.stack([q.mean for q in by_hand]), mean[trial, : length + 1])
        close(torch.stack([q.variance for q in by_hand]), log_variance[trial, : length + 1].exp())
    assert mean[:, :2].std() > 0.01
    if lab.envs.unwrapped.can_terminate:
        assert len(set(lengths)) > 1


@each_family
def test_log_probabilities_are_those_of_what_the_policy_was_told(lab):
    for trial, length in enumerate(lab.seen.mask.sum(1).int().tolist()):
        for told, action, log_prob in zip(*(x[trial, :length] for x in lab.choices[:3]), strict=True):
            hidden = torch.tanh(lab.theta["w_hidden"] @ told + lab.theta["b_hidden"])
            output = lab.theta["w_policy"] @ hidden + lab.theta["b_policy"]
            policy = Categorical(logits=output)
            if "log_std" in lab.theta:
                policy = Independent(Normal(output, lab.theta["log_std"].exp()), 1)
            close(policy.log_prob(action), log_prob)


@pytest.mark.parametrize("name", ["grid"])
def test_a_step_is_what_happened_also_the_last_one_of_an_episode(lab):
    """The reward is a pure function of what stands in a step; where an episode ends, the next one starts elsewhere."""
    seen, (N, S) = lab.seen, lab.seen.mask.shape
    after, action, reward = seen.x[..., :25], seen.x[..., 25:30].argmax(-1), seen.x[..., -1]
    assert torch.equal(action, lab.choices.action)
    close(reward, GridNavi.reward(seen.obs, action, after, lab.tasks[:, None].expand(N, S, 2)))
    for episode in range(3):
        steps = slice(6 * episode, 6 * episode + 6)
        assert (seen.obs[:, 6 * episode, 0] == 1).all()
        assert torch.equal(seen.obs[:, steps][:, 1:], after[:, steps][:, :-1])
        close(lab.returns[:, episode], reward[:, steps].sum(1))
    assert (after[:, 5].argmax(-1) > 0).any()


def test_successive_kl_is_that_of_torch():
    mean, log_variance = torch.randn(2, 4, 6, 3, generator=seeded(0))
    actual = ours.successive_kl(mean, log_variance)
    for trial in range(4):
        before = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
        for k in range(6):
            now = Independent(Normal(mean[trial, k], (log_variance[trial, k] / 2).exp()), 1)
            close(actual[trial, k], kl_divergence(now, before))
            before = now


def test_the_first_belief_of_a_new_encoder_is_near_the_prior():
    lab = setup("grid")
    phi = ours.init_learner(lab.envs, lab.args, seeded(1))["phi"]
    mean, log_variance, _ = ours.beliefs(phi, inputs(lab.seen))
    assert ours.successive_kl(mean, log_variance)[:, 0].max() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The ELBO
# ---------------------------------------------------------------------------------------------------------------------


def network(phi, part, x):
    for i in range(3):
        x = phi[f"{part}_w{i}"] @ x + phi[f"{part}_b{i}"]
        x = x.clamp_min(0) if i < 2 else x
    return x


def elbo_by_hand(lab, seen, index, noise):
    """The mean over trials and beliefs, term by term."""
    O, terms = seen.obs.shape[-1], []  # noqa: E741
    for trial, length in enumerate(seen.mask.sum(1).int().tolist()):
        q = beliefs_by_hand(lab.phi, inputs(seen)[trial, : length + 1])
        before = [Independent(Normal(torch.zeros(3), torch.ones(3)), 1), *q]
        for column, k in enumerate(index):
            if k > length:
                continue
            m, total = q[k].mean + q[k].stddev * noise[trial, column], 0.0
            for step in range(length):
                obs, x = seen.obs[trial, step], seen.x[trial, step]
                if lab.args.reward_decoder == "cells":
                    logit = network(lab.phi, "reward", m)[x[:O].argmax()]
                    total = total + Bernoulli(logits=logit).log_prob((x[-1] > 0).double())
                else:
                    mean = network(lab.phi, "reward", torch.cat([m, x[:-1]]))[0]
                    total = total + Normal(mean, 1.0).log_prob(x[-1]) + 0.5 * math.log(2 * math.pi)
                if lab.args.decode_obs:
                    change = network(lab.phi, "obs", torch.cat([m, obs, x[O:-1]]))
                    of_numbers = Normal(obs + change, 1.0).log_prob(x[:O]) + 0.5 * math.log(2 * math.pi)
                    total = total + of_numbers.sum()
            terms.append(total - lab.args.kl_weight * kl_divergence(q[k], before[k]))
    return torch.stack(terms).mean()


@each_family
@pytest.mark.parametrize("drawn", [False, True])
def test_the_elbo_has_all_terms(name, drawn):
    lab = setup(name, kl_weight=0.7)
    length = 5 if name == "mice" else lab.seen.mask.shape[1]
    seen = ours.Seen(*(x[:3, :length] for x in lab.seen))
    index = torch.arange(length + 1)
    index = index[torch.randperm(length + 1, generator=seeded(5))[:4]] if drawn else index
    noise = torch.randn(len(seen.mask), len(index), 3, generator=seeded(6))
    leaves = {key: value.clone().requires_grad_() for key, value in lab.phi.items()}
    actual, parts = ours.elbo(leaves, seen, index, noise, lab.args)
    lab.phi = {key: value.clone().requires_grad_() for key, value in lab.phi.items()}
    expected = elbo_by_hand(lab, seen, index.tolist(), noise)
    close(actual, expected)
    close(actual, parts["log_likelihood"] - 0.7 * parts["belief_kl"])
    gradients = [torch.autograd.grad(bound, x.values()) for bound, x in ((actual, leaves), (expected, lab.phi))]
    for slope, slope_by_hand in zip(*gradients, strict=True):
        close(slope, slope_by_hand)
        assert slope.norm() > 1e-6


def test_what_lies_behind_a_trial_has_no_influence():
    lab = setup("mouse")
    behind = lab.seen.mask == 0
    assert behind.sum() > 5
    garbage = [torch.randn(x.shape, generator=seeded(7)) for x in lab.seen[:2]]
    mixed = [torch.where(behind[..., None], new, old) for new, old in zip(garbage, lab.seen[:2], strict=True)]
    index = torch.arange(lab.seen.mask.shape[1] + 1)
    noise = torch.randn(9, len(index), 3, generator=seeded(8))
    bounds = [
        ours.elbo(lab.phi, seen, index, noise, lab.args)[0] for seen in (lab.seen, ours.Seen(*mixed, ~behind + 0.0))
    ]
    close(*bounds)


def two_possibilities(trials=256, steps=4):
    """Walks at random between two cells, of which one pays: what they show, and the goals."""
    generator = seeded(9)
    goal, cells = (torch.randint(2, size, generator=generator) for size in ((trials,), (trials, steps + 1)))
    place = torch.eye(2)[cells]
    pays = cells[:, 1:] == goal[:, None]
    reward = torch.where(pays, 1.0, -0.1)[..., None]
    x = torch.cat([place[:, 1:], place[:, 1:], reward], -1)  # the action is the cell to go to
    return ours.Seen(obs=place[:, :-1], x=x, mask=torch.ones(trials, steps)), goal


def test_beliefs_about_two_possibilities_become_the_posterior():
    """Before the first step both are as likely, after it all is known.

    No belief can tell more of the S rewards than -S log 2 before the first step, since it is the same for both goals
    and E_q log p is then at most that of even odds, and 0 afterwards.
    """
    seen, goal = two_possibilities()
    S, args = 4, ours.Args(hidden_size=12, latent_size=2, decoder_size=12, vae_updates=400, vae_lr=0.01, kl_weight=0.01)
    space = SimpleNamespace(shape=(2,))
    envs = SimpleNamespace(single_observation_space=space, single_action_space=SimpleNamespace(shape=(), n=2))
    args.horizon, args.episodes_per_trial, args.buffer_size = S, 1, len(goal)
    state = ours.init_learner(envs, args, seeded(1))
    ours.keep_trials(state, seen)
    optimizer = torch.optim.Adam(state["phi"].values(), args.vae_lr)
    ours.learn_beliefs(state["phi"], optimizer, state, args, 1.0, seeded(2))
    noise = torch.randn(20, len(goal), S + 1, 2, generator=seeded(3))
    bounds = [ours.elbo(state["phi"], seen, torch.arange(S + 1), x, args)[1]["log_likelihood"] for x in noise]
    best = -S * math.log(2) / (S + 1)
    assert best - 0.1 < torch.stack(bounds).mean() < best + 0.01
    mean, log_variance, _ = ours.beliefs(state["phi"], inputs(seen))
    m = mean + (0.5 * log_variance).exp() * noise
    probability = ours.decode(state["phi"], "reward", m).sigmoid().mean(0)  # [N, K, 2], of each cell that it pays
    close(probability[:, 0], torch.full((len(goal), 2), 0.5), 0.1)
    close(probability[:, 1:], torch.eye(2)[goal][:, None].expand(-1, S, 2), 0.15)


# ---------------------------------------------------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------------------------------------------------


@each_family
def test_no_gradient_crosses_between_belief_and_policy(lab):
    phi, theta = ({k: v.clone().requires_grad_() for k, v in params.items()} for params in (lab.phi, lab.theta))
    _, choices, _ = ours.play_with_beliefs(lab.envs, lab.tasks, phi, theta, lab.args, seeded(4))
    assert not any(x.requires_grad for x in choices)
    loss, _ = ours.choices_loss(theta, choices, lab.args, 0.1)
    loss.backward()
    assert all(x.grad is None for x in phi.values())
    assert all(x.grad.norm() > 0 for x in theta.values())
    ours.keep_trials(lab.state, lab.seen)
    before = [flat(params).clone() for params in (lab.phi, lab.theta)]
    optimizer = torch.optim.Adam(lab.phi.values(), 0.01)
    ours.learn_beliefs(lab.phi, optimizer, lab.state, lab.args, 1.0, seeded(5))
    assert not torch.equal(flat(lab.phi), before[0])
    assert torch.equal(flat(lab.theta), before[1])
    before[0] = flat(lab.phi).clone()
    optimizer = torch.optim.Adam(lab.theta.values(), 0.01)
    ours.learn_choices(ALONE, lab.theta, optimizer, lab.choices, lab.args, 1.0, seeded(6))
    assert torch.equal(flat(lab.phi), before[0])
    assert not torch.equal(flat(lab.theta), before[1])


@each_family
def test_the_policys_loss_is_that_of_ppo(lab):
    choices = lab.choices._replace(log_prob=lab.choices.log_prob + 0.3 * torch.randn(lab.choices.mask.shape))
    total, count = 0.0, 0
    for trial, length in enumerate(choices.mask.sum(1).int().tolist()):
        for step in range(length):
            told, action, log_prob, _, advantage, target = (x[trial, step] for x in choices)
            hidden = torch.tanh(lab.theta["w_hidden"] @ told + lab.theta["b_hidden"])
            output = lab.theta["w_policy"] @ hidden + lab.theta["b_policy"]
            value = lab.theta["w_value"][0] @ hidden + lab.theta["b_value"][0]
            policy = Categorical(logits=output)
            if "log_std" in lab.theta:
                policy = Independent(Normal(output, lab.theta["log_std"].exp()), 1)
            ratio = float((policy.log_prob(action) - log_prob).exp())
            gain = min(ratio * advantage, min(max(ratio, 1 - lab.args.clip), 1 + lab.args.clip) * advantage)
            total += lab.args.value_coef * (value - target) ** 2 - gain - 0.4 * policy.entropy()
            count += 1
    close(ours.choices_loss(lab.theta, choices, lab.args, 0.4)[0], total / count)


@pytest.mark.parametrize("name", ["mouse", "navigation"])
def test_an_update_of_the_policy_is_adam_on_minibatches_of_whole_trials(name):
    lab = setup(name, epochs=2, minibatches=3, lr=0.01, max_grad_norm=0.2)
    theta = {key: value.clone() for key, value in lab.theta.items()}
    optimizer = torch.optim.Adam(theta.values(), lab.args.lr, eps=1e-5)
    stats = ours.learn_choices(ALONE, theta, optimizer, lab.choices, lab.args, 0.6, seeded(9))
    weights, generator = {k: v.clone().requires_grad_() for k, v in lab.theta.items()}, seeded(9)
    optimizer = torch.optim.Adam(weights.values(), 0.006, eps=1e-5)
    for _ in range(2):
        order = torch.randperm(9, generator=generator).tolist()
        for trials in (order[:3], order[3:6], order[6:]):
            part = ours.Choices(*(torch.stack([x[i] for i in trials]) for x in lab.choices))
            loss, parts = ours.choices_loss(weights, part, lab.args, 0.6 * lab.args.entropy_coef)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([x.grad.flatten() for x in weights.values()]).norm()
            for x in weights.values():
                x.grad *= min(1.0, 0.2 / float(norm))
            optimizer.step()
    close(flat(theta), flat(weights).detach(), 3e-6)  # clipping adds 1e-6 to the norm
    assert flat(theta).sub(flat(lab.theta)).norm() > 0.01
    expected = {f"train/{key}": float(value.detach()) for key, value in parts.items()}
    expected |= {"train/gradient_norm": float(norm)}
    assert {key: float(value) for key, value in stats.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beliefs", [None, 4])
def test_an_update_of_the_belief_is_adam_on_trials_from_the_buffer(beliefs):
    lab = setup("grid", vae_updates=3, vae_batch_size=4, vae_lr=0.01, decoded_beliefs=beliefs)
    ours.keep_trials(lab.state, lab.seen)
    start = {key: value.clone() for key, value in lab.phi.items()}
    optimizer = torch.optim.Adam(lab.phi.values(), 1.0)
    stats = ours.learn_beliefs(lab.phi, optimizer, lab.state, lab.args, 0.7, seeded(9))
    weights, generator, D = {k: v.requires_grad_() for k, v in start.items()}, seeded(9), beliefs or 19
    optimizer = torch.optim.Adam(weights.values(), 0.007)
    rows = torch.randint(5, (3, 4), generator=generator)  # of the trials that are there
    index = [torch.randperm(19, generator=generator)[:D] for _ in range(3)]
    noise = torch.randn(3, 4, D, 3, generator=generator)
    for update in range(3):
        part = ours.Seen(*(x[rows[update]] for x in lab.seen))
        bound, parts = ours.elbo(weights, part, index[update], noise[update], lab.args)
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
    close(flat(lab.phi), flat(weights).detach())
    expected = {f"train/{key}": float(x.detach()) for key, x in (parts | {"elbo": bound}).items()}
    assert {key: float(value) for key, value in stats.items()} == pytest.approx(expected)


def test_the_buffer_keeps_the_newest_trials():
    """Also where a shorter trial takes a longer one's place."""
    lab = setup("mice", buffer_size=4)
    kept = []
    for seed in range(6):
        seen, *_ = play(lab, seed)
        ours.keep_trials(lab.state, seen)
        kept += [{name: x[i] for name, x in seen._asdict().items()} for i in range(2)]
    assert lab.state["stored"] == 12
    for number, trial in enumerate(kept[-4:], start=8):
        length = len(trial["mask"])
        for name, x in trial.items():
            found = lab.state["buffer"][name][number % 4]
            assert torch.equal(found[:length], x)
            assert not found[length:].any()
    lengths = [len(trial["mask"]) for trial in kept]
    assert any(lengths[k] > lengths[k + 4] for k in range(4, 8))


# ---------------------------------------------------------------------------------------------------------------------
# evaluate and train
# ---------------------------------------------------------------------------------------------------------------------


@each_family
def test_evaluation_is_of_the_test_set_and_changes_nothing(lab):
    before = [flat(params).clone() for params in (lab.phi, lab.theta)]
    stats = ours.evaluate(lab.envs, lab.phi, lab.theta, lab.args)
    assert summarise(ours.evaluate(lab.envs, lab.phi, lab.theta, lab.args)) == summarise(stats)
    assert all(torch.equal(flat(x), y) for x, y in zip((lab.phi, lab.theta), before, strict=True))
    tasks, generator = lab.envs.unwrapped.test_set(lab.args.meta_batch_size)
    *_, returns = ours.play_with_beliefs(lab.envs, tasks, lab.phi, lab.theta, lab.args, generator)
    for k, expected in enumerate(returns.unbind(1)):
        close(stats[f"test/return_k{k}"], expected)
    close(stats["test/return_trial"], returns.sum(1))
    close(stats["test/gain_ci95"][0], returns[:, -1] - returns[:, 0])


def test_a_grid_is_learned():
    """Five goals on 3 x 3 cells, two episodes of six steps: Bayes-optimal are 2.70 and 4.02 where all are as likely.

    Four seeds gave -0.35 to -0.10 at first, then 2.04 to 2.70 in the first episode and 4.07 to 4.16 in the second.
    """
    flags = {"meta_batch_size": 40, "episodes_per_trial": 2, "horizon": 6, "hidden_size": 24, "iterations": 120}
    flags |= {"vae_updates": 8, "vae_lr": 0.005, "lr": 0.005, "buffer_size": 2000, "eval_every": 1000}
    args = ours.Args(**flags)
    envs = Trials(SmallGrid(40, 6, dtype=torch.float64), 2)
    state = ours.init_learner(envs, args, seeded(1))
    state |= {"iteration": 0, "env_steps": 0, "generator": seeded(5).get_state()}
    ours.train(envs, args, run := Recorder(args), state)
    first, last = (run.logged[i][2] for i in (0, -1))
    assert first["test/return_k0"] < 0.5
    assert first["test/return_k1"] < 0.5
    assert last["test/return_k0"] > 1.5
    tasks, _ = envs.unwrapped.test_set(40)
    best = -0.6 + 1.1 * (7 - tasks.sum(1)).mean()  # of somebody who is told the goal
    assert best - 0.7 < last["test/return_k1"] <= best + 1e-9
    assert run.logged[-1][1] == 120 * 40 * 12
