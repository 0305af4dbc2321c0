"""The mathematics of algos/dpt.py and ad.py against independent oracles, in float64: contexts read anew in place of
caches, labels by search and enumeration, Q-learning in plain loops, exact posteriors of a finite set of bandits."""

from collections import deque
from itertools import product

import pytest
import torch

from algos import ad, dpt
from benchmark import in_context
from envs.bandit import Bandit5, DependentBandit
from envs.hidden_goals import MOVES, DarkRoom, DarkRoomSmall, GridNavi
from envs.tabular_mdp import TabularMDP, tables
from tests.double_precision import float64, seeded  # noqa: F401 (float64 is used by being here)

N = 4
FAMILIES = {"bandit": (Bandit5, 1), "mdp": (TabularMDP, 3), "room": (DarkRoomSmall, 5)}  # class, horizon
SMALL = {"meta_batch_size": N, "episodes_per_trial": 6, "hidden_size": 32}
SOURCE = {"learners": 7, "source_episodes": 12, "keep_every": 2}
each_family = pytest.mark.parametrize("name", FAMILIES)
each_file = pytest.mark.parametrize("ours", [dpt, ad], ids=["dpt", "ad"])


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noisy(theta, seed):
    """Away from the special values, 0 and 1, and from the near uniform policy."""
    generator = seeded(seed)
    return {name: x + 0.2 * torch.randn(x.shape, generator=generator) for name, x in theta.items()}


def setup(ours, name, num=N, **kwargs):
    family, horizon = FAMILIES[name]
    args = ours.Args(**{**SMALL, **(SOURCE if ours is ad else {}), "horizon": horizon, **kwargs})
    envs = family(num, horizon, dtype=torch.float64)
    return args, envs, noisy(ours.init_model(envs, args, seeded(1)), 2)


def token(envs, query, step, lived):
    """What M reads at one position: a query (state, step), and the transition before it or None; by hand."""
    features = envs.state_features().tolist()
    words = [*features[query], step / envs.horizon]
    if lived is None:
        return words + [0.0] * (2 * len(features[0]) + int(envs.single_action_space.n) + 1)
    state, action, reward, next_state = lived
    chosen = [float(k == action) for k in range(int(envs.single_action_space.n))]
    return [*words, *features[state], *features[next_state], *chosen, reward]


# ---------------------------------------------------------------------------------------------------------------------
# Acting
# ---------------------------------------------------------------------------------------------------------------------


@each_family
@each_file
@pytest.mark.parametrize("context", [1, 2, 5])
@pytest.mark.parametrize("greedy", [False, True])
def test_acting_with_a_cache_is_reading_the_context_anew(ours, name, context, greedy, monkeypatch):
    args, envs, theta = setup(ours, name, context=context)
    T, seen, played = args.horizon, [], []
    logits_of, step_of = ours.action_logits, envs.step

    def spied_step(action):
        state = envs._obs.argmax(1)
        result = step_of(action)
        played.append((state, action, result[1], result[0].argmax(1)))
        return result

    def latest_logits(theta, x, memory, args):
        """The last ones before a step choose its action; others read a context again."""
        logits, memory = logits_of(theta, x, memory, args)
        del seen[len(played) :]
        seen.append(logits[:, -1])
        return logits, memory

    monkeypatch.setattr(ours, "action_logits", latest_logits)
    monkeypatch.setattr(envs, "step", spied_step)
    play = dpt.play_by_episodes if ours is dpt else ad.play_by_steps
    returns = play(envs, envs.sample_tasks(N, seeded(0)), theta, args, seeded(3), greedy)
    assert len(played) == args.episodes_per_trial * T
    rewards = torch.stack([x[2] for x in played], 1)
    close(returns, rewards.unflatten(1, (-1, T)).sum(2))
    for world in range(N):
        lived = [tuple(float(x[world]) if k == 2 else int(x[world]) for k, x in enumerate(step)) for step in played]
        for now in range(len(played)):
            episode, first = now // T, max(0, now // T - context) * T
            end = episode * T if ours is dpt else now  # D ends with the last episode, or with the last step
            tokens = [token(envs, lived[j][0], j % T, lived[j - 1] if j > first else None) for j in range(first, end)]
            tokens.append(token(envs, lived[now][0], now % T, lived[end - 1] if end > first else None))
            expected = logits_of(theta, torch.tensor([tokens]), {}, args)[0][0, -1]
            close(seen[now][world], expected)
            if greedy:
                assert lived[now][1] == int(expected.argmax())


def test_actions_are_drawn_from_the_softmax():
    args, envs, theta = setup(dpt, "bandit", num=20000, episodes_per_trial=2)
    tasks = envs.sample_tasks(1, seeded(0)).expand(20000, -1)
    probability = dpt.action_logits(theta, torch.tensor([[token(envs, 0, 0, None)]]), {}, args)[0].softmax(2)[0, 0]
    drawn, step_of = [], envs.step

    def spied_step(action):
        drawn.append(action)
        return step_of(action)

    envs.step = spied_step
    dpt.play_by_episodes(envs, tasks, theta, args, seeded(3))
    share = drawn[0].bincount(minlength=5) / 20000
    assert ((share - probability).abs() < 4 * (probability * (1 - probability) / 20000).sqrt()).all()
    assert float(probability.max() - probability.min()) > 0.05


@each_family
@each_file
def test_later_transitions_change_nothing_before(ours, name):
    args, _, theta = setup(ours, name)
    num_inputs, S = theta["w_in"].shape[1], len(theta["position"])
    x = torch.randn(2, S, num_inputs, generator=seeded(4), requires_grad=True)
    logits, _ = ours.action_logits(theta, x, {}, args)
    for position in range(S):
        (slope,) = torch.autograd.grad(logits[0, position].square().sum(), x, retain_graph=True)
        assert not slope[1].any()
        assert not slope[0, position + 1 :].any()
        assert (slope[0, : position + 1].norm(dim=1) > 1e-9).all()


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [Bandit5, DependentBandit])
def test_the_label_of_a_bandit_is_its_best_arm(family):
    envs = family(9, 2)
    tasks = envs.sample_tasks(9, seeded(0))
    actions = envs.optimal_actions(tasks)
    assert actions.shape == (9, 2, 1)
    for task, action in zip(tasks.tolist(), actions.tolist(), strict=True):
        assert action == [[task.index(max(task))]] * 2


def test_the_label_of_a_tabular_mdp_is_that_of_the_best_of_all_policies():
    """Two steps: every action now, and every choice of actions in the ten states that may come, is tried."""
    envs = TabularMDP(3, 2, dtype=torch.float64)
    tasks = envs.sample_tasks(3, seeded(0))
    mean, transition = tables(tasks)
    actions = envs.optimal_actions(tasks)
    assert actions.shape == (3, 2, 10)
    for n, state in product(range(3), range(10)):
        last = mean[n].amax(1)  # of each state the best of five actions, when one step is left
        values = [float(mean[n, state, a] + transition[n, state, a] @ last) for a in range(5)]
        assert int(actions[n, 0, state]) == values.index(max(values))
        assert int(actions[n, 1, state]) == int(mean[n, state].argmax())


def test_the_labels_of_a_tabular_mdp_are_worth_what_the_best_are():
    """Ten steps: the policy's exact value is `optimal_value`, and no change of one action in one step betters it."""
    envs = TabularMDP(2, 10, dtype=torch.float64)
    tasks = envs.sample_tasks(2, seeded(0))
    mean, transition = tables(tasks)
    actions = envs.optimal_actions(tasks)
    for n in range(2):
        value = torch.zeros(10)
        for step in reversed(range(10)):
            q = mean[n] + transition[n] @ value
            assert torch.equal(q.argmax(1), actions[n, step])
            value = torch.stack([q[s, actions[n, step, s]] for s in range(10)])


def distances(side, goal):
    """Steps to the goal from each cell, by breadth-first search."""
    steps, queue = {goal: 0}, deque([goal])
    while queue:
        column, row = queue.popleft()
        for dx, dy in MOVES:
            cell = column + dx, row + dy
            if cell not in steps and 0 <= cell[0] < side and 0 <= cell[1] < side:
                steps[cell] = steps[column, row] + 1
                queue.append(cell)
    return steps


@pytest.mark.parametrize("family", [DarkRoom, DarkRoomSmall, GridNavi])
def test_the_label_of_a_room_is_a_step_of_a_shortest_way(family):
    tasks = torch.cat([family.goals("train"), family.goals("test")]).double()
    envs = family(len(tasks), 3, dtype=torch.float64)
    actions = envs.optimal_actions(tasks)
    assert (actions == actions[:, :1]).all()
    for state in range(family.side**2):
        envs.reset(options={"tasks": tasks})
        envs._obs = envs._one_hot(torch.full((len(tasks),), state))
        obs, *_ = envs.step(actions[:, 0, state])
        for goal, cell in zip(tasks.long().tolist(), obs.argmax(1).tolist(), strict=True):
            steps = distances(family.side, tuple(goal))
            before, after = (steps[k % family.side, k // family.side] for k in (state, cell))
            assert after == max(0, before - 1)


@pytest.mark.parametrize("family", [Bandit5, TabularMDP, DarkRoom, DarkRoomSmall])
def test_states_are_told_apart(family):
    features = family(1).state_features()
    assert len(features) == family(1).single_observation_space.shape[0]
    assert len(features.unique(dim=0)) == len(features)


@each_family
def test_examples_are_queries_beside_transitions(name):
    args, envs, _ = setup(dpt, name, policies=2)
    tasks = envs.sample_tasks(N, seeded(0))
    lived = dpt.play_contexts(envs, tasks, args, seeded(1))
    examples = dpt.optimal_examples(envs, tasks, lived, seeded(2))
    features, best = envs.state_features(), envs.optimal_actions(tasks)
    S = 5 * args.horizon + 1
    assert examples.x.shape[:2] == examples.label.shape == (N, S)
    for n, j in product(range(N), range(S)):
        words = examples.x[n, j]
        query = int((features == words[: features.shape[1]]).all(1).nonzero())
        step = round(float(words[features.shape[1]]) * args.horizon)
        before = None if j == 0 else tuple(x[n, j - 1].item() for x in lived)
        close(words, torch.tensor(token(envs, query, step, before)))
        assert examples.label[n, j] == best[n, step, query]
    if name != "bandit":
        assert len({tuple(x) for x in examples.x[:, :, : features.shape[1]].flatten(0, 1).tolist()}) > 5


def test_contexts_follow_from_the_worlds():
    args, envs, _ = setup(dpt, "room", policies=3)
    tasks = envs.sample_tasks(N, seeded(0))
    lived = dpt.play_contexts(envs, tasks, args, seeded(1))
    for n, j in product(range(N), range(25)):
        start = 40 if j % 5 == 0 else int(lived.next_state[n, j - 1])
        assert int(lived.state[n, j]) == start
        move = MOVES[int(lived.action[n, j])]
        column, row = (min(8, max(0, at + by)) for at, by in zip((start % 9, start // 9), move, strict=True))
        assert int(lived.next_state[n, j]) == 9 * row + column
        assert float(lived.reward[n, j]) == ([column, row] == tasks[n].tolist())


def test_the_behaviour_in_bandits_is_a_dirichlet_mixed_with_a_point_mass():
    """Two pulls of one policy are equal with probability E[sum p^2], p = (1 - w) Dirichlet + w (one arm)."""
    args, envs, _ = setup(dpt, "bandit", num=20000, episodes_per_trial=4)
    action = dpt.play_contexts(envs, envs.sample_tasks(20000, seeded(0)), args, seeded(1)).action
    w = torch.arange(11) / 10
    expected = float(((1 - w) ** 2).mean() * 2 / 6 + 2 * (w * (1 - w)).mean() / 5 + (w**2).mean())
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((action[:, one] == action[:, other]).double().mean()) == pytest.approx(expected, abs=0.015)
    args.policies = 3
    action = dpt.play_contexts(envs, envs.sample_tasks(20000, seeded(0)), args, seeded(1)).action
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((action[:, one] == action[:, other]).double().mean()) == pytest.approx(0.2, abs=0.015)


# ---------------------------------------------------------------------------------------------------------------------
# Learning histories
# ---------------------------------------------------------------------------------------------------------------------


@each_family
def test_the_source_is_q_learning(name):
    """With its actions given, tables in plain loops: each action is the best or, with epsilon's frequency, any."""
    args, envs, _ = setup(ad, name, num=50, source_episodes=20, keep_every=1, source_lr=0.3)
    T, A = args.horizon, int(envs.single_action_space.n)
    lived = ad.learning_histories(envs, envs.sample_tasks(50, seeded(0)), args, seeded(1))
    assert lived.state.shape == (50, 20 * T)
    best, all_steps = [[] for _ in range(20)], 20 * T
    for n in range(50):
        Q = {}
        for j in range(all_steps):
            state, action, reward, next_state = (x[n, j].item() for x in lived)
            row = [Q.get((state, a), 0.0) for a in range(A)]
            best[j // T].append(row[action] >= max(row) - 1e-4)
            top = max(Q.get((next_state, a), 0.0) for a in range(A))
            Q[state, action] = row[action] + 0.3 * (reward + 0.9 * top - row[action])
    for episode, choices in enumerate(best):
        assert sum(choices) / len(choices) >= episode / 20 - 0.15
    assert sum(best[19]) / len(best[19]) > 0.9
    assert name == "room" or sum(best[3]) / len(best[3]) < 0.7  # in the room all values are equal for long


def test_every_kth_episode_is_kept():
    args, envs, _ = setup(ad, "room", num=7)
    tasks = envs.sample_tasks(7, seeded(0))
    every = ad.learning_histories(envs, tasks, args.__class__(**{**vars(args), "keep_every": 1}), seeded(1))
    kept = ad.learning_histories(envs, tasks, args, seeded(1))
    for whole, part in zip(every, kept, strict=True):
        assert torch.equal(part, whole.unflatten(1, (-1, 5))[:, ::2].flatten(1))


def test_windows_are_episodes_in_a_row():
    args, envs, _ = setup(ad, "room", num=7, context=2)
    histories = ad.learning_histories(envs, envs.sample_tasks(7, seeded(0)), args, seeded(1))
    numbered = ad.Experience(*[torch.arange(7 * 30).reshape(7, 30)] * 4)
    found = set()
    for seed in range(40):
        for row in ad.draw_windows(numbered, args, seeded(seed)).action.tolist():
            assert row == list(range(row[0], row[0] + 15))
            assert row[0] % 5 == 0
            assert row[0] % 30 <= 15
            found.add(row[0])
    assert len(found) == 7 * 4  # of each learner, each of four places
    windows = ad.draw_windows(histories, args, seeded(0))
    examples = ad.source_examples(envs, windows)
    assert torch.equal(examples.label, windows.action)
    for n, j in product(range(N), range(15)):
        before = None if j == 0 else tuple(x[n, j - 1].item() for x in windows)
        close(examples.x[n, j], torch.tensor(token(envs, int(windows.state[n, j]), j % 5, before)))


def best_returns(family, tasks, horizon):
    """What whoever knows the goal gets: the steps that are left on arrival, the arriving one included."""
    start = family.start
    return [min(horizon, horizon - distances(family.side, tuple(goal))[start] + 1) for goal in tasks.long().tolist()]


def test_source_learners_learn():
    torch.set_default_dtype(torch.float32)
    args = ad.Args(horizon=20, learners=100, keep_every=1)
    envs = DarkRoomSmall(100, 20)
    tasks = envs.sample_tasks(100, seeded(0))
    lived = ad.learning_histories(envs, tasks, args, seeded(1))
    returns = lived.reward.unflatten(1, (-1, 20)).sum(2).mean(0)
    best = sum(best_returns(DarkRoomSmall, tasks, 20)) / 100
    assert float(returns[:5].mean()) < 0.1 * best
    assert float(returns[-5:].mean()) > 0.9 * best


@each_file
@pytest.mark.parametrize("family", [DarkRoom, DarkRoomSmall])
def test_no_held_out_goal_is_ever_in_the_data(ours, family, monkeypatch):
    args = ours.Args(**SMALL, horizon=3, iterations=3, **(SOURCE if ours is ad else {}))
    held_out = {tuple(goal) for goal in family.goals("test").tolist()}
    seen = set()

    class Spied(family):
        def reset(self, *, seed=None, options=None):
            seen.update(tuple(goal) for goal in options["tasks"].long().tolist())
            return super().reset(seed=seed, options=options)

    class Quiet:
        def doing(self, *_):
            pass

        def end_iteration(self, *_, **__):
            pass

    worlds = [Spied(num, 3, dtype=torch.float64) for num in ([N, 7] if ours is ad else [N])]
    theta = ours.init_model(worlds[0], args, seeded(0))
    state = {"iteration": 0, "env_steps": 0, "theta": theta, "generator": seeded(1).get_state()}
    ours.train(*worlds, args, Quiet(), state)
    assert len(seen) >= 6
    assert not seen & held_out


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


def test_the_posterior_is_that_of_bayes_rule():
    """In plain loops, for every history of two pulls: P(arm a is the best | pulls) over the six tasks."""
    torch.set_default_dtype(torch.float32)
    chances = in_context.SixBandits.chances.tolist()
    for arms, pays in product(product(range(3), repeat=2), product((0.0, 1.0), repeat=2)):
        weights = []
        for task in chances:
            weight = 1.0
            for arm, paid in zip(arms, pays, strict=True):
                weight *= task[arm] if paid else 1 - task[arm]
            weights.append(weight)
        share = [0.0] * 3
        for task, weight in zip(chances, weights, strict=True):
            share[task.index(max(task))] += weight / sum(weights)
        found = in_context.posterior(torch.tensor([arms]), torch.tensor([pays]))[0, -1]
        close(found, torch.tensor(share), 1e-5)


def test_the_exact_posterior_is_learned():
    """And its pulls earn what Thompson sampling's do."""
    torch.set_default_dtype(torch.float32)
    args, envs, theta = in_context.learn_posterior(updates=250)
    apart = in_context.divergence(args, theta, 2000, seed=3)
    assert float(apart.mean()) < 0.03  # nats
    assert float(apart[0]) < 0.02
    tasks, generator = envs.sample_tasks(200, seeded(4)), seeded(5)
    rewards = dpt.play_by_episodes(envs, tasks, theta, args, generator).sum(1)
    others = in_context.thompson_rewards(tasks.repeat(10, 1), args.episodes_per_trial, generator)
    assert float(rewards.mean()) == pytest.approx(float(others.mean()), abs=0.6)


@each_file
def test_the_step_is_that_of_the_mean_cross_entropy(ours):
    """With plain gradient descent in place of Adam; the gradient by central differences."""
    args, _, theta = setup(ours, "mdp", lr=1e-3, max_grad_norm=1e6)
    x = torch.randn(N, 6, theta["w_in"].shape[1], generator=seeded(3))
    label = torch.randint(5, (N, 6), generator=seeded(4))

    def loss(theta):
        log_p = ours.action_logits(theta, x, {}, args)[0].log_softmax(2)
        return -sum(log_p[n, j, label[n, j]] for n in range(N) for j in range(6)) / (6 * N)

    before = {name: value.clone() for name, value in theta.items()}
    stats = ours.pretrain_step(theta, torch.optim.SGD(theta.values(), 1.0), ours.Examples(x=x, label=label), args, 0.5)
    assert stats["train/loss"] == pytest.approx(float(loss(before)), rel=1e-9)
    for name in ("b_policy", "w_policy", "w_in", "position", "w_qkv0", "scale_mlp1"):
        step = (before[name] - theta[name]) / (0.5 * args.lr)
        spot = tuple(int(k) for k in (step.abs() == step.abs().max()).nonzero()[0])
        up, down = ({key: value.clone() for key, value in before.items()} for _ in range(2))
        up[name][spot] += 1e-5
        down[name][spot] -= 1e-5
        assert float(step[spot]) == pytest.approx(float(loss(up) - loss(down)) / 2e-5, rel=1e-5)


class TinyRoom(DarkRoom):
    """Sixteen cells; three goals are held out."""

    side = 4


def test_algorithm_distillation_gets_better_along_a_trial_with_a_goal_it_has_never_seen():
    torch.set_default_dtype(torch.float32)
    sizes = {"horizon": 10, "episodes_per_trial": 6, "context": 2, "meta_batch_size": 100}
    args = ad.Args(**sizes, learners=300, source_episodes=60, keep_every=10, iterations=250, lr=4e-3)
    envs, generator = TinyRoom(100, 10), seeded(1)
    source_envs = TinyRoom(300, 10)
    histories = ad.learning_histories(source_envs, source_envs.sample_tasks(300, generator), args, generator)
    theta = ad.init_model(envs, args, generator)
    optimizer = torch.optim.Adam(theta.values(), args.lr)
    for iteration in range(args.iterations):
        examples = ad.source_examples(envs, ad.draw_windows(histories, args, generator))
        ad.pretrain_step(theta, optimizer, examples, args, 1 - iteration / args.iterations)
    tasks, generator = envs.test_set(100)
    returns = ad.play_by_steps(envs, tasks, theta, args, generator).mean(0)
    assert float(returns[-2:].mean() - returns[0]) > 0.5, returns
