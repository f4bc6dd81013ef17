#!/usr/bin/env bash
# All that is to be measured on a GPU, in at most 8 minutes; writes one Markdown table with device, date and versions.
#
#     benchmarks/gpu_session.sh RESULT.md                                    random weights, no network
#     benchmarks/gpu_session.sh RESULT.md --model FOLDER --judge FOLDER --data FOLDER
#     benchmarks/gpu_session.sh RESULT.md --tiny                             on a CPU: whether the script runs to its end
#
# PYTHON names the interpreter. The table is written again after each measurement, so a session that is cut short leaves
# what it has; what time does not suffice for is listed as not measured.
set -u
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
result=$(realpath -m "$1")
shift
started=$(date +%s)
python=${PYTHON:-python}
command -v "$python" >/dev/null || python=python3
cd "$(dirname "$0")/.." || exit 1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "pytest -m gpu" >&2
timeout 150 "$python" -m pytest -m gpu tests/test_on_gpu.py -q --tb=line -p no:cacheprovider >"$log" 2>&1
echo "pytest ended with $?: $(tail -n 1 "$log")" >&2
timeout 480 "$python" benchmarks/gpu_session.py "$result" --tests "$log" --until $((started + 460)) "$@"
