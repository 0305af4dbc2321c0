"""benchmark/estimators.py against golden values (SPECS.md, G.2), enumerations, the file's own functions on explicit
episodes, and plain loops; docs/estimators.md against the kept results."""

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from matplotlib.image import imread
from torch import Generator
from torch.func import grad

from algos import maml_trpo
from benchmark import estimators as study
from envs import make
from tests.test_maml_trpo_math import TASK1, TASK2, Tabular, tabular_policy  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = {  # limits for infinitely many episodes, first components of the two states
    "exact value": {
        "score": (-0.0904803523, 0.0350689990),
        "first-order": (-0.0904803523, 0.0350689990),
        "lvc": (-0.0988026720, 0.1448852566),
        "dice": (-0.1255623541, 0.1241352703),
        "loaded": (-0.1255623541, 0.1241352703),
    },
    "no baseline": {
        "score": (-0.0884202730, 0.1902416723),
        "first-order": (-0.0904803523, 0.0350689990),
        "lvc": (-0.0988026720, 0.1448852566),
        "dice": (-0.1255623541, 0.1241352703),
        "loaded": (-0.1255623541, 0.1241352703),
    },
}
GOLDEN["exact value, rewards + 5"] = GOLDEN["exact value"]


def tasks_of(setting):
    return [study.Task(rewards, *study.SETTINGS[setting]) for rewards in study.REWARDS]


def full(pair):
    return torch.tensor([pair[0], -pair[0], pair[1], -pair[1]], dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def double(monkeypatch):
    """Worlds and policies in double precision: fits of few episodes are so ill-conditioned that in single precision
    two processors' meta-gradients may differ in every digit."""
    monkeypatch.setattr(gym, "make_vec", partial(gym.make_vec, dtype=torch.float64))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- tabular


@pytest.mark.parametrize("setting", study.SETTINGS)
def test_exact_gradient_and_limits_are_the_golden_ones(setting):
    tasks = tasks_of(setting)
    close(study.exact(tasks), full((-0.1255623541, 0.1241352703)))
    supports = [task.prob(study.THETA)[None] for task in tasks]
    limits = study.tabular_gradients(tasks, supports, lambda p: p, 1)
    for name, expected in GOLDEN[setting].items():
        close(limits[name][0], full(expected))


def test_expectation_over_every_support_of_one_episode():
    """Task 1 alone, no baseline: all 64 supports, each with the exact query, weighted by their probability."""
    task = study.Task(study.REWARDS[0], False)
    gradients = study.tabular_gradients([task], [torch.eye(64, dtype=torch.float64)], lambda p: p, 1)
    mean = {name: task.prob(study.THETA) @ x for name, x in gradients.items()}
    close(mean["e_maml"], full((0.1575404866, -0.6166623313)))
    close(mean["score"], full((0.1398693609, -0.4810943057)))
    close(mean["dice"], full((0.1489449004, -0.5690138998)))
    close(study.exact_of_one_episode([task]), mean["e_maml"])


@pytest.mark.parametrize("name", study.ESTIMATORS)
@pytest.mark.parametrize("setting", study.SETTINGS)
def test_an_estimate_is_what_the_file_computes_from_those_episodes(name, setting, tabular_policy, double):  # noqa: F811
    """Five drawn episodes a task, through adapt() and surrogate() on a tabular policy."""
    tabular_policy.shape, K, H = (2, 2), 5, 3
    baseline, shift = study.SETTINGS[setting]
    worlds = [Tabular(*x[:2], (torch.tensor(x[2]) + shift).tolist(), *x[3:]) for x in (TASK1, TASK2)]
    theta, generator, tasks = study.THETA.view(2, 2), Generator().manual_seed(3), tasks_of(setting)
    keys = [[tuple(torch.stack([w.state[m], w.action[m]], 1).flatten().tolist()) for m in range(64)] for w in worlds]
    place = [torch.tensor([int("".join(map(str, key)), 2) for key in each]) for each in keys]  # in study.Task's order
    drawn = [torch.multinomial(world.prob(theta), K, True, generator=generator) for world in worlds]
    asked = [torch.randint(64, (K,), generator=generator) for _ in worlds]
    supports, queries = [], []
    for world, own, query in zip(worlds, drawn, asked, strict=True):
        values = world.values(theta)[0] * baseline
        supports.append(maml_trpo.Episodes(*(x[own] for x in world.episodes(theta, values))))
        error = torch.eye(2)[world.action[own]] - torch.softmax(theta, -1)[world.state[own]]
        steps = (world.to_go - values)[own][..., None, None] * torch.einsum(
            "ets,eta->etsa", torch.eye(2)[world.state[own]], error
        )
        params = theta + 0.3 * steps.sum(1).mean(0)
        queries.append(maml_trpo.Episodes(*(x[query] for x in world.episodes(params, world.values(params)[0]))))
    support, query = (maml_trpo.Episodes(*map(torch.stack, zip(*x, strict=True))) for x in (supports, queries))
    estimator = "score" if name == "first-order" else name
    args = maml_trpo.Args(estimator=estimator, inner_lr=0.3 * H, first_order=name == "first-order", gamma=1.0)
    args.meta_batch_size = 2

    def objective(vector):  # the file divides by the number of steps
        return H * maml_trpo.surrogate({"b0": vector}, [support], query, args)[0].mean()

    expected = grad(objective)(study.THETA)
    shares = [
        [torch.bincount(p[x], minlength=64)[None] / K for p, x in zip(place, y, strict=True)] for y in (drawn, asked)
    ]
    later = iter(shares[1])
    actual = study.tabular_gradients(tasks, shares[0], lambda prob: next(later), K)[name][0]
    close(actual, expected)


by_sampling = pytest.mark.xdist_group("estimators")


@pytest.fixture(scope="module")
def sampled():
    result = study.tabular(study.Options("tabular", repetitions=2000))
    return {(row["setting"], row.get("episodes"), row["estimator"]): row for row in result["rows"]}


@by_sampling
def test_sampled_means_go_where_the_enumeration_says(sampled):
    exact = full((-0.1255623541, 0.1241352703))
    for setting, limits in GOLDEN.items():
        for name, limit in limits.items():
            bias = float((full(limit) - exact).norm() / exact.norm())
            assert sampled[setting, None, name]["error_of_mean"] == pytest.approx(bias, abs=1e-9)
            row = sampled[setting, 500, name]
            assert abs(row["error_of_mean"] - bias) < 4 * row["noise_of_mean"] + 0.005  # + bias of finite K
            assert row["cosine_exact"][0] < sampled[setting, None, name]["cosine_of_means_exact"][0]
            widths = [sampled[setting, K, name]["spread"] for K in (5, 20, 100, 500)]  # ~ 1 / sqrt(K)
            assert [a / b for a, b in itertools.pairwise(widths)] == pytest.approx([2, 5**0.5, 5**0.5], rel=0.15)
    for setting in study.SETTINGS:  # e_maml: unbiased for one episode, and ever noisier
        row = sampled[setting, 1, "e_maml"]
        assert row["error_from_own_target"] < 4 * row["noise_of_mean"]
        assert sampled[setting, 500, "e_maml"]["spread"] > 5 * sampled[setting, 5, "e_maml"]["spread"]


@by_sampling
def test_only_dice_suffers_when_all_rewards_shift(sampled):
    for name in study.ESTIMATORS:
        before, after = (sampled[setting, 20, name] for setting in ("exact value", "exact value, rewards + 5"))
        if name == "dice":
            assert after["spread"] > 1.5 * before["spread"]
            assert after["cosine_exact"][0] < before["cosine_exact"][0] - 0.1
        else:
            assert after["spread"] == pytest.approx(before["spread"], rel=1e-6)


# ---------------------------------------------------------------- statistics


def test_statistics_against_loops():
    generator = Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator).double() + 0.5 for n in (25, 10))
    for row, value in zip(x, study.cosine(x, y[0]), strict=True):
        a, b = row.tolist(), y[0].tolist()
        expected = sum(i * j for i, j in zip(a, b, strict=True)) / math.dist(a, (0, 0, 0)) / math.dist(b, (0, 0, 0))
        assert float(value) == pytest.approx(expected)
    middle = [sum(column) / 25 for column in x.T.tolist()]
    assert study.spread(x) == pytest.approx(math.sqrt(sum(math.dist(row, middle) ** 2 for row in x.tolist()) / 24))
    assert study.interval(x[:, 0]) == pytest.approx(1.96 * math.sqrt(float(x[:, 0].var()) / 25))
    pairs = [float(x[i] @ y[j]) for i in range(10) for j in range(10) if i != j]
    assert study.product_of_means(x[:10], y) == pytest.approx(sum(pairs) / 90)

    left = []
    for block in range(10):
        kept = [z[[i for i in range(len(z)) if i % 10 != block]] for z in (x, y)]
        left.append(study.cosine_of_means(*kept, False))
    mean = sum(left) / 10
    expected = 2.26 * math.sqrt(9 / 10 * sum((value - mean) ** 2 for value in left))
    assert study.jackknife(x, y, False) == pytest.approx([study.cosine_of_means(x, y, False), expected])


@pytest.mark.parametrize("paired", [True, False])
def test_cosine_of_means_sees_through_the_noise(paired):
    """Directions 60 degrees apart under noise several times their length; the noise is common to pairs."""
    generator, goal = Generator().manual_seed(1), torch.zeros(2, 50).double()
    goal[0, 0], goal[1, 0], goal[1, 1] = 1, 0.5, 0.75**0.5
    corrected, plain = [], []
    for _ in range(200):
        noise = torch.randn(2, 40, 50, generator=generator).double()
        x, y = goal[0] + noise[0], goal[1] + noise[0 if paired else 1]
        corrected.append(study.cosine_of_means(x, y, paired))
        plain.append(float(torch.nn.functional.cosine_similarity(x.mean(0), y.mean(0), 0)))
    corrected, plain = torch.tensor(corrected), torch.tensor(plain)
    assert abs(float(corrected.nanmean()) - 0.5) < 0.1
    assert abs(float(plain.mean()) - 0.5) > 0.15
    assert study.jackknife(noise[0] - noise[0].mean(0), y, paired) is None


# ---------------------------------------------------------------- HalfCheetahDir


def small(gamma=1.0):
    args = maml_trpo.Args(meta_batch_size=2, episodes_per_task=3, horizon=6, hidden_size=4, gamma=gamma)
    envs = make(args.env_id, 6, 6, False, 10.0)
    return envs, maml_trpo.init_policy(envs, 4, Generator().manual_seed(0)), args


@pytest.mark.parametrize("pairs", [1, 2])
def test_meta_gradients_are_those_of_the_shared_parameters(pairs, double):
    """A forward and a backward task a row: torch.autograd through both inner steps, from the same episodes."""
    _, theta, args = small()
    args.meta_batch_size = 2 * pairs
    envs = make(args.env_id, 6 * pairs, 6, False, 10.0)
    estimators = [name for name in study.ESTIMATORS if pairs == 1 or name != "e_maml"]  # its baseline is in all tasks
    actual = study.meta_gradients(envs, theta, args, estimators, Generator().manual_seed(5))
    generator, tasks = Generator().manual_seed(5), torch.tensor([[1.0], [-1.0]] * pairs)
    support = maml_trpo.collect(envs, tasks, theta, args, generator)
    query = maml_trpo.collect(envs, tasks, maml_trpo.adapt(theta, support, args), args, generator)
    for name, row in itertools.product(estimators, range(pairs)):
        own = maml_trpo.Args(**vars(args) | {"estimator": "lvc" if name == "first-order" else name})
        own.first_order = name == "first-order"
        leaf = {key: value.clone().requires_grad_() for key, value in theta.items()}
        pair = [maml_trpo.Episodes(*(x[2 * row : 2 * row + 2] for x in batch)) for batch in (support, query)]
        maml_trpo.surrogate(leaf, pair[:1], pair[1], own)[0].mean().backward()
        expected = torch.cat([value.grad.flatten() for value in leaf.values()])
        assert actual[name].shape == (pairs, len(expected))
        assert float((actual[name][row] - expected).norm() / expected.norm()) < 1e-7  # 1e-11 under three kernels
    for a, b in itertools.combinations([name for name in estimators if name != "first-order"], 2):
        assert float((actual[a] - actual[b]).norm()) > 1e-3 * float(actual[a].norm()), (a, b)


def test_below_a_discount_of_one_dice_adapts_elsewhere(double):
    envs, theta, args = small(gamma=0.9)
    rest = [name for name in study.ESTIMATORS if name != "dice"]
    assert study.meta_gradients(envs, theta, args, rest, Generator().manual_seed(5)).keys() == set(rest)
    with pytest.raises(AssertionError, match="not close"):
        study.meta_gradients(envs, theta, args, study.ESTIMATORS, Generator().manual_seed(5))


@pytest.mark.parametrize("iterations", [0, 1])
def test_theta_is_what_the_file_trains(iterations, monkeypatch):
    envs, made = small()[0], []
    monkeypatch.setattr(study, "make", lambda env_id, n, *rest: made.append((env_id, n)) or envs)
    monkeypatch.setattr(
        maml_trpo,
        "train",
        lambda envs, args, run, state: (
            state.update(left=args.iterations - state["iteration"]) or made.append((state, args))
        ),
    )
    theta, args, returns = study.trained(iterations, 3)
    assert made[0] == ("HalfCheetahDir-v0", args.meta_batch_size * args.episodes_per_task)
    assert made[1][0]["left"] == iterations
    expected = maml_trpo.init_policy(envs, args.hidden_size, Generator().manual_seed(3))
    assert all(torch.equal(theta[name], expected[name]) for name in expected)
    assert returns == {}


def test_samples_come_in_pairs_of_tasks(double):
    _, theta, args = small()
    parts = study.sample(theta, args, 25, ("lvc", "first-order"), Generator().manual_seed(6))
    assert {name: x.shape[0] for name, x in parts.items()} == {"lvc": 20, "first-order": 20}  # in batches of 20 pairs
    generator = Generator().manual_seed(6)
    envs = make(args.env_id, 120, 6, False, 10.0)
    wide = maml_trpo.Args(**vars(args) | {"meta_batch_size": 40})
    expected = study.meta_gradients(envs, theta, wide, ("lvc",), generator)
    assert torch.equal(parts["lvc"], expected["lvc"].double())


def test_the_study_of_the_cheetah_reports_what_was_sampled(monkeypatch):
    """Gradients of known expectation and noise: lvc half as long as the truth, score 60 degrees off, dice noisy."""
    lengths = {"lvc": (0.5, 0.0), "score": (0.5, 0.75**0.5), "first-order": (0.5, 0.75**0.5), "e_maml": (0.0, 0.0)}

    def sample(theta, args, repetitions, estimators, generator):
        result = {}
        for name in estimators:
            x = torch.randn(repetitions, 20, generator=generator).double() / args.episodes_per_task**0.5
            x *= 8.0 if name == "dice" else 1.0
            x[:, :2] += torch.tensor(lengths.get(name, (1.0, 0.0)))
            result[name] = 7 * x
        return result

    monkeypatch.setattr(study, "sample", sample)
    monkeypatch.setattr(study, "trained", lambda iterations, seed: (*small()[1:], {"test/return_k0": 0.0}))
    result = study.cheetah(study.Options("cheetah", repetitions=2000, reference_parts=50, reference_episodes=400))
    rows = {(row["estimator"], row["episodes"]): row for row in result["rows"]}
    sizes = (10, 20, 40, 400)
    assert set(rows) == {(name, E) for name in study.ESTIMATORS for E in sizes} - {("e_maml", 400)}
    assert [rows["lvc", E]["parts"] for E in sizes] == [4000, 2000, 1000, 50]
    assert result["unit"] == pytest.approx(7, rel=0.01)
    for (name, E), row in rows.items():
        noise = (8 if name == "dice" else 1) * (20 / E) ** 0.5
        assert row["spread"] == pytest.approx(noise, rel=0.1)
        length = {"lvc": 0.5, "e_maml": 0.0}.get(name, 1.0)
        assert row["length_of_mean"] == pytest.approx(length, abs=0.15)
        if name not in ("e_maml", "dice"):
            for key in ("loaded", "lvc"):
                value, half = row[f"cosine_of_means_{key}"]
                assert value == pytest.approx(0.5 if name in ("score", "first-order") else 1.0, abs=0.06)
                assert half < 0.2
    assert rows["dice", 400]["accuracy"] == pytest.approx((1 + 64 * 20 / 400 / 50) ** -0.5, abs=0.03)
    assert rows["dice", 400]["cosine_of_means_dice"] == pytest.approx([1, 0], abs=1e-9)  # the noise is common
    for E, name in itertools.product(
        (10, 20, 40), ("loaded", "lvc")
    ):  # without noise: 1; about l / sqrt(l^2 + noise^2)
        length = {"loaded": 1.0, "lvc": 0.5}[name]
        expected = length / (length**2 + 20 / E) ** 0.5
        assert rows[name, E]["cosine_loaded"][0] == pytest.approx(expected, abs=0.015)
        assert rows[name, E]["cosine_loaded"][1] < 0.02


def test_a_reference_of_noise_is_refused(monkeypatch):
    def noise(theta, args, repetitions, estimators, generator):
        x = torch.eye(repetitions).double()
        return dict.fromkeys(estimators, x - x.mean(0))

    monkeypatch.setattr(study, "sample", noise)
    monkeypatch.setattr(study, "trained", lambda iterations, seed: (*small()[1:], {}))
    with pytest.raises(SystemExit, match="noise"):
        study.cheetah(study.Options("cheetah"))


# ---------------------------------------------------------------- page and picture


def test_the_page_shows_the_kept_results():
    results, page = json.loads(study.RESULTS.read_text()), (ROOT / "docs/estimators.md").read_text()
    made = study.tables(results)
    for name, table in made.items():
        assert table in page, name
    for command, result in results.items():
        assert command in page
        assert all(version in page for version in result["versions"].values())
    numbers = []

    def walk(x):
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            walk(value)
        if isinstance(x, int | float):
            numbers.append(float(x))

    walk(results)
    numbers += [float(x) for x in re.findall(r"-?\d+\.\d+", "".join(made.values()))] + [0.99, 0.9, 0.3]  # gammas, alpha
    prose = "".join(line for line in page.splitlines(True) if not line.startswith(("|", "    ", "#")))
    prose = re.sub(r"\(http\S+\)|python \d\S+|torch \d\S+|mujoco \d\S+|`[^`]*`", "", prose, flags=re.I)
    for quoted in re.findall(r"-?\d+\.\d+", prose):
        digits = len(quoted.split(".")[1])
        near = any(abs(abs(value) - abs(float(quoted))) <= 0.5001 * 10**-digits for value in numbers)
        assert near, quoted


def test_the_picture_is_drawn_from_the_kept_results(tmp_path, monkeypatch):
    kept = imread(study.PICTURE)
    monkeypatch.setattr(study, "PICTURE", tmp_path / "estimators.png")
    study.draw(json.loads(study.RESULTS.read_text()))
    again = imread(tmp_path / "estimators.png")
    assert again.shape == kept.shape
    assert float(abs(again - kept).mean()) < 1e-3
