#!/usr/bin/env bash
# What a machine with an NVIDIA GPU should check and measure, offline. Nothing in it was ever run on one.
#
#   benchmark/gpu.sh                       all steps in this order, in under 10 minutes (LIMIT=570 seconds)
#   benchmark/gpu.sh correctness worlds    these steps
#   benchmark/gpu.sh --cpu [STEP ..]       a rehearsal: the same steps without a GPU, tiny
#   benchmark/gpu.sh wheels                before, where there is a network: what that machine lacks, into .whl and
#                                          .warp-lang-0, -1, .. for Python 3.12 on x86-64
#   benchmark/gpu.sh install               there: the wheels into $SITE, as every other call does first
#
#   correctness   every file of algos/ with --cuda, all at the same time, beside the CPU: PASS or FAIL (gpu_check.py)
#   worlds        256 to 65,536 worlds by warp and by the CPU's threads: where `auto` should switch (gpu_worlds.py)
#   rl2           steps per second of rl2_ppo.py on bandits and TabularMDP, all on the device (speed.py)
#   pearl         updates per second of pearl_sac.py, eager and with --compile (speed.py)
#   maml          seconds per iteration of maml_trpo.py, by warp, by the CPU's threads, and without the GPU (speed.py)
#   tests         the tests that need a GPU
#   learn         MAML-TRPO on HalfCheetahDir for the time that is left; RESUME=FOLDER goes on with an earlier one
#
# Results are written as they come, eight files at most, in $OUT (benchmark/results/gpu if it is not set; a rehearsal's
# in a new folder of /tmp): log.txt, correctness.jsonl, worlds.jsonl, speed.jsonl, and in runs/ what the learning run
# keeps. They are added to what is there. A step that fails or takes too long is reported, and the next one runs. Exit
# status 124 means that it was ended at its limit, as the learning run always is.
#
# It expects Python 3.12 with torch, numpy, pytest, tqdm and matplotlib (PYTHON=.. names another than python3). What it
# lacks of the rest comes from the wheels, into $SITE. Without warp-lang what needs it is left out, and a line says so.
#
# On the machine that is lent for 15 minutes (../.library/device/README.md), where 64 MiB travel in a call:
#
#   here                                           benchmark/gpu.sh wheels
#   run, carry .warp-lang-0                        true
#   run, carry .warp-lang-1                        true
#   run, carry .warp-lang-2 .whl, timeout_s 330    LIMIT=310 benchmark/gpu.sh correctness worlds
#   here                                           the files that came back into benchmark/results/gpu
#   run, timeout_s 330                             LIMIT=310 benchmark/gpu.sh rl2 pearl maml tests learn
#   give_back
#
# One right after the other: a machine that is idle for 30 seconds goes back, and with it what was carried. If a file is
# not correct, mend it first. This checks one again:
#   benchmark/gpu.sh install && PYTHONPATH=/tmp/cleanmeta-site python3 benchmark/gpu_check.py --cuda --only NAME
set -uo pipefail
cd "$(dirname "$0")/.." || exit
STEPS=(correctness worlds rl2 pearl maml tests learn)
CPU=() CUDA=(--cuda)
if [ "${1:-}" = --cpu ]; then CPU=(--cpu) CUDA=() && shift && OUT=${OUT:-$(mktemp -d)}; fi
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")")  # not the Python behind a virtual environment's link
OUT=${OUT:-$PWD/benchmark/results/gpu} SITE=${SITE:-/tmp/cleanmeta-site} LIMIT=${LIMIT:-570}
export PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=1000 PYTHONPATH=$SITE

wheels() {
    local needed tag tags=()
    needed=$(sed -nE 's/^(gymnasium|mujoco|tyro)(\[.*\])?(==.*)/\1\3/p; s/^mujoco(==.*)/mujoco-core\1/p' \
        requirements.txt)
    for tag in 2_34 2_31 2_28 2_27 2_24 2_17; do tags+=(--platform "manylinux_${tag}_x86_64"); done
    rm -rf .whl .warp-lang-*
    # shellcheck disable=SC2086  # several words
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${tags[@]}" --platform manylinux2014_x86_64 --dest .whl -r requirements-warp.txt \
        $needed glfw pyopengl farama-notifications docstring-parser typeguard || return
    "$PYTHON" - .whl/warp_lang-*.whl <<'END' || return
import sys, zipfile
whole, small = zipfile.ZipFile(sys.argv[1]), zipfile.ZipFile(".whl/small", "w", zipfile.ZIP_DEFLATED, compresslevel=9)
for name in whole.namelist():
    if not name.startswith(("warp/tests/", "warp/examples/")):
        small.writestr(name, whole.read(name))
small.close()
END
    split --bytes=54MB --numeric-suffixes --suffix-length=1 .whl/small .warp-lang-
    rm .whl/small .whl/warp_lang-*.whl
    du -sh .whl .warp-lang-*
}

install() {
    mkdir -p "$SITE"
    if ! "$PYTHON" -c 'import gymnasium, mujoco, tyro' 2> /dev/null; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" .whl/*.whl
    fi
    if ! "$PYTHON" -c 'import warp' 2> /dev/null && [ -e .warp-lang-0 ]; then
        cat .warp-lang-* > "$SITE/warp-lang.whl" && "$PYTHON" -m zipfile -e "$SITE/warp-lang.whl" "$SITE"
    fi
    "$PYTHON" -c 'import gymnasium, torch, mujoco, tyro; print("torch", torch.__version__)'
}

# step NAME SECONDS COMMAND..: what it prints, its lines of JSON also into $OUT/speed.jsonl; no longer than is left.
step() {
    local name=$1 since=$SECONDS left=$((LIMIT - SECONDS))
    left=$(($2 < left ? $2 : left))
    shift 2
    if ((left < 5)); then echo "== $name: left out, no time is left" && return; fi
    echo "== $name: $*"
    timeout --kill-after=10 "$left" "$@" > "$PRINTED" 2>&1
    echo "== $name: exit status $? after $((SECONDS - since)) s"
    cat "$PRINTED"
    sed -n "s/^{/{\"step\": \"$name\", /p" "$PRINTED" >> "$OUT/speed.jsonl"
}

speed() {
    local name=$1 most=$2
    shift 2
    step "$name" "$most" "$PYTHON" benchmark/speed.py "$@"
}

# ---------------------------------------------------------------- the steps, and their sizes in a rehearsal

correctness() {
    local some=() most=118 each=105
    if ((${#CPU[@]})); then some=(--only promp pearl_sac) most=300 each=250; fi
    step correctness "$most" "$PYTHON" benchmark/gpu_check.py "${CUDA[@]}" "${some[@]}" --limit "$each" \
        --results "$OUT/correctness.jsonl"
}

worlds() {
    local run=("$PYTHON" benchmark/gpu_worlds.py run "${CUDA[@]}" --results "$OUT/worlds.jsonl") body physics
    local -A numbers=([HalfCheetahDir]="256 1024 4096 16384 65536" [AntGoal]="1024 4096 16384")
    local -A most=([warp]=100 [mujoco]=60)  # warp's compiler takes its time
    if ((${#CPU[@]})); then numbers=([HalfCheetahDir]="2 4" [AntGoal]="2 4") && run+=(--horizon 3 --seconds 0); fi
    for body in HalfCheetahDir AntGoal; do
        for physics in "${PHYSICS[@]}"; do
            # shellcheck disable=SC2086  # several words
            step "worlds, $body, $physics" "${most[$physics]}" "${run[@]}" --env-id "$body-v0" --physics "$physics" \
                --worlds ${numbers[$body]}
        done
    done
    step "worlds, table" 20 "$PYTHON" benchmark/gpu_worlds.py table --results "$OUT/worlds.jsonl"
}

rl2() {
    local tiny=() env_id trials
    if ((${#CPU[@]})); then tiny=(--hidden-size 16 --minibatches 2); fi
    for env_id in Bandit5-v0 TabularMDP-v0; do
        for trials in ${CPU[0]+4} ${CUDA[0]+500 32000}; do
            speed "rl2_ppo, $env_id, $trials trials" 40 rl2_ppo --env-id "$env_id" --meta-batch-size "$trials" \
                --iterations ${CPU[0]+1} ${CUDA[0]+5} "${CUDA[@]}" "${tiny[@]}"
        done
    done
}

pearl() {
    local sizes=(--physics mujoco --iterations 5)
    if ((${#CPU[@]})); then
        sizes=(--env-id Navigation2D-v0 --train-tasks 4 --tasks-per-iteration 2 --meta-batch-size 2 --horizon 5
            --updates 2 --batch-size 4 --context-size 4 --hidden-size 8 --iterations 1)
    fi
    speed "pearl_sac" 60 pearl_sac "${sizes[@]}" "${CUDA[@]}"
    speed "pearl_sac, compiled" 120 pearl_sac "${sizes[@]}" "${CUDA[@]}" --compile
}

maml() {
    local sizes=(--meta-batch-size 40 --episodes-per-task 20 --horizon 200 --iterations 3) physics
    if ((${#CPU[@]})); then sizes=(--meta-batch-size 4 --episodes-per-task 2 --horizon 5 --iterations 1); fi
    for physics in "${PHYSICS[@]}"; do
        speed "maml_trpo, $physics" 60 maml_trpo "${sizes[@]}" "${CUDA[@]}" --physics "$physics"
    done
    speed "maml_trpo, CPU" 60 maml_trpo "${sizes[@]}" --physics mujoco
}

tests() {
    local files which=(-k "gpu or cuda")
    mapfile -t files < <(grep -l '^@pytest.mark.skipif(not torch.cuda' tests/test_*.py)
    if ((${#CPU[@]})); then files=(tests/test_blame.py tests/test_imagined.py); fi  # they are skipped there
    if "$PYTHON" -c 'import xdist'; then which+=(-n ${CPU[0]+2} ${CUDA[0]+8} --dist loadgroup); fi
    step tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider -o filterwarnings=default \
        --continue-on-collection-errors "${which[@]}" "${files[@]}"
}

# It gets SIGTERM 15 seconds before the end, and then saves.
learn() {
    local left=$((LIMIT - SECONDS - 15)) folder
    local flags=(--env-id HalfCheetahDir-v0 --meta-batch-size 40 --episodes-per-task 20 --iterations 100000
        --eval-every 25 --physics mujoco)
    if ((${#CPU[@]})); then
        left=$((left < 25 ? left : 25)) flags=(--env-id Navigation2D-v0 --meta-batch-size 4 --episodes-per-task 2
            --horizon 5 --hidden-size 8 --iterations 100000 --eval-every 25)
    fi
    mkdir -p "$OUT/runs" && if [ -n "${RESUME:-}" ]; then cp -r "$RESUME" "$OUT/runs/"; fi
    folder=$(find "$OUT/runs" -name checkpoint.pt -printf 'runs/%P' -quit)
    step learn "$left" env -C "$OUT" "$PYTHON" "$PWD/algos/maml_trpo.py" "${flags[@]}" "${CUDA[@]}" \
        ${folder:+--resume "$(dirname "$folder")"}
    find "$OUT/runs" -name metrics.jsonl -exec tail -n 2 {} +
}

summary() {
    "$PYTHON" - "$OUT/speed.jsonl" <<'END'
import json, sys
print("| step | steps per s | s per iteration | 500 iterations, minutes | end to end / physics alone | updates per s |")
print("|---" * 6 + "|")
for record in map(json.loads, open(sys.argv[1])):
    if "updates_per_s" in record:
        print(f"| {record['step']} | | {record['iteration_s']:.3f} | | | {record['updates_per_s']:.1f} |")
        continue
    rate, seconds, share = record["end_to_end_steps_per_s"], record["sample_s"] + record["update_s"], ""
    if "physics_steps_per_s" in record:
        share = f"{rate / record['physics_steps_per_s']:.2f}"
    print(f"| {record['step']} | {rate:,.0f} | {seconds:.3f} | {500 * seconds / 60:.1f} | {share} | |")
END
}

everything() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    install || echo "== install: failed, and what follows will"
    PHYSICS=(mujoco)
    if "$PYTHON" -c 'import mujoco_warp'; then PHYSICS=(warp mujoco); else
        echo "== warp: left out, for it needs mujoco_warp and warp-lang (benchmark/gpu.sh wheels)"
    fi
    for name in "$@"; do $name; done
    echo "== summary" && summary
}

if [[ "${1:-}" = wheels || "${1:-}" = install ]]; then "$1"; exit; fi
for name in "$@"; do
    if [[ " ${STEPS[*]} " != *" $name "* ]]; then
        echo "benchmark/gpu.sh $name: allowed are ${STEPS[*]}, before them --cpu; wheels; install" >&2 && exit 2
    fi
done
if (($# == 0)); then set -- "${STEPS[@]}"; fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && touch "$OUT/speed.jsonl"
PRINTED=$(mktemp) && trap 'rm -f "$PRINTED"' EXIT
everything "$@" 2>&1 | tee -a "$OUT/log.txt"
