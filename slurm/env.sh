# shellcheck shell=bash disable=SC2034,SC2209 # set for the scripts; `env` is a word here, not a command to run
# What the scripts in this folder have to know about this cluster, and all they know: each sources it before anything
# else. Change it freely. (`crystal submit` does not read it: it has profiles instead, configs/clusters/*.yaml.)
# $CRYSTAL_HOME is the checkout when this begins.

# --- Modules. The host needs a Python of 3.11 or newer, and whatever its torch was built against.
# module purge
# module load cuda/12.4

# --- Python, with crystal_hpc's dependencies: CRYSTAL_PYTHON if you set it, else the checkout's .venv (`make demo`
# makes it), else the first on PATH, such as that of a virtual environment activated here:
# . /shared/venvs/crystal/bin/activate
if [ -z "$CRYSTAL_PYTHON" ]; then
    if [ -x "$CRYSTAL_HOME/.venv/bin/python" ]; then
        CRYSTAL_PYTHON=$CRYSTAL_HOME/.venv/bin/python
    else
        CRYSTAL_PYTHON=python3
    fi
fi
export PYTHONPATH=$CRYSTAL_HOME${PYTHONPATH:+:$PYTHONPATH} # the code is this checkout's

# --- Network: the interface through which nodes reach each other (`ip addr`), and what else your fabric wants.
# export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# --- Threads of each rank: as many as the cores that it was given with --cpus-per-task.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# --- Training data on the nodes' own disks: `whole` copies the stores of the run to every node before it trains, `slice`
# prepares the rows of the next steps while it trains. CRYSTAL_MPI: one of `srun --mpi=list`; pmi2 if not set.
# export CRYSTAL_STAGING=whole CRYSTAL_SCRATCH=/scratch/$USER

# --- From here on only containers need a change.
# Signals are held back from the exec of a rank until its handlers stand; older coreutils cannot.
CRYSTAL_SHIELD='env --block-signal=TERM,USR2'
$CRYSTAL_SHIELD true 2>/dev/null || CRYSTAL_SHIELD=env

if [ -n "$SLURM_CPUS_PER_TASK" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it over from sbatch
fi

# More options for the srun of the ranks, and the words that start a rank's Python.
CRYSTAL_SRUN=()
# shellcheck disable=SC2206 # the shield is words
CRYSTAL_RANK=($CRYSTAL_SHIELD "$CRYSTAL_PYTHON")

# --- Ranks in a container; the steps before and after them stay on the host, where Slurm's commands are. What it sees
# must include the checkout, the runs and the stores, under the same paths.
# Enroot/Pyxis:
# CRYSTAL_SRUN=(--container-image=/shared/crystal.sqsh --container-mounts="$CRYSTAL_HOME:$CRYSTAL_HOME,/shared:/shared")
# CRYSTAL_RANK=($CRYSTAL_SHIELD python3)
# Apptainer:
# CRYSTAL_RANK=(apptainer exec --nv --bind "$CRYSTAL_HOME" --bind /shared /shared/crystal.sif $CRYSTAL_SHIELD python3)
