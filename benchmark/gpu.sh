#!/usr/bin/env bash
# What a machine with an NVIDIA GPU should measure, in one command, offline, in under 10 minutes.
#
#   benchmark/gpu.sh           on that machine; results into $OUT, or benchmark/results/gpu
#   benchmark/gpu.sh wheels    before, where there is a network: what that machine lacks, into .whl and .warp-lang-0, -1, ..
#   benchmark/gpu.sh --cpu     a rehearsal: the same steps without a GPU, tiny
#
# It expects Python 3.12 with torch, numpy, pytest, tqdm and matplotlib (PYTHON=.. names another than python3); what it
# lacks of the rest comes from the wheels, into a temporary folder. warp-lang's wheel has 149 MB: where what travels in a
# call is limited, as to 64 MiB, its parts .warp-lang-* go there in calls of their own with `true` as the command, and the
# last part, .whl and this command in the last call. Without warp-lang what needs it is left out, and a line says so.
# A step that fails or takes too long is reported, and the next one runs.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmark/results/gpu} SITE=${SITE:-/tmp/cleanmeta-site} LIMIT=${LIMIT:-570}
export OUT PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive PYTHONPATH=$SITE
MAML=(--meta-batch-size 40 --episodes-per-task 20 --horizon 200 --iterations 3)
PEARL=(--iterations 5)
POINTS=(--tasks 10 40 160 --episodes 80 --at 40 20 --horizon 200 --iterations 2 --limit 60)
TESTS=(-k "gpu or cuda")
CUDA=(--cuda)

wheels() {
    local needed tag tags=()
    needed=$(sed -nE 's/^(gymnasium|mujoco|tyro)(\[.*\])?(==.*)/\1\3/p; s/^mujoco(==.*)/mujoco-core\1/p' requirements.txt)
    for tag in 2_34 2_31 2_28 2_27 2_24 2_17; do tags+=(--platform "manylinux_${tag}_x86_64"); done
    rm -rf .whl .warp-lang-*
    # shellcheck disable=SC2086  # several words
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${tags[@]}" --platform manylinux2014_x86_64 --dest .whl -r requirements-warp.txt \
        $needed glfw pyopengl farama-notifications docstring-parser typeguard || return
    split --bytes=40MB --numeric-suffixes --suffix-length=1 .whl/warp_lang-*.whl .warp-lang- && rm .whl/warp_lang-*.whl
    du -sh .whl .warp-lang-*
}

install() {
    if ! "$PYTHON" -c 'import gymnasium, mujoco, tyro'; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" .whl/*.whl
    fi
    if ! "$PYTHON" -c 'import warp' && [ -e .warp-lang-0 ]; then
        cat .warp-lang-* > "$SITE/warp-lang.whl" && "$PYTHON" -m zipfile -e "$SITE/warp-lang.whl" "$SITE"
    fi
    "$PYTHON" -c 'import gymnasium, mujoco, torch, tyro; print("torch", torch.__version__, "mujoco", mujoco.__version__)'
}

# step NAME SECONDS COMMAND..: what it prints, its lines of JSON also into $OUT/speed.jsonl; no longer than is left.
step() {
    local name=$1 most=$2 since=$SECONDS left=$((LIMIT - SECONDS))
    shift 2
    if ((left < 5)); then echo "== $name: left out, no time is left" && return; fi
    echo "== $name: $*"
    timeout --kill-after=10 $((most < left ? most : left)) "$@" > "$OUT/step.txt" 2>&1
    echo "== $name: exit status $? after $((SECONDS - since)) s"
    cat "$OUT/step.txt"
    sed -n "s/^{/{\"step\": \"$name\", /p" "$OUT/step.txt" >> "$OUT/speed.jsonl"
    rm "$OUT/step.txt"
}

summary() {
    "$PYTHON" - <<'END' | tee "$OUT/summary.md"
import json, os
print("| step | s per iteration | 500 iterations, minutes | end to end / physics alone | updates per s |\n|---|---|---|---|---|")
for record in map(json.loads, open(os.environ["OUT"] + "/speed.jsonl")):
    if "physics_steps_per_s" in record:
        seconds = record["sample_s"] + record["update_s"]
        share = record["end_to_end_steps_per_s"] / record["physics_steps_per_s"]
        print(f"| {record['step']} | {seconds:.3f} | {500 * seconds / 60:.1f} | {share:.2f} | |")
    else:
        print(f"| {record['step']} | {record['iteration_s']:.3f} | | | {record['updates_per_s']:.1f} |")
END
}

measure() {
    local speed=("$PYTHON" benchmark/speed.py) scaling=("$PYTHON" benchmark/scaling.py) which=(mujoco)
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    install || echo "== install: failed, and what follows will"
    if ((${#CUDA[@]})) && "$PYTHON" -c 'import mujoco_warp'; then which=(warp mujoco); else
        echo "== warp: left out, for it needs a GPU, mujoco_warp and warp-lang (benchmark/gpu.sh wheels)"
    fi
    for physics in "${which[@]}"; do
        step "maml_trpo, $physics" 110 "${speed[@]}" maml_trpo "${MAML[@]}" "${CUDA[@]}" --physics "$physics"
    done
    step "maml_trpo, CPU" 110 "${speed[@]}" maml_trpo "${MAML[@]}"
    step "pearl_sac" 60 "${speed[@]}" pearl_sac "${PEARL[@]}" "${CUDA[@]}"
    step "pearl_sac, compiled" 100 "${speed[@]}" pearl_sac "${PEARL[@]}" "${CUDA[@]}" --compile
    for physics in "${which[@]}"; do
        step "scaling, $physics" 90 "${scaling[@]}" run "${CUDA[@]}" "${POINTS[@]}" --results "$OUT/scaling.jsonl" \
            --physics "$physics"
    done
    step "picture" 30 "${scaling[@]}" draw --at "${AT[@]}" --results "$OUT/scaling.jsonl" --image "$OUT/scaling.png"
    step "tests" 120 "$PYTHON" -m pytest -q -p no:cacheprovider -o filterwarnings=default "${TESTS[@]}"
    summary
}

AT=(40 20)
case "${1:-}" in
wheels) wheels && exit ;;
--cpu)
    MAML=(--meta-batch-size 4 --episodes-per-task 2 --horizon 5 --iterations 1)
    PEARL=(--env-id Navigation2D-v0 --train-tasks 4 --tasks-per-iteration 2 --meta-batch-size 2 --horizon 5
        --updates 2 --batch-size 4 --context-size 4 --hidden-size 8 --iterations 1)
    POINTS=(--tasks 4 --episodes --at 4 2 --horizon 5 --iterations 1 --processes 1 --env-id Navigation2D-v0)
    AT=(4 2) TESTS=(--collect-only tests/test_scaling.py) CUDA=()
    ;;
"") ;;
*) echo "benchmark/gpu.sh $1: allowed is nothing, wheels, --cpu" >&2 && exit 2 ;;
esac
mkdir -p "$OUT" "$SITE" && rm -f "$OUT"/*.jsonl
measure 2>&1 | tee "$OUT/log.txt"
