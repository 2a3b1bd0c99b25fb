#!/usr/bin/env bash
# Everything that only a GPU can show, on a machine with one Hopper GPU and torch >= 2.11 (Python 3.11 or 3.12; neither
# Transformer Engine nor DALI): tests, kernels, steps at full width, FP8, the tower, one rank of a large layout.
#
#   OUT=results tools/gpu_check.sh --wheels FOLDER            # all parts, at most 25 minutes
#   OUT=results tools/gpu_check.sh --wheels FOLDER text fp8   # some
#
# FOLDER has wheels of megatron-core 0.16.1 and of what else the interpreter lacks; they are installed without the
# network into a folder of their own. PYTHON=... chooses the interpreter. Every part has its own time limit. A part that
# cannot run fails with its reason in the table; the exit code is 0 only when all parts ran and all that is asked for
# was met. In $OUT: results.json, table.txt, log.txt, and the traces text.json.gz, mixture.json.gz.
# Never run so far: written on a machine without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PARTS=(build pytest kernels text mixture fp8 tower slice)
declare -A LIMIT=([build]=120 [pytest]=300 [kernels]=240 [text]=120 [mixture]=150 [fp8]=50 [tower]=150 [slice]=120)
PYTHON=${PYTHON:-python3}
OUT=${OUT:?set OUT to a folder for the results}
wheels=""
if [[ ${1:-} == --wheels ]]; then
    wheels=${2:?--wheels needs a folder}
    shift 2
fi
chosen=("$@")
[[ ${#chosen[@]} -gt 0 ]] || chosen=("${PARTS[@]}")
for part in "${chosen[@]}"; do
    [[ -n ${LIMIT[$part]:-} ]] || { echo "gpu_check.sh: no part $part; there are ${PARTS[*]}" >&2; exit 2; }
done
mkdir -p "$OUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
: >"$OUT/log.txt"

if [[ -n $wheels ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$WORK/site" "$wheels"/*.whl \
        >>"$OUT/log.txt" 2>&1 || { tail -5 "$OUT/log.txt" >&2; echo "gpu_check.sh: the wheels of $wheels do not install" >&2; exit 2; }
fi
export PYTHONPATH="$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -c 'import megatron.core, torch; assert torch.cuda.is_available(), "torch sees no CUDA device"' \
    2>>"$OUT/log.txt" || { tail -3 "$OUT/log.txt" >&2; echo "gpu_check.sh: this interpreter cannot run it" >&2; exit 2; }

cat >"$WORK/run.yaml" <<YAML
preset: step3_vl_10b
run_dir: $WORK/run
parallel: {device: cuda, layer_backend: torch}
precision: {params: bf16}
data: {seq_length: 8192}
train: {micro_batch_size: 1, global_batch_size: 4}
YAML
bench=("$PYTHON" tools/benchmark_throughput.py)
# full width, as many layers as fit beside 18 bytes for every parameter
text=(model.vision.num_layers=1 model.text.num_layers=16 --visual-share 0)
mixture=(data.seq_length=4096 model.text.num_layers=12 recompute.vision=full --visual-share 0.3)
layers=(model.vision.num_layers=1 --visual-share 0 --steps 5 --warmup 2)

limited() { # NAME SECONDS COMMAND ...: exit code and seconds go to the table, output to the log
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name: $*" | tee -a "$OUT/log.txt"
    timeout --kill-after=20 "$limit" "$@" >"$WORK/$name.log" 2>&1
    code=$?
    cat "$WORK/$name.log" >>"$OUT/log.txt"
    tail -n 40 "$WORK/$name.log"
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begin))" "$limit" >>"$WORK/parts.tsv"
}

run_part() {
    local limit=${LIMIT[$1]} precision count
    case $1 in
        build) limited build "$limit" make -C csrc PYTHON="$(command -v "$PYTHON")" ;;
        pytest) limited pytest "$limit" "$PYTHON" -m pytest -q -m gpu -rfEs tests ;;
        kernels) limited kernels "$limit" "${bench[@]}" kernels --require --json "$WORK/kernels.json" ;;
        text) limited text "$limit" "${bench[@]}" step "$WORK/run.yaml" "${text[@]}" --trace "$WORK/text.trace.json" \
            --json "$WORK/text.json" ;;
        mixture) limited mixture "$limit" "${bench[@]}" step "$WORK/run.yaml" "${mixture[@]}" \
            --trace "$WORK/mixture.trace.json" --json "$WORK/mixture.json" ;;
        fp8) # a layer's time is a difference: 8 layers less 2
            for precision in none tensorwise; do
                for count in 2 8; do
                    limited "fp8_${precision}_$count" "$limit" "${bench[@]}" step "$WORK/run.yaml" "${layers[@]}" \
                        "precision.fp8=$precision" "model.text.num_layers=$count" --json "$WORK/fp8_${precision}_$count.json"
                done
            done ;;
        tower) limited tower "$limit" "${bench[@]}" tower "$WORK/run.yaml" model.text.num_layers=1 --views 8 --compile \
            --json "$WORK/tower.json" ;;
        slice) limited slice "$limit" "${bench[@]}" step "$WORK/run.yaml" data.seq_length=131072 data.packing.enabled=true \
            parallel.tensor_model_parallel_size=4 parallel.context_parallel_size=8 parallel.sequence_parallel=true \
            recompute.vision=full train.global_batch_size=1 --document-tokens 131072 --fake-world 32 --steps 3 --warmup 1 \
            --json "$WORK/slice.json" ;;
    esac
}

for part in "${chosen[@]}"; do
    run_part "$part"
done
for name in text mixture; do
    [[ -f $WORK/$name.trace.json ]] && gzip -c "$WORK/$name.trace.json" >"$OUT/$name.json.gz"
done
"$PYTHON" tools/gpu_summary.py "$WORK" "$OUT/results.json" | tee "$OUT/table.txt"
exit "${PIPESTATUS[0]}"
