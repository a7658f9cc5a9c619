#!/bin/bash
# Run the job's one command, and put the job back into the queue if it was stopped. For the batch scripts beside this one:
#
#   exec launch/slurm/requeue.sh COMMAND ...
#
# Exit code 75: a signal has stopped the job, and all is saved. Requeued, it goes on from there, into the same log. So it
# does if it was preempted before training had begun: its ranks end at once, within the grace time, and SLURM would take
# that for the job's own end. But not once this shell has got SIGTERM: after scancel nothing shall run again, and a job
# that SLURM requeues (grace time over, or by hand) is back in the queue already. bash runs the trap when the command
# has ended: until then the ranks save. Every start that exits with 75 has saved something of its own, and one that
# reaches its time limit without gets SIGTERM: a job that makes no progress is not started for ever.
set -euo pipefail
ended=
trap 'ended=yes' TERM
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }
code=0
"$@" || code=$?
if [ -z "$ended" ] && { [ $code = 75 ] || { [ $code != 0 ] && preempted; }; }; then
    scontrol requeue "$SLURM_JOB_ID" || true # refused if submitted with --no-requeue
fi
exit $code
