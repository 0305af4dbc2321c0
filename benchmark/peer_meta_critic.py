"""The meta-critic as it is usually written: what benchmark/speed.py compares algos/meta_critic.py with.

The computation is the same (tests/test_peer_lives.py compares whole training runs), its organisation is that of the
authors' code, floodsung/meta-critic-networks:

* a loop over actors: each has a network, an Adam and a single Gymnasium environment of its own;
* an actor plays its window one step at a time, its network on a single observation, NumPy to torch and back;
* it then learns from the critic, and adds its part of the critic's and the encoder's gradient, `nn.LSTM` and all;
* where a lifetime ended, the actor is replaced by a new one with a new Adam.

Nothing is made slow on purpose: no distribution objects, no gradients while an actor plays, backward passes that skip
what they need not compute, an encoder that runs once for both losses. The authors update the critic after each actor;
here, as in algos/meta_critic.py, it takes one step on the mean over actors. Left out: critics of the actors' own.
"""

import math
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Generator, Tensor, nn

from benchmark.peer_pearl import mlp


class CartPole(gym.Env):
    """A pole on a cart; the task is half the pole's length."""

    def __init__(self):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (4,), np.float64), Discrete(2)
        self.length, self.state = 0.5, np.zeros(4)

    def start(self) -> np.ndarray:
        return self.np_random.uniform(-0.05, 0.05, 4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options and options.get("task") is not None:
            self.length = float(options["task"][0])
        self.state = self.start()
        return self.state, {}

    def step(self, action):
        x, velocity, angle, turning = self.state.tolist()
        sine, cosine = math.sin(angle), math.cos(angle)
        push = ((10.0 if action == 1 else -10.0) + 0.1 * self.length * turning**2 * sine) / 1.1
        spin = (9.8 * sine - cosine * push) / (self.length * (4 / 3 - 0.1 * cosine**2 / 1.1))
        speeding = push - 0.1 * self.length * spin * cosine / 1.1
        x, angle = x + 0.02 * velocity, angle + 0.02 * turning
        self.state = np.array([x, velocity + 0.02 * speeding, angle, turning + 0.02 * spin])
        return self.state, 1.0, abs(x) > 2.4 or abs(angle) > math.radians(12), False, {}


WORLDS = {"CartPoleLength-v0": CartPole}


class Lifetime(gym.Wrapper):
    """Episode after episode of one task, and after `episodes` of them another task from `draw_task`, for ever.

    The observation behind an episode's end is the next one's first; `info` has what the action led to, "final_obs", and
    whether a new lifetime has begun, "born".
    """

    def __init__(self, env: gym.Env, episodes: int, draw_task):
        super().__init__(env)
        self.episodes, self.draw_task = episodes, draw_task

    def reset(self, *, seed=None, options=None):
        self.episode, self.task = (options or {}).get("episode", 0), self.draw_task()
        return self.env.reset(seed=seed, options={"task": self.task})

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        final, born = obs, False
        if terminated or truncated:
            self.episode += 1
            born = self.episode == self.episodes
            if born:
                self.episode, self.task = 0, self.draw_task()
            obs, _ = self.env.reset(options={"task": self.task})
        return obs, reward, terminated, truncated, {"final_obs": final, "born": born}


def lifetimes(family: dict, args, episodes: int, number: int, envs) -> list[Lifetime]:
    """Single worlds of a family; tasks are drawn as the batched `envs` draw them, from a generator of their own."""
    if args.env_id not in family:
        raise SystemExit(f"--peer: {args.env_id} has no single environment here; allowed is {', '.join(family)}")
    generator = Generator().manual_seed(args.seed)

    def draw_task() -> np.ndarray:
        return envs.unwrapped.sample_tasks(1, generator)[0].cpu().numpy()

    worlds = [gym.wrappers.TimeLimit(family[args.env_id](), args.horizon) for _ in range(number)]
    return [Lifetime(world, episodes, draw_task) for world in worlds]


def draw(logits: Tensor) -> int:
    """A choice with these logits."""
    return int(torch.multinomial(logits.softmax(-1), 1))


class Critic(nn.Module):
    """Q and the encoder of traces."""

    def __init__(self, obs: int, actions: int, args):
        super().__init__()
        self.network = mlp(obs + actions + args.latent_size, args.critic_size, args.critic_size, 1)
        self.lstm = nn.LSTM(obs + actions + 1, args.hidden_size)
        self.latent = nn.Linear(args.hidden_size, args.latent_size)
        self.register_buffer("choices", torch.eye(actions))

    def encode(self, trace: Tensor) -> Tensor:
        """z [Z] of a trace [T, I]."""
        _, (last, _) = self.lstm(trace)
        return self.latent(last[0])

    def forward(self, obs: Tensor, action: Tensor, z: Tensor) -> Tensor:
        """Q [..] of actions [.., A] for obs [.., O] and z [Z]."""
        inputs = torch.cat([obs, action, z.expand(*obs.shape[:-1], -1)], -1)
        return self.network(inputs).squeeze(-1)

    def value(self, actor: nn.Module, obs: Tensor, z: Tensor) -> Tensor:
        """V [T] of an actor for obs [T, O]."""
        size = len(obs), len(self.choices), -1
        q = self(obs[:, None].expand(size), self.choices.expand(size), z)
        return (actor(obs).softmax(-1) * q).sum(-1)


class Pupil:
    """An actor, its Adam, its world, and where it is in it."""

    def __init__(self, actor: nn.Module, world: Lifetime, obs: np.ndarray, args):
        self.world, self.obs, self.args = world, obs, args
        self.begin(actor)

    def begin(self, actor: nn.Module) -> None:
        self.actor, self.optimizer = actor, torch.optim.Adam(actor.parameters(), self.args.actor_lr)
        like, widths = actor[0].weight, (self.world.observation_space.shape[0], int(self.world.action_space.n))
        self.trace = like.new_zeros(self.args.window_size, sum(widths) + 1)


class Window(NamedTuple):
    """T steps of an actor."""

    obs: Tensor  # [T, O]
    action: Tensor  # [T, A] one-hot
    reward: list[float]
    next_obs: Tensor  # [T, O] before any restart
    ended: list[bool]  # early
    over: list[bool]
    mask: Tensor  # [T] 0 once the lifetime was over
    trace: Tensor  # [T, I]


class Learner:
    """The critic and all actors."""

    def __init__(self, critic: Critic, pupils: list[Pupil], args):
        self.critic, self.pupils, self.args = critic, pupils, args
        self.optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr)


def new_actor(pupil: Pupil) -> nn.Module:
    """Of the same sizes and type as the one before, with torch's own initial weights."""
    widths = [layer.in_features for layer in pupil.actor[::2]]
    return mlp(*widths, pupil.actor[-1].out_features).to(pupil.actor[0].weight)


@torch.no_grad()
def load_layers(network: nn.Sequential, params: dict[str, Tensor], index: int) -> None:
    """The weights of one of several networks of algos/meta_critic.py."""
    for i, layer in enumerate(network[::2]):
        layer.weight.copy_(params[f"w{i}"][index].T)
        layer.bias.copy_(params[f"b{i}"][index, 0])


def make(state: dict, envs, args, number: int) -> Learner:
    """The critic and the first actors of a state that train() begins with, in worlds of their own."""
    theta, phi = state["theta"], state["phi"]
    like, (_, obs, size), actions = theta["w0"], theta["w0"].shape, theta["w2"].shape[2]
    critic = Critic(obs, actions, args).to(like)
    load_layers(critic.network, phi, 0)
    names = {"weight_ih_l0": "w_x", "weight_hh_l0": "w_h", "bias_ih_l0": "b_x", "bias_hh_l0": "b_h"}
    critic.lstm.load_state_dict({own: phi[name] for own, name in names.items()})
    critic.latent.load_state_dict({"weight": phi["w_z"].T, "bias": phi["b_z"]})
    pupils = []
    for i, world in enumerate(lifetimes(WORLDS, args, args.lifetime, number, envs)):
        actor = mlp(obs, size, size, actions).to(like)
        load_layers(actor, theta, i)
        first_obs, _ = world.reset(seed=args.seed + i, options={"episode": i * args.lifetime // number})
        pupils.append(Pupil(actor, world, first_obs, args))
    return Learner(critic, pupils, args)


@torch.no_grad()
def collect(pupil: Pupil, args) -> tuple[Window, bool]:
    """The actor's next window, and whether its lifetime ended in it."""
    like, born, rows = pupil.trace, False, []
    one_hot = np.eye(int(pupil.world.action_space.n))
    for _ in range(args.window_size):
        obs, mask = pupil.obs, not born
        action = draw(pupil.actor(torch.from_numpy(obs).to(like)))
        pupil.obs, reward, ended, late, info = pupil.world.step(action)
        rows.append((obs, one_hot[action], reward, info["final_obs"], ended, ended or late, mask))
        born = born or info["born"]
    obs, action, reward, next_obs, ended, over, mask = zip(*rows, strict=True)
    obs, action, next_obs = (torch.from_numpy(np.stack(x)).to(like) for x in (obs, action, next_obs))
    trace = torch.cat([obs, action, like.new_tensor(reward)[:, None]], 1)
    return Window(obs, action, reward, next_obs, ended, over, like.new_tensor(mask), trace), born


def targets(next_value: list[float], window: Window, args) -> list[float]:
    """y of each step, from V of what it led to."""
    target, found = next_value[-1], []
    for value, reward, ended, over in reversed(
        list(zip(next_value, window.reward, window.ended, window.over, strict=True))
    ):
        weight = 0.0 if over else args.td_lambda
        further = (1 - weight) * value + weight * target
        target = reward + (0.0 if ended else args.gamma * further)
        found.append(target)
    return found[::-1]


def teach(learner: Learner, windows: list[Window]) -> None:
    """A step of each actor, and one of critic and encoder."""
    critic, args = learner.critic, learner.args
    learner.optimizer.zero_grad()
    for pupil, window in zip(learner.pupils, windows, strict=True):
        z = critic.encode(pupil.trace)
        known = z.detach()
        with torch.no_grad():
            next_value = critic.value(pupil.actor, window.next_obs, known)
        target = window.mask.new_tensor(targets(next_value.tolist(), window, args))

        loss = -(critic.value(pupil.actor, window.obs, known) * window.mask).mean()
        pupil.optimizer.zero_grad()
        loss.backward(inputs=list(pupil.actor.parameters()))
        pupil.optimizer.step()

        error = (critic(window.obs, window.action, z) - target).square() * window.mask
        (error.mean() / len(windows)).backward()
        pupil.trace = window.trace
    learner.optimizer.step()


def iterate(learner: Learner) -> int:
    """A window of every actor and what is learned from it; its steps."""
    windows, born = zip(*[collect(pupil, learner.args) for pupil in learner.pupils], strict=True)
    teach(learner, windows)
    for pupil, is_new in zip(learner.pupils, born, strict=True):
        if is_new:
            pupil.begin(new_actor(pupil))
    return len(windows) * learner.args.window_size
