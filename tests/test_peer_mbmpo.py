"""benchmark/peer_mbmpo.py computes what algos/mbmpo.py computes; benchmark/speed.py runs."""

import json
import math
import sys
from functools import partial
from itertools import chain

import gymnasium as gym
import pytest
import torch
from double_precision import ALONE, flat, float64, seeded  # noqa: F401
from torch.func import grad

from algos import mbmpo as ours
from benchmark import peer_mbmpo as peer
from benchmark import speed, speed_mbmpo
from benchmark.peer_maml_trpo import set_vector
from envs import ScaleActions, imagine

CLOSE = {"rtol": 1e-8, "atol": 1e-9}
AFTER_MANY_STEPS = {"rtol": 1e-7, "atol": 1e-8}  # of episodes, of Adam: rounding grows


def small(env_id: str = "HalfCheetahForward-v0", **kwargs):
    """Sizes that all differ, worlds in float64, a policy and models that are not the first ones, made-up data."""
    sizes = {"num_models": 3, "model_size": 7, "episodes_per_task": 4, "real_episodes": 2, "horizon": 9}
    sizes |= {"hidden_size": 5, "action_scale": 3.0, "fisher_fraction": 1.0, "inner_lr": 0.1, "gae_lambda": 0.9}
    args = ours.Args(env_id=env_id, **(sizes | kwargs))
    settings = {"max_episode_steps": args.horizon, "dtype": torch.float64}
    envs = gym.make_vec(env_id, args.episodes_per_task, "vector_entry_point", **settings)
    envs, generator = ScaleActions(envs, args.action_scale), seeded(3)
    theta = ours.init_policy(envs, args.hidden_size, generator)
    models = ours.init_models(envs, args, generator)
    theta, models = (
        {name: x + 0.2 * torch.randn(x.shape, generator=generator) for name, x in params.items()}
        for params in (theta, models)
    )
    obs, _ = envs.reset(seed=1)
    obs, action = (
        torch.randn(60, size, generator=generator) for size in (obs.shape[1], envs.single_action_space.shape[0])
    )
    data = {"obs": obs, "action": action, "next_obs": obs + 0.3 * obs.roll(1, 1) + 0.1 * action.sum(1, keepdim=True)}
    data["place"] = torch.rand(len(obs), args.num_models, generator=generator)
    return args, envs, theta, models, data, generator


def scales_of(envs, reach: float) -> dict:
    """Scales that all differ, and bounds which an episode from the start states leaves sooner or later."""
    obs, (actions,) = envs.reset(seed=1)[0], envs.single_action_space.shape
    size, width = obs.shape[1], obs.shape[1] + actions
    scales = {"x_mean": torch.linspace(-0.1, 0.1, width), "x_std": torch.linspace(0.5, 1.5, width)}
    scales |= {"y_mean": torch.linspace(-0.01, 0.01, size), "y_std": torch.linspace(0.01, 0.03, size)}
    return scales | {"low": obs.mean(0) - reach, "high": obs.mean(0) + reach}


def copy_of(generator: torch.Generator) -> torch.Generator:
    again = torch.Generator()
    again.set_state(generator.get_state())
    return again


def ours_and_peers_episodes(args, envs, theta, models, scales, generator, monkeypatch):
    """Both sides' episodes before and after the inner step, from the same start states and noise."""
    imagined = imagine(envs, args.num_models * args.episodes_per_task)
    task = envs.unwrapped.sample_tasks(1, generator)
    tasks_NP, again = task.expand(args.num_models, -1), copy_of(generator)
    imagined.follow(partial(ours.predict, models, scales), scales["low"], scales["high"])
    support = ours.collect(imagined, tasks_NP, theta, args, generator)
    params = ours.lvc_step(theta, support, args)
    query = ours.collect(imagined, tasks_NP, params, args, generator)

    N, E = args.num_models, args.episodes_per_task
    starts, noises = [[] for _ in range(N)], [[] for _ in range(N)]
    for _ in range(2):
        seed = int(torch.randint(2**31, (1,), generator=again))
        noise_TNEA = torch.randn(args.horizon, N, E, envs.single_action_space.shape[0], generator=again)
        obs, _ = imagined.reset(seed=seed, options={"tasks": tasks_NP.repeat_interleave(E, 0)})
        for k in range(N):
            starts[k].append(obs.view(N, E, -1)[k])
            noises[k].extend(noise_TNEA[:, k])
    starts, noises = (chain.from_iterable(x) for x in (starts, noises))
    monkeypatch.setattr(peer, "start", lambda envs, task: next(starts))
    monkeypatch.setattr(peer, "noise", lambda like: next(noises))
    leaves = set_vector(theta, flat(theta))
    batches = peer.sample(envs, task, peer.models_like(models, scales), leaves, args)
    assert not [*starts, *noises]
    return support, params, query, leaves, batches


def assert_same_episodes(ours_NET: tuple, peers: list) -> None:
    for k, episodes in enumerate(peers):
        assert set(ours_NET._fields) - set(episodes._fields) == {"value", "std"}  # for other files' estimators
        for name, value in episodes._asdict().items():
            torch.testing.assert_close(value, getattr(ours_NET, name)[k], **AFTER_MANY_STEPS)


@pytest.mark.parametrize(
    ("env_id", "reach"), [("HalfCheetahForward-v0", 9.0), ("HopperForward-v0", 9.0), ("HalfCheetahForward-v0", 0.5)]
)
def test_imagined_episodes_and_the_inner_step_agree(env_id, reach, monkeypatch):
    args, envs, theta, models, _, generator = small(env_id, horizon=30)
    worlds = envs, theta, models, scales_of(envs, reach)
    support, params, query, leaves, batches = ours_and_peers_episodes(args, *worlds, generator, monkeypatch)
    early = 1 - support.mask.mean()
    assert 0.1 < early < 0.9 if "Hopper" in env_id or reach < 1 else early == 0, "falls and divergence end episodes"
    assert_same_episodes(support, [support for support, _ in batches])
    assert_same_episodes(query, [query for _, query in batches])
    for k, (own, _) in enumerate(batches):
        for name, value in peer.adapt(leaves, own, args, False).items():
            torch.testing.assert_close(value.detach(), params[name][k], **AFTER_MANY_STEPS)
            assert (value - leaves[name]).abs().max() > 1e-5


@pytest.mark.parametrize(("env_id", "reach"), [("HalfCheetahForward-v0", 0.5), ("HopperForward-v0", 9.0)])
def test_surrogate_gradient_fisher_product_and_step_agree(env_id, reach, monkeypatch):
    args, envs, theta, models, _, generator = small(env_id, horizon=30)
    worlds = envs, theta, models, scales_of(envs, reach)
    support, _, query, leaves, batches = ours_and_peers_episodes(args, *worlds, generator, monkeypatch)
    vector = flat(theta)

    def objective(vector):
        return ours.imagined_surrogate(ours.unflatten(vector, theta), [support], query, args)[0].mean()

    surrogate, kl, _ = peer.losses(leaves, batches, args)
    gradient = peer.flatten(torch.autograd.grad(surrogate, list(leaves.values()), retain_graph=True))
    torch.testing.assert_close(surrogate.detach(), objective(vector), **CLOSE)
    torch.testing.assert_close(gradient, grad(objective)(vector), **CLOSE)
    assert gradient.norm() > 0.01

    v = torch.randn(vector.shape, generator=generator)
    own = ours.fisher_product(theta, ours.imagined_surrogate, [support], query, args)(v)
    torch.testing.assert_close(peer.fisher_product(kl, leaves, args.cg_damping)(v), own, **CLOSE)

    new, stats = ours.trpo_step(theta, ours.imagined_surrogate, [support], query, args)
    peer_new, peer_stats = peer.trpo_step(leaves, batches, args)
    assert peer_stats["step"] == stats["train/step"] > 0
    assert peer_stats["kl"] == pytest.approx(stats["train/kl"], rel=1e-5)
    assert peer_stats["improvement"] == pytest.approx(stats["train/improvement"], rel=1e-5)
    for name, value in new.items():  # conjugate gradient amplifies rounding
        torch.testing.assert_close(peer_new[name].detach(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("early_stop", [False, True])
def test_fits_agree(early_stop, monkeypatch):
    settings = {"model_epochs": 60, "model_lr": 0.1} if early_stop else {"model_epochs": 3, "model_lr": 0.01}
    args, _, _, models, data, generator = small(model_batch_size=11, **settings)
    again, drawn, M = copy_of(generator), [], len(data["obs"])
    fitted, stats = ours.fit_models(ALONE, models, data, args, generator)
    order_NM = data["place"].T.argsort(1)
    orders = [torch.randperm(4 * M // 5, generator=again) for _ in range(args.model_epochs)]  # the same for all models

    def permutation(size, like):
        if size == M:
            drawn.append(iter(orders))
            return order_NM[len(drawn) - 1]
        return next(drawn[-1])

    monkeypatch.setattr(peer, "permutation", permutation)
    members = peer.models_like(models, {})
    epochs = peer.fit(members, data, args)
    assert max(epochs) == stats["train/model_epochs"]
    assert (len(set(epochs)) == args.num_models) == early_stop, epochs
    assert (max(epochs) < args.model_epochs) == early_stop
    for member, expected in zip(members, peer.models_like(fitted, ours.measure(data)), strict=True):
        assert (member.network[0].weight - models["w0"][0].T).abs().max() > 0.01
        for name, value in (vars(expected) | dict(expected.network.named_parameters())).items():
            if isinstance(value, torch.Tensor):
                found = vars(member).get(name, dict(member.network.named_parameters()).get(name))
                torch.testing.assert_close(found, value, **AFTER_MANY_STEPS)


def test_modules_are_the_models():
    args, envs, _, models, data, _ = small()
    scales, action = scales_of(envs, 1.0), data["action"].clamp(-1, 1)
    expected = ours.predict(models, scales, data["obs"].repeat(3, 1), action.repeat(3, 1))
    expected = expected.unflatten(0, (args.num_models, -1))
    for k, member in enumerate(peer.models_like(models, scales)):
        torch.testing.assert_close(member(data["obs"], action).detach(), expected[k], **CLOSE)
        for name in ("x_mean", "x_std", "y_mean", "y_std", "low", "high"):
            assert torch.equal(getattr(member, name), scales[name])
    assert not torch.allclose(expected[0], expected[1])


def test_the_report_is_of_medians_and_of_the_quicker_peer(monkeypatch):
    monkeypatch.setattr(speed_mbmpo, "threads", lambda: [1, 2])
    watch = speed.Stopwatch(speed.Options("mbmpo"), ours.Args())
    times = {"steps": 1200, "total": 3, "sample": 1, "update": 2, "cpu": 4, "fit": 5, "fit_cpu": 6, "rows": 3500}
    times |= {"peer_1_total": 9, "peer_1_sample": 5, "peer_1_update": 4, "peer_1_cpu": 10}
    times |= {"peer_2_total": 8, "peer_2_sample": 6, "peer_2_update": 2, "peer_2_cpu": 16}
    times |= {"peer_1_fit": 10, "peer_1_fit_cpu": 12, "peer_1_rows": 3500, "running": 0.5}
    times |= {"peer_2_fit": 11, "peer_2_fit_cpu": 22, "peer_2_rows": 3300}
    for name, value in times.items():
        watch.times[name] = [1e9, value, value / 3, 7 * value]  # one that warms up, and outliers
    expected = {"imagined_steps_per_s": 400, "imagination_only_steps_per_s": 1200, "model_rows_per_s": 700}
    expected |= {"meta_update_s": 3, "imagination_s": 1, "update_s": 2, "meta_update_cpu_s": 4}
    expected |= {"fit_s": 5, "fit_cpu_s": 6}
    expected |= {"peer_imagined_steps_per_s": 150, "peer_imagination_only_steps_per_s": 200}
    expected |= {"peer_model_rows_per_s": 350, "peer_meta_update_s": 8, "peer_imagination_s": 6, "peer_update_s": 2}
    expected |= {"peer_meta_update_cpu_s": 16, "peer_fit_s": 10, "peer_fit_cpu_s": 12}
    expected |= {"speedup_end_to_end": 8 / 3, "speedup_imagination": 6, "speedup_update": 1, "speedup_fit": 2}
    expected |= {"cpu_speedup_end_to_end": 4, "cpu_speedup_fit": 2, "running_share": 0.5}
    expected |= {"peer_1_threads_meta_update_s": 9, "peer_2_threads_meta_update_s": 8}
    assert speed_mbmpo.report(watch) == pytest.approx(expected, rel=1e-4)
    sizes = speed_mbmpo.sizes(ours.Args(model_epochs=50), watch)
    assert (sizes["peer_threads"], sizes["peer_fit_threads"], sizes["imagined_steps"]) == (2, 1, 1200)


def speed_line(flags: str, monkeypatch, capsys) -> dict:
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split()])
    torch.set_default_dtype(torch.float32)
    speed.main()
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


TINY = (
    " --num-models 2 --real-episodes 1 --episodes-per-task 3 --horizon 6 --model-size 8 --hidden-size 5 --iterations 2"
)


@pytest.mark.parametrize(
    "flags", ["", " --peer --env-id HopperForward-v0 --model-epochs 2", " --env-id Navigation2D-v0"]
)
def test_speed_always_prints_one_line_with_the_peer(flags, monkeypatch, capsys):
    monkeypatch.setattr(speed_mbmpo, "FITS", 2)
    calls = {"fit": 0, "trpo_step": 0, "sample": 0}

    def counted(name, function, *args):
        calls[name] += 1
        return function(*args)

    for name in calls:
        monkeypatch.setattr(peer, name, partial(counted, name, getattr(peer, name)))
    result = speed_line(f"mbmpo{TINY}{flags}", monkeypatch, capsys)
    kinds = len(speed_mbmpo.threads())
    assert calls == dict.fromkeys(calls, 3 * kinds)  # one warms up, two are measured
    assert all(math.isfinite(value) and value > 0 for value in result.values() if isinstance(value, float))
    epochs = 2 if "epochs" in flags else 5
    assert (result["imagined_steps"], result["iterations"], result["epochs_per_fit"]) == (72, 2, epochs)
    assert result["args"]["meta_steps"] == ours.Args().meta_steps
    for who in ("", "peer_"):
        assert result[f"{who}imagined_steps_per_s"] == pytest.approx(72 / result[f"{who}meta_update_s"], rel=1e-3)
        assert result[f"{who}imagination_only_steps_per_s"] == pytest.approx(
            72 / result[f"{who}imagination_s"], rel=1e-3
        )
        assert result[f"{who}model_rows_per_s"] == pytest.approx(10 * 2 * epochs / result[f"{who}fit_s"], rel=1e-3)
        assert result[f"{who}imagination_s"] < result[f"{who}meta_update_s"]
    for kind, name in {"end_to_end": "meta_update_s", "update": "update_s", "fit": "fit_s"}.items():
        assert result[f"speedup_{kind}"] == pytest.approx(result[f"peer_{name}"] / result[name], rel=1e-3)
    assert result["peer_meta_update_s"] == min(result[f"peer_{n}_threads_meta_update_s"] for n in speed_mbmpo.threads())


def test_worlds_that_cannot_be_imagined_are_one_clear_line(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="actions are choices"):
        speed_line("mbmpo --env-id Bandit5-v0", monkeypatch, capsys)
