#!/bin/bash
# One run on the GPUs of 1 to N nodes, under SLURM. Submit it from the repository:
#
#   sbatch launch/slurm.sh configs/tutorial.yaml data.name=mnist checkpoint.every=500
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh data.name=mnist checkpoint.every=500 name=mine
#
# The arguments are those of vae_dist/train.py. The run is called slurm-<job id>, unless name=... says otherwise.
#
# The job goes back into the queue before its time limit, and when it is preempted or loses a node. It keeps its id, so
# the run keeps its name and goes on. Before its time limit and at a preemption with a grace time the run saves first;
# where a node is lost it goes on from its newest checkpoint, so choose checkpoint.every for as many steps as you can
# bear to repeat.
#
# runs/ and data/ are on a file system that all nodes share. Nodes without internet: start a run of one step on a node
# that has it (train.steps=1), then the images are there. Say data.name=mnist, or embedded digits may take its place.
#
#   PYTHON               the environment's Python; .venv/bin/python where it is not set
#   PROCESSES_PER_NODE   one per GPU where it is not set; a number for nodes without GPUs (sbatch --gpus-per-node=0)

#SBATCH --job-name=vae_dist
#SBATCH --nodes=2
# One task a node, the launcher; it starts the processes and shares these GPUs and cores among them.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
# USR1 comes to this script (B:) so many seconds before the time limit. That has to be enough for the processes to end.
#SBATCH --signal=B:USR1@120
# Preemption and lost nodes: SLURM puts the job back by itself.
#SBATCH --requeue
# A job that was put back writes on in the same file.
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append

set -uo pipefail

if [[ ! -f vae_dist/train.py ]]; then
    echo "launch/slurm.sh: submit this from the repository; there is no vae_dist/train.py in $PWD" >&2
    exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # its own for every job, below those that systems give away

# Only a task knows its node's number, so the quotes are single ones: this shell leaves $SLURM_NODEID alone.
# shellcheck disable=SC2016
launch='exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'

step=
stopping=
trap 'stopping=yes; again=yes; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null' USR1

# srun forgets sbatch's --cpus-per-task. A node that fails ends the others, which would wait for it.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c "$launch" "${PYTHON:-.venv/bin/python}" \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-backend=static \
    --rdzv-endpoint="${nodes[0]}:$port" \
    --rdzv-id="slurm-$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout=60 \
    vae_dist/train.py "name=slurm-$SLURM_JOB_ID" "$@" &
step=$!
[[ -z $stopping ]] || kill -USR1 "$step" 2>/dev/null

# A signal ends `wait` early, so that the trap is run at once. Then the status is still to come.
again=yes
while [[ -n $again ]]; do
    again=
    wait "$step"
    status=$?
done

if [[ -n $stopping && $status -ne 0 ]]; then # with 0 it was done before the signal reached it
    echo "launch/slurm.sh: stopped before the time limit; job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
