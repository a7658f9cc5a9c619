#!/bin/bash
# Train with torchrun: the same line on every host, by pdsh, a scheduler or hand.
#
#   NNODES=4 HEAD=node1 launch/torchrun.sh launch/configs/x.yaml [key.sub=value ...]
#
# HEAD           the host to meet at.            PORT     there, 29500.
# NNODES         number of hosts, 1.             PROCS_PER_NODE  ranks a host, all its GPUs.
# NODE_RANK      this host's number from 0: static rendezvous. Left out: c10d, numbered by name.
# JOB_ID         keeps jobs apart (c10d).
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: NNODES=4 HEAD=node1 launch/torchrun.sh CONFIG [key.sub=value ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
NNODES=${NNODES:-1} HEAD=${HEAD:-127.0.0.1} PORT=${PORT:-29500}
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
if [ -n "${NODE_RANK:-}" ]; then
    meet=(--node_rank "$NODE_RANK" --master_addr "$HEAD" --master_port "$PORT")
else
    meet=(--rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${JOB_ID:-lora_one}")
fi
# torchrun would die of SIGUSR1; ranks undo this when they listen for it.
trap '' USR1
# No restarts: the failure of one rank ends the job; supervise.py ends an agent that waits for a lost host.
exec "$python" "$root/launch/supervise.py" "$python" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc_per_node "${PROCS_PER_NODE:-gpu}" --max_restarts 0 "${meet[@]}" \
    "$root/launch/train.py" --config "$@"
