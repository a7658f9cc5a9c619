#!/bin/bash
# Train with Open MPI's mpirun over the hosts of a hostfile (lines "node1 slots=8", as for deepspeed):
#
#   launch/mpi.sh hostfile launch/configs/x.yaml [key.sub=value ...]
#
# MPI starts the ranks and tells them who they are; training speaks NCCL or gloo. MPIRUN_ARGS adds to mpirun's options,
# e.g. MPIRUN_ARGS="--mca oob_tcp_if_include ib0".
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: launch/mpi.sh HOSTFILE CONFIG [key.sub=value ...]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
hostfile=$1
shift
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}

# mpirun forwards none of the environment by itself.
forward=()
for name in $(compgen -e | grep -E '^(NCCL|GLOO|UCX|HF|CUDA|TORCH|OMP|DS|MASTER)_|^(PATH|LD_LIBRARY_PATH|PYTHONPATH)$'); do
    forward+=(-x "$name")
done
# mpirun looks for a lost host after 5 minutes; this lets its daemon on a host that was cut off end sooner.
keepalive=(--mca oob_tcp_keepalive_time 30 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 2)
# Without --bind-to none every rank, with all its threads, would sit on one core or socket.
# shellcheck disable=SC2086
exec "$python" "$root/launch/supervise.py" mpirun --hostfile "$hostfile" --bind-to none "${keepalive[@]}" ${MPIRUN_ARGS:-} "${forward[@]}" \
    "$python" -u "$root/launch/train.py" --config "$@"
