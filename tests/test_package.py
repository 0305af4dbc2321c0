"""The environments as a package of any name, in other processes, and as `pip install .` installs them."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
every_family = pytest.mark.parametrize("name", [family.__name__ for family in envs.HORIZONS])

USES = """
import sys
import gymnasium as gym
import torch
package = sys.argv[1]
assert package not in sys.modules
single = gym.make(f"{package}:HalfCheetahDir-v0")
assert type(single.unwrapped).__module__ == f"{package}.core"
worlds = gym.make_vec(f"{package}:HalfCheetahDir-v0", 3, vectorization_mode="vector_entry_point")
import importlib
own = importlib.import_module(package)
made = own.make("HalfCheetahDir-v0", 3, horizon=9)
for batch in (worlds, made):
    obs, _ = batch.reset(seed=0)
    obs, reward, *_ = batch.step(torch.zeros(3, 6))
print(float(obs.double().sum() + reward.double().sum()))
importlib.import_module(f"{package}.records")
importlib.import_module(f"{package}.single")
others = {name for name in sys.modules if name.split(".")[0] in {"envs", "cleanmeta_envs"} - {package}}
assert not others, others
"""


def expected() -> float:
    batch = envs.make("HalfCheetahDir-v0", 3, horizon=9)
    batch.reset(seed=0)
    obs, reward, *_ = batch.step(torch.zeros(3, 6))
    return float(obs.double().sum() + reward.double().sum())


@pytest.mark.parametrize("package", ["cleanmeta_envs", "worlds_of_mine"])
def test_the_folder_may_have_any_name(package, tmp_path):
    shutil.copytree(ROOT / "envs", tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", USES, package]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == expected()


def test_the_package_has_all_files_and_what_they_import():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool == {"packages": ["cleanmeta_envs"], "package-dir": {"cleanmeta_envs": "envs"}}
    assert {path.suffix for path in (ROOT / "envs").iterdir() if path.name != "__pycache__"} == {".py"}  # no data
    names = {re.match(r"[\w-]+", line)[0].lower() for line in PROJECT["dependencies"]}
    names |= {re.match(r"[\w-]+", line)[0].lower() for line in PROJECT["optional-dependencies"]["runs"]}
    lazily = {"wandb", "metaworld", "mujoco_warp", "warp"}  # with a line that says what to install
    text = "\n".join(path.read_text() for path in (ROOT / "envs").glob("*.py"))
    found = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)) - set(sys.stdlib_module_names)
    prose = {word for word in found if not re.search(rf"^\s*(import {word}\b|from {word}[\w.]* import)", text, re.M)}
    assert {x.replace("PIL", "pillow") for x in found - lazily - prose} == names


def test_bounds_are_loose_and_allow_the_exact_versions():
    pinned = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["runs"]:
        name, least = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
        number, exact = ([int(x) for x in version.split(".")] for version in (least, pinned[name]))
        assert number <= exact


@every_family
def test_specs_and_worlds_can_be_pickled(name):
    spec = gym.spec(f"{name}-v0")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert type(spec).from_json(spec.to_json()) == spec
    single = gym.make(f"{name}-v0")
    single.reset(seed=1)
    single.action_space.seed(0)
    action = single.action_space.sample()
    copy = pickle.loads(pickle.dumps(single))
    for x, y in zip(single.step(action)[:3], copy.step(action)[:3], strict=True):
        np.testing.assert_array_equal(x, y)
    batch = envs.make(f"{name}-v0", 2, 3, discrete=True)
    batch.reset(seed=0)
    batch.action_space.seed(0)
    actions = torch.as_tensor(batch.action_space.sample())
    copy = pickle.loads(pickle.dumps(batch))
    for x, y in zip(batch.step(actions)[:4], copy.step(actions)[:4], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_single_worlds_run_in_processes_of_gymnasiums(context):
    ids = ("HalfCheetahDir-v0", "MouseCheese-v0") if context == "fork" else ("HalfCheetahDir-v0",)
    for env_id in ids:
        worlds = gym.make_vec(env_id, 2, vectorization_mode="async", vector_kwargs={"context": context})
        plain = gym.make_vec(env_id, 2, vectorization_mode="sync")
        try:
            np.testing.assert_array_equal(worlds.reset(seed=3)[0], plain.reset(seed=3)[0])
            plain.action_space.seed(0)
            action = plain.action_space.sample()
            for x, y in zip(worlds.step(action)[:4], plain.step(action)[:4], strict=True):
                np.testing.assert_array_equal(x, y)
        finally:
            worlds.close()
