"""benchmark/scaling.py measures and draws; the commands of docs/speed.md parse."""

import io
import itertools
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import tyro
import yaml
from PIL import Image
from torch.distributed.run import get_args_parser
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from algos import maml_trpo
from benchmark import scaling, speed, speed_all

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/speed.md").read_text()
pytestmark = pytest.mark.xdist_group("scaling")
TINY = "--tasks 4 --episodes --at 4 3 --iterations 2 --env-id Navigation2D-v0 --horizon 10"


def run(where: Path, flags: str) -> str:
    """What benchmark/scaling.py prints; SystemExit where it ends with an error."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["scaling.py", *flags.split(), "--results", str(where / "points.jsonl")])
        scaling.main()
    return out.getvalue()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two points of equal work, in one process and in two."""
    where = tmp_path_factory.mktemp("scaling")
    assert run(where, f"run {TINY} --processes 1 2").count("end_to_end_steps_per_s") == 2
    return [json.loads(line) for line in (where / "points.jsonl").read_text().splitlines()]


def test_points_are_of_the_work_that_was_asked_for(measured):
    assert [record["processes"] for record in measured] == [1, 2]
    for record in measured:
        steps = 2 * 4 * 3 * 10  # support and query, tasks, episodes, steps of an episode
        for rate in scaling.RATES:
            lowest, value, highest = (record[f"{rate}_steps_per_s{which}"] for which in ("_lowest", "", "_highest"))
            assert 0 < lowest <= value <= highest
        seconds = [steps / record[f"end_to_end_steps_per_s{which}"] for which in ("_lowest", "_highest")]
        assert record["iteration_s"] == pytest.approx(sum(seconds) / 2, rel=1e-3)  # the median of two
        assert record["end_to_end_steps_per_s"] < record["sampling_steps_per_s"]
        assert record["steps_per_batch"] * record["processes"] == 4 * 3 * 10
        words = record["command"].split()
        assert words[:2] == ["OMP_NUM_THREADS=1", "python"]
        assert vars(speed.parse(words[words.index("point") + 1 :])[2]).items() >= record["args"].items()
    one, two = (record["memory_mb"] for record in measured)
    assert 1.7 < two / one < 2.3  # torch itself, twice
    assert 100 < measured[0]["start_memory_mb"] <= one


def test_what_is_drawn_and_listed_are_medians_of_the_points(measured, tmp_path):
    slower = measured[0] | {"end_to_end_steps_per_s": 1.0, "physics_steps_per_s": 11.0}
    slowest = slower | {"end_to_end_steps_per_s": 0.0}
    with open(tmp_path / "points.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in (*measured, slower, slowest))
    lines = run(tmp_path, "table").splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:2] for row in rows] == [["4 x 3", "1 process, 1 thread"], ["4 x 3", "2 processes, 1 thread"]]
    assert rows[0][2].startswith("1 (")
    assert rows[0][4].startswith("11 (")
    assert rows[1][2].startswith(f"{measured[1]['end_to_end_steps_per_s']:,.0f} (")
    assert run(tmp_path, f"draw --at 4 3 --image {tmp_path}/picture.png") == f"{tmp_path}/picture.png\n"
    picture = Image.open(tmp_path / "picture.png").convert("RGB")
    assert any(max(color) - min(color) > 100 for _, color in picture.getcolors(10**6))  # axes alone are grey


def test_what_cannot_be_measured_is_said(tmp_path, capsys):
    assert run(tmp_path, f"run {TINY} --processes 3 --tasks 5") == (
        "left out: 5 tasks are no multiple of 3 processes\n"
    )
    with pytest.raises(SystemExit, match="1 points failed"):
        run(tmp_path, f"run {TINY} --processes 1 --inner-lr -1")
    assert "--inner-lr -1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1 points failed"):
        run(tmp_path, f"run {TINY} --processes 2 --limit 1")
    assert "ran into the limit of 1 s" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="table: unknown --horizon 10"):
        run(tmp_path, "table --horizon 10")
    (tmp_path / "points.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"points\.jsonl holds no points of maml_trpo"):
        run(tmp_path, "draw")


# ---------------------------------------------------------------- speed_all.py


def test_every_algorithm_is_in_the_table_and_its_commands_parse():
    named = {speed.parse(command.split())[0].algorithm for command in speed_all.RUNS}
    without = set(re.findall(r"`(\w+)`", re.search(r"No peer is written for ([^:]*):", PAGE)[1]))
    assert without == {"varibad_ppo", "dpt", "ad", "meta_gradient_a2c"}
    assert named == {path.stem for path in (ROOT / "algos").glob("*.py")} - without


def test_rows_with_large_tensors_have_all_cores(monkeypatch):
    monkeypatch.setattr(speed_all, "available_cpus", lambda: 7)
    with_all = {command.split()[0] for command in speed_all.RUNS if speed_all.threads(command) == 7}
    assert with_all == {"maml_trpo", "promp", "reptile_ppo", "multitask_ppo"}
    assert {speed_all.threads(command) for command in speed_all.RUNS} == {1, 7}


def test_the_table_has_medians_of_ours_and_the_peers(tmp_path, capsys):
    def record(command, **figures):
        return json.dumps({"command": f"OMP_NUM_THREADS=1 python benchmark/speed.py {command}"} | figures) + "\n"

    pearl, meta_critic = speed_all.RUNS[11], speed_all.RUNS[13]
    lines = [
        record(pearl, updates_per_s=x, peer_updates_per_s=5.0, speedup_update=x / 5, cpu_speedup_update=x / 10)
        for x in (20.0, 10.0, 70.0)
    ]
    (tmp_path / "all.jsonl").write_text(record(meta_critic, end_to_end_steps_per_s=1234.5) + "".join(lines))
    speed_all.table(speed_all.Options("table", results=tmp_path / "all.jsonl"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        [f"`{pearl}`", "1", "20.0 updates", "5.0", "4.00 (2.00 to 14.00)", "2.00 (1.00 to 7.00)"],
        [f"`{meta_critic}`", "1", "1,234 steps", "none", "", ""],
    ]


# ---------------------------------------------------------------- docs/speed.md


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/speed.md").read_text(), re.DOTALL)


def run_of_torchrun(words: list[str]):
    """The options of torchrun and the Args of the file that it runs."""
    options = get_args_parser().parse_args(words)
    assert options.training_script == "algos/maml_trpo.py"
    return options, tyro.cli(maml_trpo.Args, args=options.training_script_args)


def test_torchruns_commands_parse():
    lines = [line.partition("#")[0].split() for block in blocks("") for line in block.replace("\\\n", "").splitlines()]
    found = [run_of_torchrun(words[1:]) for words in lines if words[:1] == ["torchrun"]]
    assert [options.nproc_per_node for options, _ in found] == ["4", "8", "8"]
    assert [args.meta_batch_size for _, args in found] == [40, 40, 80]


def test_the_sweeps_commands_parse():
    (sweep,) = map(yaml.safe_load, blocks("yaml"))
    assert (ROOT / sweep["program"]).exists()
    assert sweep["command"][-1] == "${args_no_boolean_flags}"
    values = {name: entry.get("values", [entry.get("value")]) for name, entry in sweep["parameters"].items()}
    seen = set()
    for combination in itertools.product(*values.values()):
        wanted = dict(zip(values, combination, strict=True))
        words = create_sweep_command_args({"args": {name: {"value": value} for name, value in wanted.items()}})
        args = tyro.cli(maml_trpo.Args, args=words["args_no_boolean_flags"])
        assert wanted.items() <= vars(args).items()
        seen.add(str(args))
    assert len(seen) == 24


def test_slurms_scripts_start_what_they_say():
    """The scripts run, with stand-ins for SLURM's commands."""
    stand_ins = (
        'srun() { echo "$@"; }; scontrol() { [ "$*" = "show hostnames node[1-2]" ] && echo node1 && echo node2; }\n'
    )
    array, nodes = blocks("bash")
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77"}

    def started(script: str, **more) -> list[str]:
        command = ["bash", "-euc", stand_ins + script]
        return subprocess.run(command, env=slurm | more, capture_output=True, text=True, check=True).stdout.split()

    assert "#SBATCH --array=0-5 " in array
    runs = [started(array, SLURM_ARRAY_TASK_ID=str(task)) for task in range(6)]
    assert {tuple(words[:2]) for words in runs} == {(".venv/bin/python", "algos/maml_trpo.py")}
    found = [tyro.cli(maml_trpo.Args, args=words[2:]) for words in runs]
    environments = "HalfCheetahDir-v0", "HalfCheetahVel-v0"
    assert {(args.env_id, args.seed) for args in found} == set(itertools.product(environments, (1, 2, 3)))
    words = started(nodes)
    assert words[0] == ".venv/bin/torchrun"
    options, args = run_of_torchrun(words[1:])
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("2", "node1:29400", "77")
    assert args.cuda
