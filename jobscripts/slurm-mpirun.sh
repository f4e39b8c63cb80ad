#!/bin/bash
# Train on several nodes under Slurm, with the mpiexec (mpirun) of the MPI library as the launcher:
# where srun has no plugin for that library.
#
#   sbatch jobscripts/slurm-mpirun.sh
#   OUT=run-7 STEPS=5000 sbatch --nodes=8 jobscripts/slurm-mpirun.sh --stage 3 --dtype bfloat16
#
# Arguments after the script's name go to `zerompi train`. Options of sbatch on the command line win
# over the lines below. Every setting of the next section can be given in the environment.
#
# Before the time is over the job saves a checkpoint, is queued again, and goes on from there: zerompi
# reads the end of the time from Slurm, which also sends SIGUSR1 two minutes before. A job that is
# pre-empted or cancelled (SIGTERM) saves a checkpoint, too.

#SBATCH --job-name=zerompi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=zerompi-%j.log
# On nodes with GPUs, one rank per GPU, for instance:
##SBATCH --gpus-per-node=4

set -euo pipefail

# -- settings ------------------------------------------------------------------------------------

OUT=${OUT:-zerompi-out}           # directory of metrics and checkpoints; on a shared file system
STEPS=${STEPS:-}                  # steps of the whole run; empty: the default of zerompi train
SAVE_EVERY=${SAVE_EVERY:-200}     # steps between checkpoints
ZEROMPI=${ZEROMPI:-zerompi}       # the command; or "python -m zerompi"
VENV=${VENV:-}                    # virtual environment with zerompi; empty: what is active
MODULES=${MODULES:-}              # modules to load, for instance "mpich cray-python"
MPIEXEC=${MPIEXEC:-mpiexec}       # the launcher of the MPI library that mpi4py uses
MPIEXEC_OPTIONS=${MPIEXEC_OPTIONS:-}    # more options for it
CPU_BIND=${CPU_BIND:-core}        # binding of each rank to its own cores; none: no binding
REQUEUE=${REQUEUE:-1}             # 1: queue the job again when its time was over before its end

# -- environment ---------------------------------------------------------------------------------

for module in $MODULES; do
    module load "$module"
done
if [ -n "$VENV" ]; then
    # shellcheck source=/dev/null
    . "$VENV/bin/activate"
fi

# One rank per GPU where there are GPUs; else as many as sbatch was asked for.
ranks_per_node=${SLURM_NTASKS_PER_NODE:-1}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "$SLURM_GPUS_ON_NODE" -gt 0 ]; then
    ranks_per_node=$SLURM_GPUS_ON_NODE
fi

# Threads of each rank: its cores.
cores_per_node=${SLURM_CPUS_ON_NODE:-1}
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((cores_per_node / ranks_per_node))}
if [ "$cpus_per_task" -lt 1 ]; then
    cpus_per_task=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}

# MPICH, Intel MPI and Open MPI name the same things differently.
ranks=$((ranks_per_node * SLURM_JOB_NUM_NODES))
read -r -a more <<< "$MPIEXEC_OPTIONS"
if "$MPIEXEC" --version 2>&1 | grep -qi -e "open mpi" -e prte; then
    launch=("$MPIEXEC" -n "$ranks")
    if [ "$CPU_BIND" = none ]; then
        launch+=(--map-by "ppr:$ranks_per_node:node" --bind-to none)
    else
        launch+=(--map-by "ppr:$ranks_per_node:node:pe=$cpus_per_task" --bind-to "$CPU_BIND")
    fi
else
    launch=("$MPIEXEC" -n "$ranks" -ppn "$ranks_per_node")
    if [ "$CPU_BIND" = none ]; then
        launch+=(-bind-to none)
    else
        launch+=(-bind-to "$CPU_BIND:$cpus_per_task")
    fi
fi
launch+=("${more[@]}")

# -- run -----------------------------------------------------------------------------------------

# When the time of the job is over: zerompi saves a checkpoint before that. Older versions of Slurm do
# not set it.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' || true)
    SLURM_JOB_END_TIME=$(date --date="$end" +%s 2> /dev/null || true)
    export SLURM_JOB_END_TIME
fi

read -r -a zerompi <<< "$ZEROMPI"
# From the latest checkpoint; from the start if there is none.
options=(--out "$OUT" --save-every "$SAVE_EVERY" --resume auto)
if [ -n "$STEPS" ]; then
    options+=(--steps "$STEPS")
fi

echo "job $SLURM_JOB_ID: $SLURM_JOB_NUM_NODES nodes, $ranks_per_node ranks each," \
    "$OMP_NUM_THREADS threads each: zerompi train ${options[*]} $*"

# In the background, so that bash can hand the signal on while it waits.
"${launch[@]}" "${zerompi[@]}" train "${options[@]}" "$@" &
training=$!

# The launcher hands SIGUSR1 on to every rank; zerompi saves a checkpoint and ends with status 75.
# After SIGTERM it is not for us to queue the job: scancel does not want it, pre-emption does it.
cancelled=0
trap 'kill -USR1 "$training"' USR1
trap 'cancelled=1; kill -USR1 "$training"' TERM

# wait returns at a signal, too: the training has ended only when it is gone.
status=0
wait "$training" || status=$?
while kill -0 "$training" 2> /dev/null; do
    status=0
    wait "$training" || status=$?
done
if [ "$status" = 75 ] && [ "$cancelled" = 0 ] && [ "$REQUEUE" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
