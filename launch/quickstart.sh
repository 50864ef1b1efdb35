#!/usr/bin/env bash
# The whole path on the shipped sample: data and tokenizer -> token cache -> training -> model and report.
# Uses the GPUs of this machine in bf16 (fp32 where they lack it), or two CPU ranks in fp32. Run it from the
# repository root with the package installed.
set -euo pipefail

config=configs/quickstart.yaml
run_dir=runs/quickstart
# bf16 brings the attention kernel and the master weights that real runs take; fp32 has neither.
found=$(python -c '
import torch
gpus = torch.cuda.device_count()
print(gpus, "bf16" if gpus and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32")
')
read -r gpus dtype <<<"$found"
ranks=$((gpus > 0 ? gpus : 2))
# The quick start's global batch is 8 packs; ranks must divide it.
while ((8 % ranks)); do ranks=$((ranks - 1)); done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The launcher's own choice, 29500, is taken when another run is going on here.
port=$(python -c 'import socket; probe = socket.socket(); probe.bind(("", 0)); print(probe.getsockname()[1])')

versatune-ds sample runs/sample
versatune-ds prepare --config "$config"
deepspeed --log_level warning --num_gpus "$ranks" --master_port "$port" launch/train.py \
  --config "$config" "model.dtype=$dtype"
versatune-ds report "$run_dir"
echo "model:  $run_dir/model"
echo "report: $run_dir/report.html"
