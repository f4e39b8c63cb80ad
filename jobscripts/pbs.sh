#!/bin/bash
# Train on several nodes under PBS (OpenPBS, PBS Professional).
#
#   qsub jobscripts/pbs.sh
#   qsub -l select=8:ncpus=64:mpiprocs=4 \
#       -v OUT=run-7,STEPS=5000,OPTIONS="--stage 3 --dtype bfloat16" jobscripts/pbs.sh
#
# PBS gives a job no arguments: what `zerompi train` gets beside the settings below stands in
# OPTIONS. Options of qsub on the command line win over the lines below.
#
# Before the time is over, or when it is told to (qsig -s USR1, SIGTERM), the job saves a checkpoint
# and ends with status 75; the same qsub again goes on from there. RESUBMIT does so by itself.

#PBS -N zerompi
#PBS -l select=2:ncpus=16:mpiprocs=4
#PBS -l place=scatter
#PBS -l walltime=04:00:00
#PBS -j oe
#PBS -r y
# On nodes with GPUs, one rank per GPU, for instance:
##PBS -l select=2:ncpus=64:ngpus=4:mpiprocs=4

set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"

# -- settings ------------------------------------------------------------------------------------

OUT=${OUT:-zerompi-out}           # directory of metrics and checkpoints; on a shared file system
STEPS=${STEPS:-}                  # steps of the whole run; empty: the default of zerompi train
SAVE_EVERY=${SAVE_EVERY:-200}     # steps between checkpoints
OPTIONS=${OPTIONS:-}              # more options of zerompi train
ZEROMPI=${ZEROMPI:-zerompi}       # the command; or "python -m zerompi"
VENV=${VENV:-}                    # virtual environment with zerompi; empty: what is active
MODULES=${MODULES:-}              # modules to load, for instance "mpich cray-python"
MPIEXEC=${MPIEXEC:-mpiexec}       # the launcher of the MPI library that mpi4py uses
MPIEXEC_OPTIONS=${MPIEXEC_OPTIONS:-}    # more options for it
CPU_BIND=${CPU_BIND:-core}        # binding of each rank to its own cores; none: no binding
RESUBMIT=${RESUBMIT:-}            # command that queues the job again when its time was over

# -- environment ---------------------------------------------------------------------------------

for module in $MODULES; do
    module load "$module"
done
if [ -n "$VENV" ]; then
    # shellcheck source=/dev/null
    . "$VENV/bin/activate"
fi

# The node file has one line per rank (mpiprocs); ranks of a node stand side by side.
ranks=$(wc -l < "$PBS_NODEFILE")
nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
ranks_per_node=$((ranks / nodes))

# Threads of each rank: its cores. PBS sets NCPUS (and OMP_NUM_THREADS) to the cores of the node's
# chunk.
cpus_per_rank=$((${NCPUS:-$ranks_per_node} / ranks_per_node))
if [ "$cpus_per_rank" -lt 1 ]; then
    cpus_per_rank=1
fi
export OMP_NUM_THREADS=$cpus_per_rank

# When the time of the job is over: zerompi saves a checkpoint before that.
if [ -z "${ZEROMPI_END_TIME:-}" ] && command -v qstat > /dev/null; then
    walltime=$(qstat -f "${PBS_JOBID:-}" 2> /dev/null | sed -n 's/.*Resource_List.walltime = //p')
    if [[ $walltime =~ ^([0-9]+):([0-9]+):([0-9]+)$ ]]; then
        seconds=$((10#${BASH_REMATCH[1]} * 3600 + 10#${BASH_REMATCH[2]} * 60 + 10#${BASH_REMATCH[3]}))
        ZEROMPI_END_TIME=$(($(date +%s) + seconds))
        export ZEROMPI_END_TIME
    fi
fi

# MPICH, Intel MPI and Open MPI name the same things differently.
read -r -a more <<< "$MPIEXEC_OPTIONS"
if "$MPIEXEC" --version 2>&1 | grep -qi -e "open mpi" -e prte; then
    launch=("$MPIEXEC" -n "$ranks" --hostfile "$PBS_NODEFILE")
    if [ "$CPU_BIND" = none ]; then
        launch+=(--map-by "ppr:$ranks_per_node:node" --bind-to none)
    else
        launch+=(--map-by "ppr:$ranks_per_node:node:pe=$cpus_per_rank" --bind-to "$CPU_BIND")
    fi
else
    launch=("$MPIEXEC" -n "$ranks" -ppn "$ranks_per_node" -f "$PBS_NODEFILE")
    if [ "$CPU_BIND" = none ]; then
        launch+=(-bind-to none)
    else
        launch+=(-bind-to "$CPU_BIND:$cpus_per_rank")
    fi
fi
launch+=("${more[@]}")

# -- run -----------------------------------------------------------------------------------------

read -r -a zerompi <<< "$ZEROMPI"
read -r -a extra <<< "$OPTIONS"
# From the latest checkpoint; from the start if there is none.
options=(--out "$OUT" --save-every "$SAVE_EVERY" --resume auto)
if [ -n "$STEPS" ]; then
    options+=(--steps "$STEPS")
fi
options+=("${extra[@]}")

echo "job ${PBS_JOBID:-}: $nodes nodes, $ranks_per_node ranks each, $OMP_NUM_THREADS threads each:" \
    "zerompi train ${options[*]}"

# In the background, so that bash can hand the signal on while it waits.
"${launch[@]}" "${zerompi[@]}" train "${options[@]}" &
training=$!

# The launcher hands SIGUSR1 on to every rank; zerompi saves a checkpoint and ends with status 75.
# After SIGTERM the job is not queued again: it may come from qdel.
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
if [ "$status" = 75 ] && [ "$cancelled" = 0 ] && [ -n "$RESUBMIT" ]; then
    eval "$RESUBMIT"
fi
exit "$status"
