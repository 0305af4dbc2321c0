"""On a GPU every number that Python reads makes it wait for the device: none is read in a step or an update.

Read are numbers (`float(x)`, `if x:`) and shapes that depend on data (boolean masks as indices, nonzero). They are
counted on the CPU, where a copy to the host cannot be seen. The worlds here read nothing, so that what is counted is
the algorithm's own; what does not grow with the steps is read once a batch.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box
from torch.utils._python_dispatch import TorchDispatchMode

from algos import maml_trpo, mbmpo, pearl_sac, promp, rl2_ppo, rl2_transformer_ppo, varibad_ppo
from tests.double_precision import ALONE, Alone, seeded

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
N, E, O, A, P = 4, 3, 5, 2, 1  # tasks, episodes, observation, action, task vector  # noqa: E741


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in INDEXING:
            self.count += any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        else:
            tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
            self.count += any(tag in function.tags for tag in tags) or name == "_linalg_check_errors"
        return function(*args, **(kwargs or {}))


def waits(function) -> int:
    with Waits() as mode:
        function()
    return mode.count


X = torch.arange(-2.0, 3.0)


@pytest.mark.parametrize(
    "reading",
    [
        lambda: X[0].item(),
        lambda: float(X.sum()),
        lambda: bool((X > 0).any()),
        lambda: X.nonzero(),
        lambda: torch.where(X > 0),
        lambda: X[X > 0],
        lambda: X.clone().__setitem__(X > 0, X[:2]),
        lambda: X.masked_select(X > 0),
        lambda: X.unique(),
        lambda: torch.linalg.solve(torch.eye(5), X),
        lambda: torch.vmap(lambda x: x * 2)(X)[0].item(),
    ],
)
def test_what_waits_is_counted(reading):
    assert waits(reading) == 1


def test_what_does_not_wait_is_not():
    assert waits(lambda: torch.where(X > 0, X, 0.0)[torch.tensor([1, 2])].square().sum().sqrt()) == 0


class Worlds(Alone):
    """Worlds that end when told, and whose step reads nothing."""

    device, single_observation_space = torch.device("cpu"), Box(-1, 1, (O,))
    single_action_space, episodes, is_over = Box(-1, 1, (A,)), 2, False

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed, options):
        return torch.randn(self.num_envs, O, generator=seeded(seed)), {}

    def step(self, action):
        obs, over = action[:, :1].expand(-1, O).tanh(), action[:, 0] > 9
        return obs, obs[:, 0], over, over, {"episode": 0, "done": over, "waits": over, "final_obs": obs}


TASKS = torch.zeros(N, P)


def rollout(horizon: int) -> int:
    args, envs = maml_trpo.Args(horizon=horizon, episodes_per_task=E), Worlds(N * E)
    theta = maml_trpo.init_policy(envs, 8, seeded(0))
    return waits(partial(maml_trpo.rollout, envs, TASKS, theta, args, seeded(1)))


def play_trials(module, encoder: str, horizon: int) -> int:
    args, envs = module.Args(horizon=horizon, hidden_size=16, encoder=encoder), Worlds(N)
    theta = module.init_network(envs, args, seeded(0))
    return waits(partial(module.play_trials, envs, TASKS, theta, args, seeded(1)))


def learner_of_beliefs(**kwargs) -> tuple:
    """VariBAD's flags, worlds, state and what a trial of each world has shown and chosen."""
    sizes = {
        "meta_batch_size": N,
        "horizon": 6,
        "hidden_size": 8,
        "minibatches": 2,
        "buffer_size": 20,
        "vae_batch_size": 3,
        "env_id": "Mine-v0",
    }
    args, envs = varibad_ppo.Args(**sizes | kwargs), Worlds(N)
    state = varibad_ppo.init_learner(envs, args, seeded(0))
    seen, choices, _ = varibad_ppo.play_with_beliefs(envs, TASKS, state["phi"], state["theta"], args, seeded(1))
    return args, state, seen, choices


def play_with_beliefs(horizon: int) -> int:
    return waits(partial(learner_of_beliefs, horizon=horizon))


def updates_of_beliefs(updates: int) -> int:
    args, state, seen, _ = learner_of_beliefs(vae_updates=updates, episodes_per_trial=2)
    assert waits(partial(varibad_ppo.keep_trials, state, seen)) == 0
    optimizer = fused_adam(state["phi"].values())
    return waits(partial(varibad_ppo.learn_beliefs, state["phi"], optimizer, state, args, 1.0, seeded(2)))


def epochs_of_choices(epochs: int) -> int:
    args, state, _, choices = learner_of_beliefs(epochs=epochs)
    optimizer = fused_adam(state["theta"].values())
    return waits(partial(varibad_ppo.learn_choices, ALONE, state["theta"], optimizer, choices, args, 1.0, seeded(3)))


def play_episode(horizon: int) -> int:
    args, envs = pearl_sac.Args(horizon=horizon, hidden_size=8), Worlds(N)
    theta, z = pearl_sac.init_networks(envs, args, seeded(0)), torch.zeros(N, args.latent_size)
    return waits(partial(pearl_sac.play_episodes, envs, TASKS, theta, z, args, seeded(1), 1.0))


@pytest.mark.parametrize(
    "played",
    [
        rollout,
        partial(play_trials, rl2_ppo, "gru"),
        partial(play_trials, rl2_ppo, "lstm"),
        partial(play_trials, rl2_transformer_ppo, "transformer"),
        partial(play_trials, rl2_transformer_ppo, "snail"),
        play_episode,
        play_with_beliefs,
    ],
)
def test_no_step_of_a_rollout_waits(played):
    assert played(4) == played(9)


def fused_adam(params, lr=1e-3, **kwargs):
    """Adam whose count of steps lies with the weights: the usual one keeps it on the host, where reading is free."""
    return torch.optim.Adam(params, lr, fused=True, **kwargs)


def learn(updates: int) -> int:
    sizes = {"train_tasks": 6, "tasks_per_iteration": 6, "meta_batch_size": N, "batch_size": 7, "context_size": 3}
    args = pearl_sac.Args(updates=updates, hidden_size=8, auto_entropy=True, **sizes)
    theta = pearl_sac.init_networks(Worlds(N), args, seeded(0))
    state = {"theta": theta, "target": {name: x.clone() for name, x in theta.items() if name[0] == "q"}}
    for name in ("replay", "recent"):
        empty = pearl_sac.init_buffer(Worlds(N), 6, 11)
        state[name] = {field: torch.randn(x.shape, generator=seeded(2)) for field, x in empty.items()}
        state[name] |= {"mask": torch.ones(6, 11), "count": torch.full((6,), 11)}
    state |= {"tasks": torch.zeros(6, P), "updates": 0}
    optimizer = fused_adam(theta.values())
    return waits(partial(pearl_sac.learn, Worlds(N), state, optimizer, args, seeded(0), pause=lambda done: None))


def epochs_of_promp(epochs: int) -> int:
    args, envs = promp.Args(horizon=6, episodes_per_task=E, epochs=epochs), Worlds(N * E)
    theta = promp.init_policy(envs, 8, seeded(0))
    batches = [promp.collect(envs, TASKS, theta, args, seeded(k)) for k in range(2)]
    return waits(partial(promp.meta_update, theta, fused_adam(theta.values()), batches[:1], batches[1], args, [1.0]))


def epochs_of_rl2(epochs: int) -> int:
    args, envs = rl2_ppo.Args(horizon=6, hidden_size=8, epochs=epochs, minibatches=2), Worlds(N)
    theta = rl2_ppo.init_network(envs, args, seeded(0))
    steps, _ = rl2_ppo.play_trials(envs, TASKS, theta, args, seeded(1))
    return waits(partial(rl2_ppo.ppo, ALONE, theta, fused_adam(theta.values()), steps, args, 1.0, seeded(3)))


@pytest.mark.parametrize("updates", [learn, epochs_of_promp, epochs_of_rl2, updates_of_beliefs, epochs_of_choices])
def test_no_update_waits(updates):
    assert updates(2) == updates(5)


def test_no_minibatch_of_a_models_fit_waits(monkeypatch):
    monkeypatch.setattr(mbmpo, "torch", SimpleNamespace(**vars(torch) | {"optim": SimpleNamespace(Adam=fused_adam)}))
    args, envs = mbmpo.Args(num_models=3, model_size=8, model_epochs=1, model_batch_size=5), Worlds(N)
    models = mbmpo.init_models(envs, args, seeded(0))
    data = {k: torch.randn(50, n, generator=seeded(n)) for k, n in (("obs", O), ("action", A), ("next_obs", O + 1))}
    data["next_obs"] = data["next_obs"][:, :O]
    data["place"] = torch.rand(50, 3, generator=seeded(4))
    assert waits(partial(mbmpo.fit_models, envs, models, data, args, seeded(1))) == 1  # an epoch's end


def trpo_step(objectives, monkeypatch) -> tuple[int, int, dict]:
    """The waits of a step, the candidates of its line search, and its statistics."""
    args, envs, stats = maml_trpo.Args(horizon=6, episodes_per_task=E), Worlds(N * E), {}
    longest_allowed, candidates = maml_trpo.longest_allowed, []
    theta = maml_trpo.init_policy(envs, 8, seeded(0))
    support = maml_trpo.collect(envs, TASKS, theta, args, seeded(1))
    query = maml_trpo.collect(envs, TASKS, maml_trpo.adapt(theta, support, args), args, seeded(2))

    def step() -> None:
        stats.update(maml_trpo.trpo_step(theta, objectives, [support], query, args)[1])

    with monkeypatch.context() as patch:
        patch.setattr(
            maml_trpo, "longest_allowed", lambda ask: longest_allowed(lambda x: candidates.append(x) or ask(x))
        )
        return waits(step), len(candidates), stats


def test_a_trpo_step_waits_once_a_candidate_and_for_its_statistics(monkeypatch):
    def no_better(*data):
        J_N, policies = maml_trpo.surrogate(*data)
        return 0 * J_N, policies

    count, candidates, stats = trpo_step(maml_trpo.surrogate, monkeypatch)
    assert stats["train/step"] > 0
    assert 1 <= candidates < 10
    assert count == candidates + 3
    rejected, candidates, stats = trpo_step(no_better, monkeypatch)
    assert stats["train/step"] == 0
    assert candidates == 15
    assert rejected == 15 + 3
