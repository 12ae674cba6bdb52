#!/bin/bash
# One run on the GPUs of 1 to N nodes, under SLURM. Submit it from the repository:
#
#   sbatch launch/slurm.sh configs/tutorial.yaml data.name=mnist checkpoint.every=500
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh data.name=mnist checkpoint.every=500 name=mine
#
# The arguments are those of vae_dist/train.py. The run is called slurm-<job id>, unless name=... is given.
#
# The job is requeued before its time limit, and when it is preempted or loses a node. It keeps its id, so the run keeps
# its name and resumes. Before the time limit, and at a preemption with a grace time, the run saves first. If a node is
# lost, it resumes from its newest checkpoint, so let checkpoint.every be as many steps as you can afford to repeat.
#
# runs/ and data/ must be on a file system that all nodes share. If nodes have no internet, run one step on a node that
# has it (train.steps=1), to download the images. Set data.name=mnist, or embedded digits may take their place.
#
#   PYTHON               the environment's Python; default .venv/bin/python
#   PROCESSES_PER_NODE   default one per GPU; give a number for nodes without GPUs (sbatch --gpus-per-node=0)

#SBATCH --job-name=vae_dist
#SBATCH --nodes=2
# One task per node, the launcher; it starts the processes and divides these GPUs and cores among them.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
# USR1 reaches this script (B:) that many seconds before the time limit: enough for the processes to save and end.
#SBATCH --signal=B:USR1@120
# After a preemption or a lost node, SLURM requeues the job itself.
#SBATCH --requeue
# A requeued job appends to the same file.
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append

set -uo pipefail

if [[ ! -f vae_dist/train.py ]]; then
    echo "launch/slurm.sh: submit this from the repository; there is no vae_dist/train.py in $PWD" >&2
    exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # one per job, below the ephemeral ports

# Single quotes: only the task knows its node's number, so this shell must not expand $SLURM_NODEID.
# shellcheck disable=SC2016
launch='exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'

# torch 2.10 and 2.11 have neither this setting nor an option for it: their torchrun waits 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60

step=
stopping=
trap 'stopping=yes; again=yes; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null' USR1

# srun does not inherit sbatch's --cpus-per-task. A failed node ends the others, which would wait for it.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c "$launch" "${PYTHON:-.venv/bin/python}" \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-backend=static \
    --rdzv-endpoint="${nodes[0]}:$port" \
    --rdzv-id="slurm-$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    vae_dist/train.py "name=slurm-$SLURM_JOB_ID" "$@" &
step=$!
[[ -z $stopping ]] || kill -USR1 "$step" 2>/dev/null

# A signal ends `wait` early, so that the trap runs at once; then wait again for the status.
again=yes
while [[ -n $again ]]; do
    again=
    wait "$step"
    status=$?
done

if [[ -n $stopping && $status -ne 0 ]]; then # 0: it finished before the signal arrived
    echo "launch/slurm.sh: stopped before the time limit; requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
