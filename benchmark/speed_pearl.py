"""How fast PEARL collects and learns; `python benchmark/speed.py pearl_sac` comes here.

Runs the algorithm file's own `train()` with iterations of a block of BLOCK updates, since one of `--updates` takes
minutes. `--peer` adds PEARL written the usual way (benchmark/peer_pearl.py): a plain eager loop over tasks, with the
same networks, from the same weights and the same stored transitions, a block between two of ours in the same process.
Figures are medians over blocks; the first, which also fills the buffers of all tasks, is not counted.

update_ms, updates_per_s: drawing the transitions, losses, gradient, step, targets. collect_s, env_steps_per_s: the
episodes that an iteration collects. iteration_s: both, for `--updates` updates; no evaluation, no filled buffers.
peer_env_s: the part of peer_collect_s that its environment takes; the lower it could be made, the lower that speedup.
It is `gym.make` of our id; peer_own_: with the world of benchmark/peer_pearl.py, where there is one.
Names with `cpu`: processor time, of all threads together; on a busy machine that is the measure to trust.
"""

import time
from collections import defaultdict
from dataclasses import replace

import torch
from gymnasium.vector import VectorEnv
from torch import Generator

from benchmark import peer_pearl
from envs import make
from envs.records import first_state

BLOCK = 50


def make_worlds(options, args) -> VectorEnv:
    """The worlds that the algorithm's main() makes; SystemExit where a peer is asked for that does not exist."""
    if options.peer and args.env_id.startswith("Meta-World/"):
        raise SystemExit(f"--peer: its environment comes from gym.make, which does not know {args.env_id}")
    return make(args.env_id, args.tasks_per_iteration, args.horizon, args.cuda, physics=args.physics)


def peer_like(state: dict, args, obs: int, actions: int) -> peer_pearl.Agent:
    """The peer with the weights and stored transitions of a state of train()."""
    theta = state["theta"]
    agent = peer_pearl.Agent(obs, actions, args, theta["policy_w0"].device, theta["policy_w0"].dtype)
    agent.load(theta, state["target"])
    for name in ("replay", "recent"):
        stored = {field: x.cpu().numpy() for field, x in state[name].items()}
        for task, (buffer, count) in enumerate(zip(getattr(agent, name), stored["count"].tolist(), strict=True)):
            buffer.count, buffer.top = min(count, buffer.size), count % buffer.size
            for field, column in buffer.columns.items():
                column[:] = stored[field][task].reshape(column.shape)
    return agent


class Clocks:
    """Wall and processor time that functions take in an iteration, summed under their names."""

    def __init__(self, watch):
        self.watch, self.spent = watch, defaultdict(float)

    def around(self, name: str, function):
        def timed(*args, **kwargs):
            since, cpu = self.watch.now(), time.process_time()
            result = function(*args, **kwargs)
            self.spent[name] += self.watch.now() - since
            self.spent[name + "_cpu"] += time.process_time() - cpu
            return result

        return timed

    def keep(self) -> None:
        for name, value in self.spent.items():
            self.watch.times[name].append(value)
        self.spent.clear()


def peer(options, args, envs: VectorEnv, state: dict, clocks: Clocks):
    """A function that runs one block of benchmark/peer_pearl.py, the first of them from a copy of `state`."""
    (obs,), (actions,) = envs.single_observation_space.shape, envs.single_action_space.shape
    tasks, generator, agent = options.peer_tasks or args.tasks_per_iteration, Generator().manual_seed(args.seed), None
    worlds = {"peer": peer_pearl.make(args.env_id, args)}
    if args.env_id in peer_pearl.WORLDS:
        worlds["peer_own"] = peer_pearl.make(args.env_id, args, own=True)
    learn = clocks.around("peer_update", peer_pearl.learn)
    for name, env in worlds.items():
        env.reset(seed=args.seed)
        env.step = clocks.around(f"{name}_env", env.step)

    def measure() -> None:
        nonlocal agent
        agent = agent or peer_like(state, args, obs, actions)
        learn(agent, args.updates)
        for name, env in worlds.items():
            collect = clocks.around(f"{name}_collect", peer_pearl.collect)
            indices = torch.randperm(args.train_tasks, generator=generator)[:tasks].tolist()
            for index in indices:
                agent.recent[index].clear()
            for size in [0] * args.prior_episodes + [args.context_size] * args.posterior_episodes:
                for index in indices:
                    task = state["tasks"][index].cpu().numpy()
                    clocks.spent[f"{name}_steps"] += collect(env, agent, index, task, size)

    return measure


def measure(options, algorithm, args, envs: VectorEnv, watch) -> None:
    """train() of the algorithm's file, from the state that its main() makes, until the stopwatch ends it."""
    args, clocks, generator = replace(args, updates=min(BLOCK, args.updates)), Clocks(watch), Generator()
    fresh = algorithm.init_state(envs, args, generator.manual_seed(args.seed)) | {"generator": generator.get_state()}
    state = first_state(args, "pearl_sac", fresh, {}, envs.unwrapped.device)
    algorithm.learn = clocks.around("update", algorithm.learn)
    algorithm.collect_episodes = clocks.around("collect", algorithm.collect_episodes)
    if options.peer:
        watch.extras.append(peer(options, args, envs, state, clocks))
    watch.extras.append(clocks.keep)
    algorithm.train(envs, args, watch, state)


def report(args, watch) -> dict:
    """Rates and times; those of the peer beside them, and how many times ours the peer's are."""
    block, result, ours = min(BLOCK, args.updates), {}, {}
    for who in ("", "peer_", "peer_own_"):
        if f"{who}collect" not in watch.times:
            continue
        steps, collect, collect_cpu = (watch.median(who + name) for name in ("steps", "collect", "collect_cpu"))
        collect, collect_cpu = (value / steps * watch.median("steps") for value in (collect, collect_cpu))
        rates = {"env_steps_per_s": watch.median("steps") / collect, "collect_s": collect, "collect_cpu_s": collect_cpu}
        if who:
            rates["env_s"] = watch.median(f"{who}env") / steps * watch.median("steps")
        if who != "peer_own_":
            update, update_cpu = (watch.median(who + name) / block for name in ("update", "update_cpu"))
            rates |= {"updates_per_s": 1 / update, "update_ms": 1e3 * update, "update_cpu_ms": 1e3 * update_cpu}
            rates["iteration_s"] = collect + args.updates * update
            rates["iteration_cpu_s"] = collect_cpu + args.updates * update_cpu
        ours = ours or rates
        result |= {who + name: value for name, value in rates.items()}
        if who == "peer_":
            kinds = {"update_ms": "update", "collect_s": "collecting", "iteration_s": "end_to_end"}
            kinds |= {"update_cpu_ms": "update", "collect_cpu_s": "collecting", "iteration_cpu_s": "end_to_end"}
            for name, kind in kinds.items():
                result["cpu_" * ("cpu" in name) + f"speedup_{kind}"] = rates[name] / ours[name]
        elif who:
            result["speedup_collecting_own"] = rates["collect_s"] / ours["collect_s"]
            result["cpu_speedup_collecting_own"] = rates["collect_cpu_s"] / ours["collect_cpu_s"]
    return {name: float(f"{value:.5g}") for name, value in result.items()}


def sizes(options, args, envs: VectorEnv, watch) -> dict:
    """What was measured, of which worlds."""
    return ({"peer_tasks": options.peer_tasks or args.tasks_per_iteration} if options.peer else {}) | {
        "updates_per_block": min(BLOCK, args.updates),
        "steps_per_iteration": int(watch.median("steps")),
        "physics_threads": getattr(envs.unwrapped, "num_threads", None),
    }
