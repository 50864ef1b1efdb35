#!/usr/bin/env bash
# The whole path on the shipped sample: data and tokenizer -> token cache -> training -> model and report.
# Uses the GPUs of this machine, or two CPU ranks. Run it from the repository root with the package installed.
set -euo pipefail

config=configs/quickstart.yaml
run_dir=runs/quickstart
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus > 0 ? gpus : 2))
# The quick start's global batch is 8 packs; ranks must divide it.
while ((8 % ranks)); do ranks=$((ranks - 1)); done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The launcher's own choice, 29500, is taken when another run is going on here.
port=$(python -c 'import socket; probe = socket.socket(); probe.bind(("", 0)); print(probe.getsockname()[1])')

versatune-ds sample runs/sample
versatune-ds prepare --config "$config"
deepspeed --log_level warning --num_gpus "$ranks" --master_port "$port" launch/train.py --config "$config"
versatune-ds report "$run_dir"
echo "model:  $run_dir/model"
echo "report: $run_dir/report.html"
