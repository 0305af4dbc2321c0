"""benchmark/pearl.py: the table and pictures of the docs come from what runs left and from the file's own functions."""

import json
from dataclasses import replace

import pytest
import torch
import tyro

from algos import maml_trpo, pearl_sac
from benchmark import pearl
from envs import make, records, summarise

SMALL = ["--train-tasks", "40", "--tasks-per-iteration", "4", "--meta-batch-size", "4", "--initial-episodes", "1"]
SMALL += ["--horizon", "7", "--updates", "3", "--batch-size", "4", "--context-size", "6", "--hidden-size", "8"]
SMALL += ["--replay-size", "20", "--iterations", "2", "--env-id", "SparseNavigation2D-v0", "--eval-prior-episodes", "2"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a tiny run of a file: its folder."""
    monkeypatch.setattr(pearl, "IMAGES", tmp_path)
    monkeypatch.setattr(pearl, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        module.main(list(flags))
        return max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return run


@pytest.mark.parametrize("context", ["posterior", "prior"])
def test_the_table_plays_as_the_files_own_evaluation(finished, context):
    words = [word.replace("SparseNavigation2D", "Navigation2DEndless") for word in SMALL]  # where no return is 0
    folder = finished(pearl_sac, *words, "--context", context)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    policy = {name: 5 * x for name, x in saved["theta"].items() if name.startswith("policy_w")}  # which heeds z
    records.save_checkpoint(folder, saved | {"theta": saved["theta"] | policy})
    line = pearl.table(folder, pearl.Options("table", (folder,), tasks=30, episodes=4, seed=6))
    state = records.load_checkpoint(str(folder), "pearl_sac", pearl_sac.Args)
    args = replace(state["args"], tasks_per_iteration=30, eval_episodes=4)
    envs, generator = make("Navigation2DEndless-v0", 30, 7), torch.Generator().manual_seed(6)
    tasks = envs.unwrapped.sample_tasks(30, generator, "test")
    envs.unwrapped.test_set = lambda num_tasks: (tasks, generator)  # the table's in place of the fixed one
    stats = summarise(pearl_sac.evaluate(envs, state["theta"], args))
    means = [mean for mean, _ in line["episodes"]]
    assert means == pytest.approx([stats[f"test/return_k{k}"] for k in range(4)], abs=1e-3)
    assert len(set(means)) == 4
    assert line["authors"][0] == pytest.approx(stats["test/return_authors"], abs=1e-3)
    assert max(means) < 0
    assert line["gain"][1] == pytest.approx(stats["test/gain_ci95"] * 1.96 / 2.045, abs=1e-3)  # t of 29 degrees
    assert line["gain"][1] > 0.01
    assert (line["iteration"], line["env_steps"]) == (2, (40 + 2 * 2 * 4) * 7)


def test_kept_results_are_what_the_run_wrote(finished):
    folder = finished(pearl_sac, *SMALL)
    kept = pearl.keep(folder, options := pearl.Options("keep", (folder,), tasks=10))
    results, name = folder.parent.parent / "results", "SparseNavigation2D_pearl_sac_seed1"
    assert json.loads((results / f"{name}.json").read_text()) == kept == pearl.table(folder, options)
    assert (results / f"{name}.args.json").read_bytes() == (folder / "args.json").read_bytes()
    with pearl.gzip.open(results / f"{name}.metrics.jsonl.gz") as file:
        assert file.read() == (folder / "metrics.jsonl").read_bytes()


def test_rehearsals_leave_no_trace_and_paths_go_where_the_world_went(finished):
    folder = finished(pearl_sac, *SMALL)
    explorer = pearl.Explorer(folder, 5, 3)
    explorer.play()
    seen = [field.clone() for field in explorer.context]
    episodes = explorer.rehearse(explorer.infer())
    returns = episodes.reward.sum(1)
    assert all(torch.equal(field, before) for field, before in zip(explorer.context, seen, strict=True))
    assert len(explorer.episodes) == 1
    from matplotlib.figure import Figure

    pearl.draw_paths(axes := Figure().subplots(), episodes, explorer.tasks[0], "")
    lines = [torch.as_tensor(line.get_xydata()) for line in axes.lines[1:]]
    position = torch.zeros(5, 2)
    for t in range(7):  # along the actions
        assert all(torch.allclose(line[t].float(), position[i], atol=1e-6) for i, line in enumerate(lines))
        position = position + 0.1 * episodes.action[:, t]
    assert all(torch.allclose(line[7].float(), position[i], atol=1e-6) for i, line in enumerate(lines))
    near = [torch.linalg.vector_norm(line[1:].float() - explorer.tasks[i], dim=1) for i, line in enumerate(lines)]
    expected = torch.stack([torch.where(d <= 0.2, 1 - d, 0 * d).sum() for d in near])
    assert returns == pytest.approx(expected, abs=1e-5)


def test_contexts_can_be_samples_and_actions_noisy_as_in_training(finished, monkeypatch):
    folder, asked, before = finished(pearl_sac, *SMALL), [], []
    original, prior = pearl_sac.sample_posterior, pearl_sac.sample_prior

    def spy(theta, context, args, generator):
        asked.append(context)
        return original(theta, context, args, generator)

    monkeypatch.setattr(pearl_sac, "sample_posterior", spy)
    monkeypatch.setattr(pearl_sac, "sample_prior", lambda *x: before.append(len(asked)) or prior(*x))
    explorer = pearl.Explorer(folder, 5, 3, spread=1.0, size=4)
    for _ in range(4):
        explorer.play()
    assert before == [0, 0]  # the first two episodes
    assert [context.mask.tolist() for context in asked] == [[[1.0] * 4] * 5] * 2
    samples, histories = (
        torch.cat([*x[:2], x.reward[..., None], x.next_obs], -1) for x in (asked[1], explorer.context)
    )
    for i, (sample, seen) in enumerate(zip(samples, histories[:, :21], strict=True)):
        places = [(seen == row).all(1).nonzero().flatten().tolist() for row in sample]
        assert all(len(place) == 1 for place in places), i
        assert len({place[0] for place in places}) == 4
    state = records.load_checkpoint(str(folder), "pearl_sac", pearl_sac.Args)
    means, _ = pearl_sac.act(state["theta"], explorer.context.obs[:, 0], torch.zeros(5, 5), torch.zeros(5, 2))
    assert (explorer.context.action[:, 0] - means).abs().max() > 0.1  # an untrained policy's means are near 0
    with pytest.raises(SystemExit, match="--context 8: allowed is 0 to 7"):
        pearl.Explorer(folder, 5, 3, size=8)


def test_the_pictures_are_drawn_and_what_cannot_be_is_one_line(finished, tmp_path):
    point = finished(pearl_sac, *SMALL)
    other = finished(
        maml_trpo, "--env-id", "Navigation2D-v0", "--horizon", "5", "--iterations", "1", "--meta-batch-size", "2"
    )
    pearl.paths(point, pearl.Options("paths", (point,)))
    pearl.latent(point, pearl.Options("latent", (point,), tasks=20))
    pearl.curves((point, other))
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"pearl_paths.png", "pearl_latent_SparseNavigation2D.png", "pearl_curves_Navigation2D.png"}
    with pytest.raises(SystemExit, match=r"a run of algos.maml_trpo, not of pearl_sac"):
        pearl.table(other, pearl.Options("table", (other,)))


def written(path, name, points):
    """A kept curve of these (steps, seconds, return)."""
    rows = [{"env_steps": x, "seconds": t, f"test/return_k{pearl.AFTER[name]}": y} for x, t, y in points]
    with pearl.gzip.open(file := path / f"Family_{name}_seed1.metrics.jsonl.gz", "wt") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_crossings_are_sustained(tmp_path):
    """By brute force, for noisy curves: the first step after which none is below."""
    generator = torch.Generator().manual_seed(0)
    found = set()
    for end in (-9.0, -5.0, -1.0):
        other = written(tmp_path, "rl2_ppo", [(1000, 10.0, -20.0), (9000, 90.0, end)])
        curve = -10 + 8 * torch.linspace(0, 1, 20) + 2 * torch.randn(20, generator=generator)
        points = [(100 * (k + 1), 7.0 * (k + 1), float(y)) for k, y in enumerate(curve)]
        ours = written(tmp_path, "pearl_sac", points)
        since = [x for k, (x, _, _) in enumerate(points) if all(y >= end for *_, y in points[k:])]
        *_, line = pearl.crossings((ours, other))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:5] == ["rl2_ppo", "9,000", "90", f"{end:.1f}", "Family_pearl_sac_seed1"]
        if since:
            assert cells[5:] == [f"{since[0]:,}", f"{9000 / since[0]:.0f}", f"{0.07 * since[0]:,.0f}"]
        else:
            assert cells[5:] == ["never", "", ""]
        found.add(cells[5])
        early = next((x for x, _, y in points if y >= end), None)
        assert early is None or not since or early <= since[0]
    assert len(found) == 3
    with pytest.raises(SystemExit, match="crossings: give runs of pearl_sac, and others beside them"):
        pearl.crossings((ours,))


def test_the_papers_settings_are_one_command():
    """That of the page, beside configs/default.py and configs/cheetah-vel.json of the authors' code, oyster."""
    page = (pearl.ROOT / "docs/pearl_sac.md").read_text()
    block = page.split("The paper's settings for HalfCheetahVel", 1)[1].split("```")[1]
    args = tyro.cli(pearl_sac.Args, args=block.replace("\\\n", " ").split()[2:])
    horizon = 200  # max_path_length
    assert vars(args) == vars(pearl_sac.Args()) | {
        "horizon": horizon,
        "train_tasks": 100,
        "meta_batch_size": 16,
        "iterations": 500,
        "initial_episodes": 2000 // horizon,
        "tasks_per_iteration": 5,
        "prior_episodes": 400 // horizon,
        "posterior_episodes": 600 // horizon,
        "context": "prior",  # num_steps_posterior 0: the 600 are "extra_rl_steps", not in the encoder's buffer
        "updates": 2000,
        "batch_size": 256,
        "context_size": 100,
        "hidden_size": 300,
        "latent_size": 5,
        "lr": 3e-4,
        "gamma": 0.99,
        "tau": 0.005,
        "reward_scale": 5.0,
        "kl_weight": 0.1,
        "next_obs": False,
        "eval_episodes": 600 // horizon,
        "eval_prior_episodes": 2,
        "replay_size": 50_000,  # a million there: no task collects so many
    }
    most = 2000 + args.iterations * 1000 * args.tasks_per_iteration / args.train_tasks  # of a task, on average
    assert most + 4 * 1000 * (args.iterations * 0.05 * 0.95) ** 0.5 < args.replay_size
    default = pearl_sac.Args()
    words = block.replace("\\\n", " ").split()[2:]
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert given == {name for name, value in vars(args).items() if value != getattr(default, name)}
