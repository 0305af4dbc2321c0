"""The house rules of DESIGN, checked on every file of algos/."""

import ast
import difflib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.distributed.run import get_args_parser

from tests.double_precision import Alone, Recorder
from tools.sync import sources, sync

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "algos").glob("*.py"))
SUPERVISED = ("maml", "fomaml", "reptile")
READERS = ("protonet", "in_context")  # supervised, too; no weight changes in them
LONGEST = dict.fromkeys((*SUPERVISED, *READERS), 340)  # lines of a file at most; 455 for those that are not named here
LONGEST |= {"in_context": 410}  # three encoders
LONGEST |= {"maml_trpo": 515}  # five inner estimators, TRPO
LONGEST |= {"rl2_transformer_ppo": 495, "mbmpo": 580}  # two encoders, each with a cache; models beside TRPO
LONGEST |= {"pearl_sac": 515, "lirpg": 495}  # three networks and their losses; an update that is differentiated
LONGEST |= {"varibad_ppo": 494, "meta_critic": 490}  # an auto-encoder beside PPO; a baseline of critics of their own
COLUMNS = 110  # of a line in algos/
DOC_COLUMNS = 120  # of a line in docs/ and README.md; tables and addresses may be longer
PROCESSES = {"share", "gather", "in_any_process", "dist", "shard", "get_rank", "get_world_size"}
GRADIENTS = {"grad", "grad_and_value", "vjp"}
AVERAGES = {"exploration_credit"}  # beside what takes a gradient: E-MAML's weight, a factor of its gradient
HEADINGS = ("Paper", "Run", "Result", "Algorithm", "Symbols", "Shapes", "Differs")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def tags(text: str) -> tuple[set, set]:
    """Tags of the pseudo-code in the module docstring, and of the comments in the code."""
    doc = ast.get_docstring(ast.parse(text))
    code = text[text.index(doc.splitlines()[-1]) :]
    return set(re.findall(r"^ *\[(\d+)\]", doc, re.MULTILINE)), set(re.findall(r"#.*?\[(\d+)\]", code))


@each_file
def test_tags_match_both_ways(path):
    written, used = tags(path.read_text())
    assert written == used != set()
    assert written == {str(k + 1) for k in range(len(written))}


def test_the_tag_checker_can_fail():
    text = FILES[0].read_text()
    written, used = tags(text.replace("# [4]", "# [44]"))
    assert written != used


@each_file
def test_sizes(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST.get(path.stem, 455)
    longest = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if hasattr(node, "args") and hasattr(node, "name")
    }
    assert max(longest.values()) <= 50, longest


def too_long(text: str, columns: int, allowed: str = "") -> list[str]:
    return [line for line in text.splitlines() if len(line) > columns and not (allowed and re.search(allowed, line))]


@each_file
def test_lines_are_short(path):
    assert too_long(path.read_text(), COLUMNS) == []


def test_lines_of_the_documentation_are_short():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert too_long(path.read_text(), DOC_COLUMNS, r"^\s*\||https?://") == [], path.name


def test_long_lines_are_found():
    text = f"{'x' * 111}\n| {'a row ' * 20}|\n{'word ' * 25}\n"
    assert len(too_long(text, COLUMNS)) == 3
    assert too_long(text, DOC_COLUMNS, r"^\s*\|") == ["word " * 25]


def algorithm_part(text: str) -> str:
    """What lies between the imports and `train`."""
    body = ast.parse(text).body
    (train,) = (node.lineno for node in body if getattr(node, "name", "") == "train")
    imports = max(node.end_lineno for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(text.split("\n")[imports : train - 1])


def about_processes(text: str) -> set[str]:
    """Names of the algorithm's part that speak of several processes."""
    tokens = tokenize.generate_tokens(io.StringIO(algorithm_part(text)).readline)
    return PROCESSES & {token.string for token in tokens if token.type == tokenize.NAME}


def averaging(text: str) -> set[str]:
    """Functions of the algorithm's part that average over processes where no gradient is taken."""
    found = set()
    for node in ast.parse(algorithm_part(text)).body:
        names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
        names |= {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)}
        if "average" in names and not names & GRADIENTS:
            found.add(node.name)
    return found - AVERAGES


@each_file
def test_the_algorithm_does_not_speak_of_processes(path):
    text = path.read_text()
    assert about_processes(text) == set()
    assert averaging(text) == set()
    order = [node.name for node in parse(path).body if hasattr(node, "name")]
    assert order[-1] == "main"
    assert set(order[order.index("train") + 1 :]) <= {"average", "main"}


def test_words_of_processes_are_found():
    text = 'import x\n\ndef f(envs):\n    """Of gather."""\n    return {}\n\ndef train():\n    return envs.gather(1)\n'
    assert about_processes(text.format("1  # share")) == set()
    assert about_processes(text.format("envs.unwrapped.gather(2)")) == {"gather"}
    assert about_processes(text.format("dist.get_world_size()")) == {"dist", "get_world_size"}
    assert averaging(text.format("average(1)")) == {"f"}
    assert averaging(text.format("average(torch.autograd.grad(1))")) == set()


def dense(text: str) -> list[str]:
    """Calls that are hard to follow: unnamed booleans, assignments inside, fields of named tuples by position."""
    tree = ast.parse(text)
    tuples = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "NamedTuple" for base in node.bases)
    }
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        where = f"line {call.lineno}: {ast.unparse(call)[:60]}"
        if any(isinstance(x, ast.Constant) and isinstance(x.value, bool) for x in call.args):
            found.append(f"unnamed boolean, {where}")
        inside = [x for part in (*call.args, *call.keywords) for x in ast.walk(part)]
        if any(isinstance(x, ast.NamedExpr) for x in inside):
            found.append(f"assignment in a call, {where}")
        mapped = len(call.args) == 1 and isinstance(call.args[0], ast.Starred)  # the same for every field
        if getattr(call.func, "id", "") in tuples and call.args and not mapped:
            found.append(f"fields by position, {where}")
    return found


@each_file
def test_calls_can_be_followed(path):
    assert dense(path.read_text()) == []


def test_dense_calls_are_found():
    text = "class T(NamedTuple):\n    a: int\n    b: int\n\nx = {}\n"
    assert dense(text.format("f(1, flag=True) + T(a=1, b=2) + T(*(y for y in z))")) == []
    for wrong in ("f(1, True)", "f((y := 2))", "f(a=(y := 2))", "T(1, 2)", "T(1, b=2)", "T(*x, *y)"):
        assert len(dense(text.format(wrong))) == 1, wrong


@each_file
def test_headings(path):
    doc = ast.get_docstring(parse(path))
    found = [re.search(rf"^{heading}\b", doc, re.MULTILINE) for heading in HEADINGS]
    assert all(found), HEADINGS
    assert [match.start() for match in found] == sorted(match.start() for match in found)
    assert 20 <= len(doc.splitlines()) <= 50


@each_file
def test_every_argument_is_documented(path):
    (args,) = (node for node in parse(path).body if getattr(node, "name", "") == "Args")
    body = [node for node in args.body if not isinstance(node, ast.FunctionDef)]
    assert len(body) % 2 == 0
    for field, doc in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(doc, ast.Expr), field.target.id
        assert isinstance(doc.value.value, str)
        assert field.value is not None


@each_file
def test_imports(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy"}
    for node in parse(path).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed
    assert not re.search(r"^\s*(from|import) algos", path.read_text(), re.MULTILINE)


IMPORTS = """
import sys, torch
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
state = torch.get_rng_state()
for name in names:
    __import__(name)
    assert torch.equal(state, torch.get_rng_state()), name
    assert not {"wandb", "envs", "gymnasium", "mujoco", "matplotlib"} & set(sys.modules), name
"""


def test_nothing_happens_at_import(tmp_path):
    """One file after the other, in one process."""
    command = [sys.executable, "-c", IMPORTS, str(ROOT / "algos"), *(path.stem for path in FILES)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def differing(paths: list[Path]) -> list[str]:
    """Names that two files define differently."""
    files = [sources(path.read_text()) for path in paths]
    names = {name for file in files for name in file}
    return sorted(name for name in names if len({file[name] for file in files if name in file}) > 1)


def test_same_name_same_source():
    assert differing(FILES) == []


def test_the_difference_of_siblings_is_the_algorithm():
    def code(name):
        text = (ROOT / f"algos/{name}.py").read_text()
        return text[text.index("\nimport ") :].splitlines()

    pairs = [("maml", "fomaml", 20), ("maml", "reptile", 105), ("maml", "protonet", 100), ("dpt", "ad", 95)]
    for name, other, most in pairs:
        changes = [line[2:] for line in difflib.ndiff(code(name), code(other)) if line[0] == "+"]
        assert 5 < len(changes) <= most, changes


def test_sync_repairs_what_differs_and_nothing_else(tmp_path):
    good, other = tmp_path / "a.py", tmp_path / "b.py"
    good.write_text('"""A."""\n\n\n@cache\ndef f(x):\n    return x\n\n\ndef train():\n    return 1\n')
    other.write_text(
        '"""B."""\n# kept\n\n\ndef f(x):\n    return -x\n\n\ndef train():\n    return 2\n\n\ndef own(): ...\n'
    )
    assert differing([good, other]) == ["f"]
    assert sync(good) == ["b.py: f"]
    assert differing([good, other]) == []
    assert (
        other.read_text()
        == '"""B."""\n# kept\n\n\n@cache\ndef f(x):\n    return x\n\n\ndef train():\n    return 2\n\n\ndef own(): ...\n'
    )
    assert sync(good) == []
    other.write_bytes(b"# a form feed: \x0c, another line end\r\n\n\ndef f(x):\n    return -x\n\n\nlast = 1")
    sync(good)
    end = b"@cache\ndef f(x):\n    return x\n\n\nlast = 1"
    assert other.read_bytes() == b"# a form feed: \x0c, another line end\r\n\n\n" + end


def test_flags_named_in_the_documentation_exist():
    known = {"--help", "--no-deps", "--cpu"} | set(get_args_parser()._option_string_actions)  # pip, gpu.sh, torchrun
    known |= {"--array", "--cpus-per-task", "--time", "--output", "--nodes", "--ntasks-per-node", "--gpus-per-node"}
    known |= {"--signal"}  # SLURM, like the line above
    for path in [*FILES, *(ROOT / "benchmark").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and node.name in ("Args", "Options"):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                known |= {"--" + field.target.id.replace("_", "-") for field in fields}
                flags = [field.target.id for field in fields if getattr(field.annotation, "id", "") == "bool"]
                known |= {"--no-" + name.replace("_", "-") for name in flags}
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()))
        assert named <= known, path.name


def test_functions_named_in_the_documentation_exist():
    code = "".join(
        path.read_text()
        for folder in ("algos", "envs", "benchmark", "tests", "tools")
        for path in (ROOT / folder).glob("*.py")
    )
    for path in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`([a-z_]+_[a-z_]+)`", path.read_text()):
            assert re.search(rf"\b{name}\b", code), f"{path.name} names {name}"


# ---------------------------------------------------------------- shapes

SIZES = {"N": 5, "E": 3, "T": 7, "O": 13, "A": 2, "P": 11, "B": 21, "F": 30, "Y": 4, "1": 1}  # B = E T
SUPERVISED_SIZES = {"N": 5, "B": 3, "X": 13, "Y": 2, "K": 4, "1": 1}  # K = eval_steps + 1


class PrimeSizes(Alone):
    """A batch of worlds whose axes all differ in size, so that no wrong letter passes by chance."""

    device, num_envs = torch.device("cpu"), SIZES["N"] * SIZES["E"]
    single_observation_space, single_action_space = Box(-1, 1, (SIZES["O"],)), Box(-1, 1, (SIZES["A"],))

    def sample_tasks(self, n, generator, split):
        return torch.randn(n, SIZES["P"], generator=generator)

    def reset(self, *, seed, options):
        self.generator, self.tasks = torch.Generator().manual_seed(seed), options["tasks"]
        return torch.randn(self.num_envs, SIZES["O"], generator=self.generator), {}

    def step(self, action):
        obs = torch.randn(self.num_envs, SIZES["O"], generator=self.generator)
        over = torch.zeros(self.num_envs, dtype=torch.bool)
        return obs, action.sum(-1) + self.tasks[:, 0], over, over, {}


class PrimeTrials(PrimeSizes):
    """Trials of as many worlds as tasks; one of them is a step shorter."""

    num_envs, episodes = SIZES["N"], SIZES["E"]

    def reset(self, **kwargs):
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.steps += 1
        obs, reward, over, *_ = super().step(action)
        self.is_over, waits = self.steps == SIZES["E"] * SIZES["T"], over.clone()
        waits[0] = self.steps == 5  # one world waits for one step
        episode = (self.steps - 1) // SIZES["T"]
        return obs, reward, over, over, {"done": waits, "waits": waits, "final_obs": -obs, "episode": episode}


class PrimeWorlds(PrimeSizes):
    """A world for each task."""

    num_envs = SIZES["N"]


class PrimeStreams(PrimeWorlds):
    """Endless episodes of each world: one ends early, one at its horizon."""

    def sample_tasks(self, n, generator, split="train"):
        return super().sample_tasks(n, generator, split)

    def step(self, action):
        obs, reward, over, *_ = super().step(action)
        worlds = torch.arange(self.num_envs)
        return obs, reward, over | (worlds == 1), over | (worlds == 2), {"final_obs": obs.clone()}

    def save_worlds(self):
        return {}


class PrimeChoices(PrimeStreams):
    """Such worlds with two choices; several worlds may have the same task. The last world's lifetimes end at once."""

    is_discrete, single_action_space = True, Discrete(SIZES["A"])

    def __init__(self, num_envs=SIZES["N"]):
        self.num_envs = num_envs

    def step(self, action):
        obs, reward, over, late, info = super().step(action[:, None])
        return obs, reward, over, late, info | {"born": torch.arange(self.num_envs) == self.num_envs - 1}

    def load_worlds(self, saved):
        return self.reset(seed=0, options={"tasks": self.sample_tasks(self.num_envs, torch.Generator())})[0]


class PrimeLives(PrimeWorlds):
    """Lifetimes of three episodes of four steps, each begun at another time; all end once or twice in a window."""

    single_action_space = Discrete(SIZES["A"])

    def __init__(self):
        self.clock = torch.arange(SIZES["N"])

    def sample_tasks(self, n, generator, split="train"):
        return super().sample_tasks(n, generator, split)

    def reset(self, *, seed, options):
        return super().reset(seed=seed, options={"tasks": torch.zeros(SIZES["N"], SIZES["P"])} | options)

    def step(self, action):
        obs, reward, *_ = super().step(action[:, None])
        over, info = self.clock % 4 == 3, {"episode": self.clock // 4 % SIZES["E"], "born": self.clock % 12 == 11}
        self.clock = self.clock + 1
        return obs, reward, over & (action > 0), over & (action == 0), info | {"final_obs": -obs}

    def save_worlds(self):
        return {}

    def load_worlds(self, saved):
        return torch.randn(self.num_envs, SIZES["O"], generator=self.generator)


class PrimeTables(PrimeSizes):
    """Worlds of as many states as an observation has numbers, each described by four."""

    is_discrete, single_action_space, horizon = True, Discrete(SIZES["A"]), SIZES["T"]

    def __init__(self, num_envs=SIZES["N"]):
        self.num_envs, self.generator = num_envs, torch.Generator()

    def reset(self, *, seed, options):
        return super().reset(seed=seed or 0, options=options)

    def step(self, action):
        return super().step(action[:, None])

    def state_features(self):
        return torch.randn(SIZES["O"], 4, generator=self.generator)

    def optimal_actions(self, tasks):
        return torch.zeros(len(tasks), self.horizon, SIZES["O"], dtype=torch.int64)


class PrimeModels(PrimeSizes):
    """Real worlds and imagined ones, which are as many."""

    diverged_share = 0.0

    def sample_tasks(self, n, generator, split="train"):
        return super().sample_tasks(n, generator, split)

    def follow(self, *dynamics):
        self.dynamics = dynamics

    def executed(self, action):
        return action.clamp(-1, 1)


class PrimeTasks:
    """Supervised tasks whose axes all differ in size."""

    device, num_inputs, num_outputs, is_classification = torch.device("cpu"), 13, 2, False

    def sample_tasks(self, n, generator, split):
        return torch.randn(n, 11, generator=generator)

    def test_set(self, n):
        generator = torch.Generator().manual_seed(1)
        return self.sample_tasks(n, generator, "test"), generator

    def sample(self, tasks, sizes, generator):
        return [tuple(torch.randn(len(tasks), size, k, generator=generator) for k in (13, 2)) for size in sizes]


class PrimeFunctions(Alone):
    """Functions to minimise."""

    def sample_tasks(self, n, generator, split):
        return torch.randn(n, 11, generator=generator)

    def start(self, tasks, generator):
        return torch.randn(len(tasks), 13, generator=generator)

    def batches(self, tasks, steps, generator):
        return [None] * steps

    def loss(self, params, tasks, batch):
        return params.square().sum(1) + tasks.sum(1)


class PrimeClasses(PrimeTasks):
    """Tasks with two classes to tell apart in a test; in training there may be more."""

    is_classification, classes = True, {"train": (0, 50)}

    def sample_tasks(self, n, generator, split):
        return torch.randn(n, self.num_outputs, generator=generator)

    def sample(self, tasks, sizes, generator):
        (n, ways), sets = tasks.shape, []
        for size in sizes:
            y = torch.eye(ways, dtype=torch.bool).repeat(size, 1).expand(n, -1, -1)
            sets.append((torch.randn(n, ways * size, 13, generator=generator), y))
        return sets


def wrong_suffixes(text: str, tmp_path: Path) -> tuple[set[str], set[str]]:
    """Run the algorithm on sizes that tell axes apart: (names whose suffix is false, all names checked)."""
    file = tmp_path / "traced.py"
    file.write_text(text)
    traced = sys.modules["traced"] = type(sys)("traced")
    traced.__file__ = str(file)
    exec(compile(text, str(file), "exec"), traced.__dict__)
    wanted = {
        "meta_batch_size": 5, "episodes_per_task": 3, "horizon": 7, "hidden_size": 17, "iterations": 1,
        "eval_steps": 1, "inner_steps": 2, "fisher_fraction": 1.0,
    }  # fmt: skip
    memory = {"meta_batch_size": 5, "episodes_per_trial": 3, "horizon": 7, "hidden_size": 16 * 19, "iterations": 1}
    memory |= {"layers": 2, "minibatches": 1}
    supervised = {"meta_batch_size": 5, "eval_tasks": 5, "shots": 3, "inner_shots": 3, "hidden_sizes": (17,)}
    supervised |= {"iterations": 1, "eval_steps": 3, "inner_steps": 2, "eval_queries": 3}
    pearl = {"meta_batch_size": 5, "tasks_per_iteration": 5, "train_tasks": 19, "horizon": 7, "batch_size": 23}
    pearl |= {"context_size": 29, "latent_size": 3, "hidden_size": 17, "iterations": 1, "updates": 2, "replay_size": 37}
    belief = {"latent_size": 3, "decoder_size": 31, "policy_size": 37, "buffer_size": 29, "vae_updates": 2}
    belief |= {"vae_batch_size": 23, "decoded_beliefs": 11, "reward_decoder": "gaussian", "decode_obs": True}
    if hasattr(traced.Args, "vae_updates"):
        envs, wanted, init = PrimeTrials(), memory | belief | {"hidden_size": 17}, "init_learner"
        sizes = {k: SIZES[k] for k in "ETOAP1"} | {"I": 13 + 2 + 1, "Z": 3, "B": 23, "U": 2}
    elif hasattr(traced.Args, "own_critic_lr"):
        wanted |= {"window_size": 7, "eval_episodes": 3, "latent_size": 3, "critic_size": 19, "eval_windows": 1}
        envs, sizes, init = PrimeChoices(), {k: SIZES[k] for k in "NTOAP1"} | {"I": 13 + 2 + 1}, "init_learners"
    elif hasattr(traced.Args, "latent_size"):
        envs, wanted, sizes, init = PrimeWorlds(), pearl, SIZES | {"M": 19, "Z": 3, "C": 2, "I": 16}, "init_state"
        sizes.pop("B")  # of a batch, or of a context
    elif hasattr(traced.Args, "episodes_per_lifetime"):
        wanted |= {"episodes_per_lifetime": 3, "steps": 7, "unroll": 2, "policy_size": 19}
        envs, sizes, init = PrimeLives(), {k: SIZES[k] for k in "NEOAP1"} | {"I": 13 + 13 + 2}, "init_lifetimes"
    elif hasattr(traced.Args, "reward_lr"):
        wanted |= {"num_worlds": 5, "rollout_steps": 7, "minibatches": 3, "epochs": 1}
        envs, sizes, init = PrimeStreams(), {k: SIZES[k] for k in "NTOAP1"}, "first_state"
    elif hasattr(traced.Args, "meta_lr"):
        wanted |= {"num_worlds": 5, "rollout_steps": 7}
        envs, sizes, init = PrimeStreams(), {k: SIZES[k] for k in "NTOAP1"} | {"K": 2}, "init_actor_critic"
    elif hasattr(traced.Args, "num_models"):
        wanted |= {"num_models": 5, "real_episodes": 3, "model_size": 19, "meta_steps": 1, "model_epochs": 2}
        envs, sizes, init = PrimeModels(), SIZES | {"I": 13 + 2}, None
    elif hasattr(traced.Args, "unroll"):
        wanted |= {"steps": 4, "unroll": 2, "eval_tasks": 5, "hidden_size": 17, "eval_steps": 3}
        envs, sizes, init = PrimeFunctions(), {"N": 5, "C": 13, "R": 65, "I": 2, "H": 17, "K": 4}, "init_optimizer"
    elif hasattr(traced.Args, "sequential"):
        wanted = supervised | {"mlp": True, "hidden_size": 16 * 19, "layers": 2}
        envs, sizes, init = PrimeClasses(), {"N": 5, "X": 13, "Y": 2, "K": 4, "1": 1}, "init_reader"
    elif hasattr(traced.Args, "train_ways"):
        wanted = supervised | {"mlp": True, "train_ways": 7}
        envs, sizes, init = PrimeClasses(), {"N": 5, "X": 13, "F": 17, "K": 4, "1": 1}, "init_embedding"
    elif hasattr(traced.Args, "shots"):
        envs, wanted, sizes, init = PrimeTasks(), supervised, SUPERVISED_SIZES, "init_params"
    elif hasattr(traced.Args, "context"):
        wanted = memory | {"episodes_per_trial": 3, "context": 1, "learners": 37, "source_episodes": 5, "keep_every": 2}
        others = {"Q": 4 + 1, "J": 2 * 4 + 2 + 1, "I": 4 + 1 + 2 * 4 + 2 + 1, "M": 37}
        envs, sizes, init = PrimeTables(), {k: SIZES[k] for k in "ETOAP1"} | others, "init_model"
    elif hasattr(traced.Args, "episodes_per_trial"):
        envs, wanted, sizes, init = (
            PrimeTrials(),
            memory,
            SIZES | {"I": 13 + 13 + 2 + 2, "J": 13 + 2 + 2},
            "init_network",
        )
        sizes.pop("F")  # of any layer
    else:
        envs, sizes, init = PrimeSizes(), SIZES, None
    wrong, checked = set(), set()

    def check(frame, event, _):
        if event == "return" and frame.f_code.co_filename == str(file):
            sizes = dict(known)  # other letters: one size within one call
            for name, value in frame.f_locals.items():
                match = re.fullmatch(r"[a-zA-Z]\w*?_([A-Z1]+)", name)
                if match and isinstance(value, torch.Tensor):
                    checked.add(name)
                    pairs = zip(match[1], value.shape, strict=False)
                    if len(match[1]) != value.ndim or any(sizes.setdefault(k, size) != size for k, size in pairs):
                        wrong.add(f"{frame.f_code.co_name}: {name} is {tuple(value.shape)}")

    for encoder in getattr(traced, "ENCODERS", ["none"]):
        generator = torch.Generator().manual_seed(0)
        all_wanted = wanted | {"encoder": encoder}
        args = traced.Args(**{name: value for name, value in all_wanted.items() if hasattr(traced.Args, name)})
        if init is None:
            theta = traced.init_policy(envs, args.hidden_size, generator)
        elif init == "init_learners":
            phi = traced.init_critics(envs, 1, args.latent_size, args, generator)
            theta = traced.init_learners(envs, phi, args, generator) | {"worlds": {}}
        else:
            theta = getattr(traced, init)(envs, args, generator)
        streams = ("first_state", "init_lifetimes", "init_actor_critic")
        is_state = init in ("init_learner", "init_state", "init_learners", *streams)
        known = sizes | ({} if is_state else {"W": sum(value.numel() for value in theta.values())})
        state = {"iteration": 0, "env_steps": 0, "seconds": 0.0, "generator": generator.get_state()}
        state |= theta if is_state else {"theta": theta}
        if hasattr(traced, "no_moments"):
            state["moments"] = traced.no_moments(theta)._asdict()
        worlds = [envs, envs] if init in streams else [envs]
        if hasattr(args, "learners"):
            worlds += [PrimeTables(args.learners)]
        if init == "init_learners":
            worlds += [PrimeChoices(), PrimeChoices(SIZES["N"] * args.eval_episodes)]
        if hasattr(args, "num_models"):
            state |= {"models": traced.init_models(envs, args, generator), "data": {}}
            worlds += [PrimeModels()]
        sys.setprofile(check)
        try:
            traced.train(*worlds, args, Recorder(args), state)  # its first iteration evaluates, too
        finally:
            sys.setprofile(None)
    del sys.modules["traced"]
    return wrong, checked


@each_file
def test_every_suffix_is_true(path, tmp_path):
    wrong, checked = wrong_suffixes(path.read_text(), tmp_path)
    assert wrong == set()
    if path.stem in SUPERVISED:
        assert {"x_BX", "y_BY", "output_BY", "result_NK"} <= checked
    elif path.stem == "protonet":
        assert {"x_BX", "y_BY", "prototype_YF", "logit_NQY", "right_NQ", "result_NK"} <= checked
    elif path.stem == "learned_optimizer":
        assert {"params_NC", "gradient_NC", "g_R", "h_RH", "output_R1", "change_NC", "result_NK"} <= checked
    elif path.stem == "in_context":
        assert {"x_NBX", "mask_SS", "q_NGSD", "state_NCH", "earlier_NSU", "output_NQY", "result_NK"} <= checked
    elif path.stem == "pearl_sac":
        assert {"k_NT", "noise_TNA", "uniform_NS", "x_NSI", "precision_NSZ", "z_NBZ", "q_CNB", "action_NBA"} <= checked
    elif path.stem == "meta_critic":
        assert {"tasks_NP", "z_NZ", "trace_NTI", "action_NTCA", "feature_NTH", "born_B", "target_NT"} <= checked
    elif path.stem == "lifetime_rewards":
        assert {"obs_NTO", "number_NK", "feature_NKH", "log_prob_NTA", "value_NS", "return_NE", "alive_N1"} <= checked
        assert {"x_NI", "known_NS", "noise_TNA", "mask_N", "advantage_NS", "norm_N", "tasks_NP", "died_N"} <= checked
    elif path.stem == "lirpg":
        assert {"obs_NO", "gae_weight_NTT", "advantage_B", "gradient_W", "return_NT", "noise_NA", "x_SF"} <= checked
    elif path.stem == "meta_gradient_a2c":
        assert {"obs_NO", "weight_NTT", "value_NT", "return_NT", "pair_K", "logits_K", "noise_NA"} <= checked
        assert {"next_value_NT", "delta_NT", "gradient_W", "df_WK", "same_NTT"} <= checked
    elif path.stem == "varibad_ppo":
        assert {"x_NSI", "mean_NKZ", "m_NDZ", "log_prob_NDS", "error_NDSO", "kl_ND", "noise_BDZ"} <= checked
        assert {"told_NF", "latest_NI", "h_1NH", "noise_SNA", "ratio_NS", "return_NE", "place_N", "rows_UB"} <= checked
    elif path.stem in ("dpt", "ad"):
        assert {"x_NSI", "x_N1I", "query_NSQ", "before_NSJ", "state_N1", "k_NGCD", "loss_NS", "return_NE"} <= checked
        own = {"dpt": {"optimal_NTO", "weight_NA", "label_NS"}, "ad": {"Q_NOA", "noise_TNA", "tasks_MP", "first_N1"}}
        assert own[path.stem] <= checked
    elif path.stem.startswith("rl2"):
        assert {"x_NSI", "feature_NSH", "noise_SNA", "previous_NJ", "log_ratio_NS", "return_NE", "order_NS"} <= checked
        assert path.stem == "rl2_ppo" or {"q_NGSD", "k_NGCD", "v_NGCD", "position_NS", "Uh_NSU"} <= checked
    else:
        assert {"mask_NET", "tasks_NP", "obs_NETO"} <= checked
    if path.stem == "mbmpo":
        assert {"x_MI", "y_MO", "order_NM", "train_NR", "valid_NV", "smoothed_N", "return_NE", "J_N"} <= checked
    if path.stem == "maml_trpo":
        assert {"noise_NEA", "std_N1A", "log_prob_ET", "gram_NFF", "x_NBF", "time_NETY", "vector_W", "J_N"} <= checked


FALSE = [("maml_trpo", "obs_NETO", false) for false in ("obs_ENTO", "obs_NETA", "obs_NET", "obs_NEOT")]
FALSE += [("maml", "x_BX", "x_NX"), ("fomaml", "output_BY", "output_YB"), ("reptile", "result_NK", "result_KN")]
FALSE += [("learned_optimizer", "params_NC", "params_CN"), ("learned_optimizer", "h_RH", "h_NH")]
FALSE += [("in_context", "state_NCH", "state_NBH"), ("in_context", "shown_NSL", "shown_NBL")]
FALSE += [("protonet", "prototype_YF", "prototype_FY"), ("protonet", "logit_NQY", "logit_QNY")]
FALSE += [("pearl_sac", "z_NBZ", "z_BNZ"), ("pearl_sac", "x_NSI", "x_NIS"), ("rl2_ppo", "x_NSI", "x_SNI")]
FALSE += [("rl2_transformer_ppo", "k_NGCD", "k_GNCD"), ("mbmpo", "train_NR", "train_NM"), ("mbmpo", "x_MI", "x_MO")]
FALSE += [("lifetime_rewards", "x_NI", "x_IN"), ("lifetime_rewards", "tasks_NP", "tasks_NO")]
FALSE += [("lifetime_rewards", "noise_TNA", "noise_NTA"), ("lifetime_rewards", "value_NT", "value_TN")]
FALSE += [("lirpg", "same_NTT", "same_NTO"), ("lirpg", "reward_NT", "reward_TN"), ("lirpg", "square_W", "square_A")]
FALSE += [("varibad_ppo", "m_NDZ", "m_DNZ"), ("varibad_ppo", "told_NF", "told_FN"), ("varibad_ppo", "kl_ND", "kl_DN")]
FALSE += [("dpt", "optimal_NTO", "optimal_NOT"), ("dpt", "before_NSJ", "before_NSI"), ("ad", "Q_NOA", "Q_NAO")]
FALSE += [("meta_gradient_a2c", "df_WK", "df_KW"), ("meta_gradient_a2c", "value_NT", "value_TN")]
FALSE += [("meta_critic", "z_NZ", "z_NI"), ("meta_critic", "action_NTCA", "action_NCTA")]


@pytest.mark.parametrize(("name", "true", "false"), FALSE)
def test_the_suffix_checker_can_fail(name, true, false, tmp_path):
    wrong, _ = wrong_suffixes((ROOT / f"algos/{name}.py").read_text().replace(true, false), tmp_path)
    assert any(f"{false} is" in line for line in wrong)
