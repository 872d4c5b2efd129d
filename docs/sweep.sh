#!/bin/sh
#SBATCH --gres=gpu:1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --signal=B:INT@60
# One erasure of a sweep: the YAML file that stands in this line of sweep/list. See docs/scaling.md.
set -eu
config=$(sed -n "${SLURM_ARRAY_TASK_ID}p" sweep/list)
output=$(sed -n 's/^ *output: //p' "$config")
[ -f "$output/result.json" ] && { echo "$output is done"; exit 0; }
resume=
ls "$output.checkpoint"/step-* >/dev/null 2>&1 && resume=--resume
exec python -m esd_peft.erase --config "$config" $resume
