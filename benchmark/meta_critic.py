"""The numbers and pictures of docs/meta_critic.md.

    python benchmark/meta_critic.py cartpole runs/A runs/B ..    new actors on 20 unseen lengths: trained meta-critics
                                                                 beside own critics, a shared actor-critic and MAML
    python benchmark/meta_critic.py tune                         step sizes of actors and critics of their own
    python benchmark/meta_critic.py bandit runs/C ..             a new actor's pay after K pulls, beside greedy choices
    python benchmark/meta_critic.py regression --updates 6000    sinusoids and lines: meta-training, and K-shot errors
    python benchmark/meta_critic.py lengths runs/A               what z says about the length of the pole
    python benchmark/meta_critic.py table                        all of this from the results that are kept
    python benchmark/meta_critic.py curves                       docs/images/meta_critic_curves.png, likewise

Each of the first five adds lines to benchmark/results/meta_critic/. The shared actor-critic and MAML are trained here,
for as many steps of the worlds as `--windows` have.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.func import grad, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algos import meta_critic as ours  # noqa: E402
from benchmark.rl2 import load  # noqa: E402
from envs import Lifetimes, make, make_supervised, records  # noqa: E402

IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmark/results/meta_critic"
LEVEL, LENGTHS, UNIT = 150, 20, 10  # the return to reach, unseen lengths, windows from one examination to the next
LABELS = {
    "meta": "taught by the meta-critic",
    "own": "own critic Q, from scratch",
    "own V": "own critic V and its advantages, from scratch",
    "shared": "shared actor-critic, fine-tuned",
    "maml": "MAML's initialisation, policy gradient",
}


@dataclass
class Options:
    what: tyro.conf.Positional[Literal["cartpole", "tune", "bandit", "regression", "lengths", "table", "curves"]]
    """what to make"""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs of algos/meta_critic.py"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """new actors of `cartpole`; of `regression` the first one"""
    windows: int = 2000
    """windows of 50 worlds in which the shared actor-critic and MAML are trained"""
    cap: int = 600
    """windows after which a new actor that has not reached the return counts as having just reached it"""
    methods: tuple[str, ...] = ("meta", "own", "own V", "shared", "maml")
    """of `cartpole`"""
    updates: int = 6000
    """of the critic in `regression`, whose K-shot errors are kept after every third of them"""
    latent_size: int = 3
    """dimensions of z in `regression`"""


def worlds(args: ours.Args) -> list:
    """Worlds to train in, those of new actors, and those of examinations, as the file's main makes them."""
    N, E = args.meta_batch_size, args.eval_episodes
    made = [make(args.env_id, n, args.horizon, discrete=True) for n in (N, N, N * E)]
    return [Lifetimes(x, n) for x, n in zip(made, (args.lifetime, 10**9, 1), strict=True)]


def set_tests(envs, tasks_NP: Tensor, seed: int) -> None:
    """Give worlds another test set: its tasks, and the seed of actors, start states and noise."""
    envs.unwrapped.test_set = lambda num_tasks: (tasks_NP, Generator().manual_seed(seed))


def keep(name: str, line: dict) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print({k: v for k, v in line.items() if not isinstance(v, list)}, flush=True)


def kept(name: str) -> list[dict]:
    if not (RESULTS / f"{name}.jsonl").exists():
        raise SystemExit(f"nothing of {name} is kept in {RESULTS}")
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def reached(returns: list[Tensor], episodes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Episodes [N] that each actor had played when its examined return was first LEVEL, or all of them; and whether."""
    high, episodes = torch.stack(returns) >= LEVEL, torch.stack(episodes)
    first = high.float().argmax(0)  # 0 where none is high
    first = torch.where(high.any(0), first, len(high) - 1)
    return episodes.gather(0, first[None])[0], high.any(0)


def record(method: str, seed: int, run: str, learning: tuple, windows: int, seconds: float) -> None:
    returns, episodes = learning
    count, ok = reached(returns, episodes)
    line = {"method": method, "tests": "fixed", "seed": seed, "run": run}
    line |= {"episodes": float(count.mean()), "reached": int(ok.sum())}
    line |= {"cap_windows": windows, "lengths": len(count), "cap_episodes": float(episodes[-1].mean())}
    line |= {"seconds": round(time.time() - seconds), "each": [round(float(x)) for x in count]}
    line |= {"return": [round(float(x.mean()), 1) for x in returns]}
    keep("cartpole", line | {"played": [round(float(x.mean()), 1) for x in episodes]})


# ---------------------------------------------------------------- other ways of learning


def own_values(envs, exams, args: ours.Args, theta: dict | None = None, value: dict | None = None, lr=(1e-3, 1e-2)):
    """As meta_test, with a critic V(s) of each actor's own, advantages by GAE (lambda 0.95) and an entropy bonus of
    0.01: the usual actor-critic. `theta` and `value` may be given, with a leading axis of 1, to be fine-tuned."""
    N = args.meta_batch_size
    tasks_NP, generator = envs.unwrapped.test_set(N)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    obs_NO, _ = envs.reset(seed=seed, options={"tasks": tasks_NP})
    state = value_actors(envs, N, args, generator)
    for name, given in (("theta", theta), ("value", value)):
        if given is not None:
            state[name] = {k: x.expand(N, *x.shape[1:]).clone() for k, x in given.items()}
            state[f"{name}_adam"] = ours.fresh_moments(state[name])
    episodes_N, returns, episodes = torch.zeros(N), [], []
    for k in range(args.eval_steps + 1):
        returns.append(ours.examine(exams, tasks_NP, state["theta"], args, generator))
        episodes.append(episodes_N)
        for _ in range(args.eval_windows if k < args.eval_steps else 0):
            obs_NO, window, _ = ours.play_window(envs, obs_NO, state["theta"], args.window_size, generator)
            improve(state, window, args.gamma, lr)
            episodes_N = episodes_N + window.over.sum(1)
    return returns, episodes


def value_actors(envs, count: int, args: ours.Args, generator: Generator) -> dict:
    O, A, H = envs.single_observation_space.shape[0], int(envs.single_action_space.n), args.hidden_size  # noqa: E741
    theta = ours.init_layers(count, (O, H, H, A), generator)
    value = ours.init_layers(count, (O, args.critic_size, args.critic_size, 1), generator)
    adam = {"theta_adam": ours.fresh_moments(theta), "value_adam": ours.fresh_moments(value)}
    return {"theta": theta, "value": value} | adam


def improve(state: dict, window: ours.Window, gamma: float, lr: tuple[float, float]) -> None:
    """A step of every actor up its policy gradient, and of every critic towards the returns; of one of each for all."""
    value_NT, after_NT = (ours.forward(state["value"], x).squeeze(-1) for x in (window.obs, window.next_obs))
    delta_NT = window.reward + gamma * (1 - window.ended) * after_NT - value_NT
    tail_N, tails = torch.zeros_like(delta_NT[:, 0]), []
    for delta_N, over_N in zip(delta_NT.flip(1).unbind(1), window.over.flip(1).unbind(1), strict=True):
        tail_N = delta_N + gamma * 0.95 * (1 - over_N) * tail_N
        tails.append(tail_N)
    advantage_NT = torch.stack(tails[::-1], 1)
    goal_NT, one = advantage_NT + value_NT, len(state["theta"]["w0"]) == 1

    def actor_loss(theta: dict) -> Tensor:
        log_NTA = ours.forward(theta, window.obs).log_softmax(-1)
        entropy_NT = -(log_NTA.exp() * log_NTA).sum(-1)
        gain_N = ((log_NTA * window.action).sum(-1) * advantage_NT + 0.01 * entropy_NT).mean(1)
        return -(gain_N.mean() if one else gain_N.sum())

    def value_loss(value: dict) -> Tensor:
        error_N = (ours.forward(value, window.obs).squeeze(-1) - goal_NT).square().mean(1)
        return error_N.mean() if one else error_N.sum()

    for (name, loss), step in zip((("theta", actor_loss), ("value", value_loss)), lr, strict=True):
        gradient, moments = grad(loss)(state[name]), f"{name}_adam"
        state[name], state[moments] = ours.adam(state[name], gradient, state[moments], step)


def shared(args: ours.Args, windows: int) -> dict:
    """One actor and one critic for all tasks, trained in the worlds of a meta-training."""
    envs, generator = worlds(args)[0], Generator().manual_seed(args.seed)
    N, state = args.meta_batch_size, value_actors(envs, 1, args, generator)
    tasks_NP = envs.unwrapped.sample_tasks(N, generator, "train")
    obs_NO, _ = envs.reset(seed=args.seed, options={"tasks": tasks_NP, "episode": torch.arange(N) * args.lifetime // N})
    for _ in range(windows):
        obs_NO, window, _ = ours.play_window(envs, obs_NO, state["theta"], args.window_size, generator)
        improve(state, window, args.gamma, (1e-3, 1e-2))
    return state


EPISODES, INNER_LR = 5, 0.5  # of a task, for an inner step of MAML


def policy_loss(theta: dict, window: ours.Window, old: Tensor, gamma: float) -> Tensor:
    """Of one actor, theta [1, ..], and its episodes, window [E, T, ..]: -mean of ratio x normalised return to go."""
    tail_E, tails = torch.zeros_like(window.reward[:, 0]), []
    for reward_E in (window.reward * window.mask).flip(1).unbind(1):
        tail_E = reward_E + gamma * tail_E
        tails.append(tail_E)
    return_ET, weight_ET = torch.stack(tails[::-1], 1), window.mask / window.mask.sum()
    # The baseline is the mean return to go of the episodes that still run at that step.
    base_T = (return_ET * window.mask).sum(0) / window.mask.sum(0).clamp_min(1)
    advantage_ET = return_ET - base_T
    scale = (weight_ET * advantage_ET.square()).sum().sqrt() + 1e-8
    log_ET = (ours.forward(theta, window.obs).log_softmax(-1) * window.action).sum(-1)
    return -((log_ET - old).exp() * advantage_ET / scale * weight_ET).sum()


def batch(envs, tasks_NP: Tensor, theta: dict, args: ours.Args, generator: Generator):
    """EPISODES of each actor: windows [N, E, T, ..], log-probabilities [N, E, T], steps, in worlds of one episode."""
    options = {"tasks": tasks_NP.repeat_interleave(EPISODES, 0)}
    obs, _ = envs.reset(seed=int(torch.randint(2**31, (1,), generator=generator)), options=options)
    _, window, _ = ours.play_window(envs, obs, theta, args.horizon, generator)
    window = ours.Window(*(x.unflatten(0, (len(tasks_NP), EPISODES)) for x in window))
    output = ours.forward(theta, window.obs.flatten(1, 2)).log_softmax(-1).unflatten(1, window.reward.shape[1:])
    return window, (output * window.action).sum(-1), int(window.mask.sum())


def inner_step(theta: dict, window: ours.Window, old: Tensor, gamma: float) -> dict:
    """One actor's policy-gradient step."""
    gradient = grad(policy_loss)(theta, window, old, gamma)
    return {name: x - INNER_LR * gradient[name] for name, x in theta.items()}


def maml(args: ours.Args, steps: int) -> dict:
    """An initialisation, by Adam on the gradient through one inner step, in so many steps of the worlds."""
    N, generator = 20, Generator().manual_seed(args.seed)
    envs = Lifetimes(make(args.env_id, N * EPISODES, args.horizon, discrete=True), 1)
    theta, played = value_actors(envs, 1, args, generator)["theta"], 0
    moments = ours.fresh_moments(theta)
    while played < steps:
        tasks_NP = envs.unwrapped.sample_tasks(N, generator, "train")
        start = {name: x.expand(N, *x.shape[1:]) for name, x in theta.items()}
        *support, n = batch(envs, tasks_NP, start, args, generator)
        lead = {name: x[:, None] for name, x in start.items()}  # inside vmap an actor has its leading 1
        adapted = vmap(inner_step, (0, 0, 0, None))(lead, *support, args.gamma)
        *query, m = batch(envs, tasks_NP, {name: x[:, 0] for name, x in adapted.items()}, args, generator)

        def loss(theta: dict, support=support, query=query) -> Tensor:
            def one(window, old, after, after_old):
                return policy_loss(inner_step(theta, window, old, args.gamma), after, after_old, args.gamma)

            return vmap(one)(*support, *query).mean()

        theta, moments = ours.adam(theta, grad(loss)(theta), moments, 3e-3)
        played += n + m
    return theta


def maml_actors(envs, exams, args: ours.Args, theta: dict):
    """As meta_test: inner steps from MAML's initialisation, EPISODES each, in worlds of their own."""
    N = args.meta_batch_size
    tasks_NP, generator = envs.unwrapped.test_set(N)
    envs = Lifetimes(make(args.env_id, N * EPISODES, args.horizon, discrete=True), 1)
    theta = {k: x.expand(N, *x.shape[1:]) for k, x in theta.items()}
    returns, episodes = [], []
    for k in range(11):
        returns.append(ours.examine(exams, tasks_NP, theta, args, generator))
        episodes.append(torch.full((N,), float(EPISODES * k)))
        window, old, _ = batch(envs, tasks_NP, theta, args, generator)
        theta = vmap(inner_step, (0, 0, 0, None))({n: x[:, None] for n, x in theta.items()}, window, old, args.gamma)
        theta = {name: x[:, 0] for name, x in theta.items()}
    return returns, episodes


# ---------------------------------------------------------------- what to make


def cartpole(options: Options) -> None:
    trained = {}
    base = ours.Args(meta_batch_size=50)
    if "shared" in options.methods:
        trained["shared"] = shared(base, options.windows)
    if "maml" in options.methods:
        trained["maml"] = maml(base, options.windows * base.window_size * base.meta_batch_size)
    for seed in options.seeds:
        args = replace(base, meta_batch_size=LENGTHS, seed=seed, eval_windows=UNIT, eval_steps=options.cap // UNIT)
        _, envs, exams = worlds(args)
        set_tests(envs, envs.unwrapped.test_set(LENGTHS)[0], seed)
        for folder in options.runs if "meta" in options.methods else ():
            # No more windows than it takes to see it level off; the cap of the others is the same in windows.
            short = replace(args, eval_steps=min(args.eval_steps, 200 // UNIT))
            start, phi = time.time(), load(folder)[2]["phi"]
            learning = ours.meta_test(envs, exams, short, phi)
            record("meta", seed, folder.name, learning, short.eval_steps * UNIT, start)
        start, cap = time.time(), args.eval_steps * UNIT
        if "own" in options.methods:
            record("own", seed, "", ours.meta_test(envs, exams, args, phi=None), cap, start)
        start = time.time()
        if "own V" in options.methods:
            record("own V", seed, "", own_values(envs, exams, args), cap, start)
        start, short = time.time(), replace(args, eval_steps=200 // UNIT)
        if "shared" in options.methods:
            parts = trained["shared"]["theta"], trained["shared"]["value"]
            record("shared", seed, "", own_values(envs, exams, short, *parts), 200, start)
        start = time.time()
        if "maml" in options.methods:
            record("maml", seed, "", maml_actors(envs, exams, args, trained["maml"]), 0, start)


def tune(options: Options) -> None:
    """Own critics with other step sizes, on other unseen lengths than those of `cartpole`."""
    for actor_lr in (5e-4, 1e-3):
        for critic_lr in (1e-2, 3e-2):
            args = ours.Args(
                meta_batch_size=LENGTHS, seed=100, eval_windows=20, eval_steps=options.cap // 20,
                own_actor_lr=actor_lr, own_critic_lr=critic_lr,
            )  # fmt: skip
            _, envs, exams = worlds(args)
            other_lengths = envs.unwrapped.sample_tasks(LENGTHS, Generator().manual_seed(args.seed + 1), "test")
            set_tests(envs, other_lengths, args.seed)
            for method in ("own", "own V"):
                start = time.time()
                if method == "own":
                    returns, episodes = ours.meta_test(envs, exams, args, phi=None)
                else:
                    returns, episodes = own_values(envs, exams, args, lr=(actor_lr, critic_lr))
                count, ok = reached(returns, episodes)
                line = {"method": method, "actor_lr": actor_lr, "critic_lr": critic_lr, "episodes": float(count.mean())}
                line |= {"reached": int(ok.sum()), "cap_windows": options.cap, "seconds": round(time.time() - start)}
                keep("tune", line | {"return": [round(float(x.mean()), 1) for x in returns]})


def fit(theta: dict, phi: dict, z_NZ: Tensor, obs: Tensor, args: ours.Args, moments: dict, *, is_choice: bool):
    """One step of new actors at observations [N, B, O], by the meta-critic alone."""
    window = SimpleNamespace(obs=obs, mask=torch.ones(obs.shape[:2]))
    gradient = grad(ours.actor_loss)(theta, phi, window, z_NZ, is_choice=is_choice)
    return ours.adam(theta, gradient, moments, args.actor_lr)


def bandit(options: Options) -> None:
    """New actors pull K times, then take 300 steps without a pull. Pay of the arms that they then choose."""
    for folder in options.runs:
        _, args, state = load(folder)
        envs = Lifetimes(make(args.env_id, 2000, args.horizon, discrete=True), 10**9)
        for shots in (5, 10, 15):
            generator = Generator().manual_seed(1)
            tasks_NP = envs.unwrapped.sample_tasks(2000, generator, "test")
            obs, _ = envs.reset(seed=1, options={"tasks": tasks_NP})
            sizes = obs.shape[1], args.hidden_size, args.hidden_size, tasks_NP.shape[1]
            theta = ours.init_layers(2000, sizes, generator)
            moments = ours.fresh_moments(theta)
            _, window, _ = ours.play_window(envs, obs, theta, shots, generator)
            z_NZ = ours.encode(state["phi"], window.trace)
            for _ in range(300):
                theta, moments = fit(theta, state["phi"], z_NZ, obs[:, None], args, moments, is_choice=True)
            chosen_NA = ours.forward(theta, obs[:, None]).softmax(-1)[:, 0]
            best_N1 = tasks_NP.argmax(1, keepdim=True)
            pulls_NA = window.action.sum(1)
            wins_NA = (window.action * window.reward[..., None]).sum(1)
            mean_NA = torch.where(pulls_NA > 0, wins_NA / pulls_NA.clamp_min(1), 0.5)
            for_first_N = (2 * wins_NA - pulls_NA) @ torch.tensor([1.0, -1.0])  # a loss of one arm speaks for the other
            line = {"run": folder.name, "shots": shots, "meta": float((chosen_NA * tasks_NP).sum(1).mean())}
            line |= {"meta_best": float(chosen_NA.gather(1, best_N1).mean()), "optimal": float(tasks_NP.amax(1).mean())}
            for name, score_N in (("greedy", mean_NA[:, 0] - mean_NA[:, 1]), ("both_arms", for_first_N)):
                share_N = 0.5 + 0.5 * score_N.sign()  # equal scores: either arm
                line[name] = float((share_N * tasks_NP[:, 0] + (1 - share_N) * tasks_NP[:, 1]).mean())
            keep("bandit", line | {"uniform": float(tasks_NP.mean())})


class Curves:
    """Curves as worlds of one step, with the contract of envs/lifetimes.py: a wrong answer costs its squared error.

    info["answer"] is the right one, which the encoder sees."""

    is_discrete = False

    def __init__(self, data, num_envs: int, episodes: int):
        self.unwrapped, self.data, self.num_envs, self.episodes = self, data, num_envs, episodes
        self.device, self.sample_tasks, self.test_set = data.device, data.sample_tasks, data.test_set
        self.generator = Generator()
        self.single_observation_space = SimpleNamespace(shape=(data.num_inputs,))
        self.single_action_space = SimpleNamespace(n=data.num_outputs)

    def reset(self, *, seed: int, options: dict) -> tuple[Tensor, dict]:
        start = {"episode": torch.zeros(self.num_envs, dtype=torch.int64)} | options
        return self.load_worlds(start | {"generator": self.generator.manual_seed(seed).get_state()}), {}

    def save_worlds(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_worlds(self, saved: dict[str, Tensor]) -> Tensor:
        """The next x [B, X], drawn by the saved generator."""
        self.state = saved
        self.generator.set_state(saved["generator"])
        ((x, y),) = self.data.sample(saved["tasks"], (1,), self.generator)
        self.x, self.y = x.squeeze(1), y.squeeze(1)
        return self.x

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        tasks, episode = self.state["tasks"], self.state["episode"]
        reward, born, always = -(action - self.y).square().sum(1), episode == self.episodes - 1, episode >= 0
        info = {"answer": self.y, "final_obs": self.x, "episode": episode, "born": born}
        fresh = self.sample_tasks(self.num_envs, self.generator)
        now = {"tasks": torch.where(born[:, None], fresh, tasks), "episode": torch.where(born, 0, episode + 1)}
        return self.load_worlds(now | {"generator": self.generator.get_state()}), reward, always, ~always, info


class Watch(records.Follower):
    """In place of Run: prints now and then, and measures K-shot errors where a run would save."""

    def __init__(self, args: ours.Args, data):
        super().__init__(args)
        self.data, self.rows = data, []

    def log(self, state: dict, stats: dict) -> None:
        self.rows.append((stats["train/loss"], float(stats["train/return_post"])))
        if state["iteration"] % 500 == 0:
            loss, reward = np.mean(self.rows[-500:], 0)
            print(f"{state['iteration']}: critic's loss {loss:.3g}, actors' squared error {-reward:.3g}", flush=True)

    def save(self, state: dict) -> None:
        errors(state, self.data, self.args)


def regression(options: Options) -> None:
    """Meta-training by the file's `train`, then new actors that see K examples of a curve."""
    args = ours.Args(
        env_id="SinusoidOrLine-v0", seed=options.seeds[0], iterations=options.updates, meta_batch_size=100,
        window_size=10, horizon=1, lifetime=3000, gamma=0.0, latent_size=options.latent_size, least_trace=4,
        eval_every=-(-options.updates // 3), eval_steps=1, eval_windows=1,
    )  # fmt: skip
    data, N, generator = make_supervised(args.env_id, 1, 1), 100, Generator().manual_seed(args.seed)
    envs, fresh_envs, exams = (Curves(data, n, e) for n, e in ((N, args.lifetime), (N, 10**9), (10 * N, 1)))
    state = {"iteration": 0, "env_steps": 0, "seconds": 0.0}
    phi = ours.init_critics(envs, 1, args.latent_size, args, generator)
    state |= ours.init_learners(envs, phi, args, generator)
    births = torch.arange(N) * args.lifetime // N
    envs.reset(seed=1, options={"tasks": data.sample_tasks(N, generator, "train"), "episode": births})
    state |= {"worlds": envs.save_worlds(), "generator": generator.get_state()}
    ours.train(envs, fresh_envs, exams, args, Watch(args, data), state)


def errors(state: dict, data, args: ours.Args) -> None:
    """Squared errors of new actors that see K examples, taught by the critic and fitted to the examples."""
    for shots in (4, 8):
        N, generator = args.meta_batch_size, Generator().manual_seed(7)
        tasks, worlds = data.sample_tasks(N, generator, "test"), Curves(data, N, 10**9)
        obs, _ = worlds.reset(seed=3, options={"tasks": tasks})
        taught = scratch = ours.init_layers(N, (1, args.hidden_size, args.hidden_size, 1), generator)
        moments = own_moments = ours.fresh_moments(taught)
        _, window, _ = ours.play_window(worlds, obs, taught, shots, generator)
        z_NZ, x, y = ours.encode(state["phi"], window.trace), window.obs, window.trace[..., 1:]
        ((test_x, test_y),) = data.sample(tasks, (100,), generator)
        line = {"shots": shots, "iterations": state["iteration"], "encoder": "(x, y)", "least_trace": args.least_trace}
        line |= {"latent_size": args.latent_size, "seed": args.seed}

        def loss(theta: dict, x=x, y=y) -> Tensor:
            return (ours.forward(theta, x) - y).square().mean((1, 2)).sum()

        for step in range(1001):
            if step in (0, 100, 300, 1000):
                pairs = ("meta", taught), ("scratch", scratch)
                line |= {f"{k}_{step}": float((ours.forward(p, test_x) - test_y).square().mean()) for k, p in pairs}
            anywhere = 10 * torch.rand(N, 30, 1, generator=generator) - 5
            taught, moments = fit(taught, state["phi"], z_NZ, anywhere, args, moments, is_choice=False)
            scratch, own_moments = ours.adam(scratch, grad(loss)(scratch), own_moments, args.actor_lr)
        keep("regression", line)


def ranks(x: np.ndarray) -> np.ndarray:
    return x.argsort().argsort().astype(float)


def lengths(options: Options) -> None:
    """The encoder's opinion of 200 new actors on unseen lengths after 0, 20 and 100 windows; docs/images picture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, folder in enumerate(options.runs):
        _, args, state = load(folder)
        args, generator = replace(args, meta_batch_size=200), Generator().manual_seed(11)
        _, envs, _ = worlds(replace(args, eval_episodes=1))
        tasks = envs.unwrapped.sample_tasks(200, generator, "test")
        obs, _ = envs.reset(seed=5, options={"tasks": tasks})
        new, found = ours.init_learners(envs, state["phi"], args, generator), {}
        for k in range(101):
            obs, window, _ = ours.play_window(envs, obs, new["theta"], args.window_size, generator)
            ours.teach(new, window, args, actor_lr=args.actor_lr, critic_lr=0.0, is_choice=True)
            if k in (0, 20, 100):
                z = ours.encode(state["phi"], window.trace).numpy()
                z = z - z.mean(0)
                components = z @ np.linalg.svd(z, full_matrices=False)[2].T
                length = tasks[:, 0].numpy()
                rho = [abs(np.corrcoef(ranks(c), ranks(length))[0, 1]) for c in components.T]
                found[k] = [round(float(r), 3) for r in rho]
        keep("lengths", {"run": folder.name, "spearman": {str(k): v for k, v in found.items()}})
        if i == 0:
            marks = left.scatter(components[:, 0], components[:, 1], c=2 * length, cmap="viridis", s=12)
            figure.colorbar(marks, label="length of the pole in m")
            left.set(
                xlabel="first principal component of z", ylabel="second", title="what the encoder makes of a window"
            )
            right.plot(2 * length, components[:, 0], "o", markersize=3)
            right.set(xlabel="length of the pole in m", ylabel="first principal component of z")
    write(figure, "meta_critic_z.png")


def write(figure: Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=100)
    print(IMAGES / name)


def kept_methods() -> dict[str, list[dict]]:
    """Lines of `cartpole` by label; those with fixed lengths apart from older ones, with lengths drawn by the seed."""
    found = {}
    for method, label in LABELS.items():
        for line in kept("cartpole"):
            if line["method"] == method:
                found.setdefault(f"{label}, fixed lengths" if "tests" in line else label, []).append(line)
    return found


def table(_: Options) -> dict:
    """Of each method: episodes to LEVEL for each seed of new actors, and how many got there."""
    result = {}
    for label, lines in kept_methods().items():
        runs = sorted({line["run"] for line in lines})
        by_run = {run: [line["episodes"] for line in lines if line["run"] == run] for run in runs}
        result[label] = {
            "episodes": {run or "-": [round(x, 1) for x in numbers] for run, numbers in by_run.items()},
            "mean": round(float(np.mean([x for numbers in by_run.values() for x in numbers])), 1),
            "reached": f"{sum(line['reached'] for line in lines)} of {sum(line['lengths'] for line in lines)}",
            "first and last return": [round(float(np.mean([line["return"][k] for line in lines]))) for k in (0, -1)],
        }
    others = {name: kept(name) for name in ("bandit", "regression", "lengths") if (RESULTS / f"{name}.jsonl").exists()}
    print(json.dumps(result | others, indent=1))
    return result


def curves(_: Options) -> None:
    """docs/images/meta_critic_curves.png: return of new actors over the episodes that they have played."""
    axes = (figure := Figure(figsize=(9, 5), layout="constrained")).subplots()
    for label, lines in kept_methods().items():
        style = {"color": f"C{[*LABELS].index(lines[0]['method'])}", "linestyle": "--" if "tests" in lines[0] else "-"}
        runs = sorted({line["run"] for line in lines})
        for run in runs:
            group = [line for line in lines if line["run"] == run]
            mean = np.mean([[line["played"], line["return"]] for line in group], 0)
            axes.plot(mean[0] + 1, mean[1], **style, label=label if run == runs[0] else None)
    axes.axhline(LEVEL, color="0.7", linewidth=1, label=f"{LEVEL}, the return that the table asks for")
    axes.set(xscale="log", xlabel="episodes that a new actor has played, and 1", ylabel="return of its next episodes")
    axes.set_title("CartPole with a pole of unseen length")
    figure.legend(loc="outside lower center", ncols=2)
    write(figure, "meta_critic_curves.png")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    globals()[chosen.what](chosen)
